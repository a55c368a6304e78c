"""Results -> the bytes, status and headers of a reply. Knows nothing of TorchServe or torch."""

import base64
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from io import BytesIO
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from handler.errors import Overloaded, RequestTooLarge, ServiceError, WrongShape
from handler.gradients.explain import Explanation
from handler.gradients.methods import Method
from handler.images.preparation import ImageWarning, PreparedImage
from handler.limits import MAX_BATCH_BYTES, MAX_HEADER_IMAGES
from handler.protocol.kserve import BYTES, EXPLANATION_OUTPUTS, GAP_OUTPUT, LENGTH, PREDICTION_OUTPUTS, Infer
from handler.protocol.options import Encoding, Options, Space
from handler.protocol.request import ReplyFormat
from handler.render.drawing import Row, draw

WITH_RESPECT_TO = {
    Space.CANONICAL: "pixel intensity in [0, 1]",
    Space.IMAGE: "grey level in [0, 1] of the image as sent",
}
PER_INTENSITY = " per unit of intensity"  # how the unit of a signed derivative ends
REPLY_HEADERS = (
    *("X-Digit", "X-Probability", "X-Saliency-Method", "X-Saliency-Target", "X-Saliency-Min", "X-Saliency-Max"),
    *("X-Saliency-Completeness-Gap", "X-Saliency-Warnings", "Inference-Header-Content-Length"),
)
BINARY_TYPE = "application/octet-stream"
BINARY_HEADER = "Inference-Header-Content-Length"
TREATED_AS_CONSTANT = "geometry, threshold, stretch, the paper's level, which pixels are ink"  # while grey levels vary


