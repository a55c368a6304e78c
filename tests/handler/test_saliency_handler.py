"""The handler in this process, on a real unpacked archive: every row of a batch gets its own answer.

Here because a batch's make-up is certain here. The same through a real server is in tests/e2e.
"""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from ts.context import RequestProcessor

import handler.preprocess as preprocess_module
import handler.protocol.reply as reply_module
import handler.saliency_handler as handler_module
from handler.gradients.explain import predict_and_explain
from handler.gradients.methods import METHODS
from handler.protocol.options import OPTIONS
from handler.protocol.request import parse_request
from handler.render.drawing import Row, Style, draw
from handler.runtime.archive import ArchiveError
from handler.saliency_handler import SaliencyHandler
from handler.torchserve import leave_with_a_lost_gpu
from scripts.paths import SAMPLE_FILES
from tests.conftest import label_of
from tests.kinks import dithered_digits, dithered_png
from tests.oracle import compute_probabilities
from tests.tolerance import FLOAT32_SHARE, require_close
from tests.worker import MIXED, Batch, answer, context_for

FILE = SAMPLE_FILES[36]  # a seven
IMAGE = dithered_png(FILE)


def test_every_row_of_a_mixed_batch_gets_the_answer_that_it_gets_alone(handler: SaliencyHandler, tmp_path: Path) -> None:
    together = answer(handler, MIXED, tmp_path / "unpacked")
    assert [status for status, _, _ in together] == [200, 200, 200, 400, 200, 400, 200, 400, 200]
    for row, (status, headers, body) in zip(MIXED, together, strict=True):
        ((status_alone, headers_alone, body_alone),) = answer(handler, [row], tmp_path / "unpacked")
        assert status == status_alone
        assert headers.keys() == headers_alone.keys()
        assert headers["content-type"] == headers_alone["content-type"]
        assert_close_bodies(headers["content-type"], body, body_alone)


def assert_close_bodies(content_type: str, body: bytes, other: bytes) -> None:
    """Equal within float32 rounding, in any reply format."""
    if content_type == "application/json":
        assert_close(json.loads(body), json.loads(other))
    elif content_type == "image/png":
        with Image.open(io.BytesIO(body)) as drawn, Image.open(io.BytesIO(other)) as drawn_alone:
            np.testing.assert_allclose(np.asarray(drawn).astype(int), np.asarray(drawn_alone).astype(int), atol=3)
    else:
        require_close(np.load(io.BytesIO(body)), np.load(io.BytesIO(other)), row_axes=2)


