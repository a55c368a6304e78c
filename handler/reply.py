"""Results -> the bytes, status and headers of a reply. Knows nothing of TorchServe or torch."""

import base64
import json
from dataclasses import dataclass, field
from http import HTTPStatus
from io import BytesIO
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from handler.drawing import Row, draw
from handler.errors import ServiceError
from handler.request import Encoding, Options, ReplyFormat

WITH_RESPECT_TO = "pixel intensity in [0, 1]"
OUTPUT = "logit"


@dataclass(frozen=True, slots=True)
class Maps:
    """Saliency maps of one picture.

    Attributes:
        classes: what each map explains.
        saliency: float32 (len(classes), H, W), signed, logit per unit of intensity.
    """

    classes: tuple[int, ...]
    saliency: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Result:
    """What the network says of one picture.

    Attributes:
        logits: float32 (K,).
        maps: the explanation, where it was asked for.
        preparation: what was done to the picture before, for the reply.
        picture: float32 (H, W), the pixels that the maps are of, intensity in [0, 1].
    """

    logits: NDArray[np.float32]
    maps: Maps | None
    preparation: dict[str, Any]
    picture: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back to one client. Header values are text, and `content_type` is ASCII, as TorchServe needs them."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def reason_phrase(self) -> str:
        """The constant ASCII phrase that belongs to the status."""
        return HTTPStatus(self.status).phrase


def render_result(result: Result, options: Options, reply_format: ReplyFormat, model: dict[str, str]) -> Reply:
    """Write a result in the format that the client asked for.

    Args:
        model: name, version and checksum, for the reply's `model`.
    Raises:
        InvalidOption: the picture asked for would be too large.
    """
    if reply_format is ReplyFormat.NPY and result.maps is not None:
        return _render_npy(result, result.maps, options)
    if reply_format is ReplyFormat.PNG and result.maps is not None:
        return _render_png(result, result.maps, options)
    return _render_json(result, options, model)


def render_error(error: ServiceError) -> Reply:
    """Write an error. Its code is in the body too, since gRPC loses the status."""
    content = {"error": {"code": error.status, "type": type(error).__name__, "message": error.message}}
    return Reply(error.status, ReplyFormat.JSON, json.dumps(content).encode())


def probabilities_of(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Softmax, in float64: (K,) probabilities."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(exponentials / exponentials.sum())


def _render_json(result: Result, options: Options, model: dict[str, str]) -> Reply:
    probabilities = probabilities_of(result.logits)
    digit = int(result.logits.argmax())
    content: dict[str, Any] = {
        "digit": digit,
        "probability": probabilities[digit],
        "probabilities": probabilities,
        "logits": result.logits,
    }
    if result.maps is not None:
        content["explanation"] = _describe_maps(result.maps, options)
    content["preparation"] = result.preparation
    content["model"] = model
    return Reply(HTTPStatus.OK, ReplyFormat.JSON, orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))


def _describe_maps(maps: Maps, options: Options) -> dict[str, Any]:
    several = options.target.several
    saliency = maps.saliency if several else maps.saliency[0]
    explained_prediction = all(target is None for target in options.target.classes)
    return {
        "method": options.method,
        "output": OUTPUT,
        "target": list(maps.classes) if several else maps.classes[0],
        "target_source": "predicted" if explained_prediction else "request",
        "with_respect_to": WITH_RESPECT_TO,
        "space": options.space,
        "shape": saliency.shape,
        "dtype": saliency.dtype.name,
        "encoding": options.encoding,
        "saliency": saliency if options.encoding is Encoding.NESTED else base64.b64encode(_little_endian(saliency)).decode(),
    }


def _little_endian(saliency: NDArray[np.float32]) -> bytes:
    return saliency.astype("<f4").tobytes()


def _render_npy(result: Result, maps: Maps, options: Options) -> Reply:
    saliency = maps.saliency if options.target.several else maps.saliency[0]
    body = BytesIO()
    np.save(body, saliency.astype("<f4"), allow_pickle=False)
    return Reply(HTTPStatus.OK, ReplyFormat.NPY, body.getvalue(), _map_headers(result, maps, options))


def _render_png(result: Result, maps: Maps, options: Options) -> Reply:
    drawing = draw([Row(result.picture, maps.saliency, maps.classes)], options.style)
    return Reply(HTTPStatus.OK, ReplyFormat.PNG, drawing, _map_headers(result, maps, options))


def _map_headers(result: Result, maps: Maps, options: Options) -> dict[str, str]:
    """What a binary reply says beside the maps. Least and largest are of their numbers, whatever the colours."""
    digit = int(result.logits.argmax())
    return {
        "X-Digit": str(digit),
        "X-Probability": repr(float(probabilities_of(result.logits)[digit])),
        "X-Saliency-Method": str(options.method),
        "X-Saliency-Target": ",".join(str(target) for target in maps.classes),
        "X-Saliency-Min": repr(float(maps.saliency.min())),
        "X-Saliency-Max": repr(float(maps.saliency.max())),
    }