@dataclass(frozen=True, slots=True)
class Result:
    """What the network says of one image.

    Attributes:
        options: what was asked about it.
        image: as the network got it.
        logits: float32 (K,).
        probabilities: float64 (K,), calibrated.
        explanation: its saliency maps (T, H, W), where it was asked for, in the pixels that were asked for: the network's, or
            the image's as it was sent.
        warnings: what may make the answer wrong.
    """

    options: Options
    image: PreparedImage
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float64]
    explanation: Explanation | None = None
    warnings: tuple[ImageWarning, ...] = ()

    @property
    def digit(self) -> int:
        """The class with the highest score."""
        return int(self.logits.argmax())

    @property
    def saliency(self) -> NDArray[np.floating]:
        """The maps as they are sent: float32 (H, W), or (T, H, W) where a list of targets was asked for."""
        assert self.explanation is not None
        return self.explanation.maps if self.options.target.several else self.explanation.maps[0]

    @property
    def target(self) -> int | list[int]:
        """What the maps explain: a class, or a list where one was asked for."""
        assert self.explanation is not None
        return list(self.explanation.classes) if self.options.target.several else self.explanation.classes[0]

    @property
    def convergence_delta(self) -> float | list[float]:
        """The convergence delta of each map, in the form of `target`."""
        assert self.explanation is not None
        assert self.explanation.convergence_deltas is not None
        deltas = self.explanation.convergence_deltas
        return deltas.tolist() if self.options.target.several else float(deltas[0])


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back to one client. Header values are text, and `content_type` is ASCII, as TorchServe needs them.

    `error` is the type of the error that it tells of, `warnings` are the types of all its warnings.
    """

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def reason_phrase(self) -> str:
        """The constant ASCII phrase that belongs to the status."""
        return HTTPStatus(self.status).phrase


def render_results(
    results: Sequence[Result], reply_format: ReplyFormat, model: dict[str, str], *, listed: bool, infer: Infer | None
) -> Reply:
    """Write the results of one request in the format that the client asked for.

    Args:
        results: one an image, at least one. For npy and PNG each has maps.
        model: name, version and checksum, for the reply's `model`.
        listed: whether the reply is a list, be it of one.
        infer: for a JSON reply in the form of the Open Inference Protocol.
    Raises:
        WrongShape: one array was asked for, and the maps differ in shape.
        InvalidOption: the PNG asked for would be too large.
    """
    reply = _render(results, reply_format, model, listed=listed, infer=infer)
    warnings = tuple(warning.type for result in results for warning in result.warnings)
    return replace(reply, warnings=warnings) if warnings else reply


def _render(
    results: Sequence[Result], reply_format: ReplyFormat, model: dict[str, str], *, listed: bool, infer: Infer | None
) -> Reply:
    if reply_format is ReplyFormat.PNG:
        return _render_png(results)
    if reply_format is ReplyFormat.NPY:
        return _render_npy(results, listed=listed)
    if infer is not None:
        return _render_tensors(results, model, infer)
    content = _describe_list(results, model) if listed else _describe(results[0], model)
    return Reply(HTTPStatus.OK, ReplyFormat.JSON, orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))


def render_description(description: dict[str, Any]) -> Reply:
    """Write what the service says of itself."""
    return Reply(HTTPStatus.OK, ReplyFormat.JSON, orjson.dumps(description))


def render_error(error: ServiceError) -> Reply:
    """Write an error. Its code is in the body too, since gRPC loses the status."""
    details: dict[str, Any] = {"code": error.status, "type": type(error).__name__}
    if error.indices:
        details["indices"] = error.indices
    content = {"error": error.message, **details} if error.as_text else {"error": {**details, "message": error.message}}
    body = json.dumps(content).encode()
    return Reply(error.status, ReplyFormat.JSON, body, dict(error.headers), error=type(error).__name__)


def fit_batch(replies: Sequence[Reply], max_bytes: int = MAX_BATCH_BYTES) -> list[Reply]:
    """Make a batch's replies small enough to be sent together: put an error in the place of the largest, as often as needed.

    Returns:
        the replies, in the same order; the smaller ones always unchanged.
    """
    fitted = list(replies)
    size = sum(len(reply.body) for reply in fitted)
    if size <= max_bytes:
        return fitted
    largest_first = sorted(range(len(fitted)), key=lambda index: len(fitted[index].body), reverse=True)
    for index in largest_first:
        if size <= max_bytes:
            break
        own_size = len(fitted[index].body)
        error: ServiceError = Overloaded(
            f"server overloaded by large replies, of which this request's has {own_size:,} bytes: retry, or ask for less"
        )
        if own_size > max_bytes:  # by itself, then and later
            error = RequestTooLarge(
                f"expected a reply of at most {max_bytes:,} bytes, got a request whose reply has {own_size:,}"
            )
        fitted[index] = render_error(error)
        size += len(fitted[index].body) - own_size
    return fitted


def _describe(result: Result, model: dict[str, str]) -> dict[str, Any]:
    """Say all there is to say of one image."""
    digit = result.digit
    content: dict[str, Any] = {
        "digit": digit,
        "probability": result.probabilities[digit],
        "probabilities": result.probabilities,
        "logits": result.logits,
    }
    if result.explanation is not None:
        content["explanation"] = _describe_maps(result)
    content["preparation"] = _describe_preparation(result)
    if result.warnings:
        content["warnings"] = [{"type": warning.type, "message": warning.message} for warning in result.warnings]
    content["model"] = model
    return content


def _describe_preparation(result: Result) -> dict[str, Any]:
    preparation, pixels = result.image.describe(), result.image.pixels
    if result.options.pixels:
        preparation |= {
            "window": result.image.window,
            "shape": pixels.shape,
            "pixels": pixels if result.options.encoding is Encoding.NESTED else _base64_of(pixels),
        }
    return preparation


def _describe_maps(result: Result) -> dict[str, Any]:
    options, saliency = result.options, result.saliency
    parameters = options.method.values
    return {
        "method": options.method.name,
        **({"parameters": parameters} if parameters else {}),
        "output": options.method.output,
        "unit": _unit_of(options),
        "target": result.target,
        "target_source": _target_source(options),
        "with_respect_to": WITH_RESPECT_TO[options.space],
        **({"held_fixed": TREATED_AS_CONSTANT} if options.space is Space.IMAGE else {}),
        "space": options.space,
        **({GAP_OUTPUT: result.convergence_delta} if options.method.has_convergence_delta else {}),
        "shape": saliency.shape,
        "dtype": _name_of(saliency.dtype),
        "encoding": options.encoding,
        "saliency": saliency if options.encoding is Encoding.NESTED else _base64_of(saliency),
    }


def _unit_of(options: Options) -> str:
    """The unit of the map's numbers, in the space that was asked for."""
    unit = options.method.unit
    return unit.replace(PER_INTENSITY, " per unit of grey level") if options.space is Space.IMAGE else unit


@functools.cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """Its name, which numpy puts together anew each time."""
    return dtype.name


def _target_source(options: Options) -> str:
    return "predicted" if all(target is None for target in options.target.classes) else "request"


def _base64_of(saliency: NDArray[np.floating]) -> str:
    return base64.b64encode(_little_endian(saliency)).decode()


