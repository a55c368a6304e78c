"""The requests of a soak, and the check of their answers.

Good requests on every route beside bad ones of every common kind and all attacks of attacks.py. An answer is right where it has
the status and the error that its kind calls for, and equals the answer that the same request got alone. An answer that belongs to
another client, or that a neighbour in the batch has changed, differs from that one. Knows nothing of rates, processes or reports.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image

from scripts.bench.attacks import Attack, build_attacks, error_type
from scripts.bench.digit_requests import BINARY
from scripts.bench.digits import dither
from scripts.bench.load import Call, build_call

# Of the largest number of a list or a map: another order of summation in another batch changes less, another image more.
TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1.0  # of drawings: mean difference of colours, of 255
# Of the numbers of a map whose image was preprocessed. Its background is flat: inputs of max pools tie there, and rounding
# decides which of them has the gradient. 12 of 784 pixels were seen to differ; maps of two images differ in most.
TIED_SHARE = 0.05
KNOWN_REPLIES = 100  # to one call, remembered as right; others are compared again
LARGE_FORM_BYTES = 7_000_000  # over 6.25 MiB a frontend may hold an upload in a temp file
ATTACK_BYTES = 400_000  # of those whose size is free
COME_AGAIN = (503, "Overloaded")  # what an attack may get beside costly neighbours in its batch, and no good request
SEED = 0  # of the noise, and of the order of calls


@dataclass(frozen=True, slots=True)
class Sample:
    """A digit's PNG, and the same enlarged, which the service has to preprocess."""

    label: int
    png: bytes
    large_png: bytes

    @property
    def text(self) -> str:
        """The PNG as base64."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True, slots=True)
class Message:
    """A request without its server: `path` has {model} in it."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request, how often it is sent beside the others, and the answer it calls for."""

    name: str
    weight: int
    make: Callable[[Sample], Message]
    status: int = 200
    error: str = ""  # the error's type
    tied_share: float = 0.0  # of a map's numbers that may differ
    attack: Attack | None = None  # that it is; its own expectation then decides instead of status and error

    @property
    def is_bad(self) -> bool:
        """Whether the service has to refuse it."""
        return bool(self.error)

    def calls_for(self, status: int, error: str) -> bool:
        """Whether an answer has a status and a type of error that are right for it."""
        return self.attack.allows(status, error) if self.attack else (status, error) == (self.status, self.error)


JSON = {"Content-Type": "application/json"}


def _predict(body: bytes, **headers: str) -> Message:
    return Message("/predictions/{model}", body, BINARY | _named(headers))


def _explain(body: bytes, **headers: str) -> Message:
    return Message("/explanations/{model}", body, BINARY | _named(headers))


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def _json(path: str, content: Mapping[str, Any]) -> Message:
    return Message(path, orjson.dumps(content), JSON)


def _form(path: str, png: bytes, **options: str) -> Message:
    boundary = "a-boundary-that-no-image-has"
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode() for name, text in options.items()]
    parts.append(b'Content-Disposition: form-data; name="data"; filename="digit.png"\r\n\r\n' + png)
    body = b"".join(b"--%b\r\n%b\r\n" % (boundary.encode(), part) for part in parts) + f"--{boundary}--\r\n".encode()
    return Message(path, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})


def _npy_of(sample: Sample, count: int) -> bytes:
    with Image.open(io.BytesIO(sample.png)) as image:
        images = np.stack([np.asarray(image)] * count)
    content = io.BytesIO()
    np.save(content, images)
    return content.getvalue()


def _levels_of(sample: Sample) -> list[Any]:
    with Image.open(io.BytesIO(sample.png)) as image:
        levels: list[Any] = np.asarray(image).tolist()
    return levels


def _image(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("1", (width, height), 1).save(content, format="PNG")
    return content.getvalue()


def _instances(sample: Sample, count: int) -> dict[str, Any]:
    return {"instances": [{"data": sample.text, "target": number % 10} for number in range(count)], "encoding": "base64"}


def _tensor(sample: Sample, count: int) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [count], "datatype": "BYTES", "data": [sample.text] * count}]}


ATTACKS = build_attacks(ATTACK_BYTES)


def _attack_kind(name: str, attack: Attack) -> Kind:
    def make(_: Sample) -> Message:
        return Message(attack.route, attack.body, attack.headers)

    return Kind(name, 0, make, attack.status, attack.error, attack=attack)


EXPLANATIONS, V1_EXPLAIN, V2_EXPLAIN = "/explanations/{model}", "/v1/models/{model}:explain", "/v2/models/{model}/explain"

