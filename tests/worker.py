"""The handler in this process, called as TorchServe's worker calls it: any batch, and one with a row of every kind."""

import base64
from pathlib import Path
from typing import Any

from ts.context import Context, RequestProcessor

from handler.saliency_handler import SaliencyHandler
from scripts.paths import SAMPLE_FILES
from tests.conftest import manifest_of
from tests.kinks import dithered_png

IMAGE = dithered_png(SAMPLE_FILES[36])  # a seven; where pools tie, a batch of another size may round to another winner

Batch = list[tuple[dict[str, Any], dict[str, Any]]]  # rows and headers

MIXED: Batch = [
    ({"body": bytearray(IMAGE)}, {"explain": "False"}),
    ({"body": bytearray(IMAGE)}, {"explain": "True"}),
    ({"body": bytearray(IMAGE)}, {"explain": "True", "X-Saliency-Target": "3"}),
    ({"body": bytearray(b"broken")}, {"explain": "True"}),
    (
        {"data": bytearray(dithered_png(SAMPLE_FILES[0])), "explain": bytearray(b"true"), "target": bytearray(b"all")},
        {"explain": "False"},
    ),
    ({"body": {"data": base64.b64encode(IMAGE).decode(), "target": 11}}, {"explain": "True"}),
    ({"body": bytearray(IMAGE)}, {"explain": "True", "Accept": "application/x-npy"}),
    ({}, {"explain": "False", "describe": "True"}),
    ({"body": bytearray(IMAGE)}, {"explain": "True", "Accept": "image/png", "X-Saliency-Target": "4,9"}),
]


def context_for(model_dir: Path, config: dict[str, Any] | None = None) -> Context:
    return Context("digits", str(model_dir), manifest_of(model_dir), 8, None, "0.12.0", model_yaml_config=config)


def answer(handler: SaliencyHandler, batch: Batch, model_dir: Path) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each row."""
    context = context_for(model_dir)
    context.request_processor = [RequestProcessor(headers) for _, headers in batch]
    bodies = handler.handle([row for row, _ in batch], context)
    return [
        (context.get_response_status(index)[0], context.get_response_headers(index), body) for index, body in enumerate(bodies)
    ]