def _describe_list(results: Sequence[Result], model: dict[str, str]) -> dict[str, Any]:
    """Say the same of several images, in the form of KServe v1."""
    predictions = [_describe(result, model) for result in results]
    explanations = [prediction.pop("explanation", None) for prediction in predictions]
    content: dict[str, Any] = {"predictions": predictions}
    if any(explanation is not None for explanation in explanations):
        content["explanations"] = explanations
    return content


def list_warnings(results: Sequence[Result]) -> str:
    """Name the types of all warnings: of one image with commas between them, of several images with semicolons."""
    return ";".join(",".join(warning.type for warning in result.warnings) for result in results)


def _render_tensors(results: Sequence[Result], model: dict[str, str], infer: Infer) -> Reply:
    """Write the form of the Open Inference Protocol v2; what is asked for in binary stands behind the JSON."""
    content = _describe_tensors(results, model, infer)
    binary = b""
    for tensor in content["outputs"]:
        if infer.wants_binary(tensor["name"]):
            data = tensor.pop("data")
            own = _binary_of(data)
            tensor["parameters"] = {**tensor.get("parameters", {}), "binary_data_size": len(own)}
            binary += own
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(infer.wants_binary(tensor["name"]) for tensor in content["outputs"]):
        return Reply(HTTPStatus.OK, ReplyFormat.JSON, body)
    return Reply(HTTPStatus.OK, BINARY_TYPE, body + binary, {BINARY_HEADER: str(len(body))})


def _binary_of(data: NDArray[Any] | list[str]) -> bytes:
    """The bytes of a tensor: numbers with the least significant byte first; of BYTES each element behind its length."""
    if isinstance(data, list):
        elements = [text.encode() for text in data]
        return b"".join(LENGTH.pack(len(element)) + element for element in elements)
    return data.astype(data.dtype.newbyteorder("<")).tobytes()


def _describe_tensors(results: Sequence[Result], model: dict[str, str], infer: Infer) -> dict[str, Any]:
    """Say it in the form of the Open Inference Protocol v2: named tensors, whose data are flat."""
    options = results[0].options  # one for all, in this protocol
    explained = results[0].explanation is not None
    parameters: dict[str, Any] = {"weights_sha256": model["weights_sha256"]}
    if explained:
        method = options.method
        parameters |= {"method": method.name, **method.values, "output": method.output}
        parameters |= {"target_source": _target_source(options)}
        parameters |= {"with_respect_to": WITH_RESPECT_TO[options.space], "space": options.space}
    if any(result.warnings for result in results):
        parameters["warnings"] = list_warnings(results)
    own_outputs = (
        [name for name in EXPLANATION_OUTPUTS if name != GAP_OUTPUT or options.method.has_convergence_delta] if explained else []
    )
    names = infer.outputs or [*PREDICTION_OUTPUTS, *own_outputs]
    return {
        "model_name": model["name"],
        "model_version": model["version"],
        **({} if infer.id is None else {"id": infer.id}),
        "parameters": parameters,
        "outputs": [_tensor(name, results) for name in names],
    }


def _tensor(name: str, results: Sequence[Result]) -> dict[str, Any]:
    if name == "saliency" and results[0].options.encoding is Encoding.BASE64:
        texts = [_base64_of(result.saliency) for result in results]
        layout = {"encoding": "base64", "dtype": "float32", "shape": ",".join(map(str, results[0].saliency.shape))}
        return {"name": name, "datatype": BYTES, "shape": [len(texts)], "parameters": layout, "data": texts}
    make, datatype = _OUTPUT_MAKERS[name]
    values = make(results)
    return {"name": name, "datatype": datatype, "shape": values.shape, "data": values.ravel()}


def _stack_maps(results: Sequence[Result]) -> NDArray[np.floating]:
    """Put the maps of all images into one array: float32 (N, H, W) or (N, T, H, W)."""
    shapes = {result.saliency.shape for result in results}
    if len(shapes) > 1:
        raise WrongShape(f"expected maps of one shape for one array, got {sorted(shapes)}")
    return np.stack([result.saliency for result in results])


def _stack_probabilities(results: Sequence[Result]) -> NDArray[np.float32]:
    return np.stack([result.probabilities for result in results]).astype(np.float32)