KINDS = (
    Kind("predict", 20, lambda s: _predict(s.png)),
    Kind("predict, numbers", 4, lambda s: _json("/predictions/{model}", {"data": _levels_of(s)})),
    Kind("predict, preprocessed", 4, lambda s: _predict(s.large_png)),
    Kind("explain", 14, lambda s: _explain(s.png)),
    Kind("explain, base64", 8, lambda s: _explain(s.png, X_Saliency_Encoding="base64")),
    Kind("explain, npy", 8, lambda s: _explain(s.png, Accept="application/x-npy")),
    Kind("explain, PNG", 3, lambda s: _explain(s.png, Accept="image/png")),
    Kind("explain, form", 4, lambda s: _form(EXPLANATIONS, s.png, target="3,9")),
    Kind("explain, large form", 0, lambda s: _form(EXPLANATIONS, s.png + bytes(LARGE_FORM_BYTES))),
    Kind("explain, all classes", 2, lambda s: _explain(s.png, X_Saliency_Target="all")),
    Kind("explain, space image", 3, lambda s: _explain(s.large_png, X_Saliency_Space="image"), tied_share=TIED_SHARE),
    Kind("smoothgrad", 3, lambda s: _explain(s.png, X_Saliency_Method="smoothgrad", X_Saliency_Samples="5")),
    Kind("integrated gradients", 2, lambda s: _explain(s.png, X_Saliency_Method="integrated_gradients", X_Saliency_Steps="5")),
    Kind("npy of 8", 2, lambda s: _explain(_npy_of(s, 8), Accept="application/x-npy")),
    Kind("KServe v1 of 4", 3, lambda s: _json(V1_EXPLAIN, _instances(s, 4))),
    Kind("KServe v2 of 2", 3, lambda s: _json(V2_EXPLAIN, _tensor(s, 2))),
    Kind("no image", 2, lambda s: _explain(b"this is no image"), 400, "UnreadableImage"),
    Kind("truncated image", 3, lambda s: _explain(s.png[: len(s.png) // 2]), 400, "UnreadableImage"),
    Kind("no body", 1, lambda s: _predict(b""), 400, "EmptyRequest"),
    Kind("broken JSON", 2, lambda s: Message("/predictions/{model}", b'{"data": [', JSON), 400, "MalformedJSON"),
    Kind("bad target", 2, lambda s: _explain(s.png, X_Saliency_Target="12"), 400, "InvalidOption"),
    Kind("unknown option", 1, lambda s: _json(EXPLANATIONS, {"data": s.text, "colour": "red"}), 400, "UnknownOption"),
    Kind("bad instance", 2, lambda s: _json(V1_EXPLAIN, {"instances": [s.text, "?"]}), 400, "MalformedBase64"),
    Kind("bad reply format", 1, lambda s: _explain(s.png, Accept="text/html"), 406, "NotAcceptable"),
    Kind("blank image", 2, lambda s: _explain(_image(60, 60)), 422, "BlankImage"),
    Kind("too many pixels", 2, lambda s: _explain(_image(5000, 4000)), 413, "ImageTooLarge"),
    Kind(
        "too many gradients",
        1,
        lambda s: _explain(s.png, X_Saliency_Method="smoothgrad", X_Saliency_Samples="500", X_Saliency_Target="all"),
        413,
        "RequestTooLarge",
    ),
    *(_attack_kind(name, attack) for name, attack in ATTACKS.items()),
)
RARE = frozenset({"explain, large form", *ATTACKS})  # sent once in each turn through all calls


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls in the order in which they are sent, over and over.

    Attributes:
        calls: (N,), with repetitions; a call's name is its kind's.
        distinct: (N,), the index of each among the distinct calls.
        labels: of each distinct call: the digit that its image shows.
    """

    calls: Sequence[Call]
    distinct: Sequence[int]
    labels: Sequence[int]

    def distinct_calls(self) -> list[Call]:
        """Each call once."""
        first = {index: call for call, index in zip(self.calls, self.distinct, strict=True)}
        return [first[index] for index in range(len(self.labels))]


def read_samples(files: Sequence[Path]) -> list[Sample]:
    """Read digits, named DIGIT-VARIANT.png, with a little noise added (see `dither`)."""
    samples = []
    for seed, file in enumerate(files):
        png = dither(file.read_bytes(), seed)
        with Image.open(io.BytesIO(png)) as image:
            large = io.BytesIO()
            image.resize((112, 112), Image.Resampling.BICUBIC).save(large, format="PNG")
        samples.append(Sample(int(file.stem.partition("-")[0]), png, large.getvalue()))
    return samples


def build_traffic(address: str, model: str, samples: Sequence[Sample]) -> Traffic:
    """Write every kind of request with every image, as often as its weight says, in an order shuffled the same way each time."""
    calls: list[Call] = []
    counts: list[int] = []
    labels: list[int] = []
    for number, sample in enumerate(samples):
        for kind in KINDS:
            count = int(number == 0) if kind.name in RARE else kind.weight
            if not count:
                continue
            message = kind.make(sample)
            path = message.path.format(model=model)
            calls.append(build_call(kind.name, address, path, message.body, message.headers))
            counts.append(count)
            labels.append(sample.label)
    order = np.random.default_rng(SEED).permutation(np.repeat(np.arange(len(calls)), counts)).tolist()
    return Traffic([calls[index] for index in order], order, labels)


class Answers:
    """The right answers, learned from requests that were alone, and the comparison of others with them."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._kinds = {kind.name: kind for kind in KINDS}
        self._names = [call.name for call in traffic.distinct_calls()]
        self._right: dict[int, tuple[int, bytes]] = {}  # status and body of each distinct call
        self._known: dict[int, set[int]] = {index: set() for index in range(len(traffic.labels))}
        self.wrong_count = 0
        self.first_wrong = ""  # what the first wrong answer was, for a person

    @property
    def learned_count(self) -> int:
        """Number of distinct calls that have a right answer so far."""
        return len(self._right)

    def learn(self, call: int, status: int, body: bytes) -> bool:
        """Take the answer to a distinct call that was alone. Returns whether it is the one that its kind calls for."""
        kind = self._kinds[self._names[call]]
        if not is_as_described(kind, self._traffic.labels[call], status, body):
            self._note_wrong(kind.name, status, body)
            return False
        self._right[call] = status, body
        return True

    def check(self, call: int, status: int, body: bytes) -> bool:
        """Whether the answer to a call of the traffic is right."""
        index, name = self._traffic.distinct[call], self._traffic.calls[call].name
        kind, known, mark = self._kinds[name], self._known[index], hash(body)
        right_status, right_body = self._right[index]
        if kind.attack and (status, right_status) != (200, 200):  # a refusal may name the seconds that were measured
            error = error_type(body)
            is_right = kind.calls_for(status, error) or (status, error) == COME_AGAIN
        else:
            is_right = status == right_status and (mark in known or say_the_same(right_body, body, kind.tied_share))
            if is_right and len(known) < KNOWN_REPLIES:
                known.add(mark)
        if not is_right:
            self._note_wrong(name, status, body)
        return is_right

    def _note_wrong(self, name: str, status: int, body: bytes) -> None:
        self.wrong_count += 1
        self.first_wrong = self.first_wrong or f"{name}: status {status}, {body[:200]!r}"


def is_as_described(kind: Kind, label: int, status: int, body: bytes) -> bool:
    """Whether an answer has its kind's status and error and, as JSON for one image, the digit that the image shows."""
    error = error_type(body) if body.startswith(b"{") else ""
    if not body or not kind.calls_for(status, error):
        return False
    if error or kind.attack or not body.startswith(b"{"):
        return True
    return bool(orjson.loads(body).get("digit", label) == label)


def say_the_same(one: bytes, other: bytes, tied_share: float = 0.0) -> bool:
    """Whether two replies are equal but for the rounding of their numbers, and for a share of those of a map."""
    if one == other:
        return True
    try:
        if one.startswith(b"{"):
            return _is_close(orjson.loads(one), orjson.loads(other), tied_share)
        if one.startswith(b"\x93NUMPY"):
            first, second = (np.load(io.BytesIO(body), allow_pickle=False) for body in (one, other))
            return first.shape == second.shape and bool(_are_close(first, second).all())
        with Image.open(io.BytesIO(one), formats=["PNG"]) as image, Image.open(io.BytesIO(other), formats=["PNG"]) as second:
            if image.size != second.size:
                return False
            difference = np.asarray(image.convert("RGB"), np.float32) - np.asarray(second.convert("RGB"), np.float32)
            return bool(np.abs(difference).mean() <= PIXEL_TOLERANCE)
    except (ValueError, TypeError, EOFError, OSError, SyntaxError):  # the other has another form, or is damaged
        return False


def _is_close(one: object, other: object, tied_share: float, name: str = "") -> bool:
    if name == "saliency":
        first, second = _map_of(one), _map_of(other)
        return first.shape == second.shape and bool((~_are_close(first, second)).mean() <= tied_share)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_close(one[key], other[key], tied_share, key) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        if one and len(one) == len(other) and all(isinstance(number, float | int) for number in [*one, *other]):
            return bool(_are_close(np.array(one, np.float64), np.array(other, np.float64)).all())
        return len(one) == len(other) and all(_is_close(*pair, tied_share) for pair in zip(one, other, strict=True))
    if isinstance(one, float | int) and isinstance(other, float | int):
        return abs(one - other) <= TOLERANCE * (1 + abs(one))  # 1: a completeness gap is what larger numbers leave
    return one == other


def _are_close(one: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which numbers are the same but for rounding, by the largest of their row: of a map (..., H, W), or of a list (N,)."""
    largest = np.abs(one).max(axis=(-2, -1) if one.ndim > 1 else -1, keepdims=True)
    close: NDArray[np.bool_] = np.abs(one - other) <= TOLERANCE * largest
    return close


def _map_of(saliency: object) -> NDArray[np.float32]:
    """Read a map from JSON, nested or base64."""
    if isinstance(saliency, str):
        return np.frombuffer(base64.b64decode(saliency, validate=True), "<f4")
    return np.array(saliency, np.float32)