def assert_close(one: Any, other: Any) -> None:
    """Equal, with a tolerance for floats, however deep."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list) and one and isinstance(one[0], (int, float, list)):
        require_close(one, other, row_axes=min(np.ndim(one), 2))  # logits and the like, or maps
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_close(left, right)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=FLOAT32_SHARE, abs=0)
    else:
        assert one == other


def test_json_reply_says_all_that_the_contract_says(handler: SaliencyHandler, network: nn.Module, tmp_path: Path) -> None:
    ((status, headers, body),) = answer(handler, MIXED[1:2], tmp_path / "unpacked")
    reply = json.loads(body)
    logits, (explanation,) = predict_and_explain(network, torch.tensor(pixels_of(FILE))[None, None], [(None,)])
    assert explanation is not None
    assert status == 200
    assert headers == {"content-type": "application/json"}
    assert reply.keys() == {"digit", "probability", "probabilities", "logits", "explanation", "preparation", "model"}
    assert reply["digit"] == 7 == label_of(FILE)
    require_close(reply["logits"], logits[0])
    require_close(reply["probabilities"], compute_probabilities(logits[0].astype(np.float64)), 1e-6)
    assert reply["probability"] == reply["probabilities"][7]
    saliency = reply["explanation"].pop("saliency")
    require_close(saliency, explanation.maps[0, 0], row_axes=2)
    assert reply["explanation"] == {
        "method": "gradient",
        "output": "logit",
        "unit": "logit per unit of intensity",
        "target": 7,
        "target_source": "predicted",
        "with_respect_to": "pixel intensity in [0, 1]",
        "space": "canonical",
        "shape": [28, 28],
        "dtype": "float32",
        "encoding": "nested",
    }
    assert reply["preparation"] == {"source": "PNG image", "steps": [], "inverted": False}
    assert reply["model"] == handler.model_description


def explain_alone(handler: SaliencyHandler, folder: Path, headers: dict[str, str]) -> dict[str, Any]:
    ((status, _, body),) = answer(handler, [({"body": bytearray(IMAGE)}, {"explain": "True", **headers})], folder)
    assert status == 200
    reply: dict[str, Any] = json.loads(body)
    return reply


def test_pixels_that_the_network_got_come_on_request_in_the_map_s_encoding(handler: SaliencyHandler, tmp_path: Path) -> None:
    asked = {"X-Saliency-Pixels": "true"}
    nested = explain_alone(handler, tmp_path / "unpacked", asked)["preparation"]
    encoded = explain_alone(handler, tmp_path / "unpacked", asked | {"X-Saliency-Encoding": "base64"})["preparation"]
    pixels = np.asarray(nested["pixels"], dtype=np.float32)
    np.testing.assert_array_equal(pixels, pixels_of(FILE))
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(encoded["pixels"]), "<f4").reshape(encoded["shape"]), pixels)
    assert nested["window"] == [0, 0, 28, 28]


@pytest.mark.parametrize(
    ("space", "unit"), [("canonical", "logit per unit of intensity"), ("image", "logit per unit of grey level")]
)
def test_reply_names_the_unit_of_its_numbers(handler: SaliencyHandler, tmp_path: Path, space: str, unit: str) -> None:
    assert explain_alone(handler, tmp_path / "unpacked", {"X-Saliency-Space": space})["explanation"]["unit"] == unit


def pixels_of(file: Path) -> NDArray[np.float32]:
    pixels: NDArray[np.float32] = levels_of([file])[0].astype(np.float32) / np.float32(255)
    return pixels


def test_base64_and_npy_hold_the_very_floats_of_the_nested_form(handler: SaliencyHandler, tmp_path: Path) -> None:
    explain = {"explain": "True", "X-Saliency-Target": "7,9"}
    batch: Batch = [
        ({"body": bytearray(IMAGE)}, explain),
        ({"body": bytearray(IMAGE)}, explain | {"X-Saliency-Encoding": "base64"}),
        ({"body": bytearray(IMAGE)}, explain | {"Accept": "application/x-npy"}),
    ]
    nested, encoded, npy = answer(handler, batch, tmp_path / "unpacked")
    explanation, explanation_encoded = json.loads(nested[2])["explanation"], json.loads(encoded[2])["explanation"]
    assert explanation["shape"] == explanation_encoded["shape"] == [2, 28, 28]
    assert explanation["target"] == [7, 9]
    assert explanation["target_source"] == "request"
    expected = np.array(explanation["saliency"], dtype=np.float32)
    decoded = np.frombuffer(base64.b64decode(explanation_encoded["saliency"]), dtype="<f4").reshape(2, 28, 28)
    np.testing.assert_array_equal(decoded, decoded.astype(np.float32))
    require_close(decoded, expected, row_axes=2)  # another row of the batch
    array = np.load(io.BytesIO(npy[2]))
    assert array.dtype == np.dtype("<f4")
    require_close(array, expected, row_axes=2)
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


def test_png_shows_the_map_of_its_own_row_over_its_own_image(
    handler: SaliencyHandler, network: nn.Module, tmp_path: Path
) -> None:
    """Every row of a batch another digit, and each drawing what the drawing module makes of that digit's own map."""
    rows: Batch = [
        ({"body": bytearray(dithered_png(file))}, {"explain": "True", "Accept": "image/png", "X-Saliency-Size": "56"})
        for file in SAMPLE_FILES[::10]
    ]
    for file, (status, headers, body) in zip(SAMPLE_FILES[::10], answer(handler, rows, tmp_path / "unpacked"), strict=True):
        logits, (explanation,) = predict_and_explain(network, torch.tensor(pixels_of(file))[None, None], [(None,)])
        assert explanation is not None
        maps = explanation.maps[:, 0]
        expected = draw([Row(pixels_of(file), maps, explanation.classes)], Style(size=56))
        assert status == 200
        assert headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(body)) as drawn, Image.open(io.BytesIO(expected)) as wanted:
            difference = np.asarray(drawn).astype(int) - np.asarray(wanted)
        assert np.abs(difference).max() <= 3, "more than float32's rounding between batches can do"
        assert headers["X-Digit"] == headers["X-Saliency-Target"] == str(int(logits.argmax()))
        extremes = [float(headers[f"X-Saliency-{name}"]) for name in ("Min", "Max")]
        require_close(extremes, [maps.min(), maps.max()])


