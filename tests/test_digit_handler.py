"""The handler in this process, on a real unpacked archive: every row of a batch gets its own answer.

Here because a batch's make-up is certain here. The same through a real server is in tests/e2e.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from ts.context import Context, RequestProcessor

import handler.prepare as prepare_module
from handler.archive import ArchiveError
from handler.digit_handler import DigitHandler
from handler.saliency import predict_and_explain
from tests.conftest import DIGIT_FILES, label_of, manifest_of

FILE = DIGIT_FILES[36]  # a seven
PICTURE = FILE.read_bytes()
Batch = list[tuple[dict[str, Any], dict[str, Any]]]  # rows and headers


def context_for(model_dir: Path, config: dict[str, Any] | None = None) -> Context:
    return Context("digits", str(model_dir), manifest_of(model_dir), 8, None, "0.12.0", model_yaml_config=config)


@pytest.fixture
def handler(unpack: Callable[[], Path]) -> DigitHandler:
    digit_handler = DigitHandler()
    digit_handler.initialize(context_for(unpack()))
    return digit_handler


def answer(handler: DigitHandler, batch: Batch, model_dir: Path) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each row."""
    context = context_for(model_dir)
    context.request_processor = [RequestProcessor(headers) for _, headers in batch]
    bodies = handler.handle([row for row, _ in batch], context)
    return [
        (context.get_response_status(index)[0], context.get_response_headers(index), body) for index, body in enumerate(bodies)
    ]


MIXED: Batch = [
    ({"body": bytearray(PICTURE)}, {"explain": "False"}),
    ({"body": bytearray(PICTURE)}, {"explain": "True"}),
    ({"body": bytearray(PICTURE)}, {"explain": "True", "X-Saliency-Target": "3"}),
    ({"body": bytearray(b"broken")}, {"explain": "True"}),
    (
        {"data": bytearray(DIGIT_FILES[0].read_bytes()), "explain": bytearray(b"true"), "target": bytearray(b"all")},
        {"explain": "False"},
    ),
    ({"body": {"data": base64.b64encode(PICTURE).decode(), "target": 11}}, {"explain": "True"}),
    ({"body": bytearray(PICTURE)}, {"explain": "True", "Accept": "application/x-npy"}),
    ({}, {"explain": "False", "describe": "True"}),
]


def test_every_row_of_a_mixed_batch_gets_the_answer_that_it_gets_alone(handler: DigitHandler, tmp_path: Path) -> None:
    together = answer(handler, MIXED, tmp_path / "unpacked")
    assert [status for status, _, _ in together] == [200, 200, 200, 400, 200, 400, 200, 400]
    for row, (status, headers, body) in zip(MIXED, together, strict=True):
        ((status_alone, headers_alone, body_alone),) = answer(handler, [row], tmp_path / "unpacked")
        assert status == status_alone
        assert headers.keys() == headers_alone.keys()
        assert headers["content-type"] == headers_alone["content-type"]
        if headers["content-type"] == "application/json":
            assert_close(json.loads(body), json.loads(body_alone))
        else:
            np.testing.assert_allclose(np.load(io.BytesIO(body)), np.load(io.BytesIO(body_alone)), rtol=0, atol=1e-5)


