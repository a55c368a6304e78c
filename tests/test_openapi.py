"""The API's description is valid OpenAPI 3.1, and says what the handler's own tables say, and the reference page."""

import json
import re
import tomllib
from typing import Any

import jsonschema_rs
import pytest
import schemathesis

from handler.errors import ClientError, ServiceError
from handler.gradients.methods import METHODS, PARAMETERS, Parameter
from handler.images.arrays import NUMPY_TYPES
from handler.images.file_decoder import ACCEPTED_FORMATS
from handler.limits import MAX_ID_CHARACTERS, MAX_IMAGES, MAX_PIXELS
from handler.protocol.describe import describe_service
from handler.protocol.kserve import BYTES, EXPLANATION_OUTPUTS, PREDICTION_OUTPUTS
from handler.protocol.options import HEADER_PREFIX, IMAGE_FIELDS, OPTIONS, read_value
from handler.protocol.request import ReplyFormat
from scripts.paths import ROOT
from tests.openapi import DOCUMENT, DOCUMENT_FILE, example_replies, resolve, schema_at, validator_of

CLASS_COUNT = 10
DESCRIPTION = describe_service(
    {"name": "digits", "version": "1.0", "weights_sha256": "0" * 64}, 28, 28, [str(index) for index in range(CLASS_COUNT)]
)
REFERENCE = (ROOT / "handler" / "README.md").read_text().partition("\n## What the numbers mean")[0]
HEADERS = {parameter["name"]: parameter for parameter in DOCUMENT["components"]["parameters"].values()}
REPLY_HEADERS = resolve(DOCUMENT["components"]["responses"]["Answer"])["headers"]