_OUTPUT_MAKERS: dict[str, tuple[Callable[[Sequence[Result]], NDArray[Any]], str]] = {
    "digit": (lambda results: np.array([result.digit for result in results], dtype=np.int64), "INT64"),  # (N,)
    "probability": (lambda results: _stack_probabilities(results).max(axis=1), "FP32"),  # (N,)
    "probabilities": (_stack_probabilities, "FP32"),  # (N, K)
    "logits": (lambda results: np.stack([result.logits for result in results]), "FP32"),  # (N, K)
    "target": (lambda results: np.array([result.target for result in results], dtype=np.int64), "INT64"),  # (N,) or (N, T)
    "saliency": (_stack_maps, "FP32"),  # (N, H, W) or (N, T, H, W)
    GAP_OUTPUT: (
        lambda results: np.array([result.convergence_delta for result in results], dtype=np.float32),
        "FP32",
    ),  # (N,) or (N, T)
}


def _little_endian(saliency: NDArray[np.floating]) -> bytes:
    return saliency.astype("<f4").tobytes()


def _render_npy(results: Sequence[Result], *, listed: bool) -> Reply:
    saliency = _stack_maps(results) if listed else results[0].saliency
    body = BytesIO()
    np.save(body, saliency.astype("<f4"), allow_pickle=False)
    return Reply(HTTPStatus.OK, ReplyFormat.NPY, body.getvalue(), _map_headers(results))


def _render_png(results: Sequence[Result]) -> Reply:
    methods = [result.options.method for result in results]
    titles = [_title(method) if len(set(methods)) > 1 else "" for method in methods]  # rows of one method need none
    rows = [
        _draw_ink(_row(result.image, result.explanation, method.unit, title), result)
        for result, method, title in zip(results, methods, titles, strict=True)
        if result.explanation is not None
    ]
    return Reply(HTTPStatus.OK, ReplyFormat.PNG, draw(rows, results[0].options.style), _map_headers(results))


def _row(image: PreparedImage, explanation: Explanation, unit: str, title: str) -> Row:
    """Put the maps onto the pixels that they are of or, where they are asked for there, onto the image as it was sent."""
    if image.thumbnail is not None:
        grey, window = image.thumbnail.grey, image.thumbnail.window
        return Row(grey, explanation.maps, explanation.classes, unit, title, window)
    return Row(image.pixels if image.sent is None else image.sent, explanation.maps, explanation.classes, unit, title)


def _draw_ink(row: Row, result: Result) -> Row:
    """Turn the sign of a derivative by dark ink, so that red is where more ink raises the score in both spaces.

    Numbers are by brightness, in the space of the image too; products with the pixel itself have no other sign.
    """
    if result.options.space is Space.IMAGE and result.image.inverted and result.options.method.unit.endswith(PER_INTENSITY):
        return replace(row, maps=-row.maps, unit=row.unit.removesuffix(PER_INTENSITY) + " per unit of darkness")
    return row


def _title(method: Method) -> str:
    """A method and what is not its default, in one line."""
    parameters = method.parameters()
    chosen = [f"{name} {value}" for name, value in method.values.items() if value != parameters[name].default]
    return ", ".join([method.name, *chosen])


def _map_headers(results: Sequence[Result]) -> dict[str, str]:
    """What a binary reply says beside the maps. Least and largest are of their numbers, whatever the colours."""
    methods = [result.options.method.name for result in results]
    if len(set(methods)) == 1:
        methods = methods[:1]
    headers = {
        "X-Saliency-Min": repr(float(min(result.saliency.min() for result in results))),
        "X-Saliency-Max": repr(float(max(result.saliency.max() for result in results))),
    }
    if any(result.warnings for result in results) and len(results) <= MAX_HEADER_IMAGES:
        headers["X-Saliency-Warnings"] = list_warnings(results)
    if len(methods) <= MAX_HEADER_IMAGES:
        headers["X-Saliency-Method"] = ";".join(methods)
    deltas = [
        np.atleast_1d(result.convergence_delta).tolist() if result.options.method.has_convergence_delta else []
        for result in results
    ]
    if any(deltas) and sum(map(len, deltas)) <= MAX_HEADER_IMAGES:
        headers["X-Saliency-Completeness-Gap"] = ";".join(",".join(map(repr, own)) for own in deltas)
    if len(results) <= MAX_HEADER_IMAGES:
        headers |= {
            "X-Digit": ";".join(str(result.digit) for result in results),
            "X-Probability": ";".join(repr(float(result.probabilities.max())) for result in results),
            "X-Saliency-Target": ";".join(",".join(map(str, np.atleast_1d(result.target))) for result in results),
        }
    return headers