def test_drawing_that_would_be_too_large_costs_its_neighbours_nothing(handler: SaliencyHandler, tmp_path: Path) -> None:
    options = {"X-Saliency-Size": "1024", "X-Saliency-Target": "all"}
    large: Batch = [({"body": bytearray(IMAGE)}, {"explain": "True", "Accept": "image/png"} | options)]
    bad, good = answer(handler, large + MIXED[:1], tmp_path / "unpacked")
    assert (bad[0], good[0]) == (400, 200)
    assert bad[1]["content-type"] == "application/json"
    assert json.loads(bad[2])["error"]["type"] == "InvalidOption"


class Clock:
    """A clock that goes a second on at each look."""

    def __init__(self) -> None:
        self.now_s = 0

    def monotonic(self) -> int:
        self.now_s += 1
        return self.now_s


def test_batch_that_takes_too_long_is_answered_as_far_as_there_is_time(
    handler: SaliencyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request looks at the clock when it is read and when its reply is written, and each pass through the network once."""
    monkeypatch.setattr("handler.saliency_handler.time", Clock())
    heavy: Batch = [({"body": bytearray(IMAGE)}, {"explain": "True", "X-Saliency-Method": "smoothgrad"})]
    for limit_s, answered in ((100, 4), (7, 2), (4, 0), (2, 0)):
        monkeypatch.setattr("handler.saliency_handler.MAX_BATCH_SECONDS", limit_s)
        replies = answer(handler, heavy * 4, tmp_path / "unpacked")
        assert [reply[0] for reply in replies] == [200] * answered + [503] * (4 - answered)
        assert {json.loads(body)["error"]["type"] for status, _, body in replies if status != 200} <= {"Overloaded"}


def test_parts_of_a_batch_take_no_more_gradients_than_one_request_may(
    handler: SaliencyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def watched(differentiable: Any, pixels: Any, targets: Any, methods: Any, mean: Any) -> Any:
        counted.append(sum(len(some) * method.gradient_count for some, method in zip(targets, methods, strict=True)))
        return predict_and_explain(differentiable, pixels, targets, methods, mean)

    monkeypatch.setattr("handler.saliency_handler.predict_and_explain", watched)
    monkeypatch.setattr("handler.saliency_handler.MAX_BATCH_SECONDS", 600)  # this is not about the machine's speed
    heavy = ({"body": bytearray(IMAGE)}, {"explain": "True", "X-Saliency-Method": "smoothgrad", "X-Saliency-Samples": "500"})
    small = ({"body": bytearray(IMAGE)}, {"explain": "False"})
    replies = answer(handler, [small, *[heavy] * 9, small, heavy], tmp_path / "unpacked")
    assert [reply[0] for reply in replies] == [200] * 12
    assert counted == [4000, 1000]


def test_defect_in_rendering_is_a_500_for_that_row(
    handler: SaliencyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise KeyError("secret")

    monkeypatch.setattr(reply_module, "draw", broken)
    image: Batch = [({"body": bytearray(IMAGE)}, {"explain": "True", "Accept": "image/png"})]
    bad, good = answer(handler, image + MIXED[1:2], tmp_path / "unpacked")
    assert (bad[0], good[0]) == (500, 200)
    assert b"secret" not in bad[2]


class Watched:
    """Stands before the handler's network and writes down how many rows each forward has."""

    def __init__(self, handler: SaliencyHandler, fails_at: int | None = None) -> None:
        self.forwards: list[int] = []
        self.inner = handler.differentiable
        self.fails_at = fails_at
        handler.differentiable = self

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, object]:
        self.forwards.append(len(pixels))
        if len(self.forwards) == self.fails_at:
            raise RuntimeError("out of memory")
        return self.inner.score(pixels, explained_count)

    def pull_back(self, saved: object, cotangents: torch.Tensor) -> torch.Tensor:
        return self.inner.pull_back(saved, cotangents)


def test_one_forward_serves_a_whole_batch(handler: SaliencyHandler, tmp_path: Path) -> None:
    watched = Watched(handler)
    answer(handler, MIXED, tmp_path / "unpacked")
    assert watched.forwards == [6]


def test_batch_of_errors_alone_runs_no_network(handler: SaliencyHandler, tmp_path: Path) -> None:
    watched = Watched(handler)
    assert [status for status, _, _ in answer(handler, [MIXED[3], MIXED[5]], tmp_path / "unpacked")] == [400, 400]
    assert watched.forwards == []


