"""Reads the API's description, serve_config/openapi.yaml, for the tests that hold it against code and server."""

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import yaml

from scripts.package import ROOT

DOCUMENT_FILE = ROOT / "serve_config" / "openapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(DOCUMENT_FILE.read_text())
ADDRESS = "urn:openapi"
REGISTRY = jsonschema_rs.Registry([(ADDRESS, DOCUMENT)], draft=jsonschema_rs.Draft202012)
METHODS = ("get", "post")


def resolve(node: Any) -> Any:
    """Follow a reference inside the document, where the node is one."""
    while isinstance(node, dict) and "$ref" in node:
        node = schema_at(node["$ref"])
    return node


def schema_at(pointer: str) -> Any:
    """What a reference inside the document points to. Parts of it may be references themselves."""
    node: Any = DOCUMENT
    for part in pointer.removeprefix("#/").split("/"):
        node = resolve(node)[part.replace("~1", "/").replace("~0", "~")]
    return resolve(node)


def validator_of(pointer: str) -> jsonschema_rs.Draft202012Validator:
    """Checks values by the schema at a place of the document."""
    return jsonschema_rs.Draft202012Validator({"$ref": ADDRESS + pointer}, registry=REGISTRY)


def example_replies() -> list[tuple[str, Any]]:
    """All examples of replies: a pointer to the schema, and the example."""
    return [
        (_pointer(place, "schema"), example["value"])
        for place, content in _reply_contents()
        for example in content.get("examples", {}).values()
    ]


def _reply_contents() -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    for name, response in DOCUMENT["components"]["responses"].items():
        for media_type, content in response["content"].items():
            yield ("components", "responses", name, "content", media_type), content


def _pointer(place: tuple[str, ...], *more: str) -> str:
    return "#/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in place + more)
