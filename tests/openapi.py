"""The API's description, serve_config/openapi.yaml, read for tests that compare it with the code and the server."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import requests
import yaml

from scripts.paths import ROOT, SAMPLE_IMAGE

DOCUMENT_FILE = ROOT / "serve_config" / "openapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(DOCUMENT_FILE.read_text())
ADDRESS = "urn:openapi"
REGISTRY = jsonschema_rs.Registry([(ADDRESS, DOCUMENT)], draft=jsonschema_rs.Draft202012)


def resolve(node: Any) -> Any:
    """Follow a reference inside the document, where the node is one."""
    while isinstance(node, dict) and "$ref" in node:
        node = schema_at(node["$ref"])
    return node


def schema_at(pointer: str) -> Any:
    """Find what a reference inside the document points to. Parts of it may be references themselves."""
    node: Any = DOCUMENT
    for part in pointer.removeprefix("#/").split("/"):
        node = resolve(node)[part.replace("~1", "/").replace("~0", "~")]
    return resolve(node)


def validator_of(pointer: str) -> jsonschema_rs.Draft202012Validator:
    """Make a validator from the schema at a place of the document."""
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


@dataclass(frozen=True, slots=True)
class ExampleRequest:
    """One example of the document, for one of the routes that take it."""

    path: str
    media_type: str
    content: bytes | dict[str, Any]  # a file, or fields

    def arguments(self) -> dict[str, Any]:
        """Arguments of `requests.request`. A form's image is a file, which the document cannot hold."""
        if isinstance(self.content, bytes):
            return {"data": self.content, "headers": {"Content-Type": self.media_type.replace("image/*", "image/png")}}
        if self.media_type == "multipart/form-data":
            return {"data": self.content, "files": {"data": SAMPLE_IMAGE.read_bytes()}}
        return {"json": self.content}


def example_requests() -> Iterator[tuple[str, ExampleRequest]]:
    """All examples of requests, each for every route that takes it, with a name."""
    for path, item in DOCUMENT["paths"].items():
        if "post" in item:
            for media_type, content in resolve(item["post"]["requestBody"])["content"].items():
                for name, example in content["examples"].items():
                    sent = example["value"] if "value" in example else (ROOT / example["x-file"]).read_bytes()
                    yield f"{path} {media_type} {name}", ExampleRequest(path, media_type, sent)


def validate_reply(path: str, method: str, reply: requests.Response) -> None:
    """Validate status, media type, headers and body of a reply against the document.

    Raises:
        AssertionError, jsonschema_rs.ValidationError: the document does not allow this reply.
    """
    response = DOCUMENT["paths"][path][method]["responses"].get(str(reply.status_code))
    assert response is not None, f"{reply.status_code} is not in the document: {reply.text}"
    response = resolve(response)
    media_type = reply.headers["Content-Type"].partition(";")[0]
    assert media_type in response["content"]
    if media_type == "application/json":
        jsonschema_rs.Draft202012Validator(
            _inside_document(response["content"][media_type]["schema"]), registry=REGISTRY
        ).validate(reply.json())
    for name, header in response.get("headers", {}).items():
        if name in reply.headers:
            schema = resolve(header)["schema"]
            value = reply.headers[name]
            number = float(value) if resolve(schema).get("type") == "number" else value
            jsonschema_rs.Draft202012Validator(_inside_document(schema), registry=REGISTRY).validate(number)


def _inside_document(schema: Any) -> Any:
    """Make a schema's references absolute."""
    if isinstance(schema, dict):
        return {key: ADDRESS + value if key == "$ref" else _inside_document(value) for key, value in schema.items()}
    return [_inside_document(member) for member in schema] if isinstance(schema, list) else schema