def test_defect_in_one_row_is_a_500_for_that_row_and_its_log_holds_no_data(
    handler: SaliencyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(rows: Any, height: int, width: int) -> Any:
        raise KeyError(str(rows))

    monkeypatch.setattr(preprocess_module, "decode_numbers", broken)
    good, bad = answer(handler, [MIXED[0], ({"body": {"data": [["secret"]]}}, {})], tmp_path / "unpacked")
    assert (good[0], bad[0]) == (200, 500)
    assert json.loads(bad[2])["error"]["type"] == "InternalError"
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text
    assert b"secret" not in bad[2]


def test_network_that_returns_nan_gives_500_and_no_nan(handler: SaliencyHandler, tmp_path: Path) -> None:
    with torch.no_grad():
        handler.model.get_parameter("lin.bias")[0] = torch.nan
    for status, _, body in answer(handler, MIXED[:2], tmp_path / "unpacked"):
        assert status == 500
        assert b"NaN" not in body


@pytest.mark.parametrize(("is_lost", "exit_codes"), [(True, [1]), (False, [])], ids=["lost", "out of memory"])
def test_worker_ends_where_its_gpu_is_lost(monkeypatch: pytest.MonkeyPatch, is_lost: bool, exit_codes: list[int]) -> None:
    """A GPU cannot be lost on purpose, least of all where there is none: PyTorch's answer and the exit are played here."""
    exits: list[int] = []

    def synchronize(_device: torch.device) -> None:
        if is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", exits.append)
    leave_with_a_lost_gpu(torch.device("cpu"))
    assert exits == []
    leave_with_a_lost_gpu(torch.device("cuda:0"))
    assert exits == exit_codes


def test_headers_of_a_reply_are_what_torchserve_can_send(handler: SaliencyHandler, tmp_path: Path) -> None:
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
        SaliencyHandler().initialize(context_for(model_dir))


def test_worker_settings_are_applied(unpack: Callable[[], Path]) -> None:
    threads = torch.get_num_threads()
    try:
        SaliencyHandler().initialize(context_for(unpack(), {"handler": {"torch_threads": threads + 1}}))
        assert torch.get_num_threads() == threads + 1
        blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        assert blas
        assert set(blas) == {threads + 1}
    finally:
        torch.set_num_threads(threads)
        threadpool_limits(threads, user_api="blas")


@pytest.mark.parametrize(("settings", "is_prepared"), [({}, True), ({"framing": {"shortest_ink": 9}}, False)])
def test_framing_of_the_settings_decides_what_is_prepared(
    unpack: Callable[[], Path], tmp_path: Path, settings: dict[str, Any], is_prepared: bool
) -> None:
    """A bar of 11 pixels: too short for MNIST's framing."""
    saliency_handler = SaliencyHandler()
    saliency_handler.initialize(context_for(unpack(), {"handler": settings}))
    levels = np.zeros((28, 28), np.uint8)
    levels[9:20, 13:16] = 255
    ((status, _, body),) = answer(saliency_handler, [({"body": {"data": levels.tolist()}}, {})], tmp_path / "unpacked")
    assert status == 200
    assert bool(json.loads(body)["preparation"]["steps"]) == is_prepared


@pytest.mark.parametrize("framing", [{"longest": 21}, {"longest_ink": "21"}, [17, 21]], ids=["name", "value", "no mapping"])
def test_wrong_framing_of_the_settings_ends_the_start(unpack: Callable[[], Path], framing: object) -> None:
    with pytest.raises(ValueError, match=r"expected .* of a framing"):
        SaliencyHandler().initialize(context_for(unpack(), {"handler": {"framing": framing}}))


LOAD_IN_A_WORKER = """
import json, sys, torch
from ts.model_loader import ModelLoaderFactory
from ts.torch_handler import base_handler

def precisions():
    backends = torch.backends
    switches = {
        "all": backends, "cuda.matmul": backends.cuda.matmul, "cudnn.conv": backends.cudnn.conv, "cudnn.rnn": backends.cudnn.rnn,
        "mkldnn.matmul": backends.mkldnn.matmul, "mkldnn.conv": backends.mkldnn.conv, "mkldnn.rnn": backends.mkldnn.rnn,
    }
    return {name: switch.fp32_precision for name, switch in switches.items()} | {
        "matmul precision": torch.get_float32_matmul_precision(),
        "older switches": [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32],
    }

torch.set_float32_matmul_precision("high")  # as BaseHandler does where it finds a newer GPU
torch.backends.fp32_precision = "tf32"
before = precisions()
service = ModelLoaderFactory.get_model_loader().load("digits", sys.argv[1], "saliency_handler.py", batch_size=1)
handler = service._entry_point.__self__
assert isinstance(handler, base_handler.BaseHandler)
"""


def run_as_worker(script: str, model_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run code after LOAD_IN_A_WORKER in a fresh process, as a TorchServe worker sees an unpacked archive."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-P", "-c", LOAD_IN_A_WORKER + script, str(model_dir)],
        cwd=model_dir,
        env=environment | {"PYTHONPATH": str(model_dir), "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_worker_computes_float32_exactly_whatever_allowed_less(unpack: Callable[[], Path]) -> None:
    finished = run_as_worker("print(json.dumps([before, precisions()]))", unpack())
    before, after = json.loads(finished.stdout.splitlines()[-1])
    assert before["all"] == before["cuda.matmul"] == before["cudnn.conv"] == before["mkldnn.matmul"] == "tf32"
    assert (before["matmul precision"], before["older switches"]) == ("high", [True, True])
    assert (after.pop("matmul precision"), after.pop("older switches")) == ("highest", [False, False])
    assert set(after.values()) == {"ieee"}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        pytest.param("handler.device = torch.device('cuda:99')", "cuda:99 does not work any more", id="no such GPU"),
        pytest.param(
            "handler.model.to('cuda'); handler.device = torch.device('cuda')\n"
            "torch.zeros(1, device='cuda').gather(0, torch.tensor([9], device='cuda'))",
            "cuda does not work any more",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            id="failed assertion on the GPU",
        ),
    ],
)
def test_batch_on_a_lost_gpu_ends_the_worker(unpack: Callable[[], Path], loss: str, message: str) -> None:
    """The process ends by itself, in the middle of `handle`: no reply says otherwise."""
    batch = (
        f"\n{loss}\n"
        "from ts.context import RequestProcessor\n"
        "service.context.request_processor = [RequestProcessor({})]\n"
        "handler.handle([{'body': {'data': [[0.5] * 14 + [0.0] * 14] * 28}}], service.context)\n"
        "print('answered')"
    )
    finished = run_as_worker("import logging; logging.basicConfig()" + batch, unpack())
    assert (finished.returncode, "answered" in finished.stdout) == (1, False)
    assert message in finished.stderr
    assert "this worker ends" in finished.stderr