def assert_close(one: Any, other: Any) -> None:
    """Equal, with a tolerance for floats, however deep."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-5)
    else:
        assert one == other


def test_json_reply_says_all_that_the_contract_says(handler: DigitHandler, network: nn.Module, tmp_path: Path) -> None:
    ((status, headers, body),) = answer(handler, MIXED[1:2], tmp_path / "unpacked")
    reply = json.loads(body)
    logits, (explanation,) = predict_and_explain(network, torch.tensor(pixels_of(FILE))[None, None], [(None,)])
    assert explanation is not None
    assert status == 200
    assert headers == {"content-type": "application/json"}
    assert reply.keys() == {"digit", "probability", "probabilities", "logits", "explanation", "preparation", "model"}
    assert reply["digit"] == 7 == label_of(FILE)
    np.testing.assert_allclose(reply["logits"], logits[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(reply["probabilities"], logits[0].double().softmax(0).numpy(), atol=1e-6)
    assert reply["probability"] == reply["probabilities"][7]
    saliency = reply["explanation"].pop("saliency")
    np.testing.assert_allclose(saliency, explanation.maps[0, 0].numpy(), atol=1e-5)
    assert reply["explanation"] == {
        "method": "gradient",
        "output": "logit",
        "target": 7,
        "target_source": "predicted",
        "with_respect_to": "pixel intensity in [0, 1]",
        "space": "canonical",
        "shape": [28, 28],
        "dtype": "float32",
        "encoding": "nested",
    }
    assert reply["preparation"] == {"source": "PNG image", "steps": []}
    assert reply["model"] == handler.model_description


def pixels_of(file: Path) -> NDArray[np.float32]:
    return np.asarray(Image.open(file)).astype(np.float32) / np.float32(255)


def test_base64_and_npy_hold_the_very_floats_of_the_nested_form(handler: DigitHandler, tmp_path: Path) -> None:
    explain = {"explain": "True", "X-Saliency-Target": "7,9"}
    batch: Batch = [
        ({"body": bytearray(PICTURE)}, explain),
        ({"body": bytearray(PICTURE)}, explain | {"X-Saliency-Encoding": "base64"}),
        ({"body": bytearray(PICTURE)}, explain | {"Accept": "application/x-npy"}),
    ]
    nested, encoded, npy = answer(handler, batch, tmp_path / "unpacked")
    explanation, explanation_encoded = json.loads(nested[2])["explanation"], json.loads(encoded[2])["explanation"]
    assert explanation["shape"] == explanation_encoded["shape"] == [2, 28, 28]
    assert explanation["target"] == [7, 9]
    assert explanation["target_source"] == "request"
    expected = np.array(explanation["saliency"], dtype=np.float32)
    decoded = np.frombuffer(base64.b64decode(explanation_encoded["saliency"]), dtype="<f4").reshape(2, 28, 28)
    np.testing.assert_array_equal(decoded, decoded.astype(np.float32))
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=1e-5)  # another row of the batch
    array = np.load(io.BytesIO(npy[2]))
    assert array.dtype == np.dtype("<f4")
    np.testing.assert_allclose(array, expected, rtol=0, atol=1e-5)
    assert npy[1] | {"X-Probability": "", "X-Saliency-Min": "", "X-Saliency-Max": ""} == {
        "content-type": "application/x-npy",
        "X-Digit": "7",
        "X-Probability": "",
        "X-Saliency-Method": "gradient",
        "X-Saliency-Target": "7,9",
        "X-Saliency-Min": "",
        "X-Saliency-Max": "",
    }
    assert float(npy[1]["X-Saliency-Min"]) == array.min()
    assert float(npy[1]["X-Saliency-Max"]) == array.max()


def test_one_forward_serves_a_whole_batch(handler: DigitHandler, tmp_path: Path) -> None:
    rows = []
    handler.model.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    answer(handler, MIXED, tmp_path / "unpacked")
    assert rows == [5]


def test_batch_of_errors_alone_runs_no_network(handler: DigitHandler, tmp_path: Path) -> None:
    handler.model.register_forward_hook(lambda *_: pytest.fail("the network ran"))
    assert [status for status, _, _ in answer(handler, [MIXED[3], MIXED[5]], tmp_path / "unpacked")] == [400, 400]


def test_defect_in_one_row_is_a_500_for_that_row_and_its_log_holds_no_data(
    handler: DigitHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(rows: Any, height: int, width: int) -> Any:
        raise KeyError(str(rows))

    monkeypatch.setattr(prepare_module, "decode_numbers", broken)
    good, bad = answer(handler, [MIXED[0], ({"body": {"data": [["secret"]]}}, {})], tmp_path / "unpacked")
    assert (good[0], bad[0]) == (200, 500)
    assert json.loads(bad[2])["error"]["type"] == "InternalError"
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text
    assert b"secret" not in bad[2]


def test_network_that_returns_nan_gives_500_and_no_nan(handler: DigitHandler, tmp_path: Path) -> None:
    with torch.no_grad():
        handler.model.get_parameter("lin.bias")[0] = torch.nan
    for status, _, body in answer(handler, MIXED[:2], tmp_path / "unpacked"):
        assert status == 500
        assert b"NaN" not in body


def test_headers_of_a_reply_are_what_torchserve_can_send(handler: DigitHandler, tmp_path: Path) -> None:
    """A header value that is no text, or a phrase that is not ASCII, would kill the worker."""
    context = context_for(tmp_path / "unpacked")
    context.request_processor = [RequestProcessor(headers) for _, headers in MIXED]
    handler.handle([row for row, _ in MIXED], context)
    for index in range(len(MIXED)):
        assert all(isinstance(value, str) and value.isascii() for value in context.get_response_headers(index).values())
        assert context.get_response_status(index)[1] in ("OK", "Bad Request")


def test_spoiled_archive_is_not_loaded(unpack: Callable[[], Path]) -> None:
    model_dir = unpack()
    content = bytearray((model_dir / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (model_dir / "weights.safetensors").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"weights\.safetensors is damaged"):
        DigitHandler().initialize(context_for(model_dir))


def test_worker_settings_and_exact_arithmetic_are_applied(unpack: Callable[[], Path]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_float32_matmul_precision("high")
        DigitHandler().initialize(context_for(unpack(), {"handler": {"torch_threads": threads + 1}}))
        assert torch.get_num_threads() == threads + 1
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_num_threads(threads)
