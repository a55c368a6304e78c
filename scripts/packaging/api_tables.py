"""Write what follows from the handler's tables into the OpenAPI document and the API reference.

    python -m scripts.packaging.api_tables

Options and methods stand in tables of the handler. This program writes the parts of serve_config/openapi.yaml and
handler/README.md that say the same, between `generated: NAME` and `/generated`, and leaves all else as it is. With --check it
writes nothing and exits with 1 where a part is not what the tables say.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from handler.gradients.methods import METHODS, PARAMETERS
from handler.protocol.options import OPTIONS, Classes, Flag, Option, Range, accepted_values
from scripts.paths import ROOT

CLASS_COUNT = 10  # of the digits that the documents describe
OPENAPI_FILE = ROOT / "serve_config" / "openapi.yaml"
REFERENCE_FILE = ROOT / "handler" / "README.md"
PART = re.compile(
    r"^(?P<start>[ ]*(?:#|<!--) generated: (?P<name>\w+)[^\n]*\n)(?P<body>.*?)^(?P<end>[ ]*(?:#|<!--) /generated[^\n]*\n)",
    re.MULTILINE | re.DOTALL,
)


class UnknownPart(RuntimeError):
    """A document asks for a part that no table gives."""


# --- OpenAPI


def _schema_name(option: str) -> str:
    return option.title().replace("_", "")


def _reference(option: str, schema: str | None = None) -> str:
    return f'{{$ref: "#/components/schemas/{schema or _schema_name(option)}"}}'


def _quoted(text: str) -> str:
    return f'"{text}"' if re.search(r"[:`#]", text) else text


def _header_parameters() -> Iterator[str]:
    for name in OPTIONS:
        yield f"{_schema_name(name)}:"
        yield f"  name: X-Saliency-{name.replace('_', '-').title()}"
        yield "  in: header"
        yield f"  schema: {_reference(name, 'TargetText' if name == 'target' else None)}"


def _option_schemas() -> Iterator[str]:
    for name, option in OPTIONS.items():
        if name == "method":
            yield from _method_schema(option)
        elif isinstance(option.values, Classes):
            yield from _target_schemas(option)
        else:
            owners = [method.name for method in METHODS.values() if name in method.parameters()]
            prefix = f"Of `{'`, `'.join(owners)}`: " if owners else ""
            yield f"{_schema_name(name)}:"
            yield f"  description: {_quoted(prefix + option.description)}"
            yield from (f"  {line}" for line in _values_schema(option))
    yield "Options:"
    yield "  type: object"
    yield "  properties:"
    yield from (f"    {name}: {_reference(name)}" for name in OPTIONS)


def _values_schema(option: Option) -> Iterator[str]:
    match option.values:
        case Flag():
            yield "type: boolean"
        case Range(lowest, highest, whole):
            yield f"type: {'integer' if whole else 'number'}"
            yield f"minimum: {lowest}"
            yield f"maximum: {highest}"
        case _:
            yield f"enum: [{', '.join(map(str, accepted_values(option.values, CLASS_COUNT)))}]"
    yield f"default: {_shown(option.default)}"


def _shown(value: object) -> str:
    """A value as YAML and JSON write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _target_schemas(option: Option) -> Iterator[str]:
    yield from ("Class:", "  type: integer", "  minimum: 0", f"  maximum: {CLASS_COUNT - 1}")
    yield from ("ClassOrPredicted:", "  oneOf:", f"    - {_reference('class')}", "    - {const: predicted}")
    yield "Target:"
    yield f"  description: {_quoted(option.description)}. A list, even of one, gives the map another first dimension"
    yield from (f"  default: {option.default}", "  oneOf:", f"    - {_reference('class')}", "    - {enum: [predicted, all]}")
    yield f"    - {{type: array, minItems: 1, maxItems: {CLASS_COUNT}, items: {_reference('', 'ClassOrPredicted')}}}"
    yield from (
        "TargetText:",
        "  description: The same as text, a list with commas",
        "  type: string",
        f"  default: {option.default}",
    )
    one = f"(predicted|[0-{CLASS_COUNT - 1}])"
    yield f'  pattern: "^(all|{one}(,{one}){{0,{CLASS_COUNT - 1}}})$"'