# --- several images in a request


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def levels_of(files: list[Path]) -> NDArray[np.uint8]:
    return dithered_digits()[[SAMPLE_FILES.index(file) for file in files]]


BASE64_IMAGE = base64.b64encode(IMAGE).decode()
SEVERAL: Batch = [
    ({"body": bytearray(npy(levels_of(SAMPLE_FILES[:3])))}, {"explain": "True"}),
    ({"data": bytearray(npy(levels_of(SAMPLE_FILES[3:5]))), "target": bytearray(b"[2]")}, {"explain": "True"}),
    ({"body": bytearray(npy(levels_of(SAMPLE_FILES[5:6])[0]))}, {"explain": "False"}),
    ({"body": {"instances": [BASE64_IMAGE, {"data": BASE64_IMAGE, "explain": True, "target": 3}]}}, {"explain": "False"}),
    ({"body": {"instances": [BASE64_IMAGE, "broken", {"data": BASE64_IMAGE, "target": -1}]}}, {"explain": "True"}),
    ({"body": {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": [BASE64_IMAGE]}]}}, {"explain": "True"}),
    ({"body": bytearray(npy(levels_of(SAMPLE_FILES[6:9])))}, {"explain": "True", "Accept": "application/x-npy"}),
    *MIXED,
]


def test_requests_with_several_images_share_a_batch_and_one_forward(handler: SaliencyHandler, tmp_path: Path) -> None:
    watched = Watched(handler)
    together = answer(handler, SEVERAL, tmp_path / "unpacked")
    assert watched.forwards == [3 + 2 + 1 + 2 + 1 + 3 + 6]
    for row, (status, headers, body) in zip(SEVERAL, together, strict=True):
        ((status_alone, headers_alone, body_alone),) = answer(handler, [row], tmp_path / "unpacked")
        assert (status, headers.keys()) == (status_alone, headers_alone.keys())
        assert_close_bodies(headers["content-type"], body, body_alone)


def test_each_of_several_images_gets_the_answer_that_it_gets_alone(handler: SaliencyHandler, tmp_path: Path) -> None:
    files = SAMPLE_FILES[:3]
    batch: Batch = [
        ({"body": bytearray(npy(levels_of(files)))}, {"explain": "True"}),
        *(({"body": bytearray(dithered_png(file))}, {"explain": "True"}) for file in files),
    ]
    several, *singles = [json.loads(body) for _, _, body in answer(handler, batch, tmp_path / "unpacked")]
    assert several.keys() == {"predictions", "explanations"}
    for prediction, explanation, single in zip(several["predictions"], several["explanations"], singles, strict=True):
        assert_close(explanation, single.pop("explanation"))
        assert prediction.pop("preparation") == {"source": "uint8 array, 0-255", "steps": [], "inverted": False}
        assert single.pop("preparation") == {"source": "PNG image", "steps": [], "inverted": False}
        assert_close(prediction, single)


def test_more_images_than_one_forward_takes_are_answered_in_order(
    handler: SaliencyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_module, "MAX_FORWARD_IMAGES", 4)
    watched = Watched(handler)
    files = SAMPLE_FILES[::5]
    batch: Batch = [
        ({"body": bytearray(npy(levels_of(files)))}, {"explain": "False"}),
        ({"body": bytearray(npy(levels_of(files[::-1])))}, {"explain": "True"}),
    ]
    forward, backward = [json.loads(body) for _, _, body in answer(handler, batch, tmp_path / "unpacked")]
    assert watched.forwards == [4, 4, 4, 4, 4]
    assert [prediction["digit"] for prediction in forward["predictions"]] == [label_of(file) for file in files]
    assert [explanation["target"] for explanation in backward["explanations"]] == [label_of(file) for file in files[::-1]]


def test_network_that_fails_on_one_part_fails_only_the_requests_in_it(
    handler: SaliencyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_module, "MAX_FORWARD_IMAGES", 2)
    Watched(handler, fails_at=2)
    batch: Batch = [({"body": bytearray(npy(levels_of(SAMPLE_FILES[:n])))}, {"explain": "False"}) for n in (2, 3, 1, 2)]
    assert [status for status, _, _ in answer(handler, batch, tmp_path / "unpacked")] == [200, 500, 200, 200]


@pytest.mark.parametrize(
    ("row", "indices", "message"),
    [
        pytest.param(
            {"body": {"instances": [BASE64_IMAGE, "x", BASE64_IMAGE, {"data": BASE64_IMAGE, "target": 99}, "abcd"]}},
            [1, 3, 4],
            "expected 5 good images, got 3 bad, at index 1, 3, 4; at 1: expected standard base64 with padding in 'data', "
            "got 'x'; ",
            id="v1",
        ),
        pytest.param(
            {
                "body": {
                    "instances": [{"data": npy_text} for npy_text in (base64.b64encode(npy(np.zeros((2, 28, 28)))).decode(),)]
                }
            },
            [0],
            "at 0: expected one image as one of several, got an array of 2",
            id="array in an instance",
        ),
        pytest.param(
            {"body": {"inputs": [{"name": "x", "shape": [2], "datatype": "BYTES", "data": ["", BASE64_IMAGE]}]}},
            [0],
            "expected 2 good images, got 1 bad, at index 0; at 0: expected the base64 of an image file in",
            id="v2 bytes",
        ),
        pytest.param(
            {
                "data": bytearray(npy(np.array([0, 2, 0, 2, 0])[:, None, None] * np.ones((28, 28)))),
                "prepare": bytearray(b"none"),
            },
            [1, 3],
            "expected 5 good images, got 2 bad, at index 1, 3; at 1, 3: expected floats from 0.0 to 1.0, "
            "got 2.0 at row 0, column 0",
            id="npy",
        ),
        pytest.param(
            {"body": {"inputs": [{"name": "x", "shape": [1, 28, 28], "datatype": "UINT8", "data": [256] * 784}]}},
            [0],
            "expected 1 good images, got 1 bad, at index 0; at 0: expected integers from 0 to 255, got 256 at row 0",
            id="v2 numbers",
        ),
        pytest.param(
            {"body": {"instances": [f"x{number}" for number in range(9)]}},
            list(range(9)),
            "; and 4 more errors",
            id="many different errors",
        ),
    ],
)
def test_error_of_several_images_names_every_bad_one(
    handler: SaliencyHandler, tmp_path: Path, row: dict[str, Any], indices: list[int], message: str
) -> None:
    ((status, _, body),) = answer(handler, [(row, {"explain": "True"})], tmp_path / "unpacked")
    content = json.loads(body)
    is_text = isinstance(content["error"], str)  # as the Open Inference Protocol has it
    assert is_text == (isinstance(row.get("body"), dict) and "inputs" in row["body"])
    error = {**content, "message": content["error"]} if is_text else content["error"]
    assert status == error["code"] == 400
    assert error["indices"] == indices
    assert message in error["message"]


def test_single_npy_image_has_an_error_without_index(handler: SaliencyHandler, tmp_path: Path) -> None:
    ((status, _, body),) = answer(handler, [({"body": bytearray(npy(np.full((28, 28), 2.0)))}, {})], tmp_path / "unpacked")
    error = json.loads(body)["error"]
    assert status == 400
    assert error.keys() == {"code", "type", "message"}
    assert error["message"].startswith("expected floats from 0.0 to 1.0, got 2.0 at row 0, column 0")


def test_more_maps_than_are_allowed_are_refused_before_the_network_runs(handler: SaliencyHandler, tmp_path: Path) -> None:
    watched = Watched(handler)
    headers = {"explain": "True", "X-Saliency-Target": "all"}
    row = {"body": bytearray(npy(np.zeros((103, 28, 28))))}
    ((status, _, body),) = answer(handler, [(row, headers)], tmp_path / "unpacked")
    assert status == 413
    assert json.loads(body)["error"]["type"] == "RequestTooLarge"
    assert watched.forwards == []
    assert "expected at most 1024 maps, got 103 images with 1030 targets in all" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("count", "options", "gradients"),
    [
        (16, {"method": "smoothgrad", "samples": "256"}, 4096),
        (16, {"method": "smoothgrad", "samples": "257"}, 4112),
        (8, {"method": "integrated_gradients", "steps": "51", "target": "all"}, 4160),
        (3, {"method": "smoothgrad", "samples": "500", "target": "0,1,2"}, 4500),
    ],
    ids=str,
)
def test_more_work_than_is_allowed_is_refused_before_the_network_runs(
    handler: SaliencyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, options: dict[str, str], gradients: int
) -> None:
    class Refuses:
        def score(self, pixels: torch.Tensor, explained_count: int) -> Any:
            raise KeyError("the network ran")

    monkeypatch.setattr(handler, "differentiable", Refuses())
    row = {
        "data": bytearray(npy(np.zeros((count, 28, 28)))),
        "prepare": bytearray(b"none"),
        **{name: bytearray(text.encode()) for name, text in options.items()},
    }
    ((status, _, body),) = answer(handler, [(row, {"explain": "True"})], tmp_path / "unpacked")
    if gradients <= 4096:
        assert status == 500  # it was let through
        return
    assert (status, json.loads(body)["error"]["type"]) == (413, "RequestTooLarge")
    assert f"got {count} images whose maps take {gradients:,}: ask for fewer" in json.loads(body)["error"]["message"]
    ((status, _, _),) = answer(handler, [(row, {"explain": "False"})], tmp_path / "unpacked")
    assert status == 500  # a prediction takes none


def test_mean_baseline_of_a_network_that_does_not_say_it_is_refused(
    handler: SaliencyHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"X-Saliency-Method": "integrated_gradients", "X-Saliency-Steps": "2"}
    batch: Batch = [
        ({"body": bytearray(IMAGE)}, {"explain": explain, "X-Saliency-Baseline": baseline} | options)
        for explain, baseline in (("True", "mean"), ("True", "zero"), ("False", "mean"))
    ]
    assert [status for status, _, _ in answer(handler, batch, tmp_path / "unpacked")] == [200, 200, 200]
    monkeypatch.setattr(handler, "mean_pixel", None)
    refused, *others = answer(handler, batch, tmp_path / "unpacked")
    assert (refused[0], [status for status, _, _ in others]) == (400, [200, 200])
    assert (
        "expected a method that works without the mean image, which this network does not say"
        in json.loads(refused[2])["error"]["message"]
    )


def test_images_of_one_request_share_a_limit_of_pixels(handler: SaliencyHandler, tmp_path: Path) -> None:
    """Else a thousand large images in one request would keep a worker busy past its time limit."""
    file = io.BytesIO()
    image = Image.new("L", (3000, 3000))
    image.paste(255, (1400, 500, 1600, 2500))
    image.save(file, "PNG")
    large = base64.b64encode(file.getvalue()).decode()
    row = {"body": {"instances": [large, BASE64_IMAGE, large, BASE64_IMAGE]}}
    ((status, _, body),) = answer(handler, [(row, {})], tmp_path / "unpacked")
    error = json.loads(body)["error"]
    assert (status, error["type"], error["indices"]) == (413, "ImageTooLarge", [2])
    assert "expected at most 16,000,000 pixels in all images of a request together" in error["message"]


def test_blank_images_count_among_those_that_are_searched(handler: SaliencyHandler, tmp_path: Path) -> None:
    """Looking for ink takes as long where there is none."""
    file = io.BytesIO()
    Image.new("L", (40, 40), 200).save(file, "PNG")
    blank = base64.b64encode(file.getvalue()).decode()
    batch: Batch = [({"body": {"instances": [blank] * count}}, {}) for count in (64, 65)]
    statuses = [status for status, _, _ in answer(handler, batch, tmp_path / "unpacked")]
    assert statuses == [422, 413]


def test_npy_reply_of_many_images_has_no_long_headers(handler: SaliencyHandler, tmp_path: Path) -> None:
    headers = {"explain": "True", "Accept": "application/x-npy", "X-Saliency-Target": "3,5", "X-Saliency-Prepare": "none"}
    batch: Batch = [({"body": bytearray(npy(np.zeros((count, 28, 28))))}, headers) for count in (2, 100, 101)]
    two, hundred, more = answer(handler, batch, tmp_path / "unpacked")
    assert two[1]["X-Saliency-Target"] == "3,5;3,5"
    assert [len(two[1][name].split(";")) for name in ("X-Digit", "X-Probability")] == [2, 2]
    assert all(len(value) < 4096 for value in hundred[1].values())
    assert more[1].keys() == {"content-type", "X-Saliency-Method", "X-Saliency-Min", "X-Saliency-Max"}
    assert np.load(io.BytesIO(more[2])).shape == (101, 2, 28, 28)


# --- what the service says of itself


def test_describe_request_of_torchserve_gets_the_description(handler: SaliencyHandler, tmp_path: Path) -> None:
    (status, headers, body), (neighbour, _, _) = answer(handler, [({}, {"describe": "True"}), MIXED[0]], tmp_path / "unpacked")
    description = json.loads(body)
    assert (status, neighbour) == (200, 200)
    assert headers == {"content-type": "application/json"}
    assert description["model"] == handler.model_description
    assert description["input_shape"] == [28, 28]
    assert description["options"].keys() == OPTIONS.keys()
    assert description["options"]["target"]["default"] == "predicted"
    assert list(description["methods"]) == description["options"]["method"]["accepted"] == list(METHODS)
    assert description["methods"]["smoothgrad"]["parameters"].keys() == {"samples", "noise", "seed", "aggregate"}
    assert description["limits"] == {
        "pictures_a_request": 1024,
        "prepared_pictures_a_request": 64,
        "maps_a_request": 1024,
        "gradients_a_request": 4096,
        "image_pixels_a_request": 16_000_000,
        "image_map_numbers_a_request": 1_440_000,
        "body_bytes": 32 * 1024 * 1024,
    }
    assert description["versions"]["torch"] == version("torch")


def test_every_value_that_the_description_lists_is_accepted(handler: SaliencyHandler, tmp_path: Path) -> None:
    ((_, _, body),) = answer(handler, [({}, {"describe": "True"})], tmp_path / "unpacked")
    description = json.loads(body)
    owners = {one: method for method, details in description["methods"].items() for one in details["parameters"]}
    for name, option in description["options"].items():
        method = {"method": owners.get(name, "gradient")}
        for value in [*option["accepted"], option["default"]]:
            if not str(value).startswith(("a ", "an ")):  # a description, such as "an integer from 28 to 1024"
                fields = {"polarity": "absolute", **method, name: value}  # absolute takes every colour map
                assert parse_request({"body": {"data": BASE64_IMAGE, **fields}}, {}, handler.class_count).parts, fields
        headers = {"x-saliency-method": method["method"], option["header"]: str(option["default"])}
        assert parse_request({"body": bytearray(IMAGE)}, headers, handler.class_count)


@pytest.mark.parametrize(
    ("row", "headers", "status"),
    [
        ({"body": bytearray(IMAGE)}, {"explain": "False", "describe": "True"}, 200),
        ({"body": bytearray(IMAGE)}, {"describe": "True"}, 200),
        ({}, {"explain": "True", "describe": "True"}, 400),
        ({}, {"describe": {"content-type": ""}}, 400),
        ({}, {"Describe": "True"}, 400),
    ],
    ids=["image", "image by another route", "empty request", "form field", "capital letter"],
)
def test_describe_header_of_a_client_changes_nothing(
    handler: SaliencyHandler, tmp_path: Path, row: dict[str, Any], headers: dict[str, Any], status: int
) -> None:
    ((got, _, body), neighbour) = answer(handler, [(row, headers), MIXED[0]], tmp_path / "unpacked")
    assert (got, neighbour[0]) == (status, 200)
    assert ("digit" if status == 200 else "error") in json.loads(body)
