"""What the documents say of options and methods is what the handler's tables say."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from handler.gradients import methods
from handler.gradients.methods import METHODS, SamplingMethod
from handler.protocol.options import OPTIONS, Option, Range
from scripts.packaging import api_tables
from scripts.packaging.api_tables import OPENAPI_FILE, REFERENCE_FILE, UnknownPart, fill_in, main


@pytest.mark.parametrize("file", [OPENAPI_FILE, REFERENCE_FILE], ids=lambda file: file.name)
def test_committed_document_says_what_the_tables_say(file: Path) -> None:
    document = file.read_text()
    assert fill_in(document) == document
    assert "generated: " in document
    assert main(["--check"], [file]) == 0


def test_a_part_that_differs_is_found_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "reference.md"
    file.write_text("# Title\n\n<!-- generated: option_rows -->\nold\n<!-- /generated -->\n\nrest\n")
    assert main(["--check"], [file]) == 1
    assert "reference.md is not what the handler's tables say" in capsys.readouterr().err
    assert main([], [file]) == 0
    written = file.read_text()
    assert written.startswith("# Title\n\n<!-- generated: option_rows -->\n| option |")
    assert written.endswith("\n<!-- /generated -->\n\nrest\n")
    assert "old" not in written
    assert written.count("| `X-Saliency-Target` |") == 1
    assert main(["--check"], [file]) == 0


def test_a_part_that_no_table_gives_is_an_error() -> None:
    with pytest.raises(UnknownPart, match="got nonsense"):
        fill_in("# generated: nonsense\n# /generated\n")


@dataclass(frozen=True, slots=True)
class Occlusion(SamplingMethod):
    """As somebody would add it: one class, and its name in the table."""

    name: ClassVar[str] = "occlusion"
    description: ClassVar[str] = "what covering a part of the image costs the score"
    patch: int = field(default=4, metadata={"description": "side of the part, in pixels", "lowest": 1, "highest": 14})


def test_a_method_is_described_by_its_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    added = {**METHODS, Occlusion.name: Occlusion}
    parameters = {**methods.PARAMETERS, **Occlusion.parameters()}
    options = {name: Option(added, one.default, one.description) if name == "method" else one for name, one in OPTIONS.items()}
    options["patch"] = Option(Range(1, 14, whole=True), 4, Occlusion.parameters()["patch"].description)
    monkeypatch.setattr(api_tables, "METHODS", added)
    monkeypatch.setattr(api_tables, "PARAMETERS", parameters)
    monkeypatch.setattr(api_tables, "OPTIONS", options)
    document = yaml.safe_load(fill_in(OPENAPI_FILE.read_text()))
    schemas = document["components"]["schemas"]
    assert "occlusion" in schemas["Method"]["enum"]
    assert "- `occlusion`: what covering a part of the image costs the score (`patch`)" in schemas["Method"]["description"]
    assert schemas["Patch"] == {
        "description": "Of `occlusion`: side of the part, in pixels",
        **{"type": "integer", "minimum": 1, "maximum": 14, "default": 4},
    }
    assert document["components"]["parameters"]["Patch"]["name"] == "X-Saliency-Patch"
    assert "patch" in schemas["MethodParameters"]["properties"]
    assert "patch" in schemas["Form"]["properties"]