def _method_schema(option: Option) -> Iterator[str]:
    yield from ("Method:", "  description: |", "    How the saliency map is made:", "")
    for method in METHODS.values():
        parameters = f" (`{'`, `'.join(method.parameters())}`)" if method.parameters() else ""
        yield f"    - `{method.name}`: {method.description}{parameters}"
    yield from ("", "    With `space` `image`, integrated gradients and `aggregate` `squared` or `variance` are refused.")
    yield from (f"  {line}" for line in _values_schema(option))


def _form_options() -> Iterator[str]:
    for name in OPTIONS:
        yield f"{name}: {_reference(name, 'TargetText' if name == 'target' else None)}"


def _method_parameters() -> Iterator[str]:
    for name in PARAMETERS:
        yield f"{name}: {_reference(name)}"


def _explanation_conditions() -> Iterator[str]:
    """What a reply holds beside the map, by its method."""
    for method in METHODS.values():
        required = ["parameters"] * bool(method.parameters()) + ["completeness_gap"] * method.has_convergence_delta
        parameters = f"{{required: [{', '.join(method.parameters())}]}}" if method.parameters() else "false"
        properties = [f"parameters: {parameters}"] + ["completeness_gap: false"] * (not method.has_convergence_delta)
        yield f"- if: {{properties: {{method: {{const: {method.name}}}}}}}"
        yield f"  then: {{required: [{', '.join(required)}], properties: {{{', '.join(properties)}}}}}"


# --- the API reference


def _option_rows() -> Iterator[str]:
    yield "| option | header | accepted | default | description |"
    yield "| --- | --- | --- | --- | --- |"
    for name, option in OPTIONS.items():
        if name not in PARAMETERS:
            yield _row(name, option)


def _row(name: str, option: Option) -> str:
    accepted = (
        f"a class from 0 to {CLASS_COUNT - 1}, `predicted`, a list of these, or `all`"
        if isinstance(option.values, Classes)
        else accepted_values(option.values, CLASS_COUNT)[0]
        if isinstance(option.values, Range)
        else ", ".join(f"`{_shown(value)}`" for value in accepted_values(option.values, CLASS_COUNT))
    )
    header = f"X-Saliency-{name.replace('_', '-').title()}"
    return f"| `{name}` | `{header}` | {accepted} | `{_shown(option.default)}` | {option.description} |"


def _method_rows() -> Iterator[str]:
    yield "| method | unit | gradients a map | description |"
    yield "| --- | --- | --- | --- |"
    for method in METHODS.values():
        yield f"| `{method.name}` | {method().unit} | {method().gradient_count} | {method.description} |"


def _parameter_rows() -> Iterator[str]:
    yield "| parameter of | option | header | accepted | default | description |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for method in METHODS.values():
        for name in method.parameters():
            yield f"| `{method.name}` {_row(name, OPTIONS[name])}"


PARTS: Mapping[str, object] = {
    "header_parameters": _header_parameters,
    "option_schemas": _option_schemas,
    "form_options": _form_options,
    "method_parameters": _method_parameters,
    "explanation_conditions": _explanation_conditions,
    "option_rows": _option_rows,
    "method_rows": _method_rows,
    "parameter_rows": _parameter_rows,
}


def fill_in(document: str) -> str:
    """Write every part that a document marks, indented as its mark is.

    Raises:
        UnknownPart: it marks one that does not exist.
    """

    def part(found: re.Match[str]) -> str:
        make = PARTS.get(found["name"])
        if not callable(make):
            raise UnknownPart(f"expected one of {', '.join(PARTS)} as a generated part, got {found['name']}")
        indent = " " * (len(found["start"]) - len(found["start"].lstrip()))
        lines = "".join(f"{indent}{line}".rstrip() + "\n" for line in make())
        return found["start"] + lines + found["end"]

    return PART.sub(part, document)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.packaging.api_tables",
        description="Write options and methods from the handler's tables into openapi.yaml and the API reference.",
        epilog="example: %(prog)s --check",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a document differs")
    return parser


def main(argv: Sequence[str] | None = None, files: Sequence[Path] = (OPENAPI_FILE, REFERENCE_FILE)) -> int:
    """Write or check. Returns the exit code: 1 where a document differs and --check was given."""
    arguments = build_parser().parse_args(argv)
    exit_code = 0
    for file in files:
        document = file.read_text()
        filled = fill_in(document)
        if filled == document:
            continue
        if arguments.check:
            print(
                f"{file.name} is not what the handler's tables say: run python -m scripts.packaging.api_tables", file=sys.stderr
            )
            exit_code = 1
        else:
            file.write_text(filled)
            print(f"wrote {file.name}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