def schema_named(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = schema_at(f"#/components/schemas/{name}")
    return schema


def option_schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = resolve(schema_named("Options")["properties"][name])
    return schema


def error_types() -> dict[str, int]:
    """Types and statuses of all errors that the code can answer with."""

    def below(parent: type[ServiceError]) -> list[type[ServiceError]]:
        return [found for child in parent.__subclasses__() for found in (child, *below(child))]

    return {error.__name__: error.status for error in below(ServiceError) if error is not ClientError}


def documented_error_types() -> dict[str, int]:
    found: dict[str, int] = {}
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if name.endswith("Error") and name not in ("Error", "FrontendError"):
            error = schema["properties"]["error"]["properties"]
            found |= dict.fromkeys(error["type"]["enum"], error["code"]["const"])
    return found


def test_document_is_valid_openapi() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    schemathesis.openapi.from_path(DOCUMENT_FILE).validate()


@pytest.mark.parametrize("name", DOCUMENT["components"]["schemas"])
def test_schema_is_valid_json_schema(name: str) -> None:
    jsonschema_rs.meta.validate(schema_named(name))
    validator_of(f"#/components/schemas/{name}")  # follows its references


def test_version_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (DOCUMENT["info"]["title"], DOCUMENT["info"]["version"]) == (project["name"], project["version"])


# --- options


def test_every_option_is_a_field_and_a_header() -> None:
    assert list(schema_named("Options")["properties"]) == list(OPTIONS)
    assert list(schema_named("Form")["properties"]) == [*IMAGE_FIELDS, *OPTIONS]
    assert [name.lower() for name in HEADERS] == [HEADER_PREFIX + name.replace("_", "-") for name in OPTIONS]
    for path in DOCUMENT["paths"].values():
        if "post" in path:
            assert [resolve(parameter) for parameter in path["parameters"]] == list(HEADERS.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_option_has_the_default_and_the_values_of_the_code(name: str) -> None:
    schema, described = option_schema(name), DESCRIPTION["options"][name]
    assert schema["default"] == described["default"]
    if "enum" in schema:
        assert schema["enum"] == described["accepted"]
    elif schema.get("type") == "boolean":
        assert described["accepted"] == [True, False]
    elif "minimum" in schema:
        kind = {"integer": "an integer", "number": "a number"}[schema["type"]]
        assert described["accepted"] == [f"{kind} from {schema['minimum']} to {schema['maximum']}"]
    else:
        assert name == "target"


CANDIDATES: list[Any] = [
    *(True, False, None, "", "true", "yes", "all", "predicted", "auto", "none", "nested", "base64", "canonical", "image"),
    *("gradient", "magic", "signed", "absolute", "RdBu_r", "rdbu_r", "viridis", "map", "overlay", "side_by_side", "sent"),
    *("smoothgrad", "integrated_gradients", "SmoothGrad", "mean", "squared", "variance", "zero", "mnist"),
    *(-1, 0, 1, 9, 10, 27, 28, 49, 50, 99.5, 100, 101, 300, 301, 500, 501, 1024, 1025, 2**32 - 1, 2**32, 0.15, 1.01, 3.5),
    *([], [3], [3, "predicted"], [3, 10], ["all"], [0] * 10, [0] * 11, {}),
]


def accepts(name: str, value: Any) -> bool:
    try:
        read_value(name, value, CLASS_COUNT)
    except ClientError:
        return False
    return True


@pytest.mark.parametrize("name", OPTIONS)
def test_document_and_code_accept_the_same_values(name: str) -> None:
    """Left out is what the code takes beside: flags as text, and one scalar in a list."""
    schema = validator_of(f"#/components/schemas/Options/properties/{name}")
    candidates = [value for value in CANDIDATES if not (name in ("explain", "pixels") and isinstance(value, str))]
    if name != "target":
        candidates = [value for value in candidates if not (isinstance(value, list) and len(value) == 1)]
    for value in candidates:
        assert schema.is_valid(value) == accepts(name, value), value


@pytest.mark.parametrize(
    "text", ["3", "3,9", "all", "predicted", "3,predicted", "10", "-1", "", "3,", "all,3", "3.5", "0" + ",1" * 10]
)
def test_document_and_code_accept_the_same_targets_in_a_header(text: str) -> None:
    assert validator_of("#/components/schemas/TargetText").is_valid(text) == accepts("target", text)


# --- methods


def test_methods_are_those_of_the_code() -> None:
    lines = schema_named("Method")["description"].replace("\n  ", " ").splitlines()
    documented = dict(line.removeprefix("- `").split("`: ") for line in lines if line.startswith("- "))
    described = {
        name: method.description + (f" ({', '.join(f'`{one}`' for one in method.parameters())})" if method.parameters() else "")
        for name, method in METHODS.items()
    }
    assert documented == described
    assert schema_named("Output")["enum"] == list(dict.fromkeys(method.output for method in METHODS.values()))


def test_parameters_are_those_of_the_code() -> None:
    assert list(schema_named("MethodParameters")["properties"]) == list(PARAMETERS)
    assert PARAMETERS.keys() <= schema_named("InferReply")["properties"]["parameters"]["properties"].keys()
    for name, parameter in PARAMETERS.items():
        methods = [method.name for method in METHODS.values() if name in method.parameters()]
        owners = ", ".join(f"`{method}`" for method in methods)
        assert option_schema(name)["description"] == f"Of {owners}: {parameter.description}"


@pytest.mark.parametrize("name", METHODS)
def test_reply_has_the_parameters_of_its_method(name: str) -> None:
    method = METHODS[name]()
    explanation: dict[str, Any] = {
        **{
            "method": name,
            "output": method.output,
            "unit": method.unit,
            "target": 3,
            "target_source": "request",
            "space": "canonical",
        },
        **{"with_respect_to": "pixel intensity in [0, 1]", "shape": [28, 28], "dtype": "float32", "encoding": "base64"},
        "saliency": "",
    }
    explanation |= {"parameters": method.values} if method.values else {}
    explanation |= {"completeness_gap": 0.25} if method.has_convergence_delta else {}
    schema = validator_of("#/components/schemas/Explanation")
    schema.validate(explanation)
    for key in ("parameters", "completeness_gap"):
        without = {other: value for other, value in explanation.items() if other != key}
        assert schema.is_valid(without) == (key not in explanation)
    if not method.values:
        assert not schema.is_valid(explanation | {"parameters": {"samples": 25}})
    if not method.has_convergence_delta:
        assert not schema.is_valid(explanation | {"completeness_gap": 0.25})


# --- limits, formats, tensors


def test_limits_are_those_of_the_code() -> None:
    assert DOCUMENT["x-limits"] == DESCRIPTION["limits"]
    instances = schema_named("InstancesBody")["properties"]["instances"]
    replies = schema_named("PredictionList")["properties"]
    assert {instances["maxItems"], replies["predictions"]["maxItems"], replies["explanations"]["maxItems"]} == {MAX_IMAGES}
    assert schema_named("InferBody")["properties"]["id"]["maxLength"] == MAX_ID_CHARACTERS
    assert f"{MAX_PIXELS:,} pixels" in schema_named("ImageFile")["description"]


def test_image_formats_are_those_of_the_code() -> None:
    for text in (DOCUMENT["info"]["description"], schema_named("ImageFile")["description"]):
        assert all(image_format in text.upper() for image_format in ACCEPTED_FORMATS)
    assert schema_named("Description")["properties"]["image_formats"]["items"]["enum"] == list(ACCEPTED_FORMATS)


def test_reply_formats_are_those_of_the_code() -> None:
    assert schema_named("Description")["properties"]["reply_formats"]["items"]["enum"] == list(ReplyFormat)
    for path in DOCUMENT["paths"].values():
        if "post" in path:
            assert list(resolve(path["post"]["responses"]["200"])["content"]) == list(ReplyFormat)


def test_tensors_are_those_of_the_code() -> None:
    assert schema_named("OutputName")["enum"] == [*PREDICTION_OUTPUTS, *EXPLANATION_OUTPUTS]
    assert schema_named("Datatype")["enum"] == [BYTES, *NUMPY_TYPES]
    assert schema_named("BytesTensor")["properties"]["datatype"]["const"] == BYTES
    assert schema_named("NumberTensor")["properties"]["datatype"]["enum"] == list(NUMPY_TYPES)


def test_description_of_the_service_has_its_schema() -> None:
    validator_of("#/components/schemas/Description").validate(DESCRIPTION)


# --- errors


def test_error_types_and_statuses_are_those_of_the_code() -> None:
    assert documented_error_types() == error_types()


def test_every_operation_answers_with_every_status_of_the_code() -> None:
    statuses = {str(status) for status in error_types().values()}
    for path in DOCUMENT["paths"].values():
        if "post" in path:
            assert statuses <= path["post"]["responses"].keys()


# --- examples of replies


@pytest.mark.parametrize(("schema", "example"), example_replies())
def test_example_reply_has_its_schema(schema: str, example: Any) -> None:
    validator_of(schema).validate(example)


def test_every_status_has_an_example_reply() -> None:
    for response in DOCUMENT["components"]["responses"].values():
        assert response["content"]["application/json"]["examples"]


# --- the reference page, handler/README.md


def rows_in(text: str, columns: int) -> list[list[str]]:
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]


def generated(name: str) -> str:
    """The part of the page between the marks of this name."""
    return REFERENCE.partition(f"<!-- generated: {name} ")[2].partition("<!-- /generated")[0]


def option_rows() -> dict[str, list[str]]:
    """Header, accepted values, default and description of each option, by its name."""
    rows = rows_in(generated("option_rows"), 5) + [row[1:] for row in rows_in(generated("parameter_rows"), 6)]
    return {row[0].strip("`"): row[1:] for row in rows if row[0].startswith("`")}


def test_reference_has_the_same_options_and_headers() -> None:
    assert set(option_rows()) == set(OPTIONS)
    assert {header for header, *_ in option_rows().values()} == {f"`{header}`" for header in HEADERS}
    assert set(re.findall(r"`(X-[A-Z][A-Za-z-]+)", REFERENCE)) == set(HEADERS) | set(REPLY_HEADERS)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_has_the_same_values_and_default(name: str) -> None:
    _, accepted, default, _ = option_rows()[name]
    schema = option_schema(name)
    if "enum" in schema:
        assert re.findall(r"`(\w+)`", accepted) == schema["enum"]
    elif "minimum" in schema:
        assert accepted.endswith(f" from {schema['minimum']} to {schema['maximum']}")
    assert default.strip("`") == json.dumps(schema["default"]).strip('"')


def test_reference_has_the_same_methods() -> None:
    described = {row[0].strip("`"): row[-1] for row in rows_in(generated("method_rows"), 4) if row[0].startswith("`")}
    assert described == {name: method.description for name, method in METHODS.items()}
    rows = {row[0].strip("`"): row[1:] for row in rows_in(REFERENCE, 5) if row[0].strip("`") in METHODS}
    assert list(rows) == list(METHODS)
    for name, (output, parameters, image_space, _) in rows.items():
        method = METHODS[name]()
        assert output == f"`{method.output}`"
        assert re.findall(r"`(\w+)`", parameters) == list(method.parameters())
        assert (image_space != "no") == method.has_image_space


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS.items())
def test_reference_has_the_same_parameters(name: str, parameter: Parameter) -> None:
    _, accepted, default, description = option_rows()[name]
    assert description == parameter.description
    assert default == f"`{parameter.default}`"
    if parameter.highest:
        assert accepted.endswith(f" from {parameter.lowest} to {parameter.highest}")


def test_reference_has_the_same_errors() -> None:
    rows = [row for row in rows_in(REFERENCE, 3) if row[0].isdigit()]
    found = {name: int(status) for status, names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    assert found == documented_error_types()


def test_reference_has_the_same_routes() -> None:
    found = set()
    for route, *_ in rows_in(REFERENCE, 2):
        if route.startswith(("`POST /", "`GET ")):
            first, *others = re.findall(r"`(?:POST |GET )?(?::8081)?([^`?]+)[^`]*`", route)
            found |= {first, *(re.sub(rf"{other[0]}\w+$", other, first) for other in others)}
    assert found == set(DOCUMENT["paths"])


def test_document_is_named_in_the_reference_and_the_readme() -> None:
    assert "serve_config/openapi.yaml" in REFERENCE
    assert "serve_config/openapi.yaml" in (ROOT / "README.md").read_text()
