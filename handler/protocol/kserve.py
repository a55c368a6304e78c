"""The bodies of KServe's two protocols, taken apart: which images, which options, which outputs.

KServe v1 is `{"instances": [...]}`, the Open Inference Protocol v2 `{"inputs": [...]}`. Works on parsed JSON and knows neither
the options nor images: `request` reads those.
"""

import math
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.errors import ClientError, InvalidRequest, WrongShape, shown
from handler.images.arrays import NUMPY_TYPES, Tensor, require_image_count
from handler.limits import MAX_ID_CHARACTERS, MAX_SHAPE_LENGTH

INSTANCES = "instances"  # the field that makes a body one of KServe v1
INPUTS = "inputs"  # the field that makes a body one of the Open Inference Protocol v2

MAX_AXIS = 2**31  # of a shape: a product of larger ones would take time
BYTES = "BYTES"
LENGTH = struct.Struct("<I")  # of an element of binary BYTES
HEADER_LENGTH = "inference-header-content-length"  # of the binary extension: the header with the size of a body's JSON
PREDICTION_OUTPUTS = ("digit", "probability", "probabilities", "logits")
GAP_OUTPUT = "completeness_gap"  # only of a method that has one
EXPLANATION_OUTPUTS = ("target", "saliency", GAP_OUTPUT)  # only where an explanation was asked for


# Of the protocol's parameters these mean nothing here: clients send them by default.
IGNORED_PARAMETERS = frozenset(
    {"binary_data", "binary_data_size", "content_type", "model_name", "model_version", "priority", "timeout"}
    | {"sequence_id", "sequence_start", "sequence_end", "headers"}
)
IGNORED_PREFIX = "triton_"


@dataclass(frozen=True, slots=True)
class Infer:
    """What the reply to a v2 request needs of it.

    Attributes:
        id: the request's own, None where it has none.
        outputs: names of the outputs asked for, in that order; empty for all.
        binary: of some outputs, by name, whether they are asked for in binary.
        is_binary: whether the others are.
    """

    id: str | None
    outputs: tuple[str, ...]
    binary: Mapping[str, bool] = field(default_factory=dict)
    is_binary: bool = False

    def wants_binary(self, output: str) -> bool:
        """Whether an output is asked for in binary."""
        return self.binary.get(output, self.is_binary)


@dataclass(frozen=True, slots=True)
class InferBody:
    """A v2 body, taken apart.

    Attributes:
        options: of all its images.
        images: a tensor of numbers; or images as base64 texts or as bytes, with an error in the place of what is neither.
        infer: for the reply.
    """

    options: dict[str, object]
    images: Tensor | list[str | bytes | ClientError]
    infer: Infer


# --- KServe v1


def split_instances(body: Mapping[str, object]) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Take a v1 body apart.

    Returns:
        the options for all images; for each image the fields of its instance. An instance that is the image itself (a
        base64 text, nested numbers) is given the field `data`.
    Raises:
        ClientError: the body has another form.
    """
    instances = body[INSTANCES]
    if not isinstance(instances, list):
        raise InvalidRequest(f"expected a list of images as '{INSTANCES}', got {shown(instances)}")
    require_image_count(len(instances))
    return _shared_options(body, {INSTANCES}), [_fields_of(instance) for instance in instances]


def _fields_of(instance: object) -> dict[str, object]:
    if not isinstance(instance, dict):
        return {"data": instance}
    if "b64" in instance and "data" not in instance:  # KServe's and TensorFlow's form for bytes
        return {"data": {"b64": instance["b64"]}} | {name: value for name, value in instance.items() if name != "b64"}
    return dict(instance)


def _shared_options(body: Mapping[str, object], own_fields: Collection[str]) -> dict[str, object]:
    """Read the options that stand beside the images, and those in `parameters`."""
    beside = {name: value for name, value in body.items() if name not in own_fields and name != "parameters"}
    parameters = _object_or_none(body.get("parameters"), "parameters")
    return _join_options(beside, parameters)


def _join_options(options: dict[str, object], more: dict[str, object]) -> dict[str, object]:
    twice = sorted(options.keys() & more.keys())
    if twice:
        raise InvalidRequest(f"expected each option in one place, got {shown(', '.join(twice))} in two")
    return options | more


def _object_or_none(value: object, name: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"expected a JSON object as {name!r}, got {shown(value)}")
    return value


# --- Open Inference Protocol v2


def split_binary_body(content: bytes, header_length: str) -> tuple[bytes, bytes]:
    """Take a body of the protocol's binary extension apart: its JSON, and the tensors' bytes behind it.

    Args:
        content: the body.
        header_length: the value of the header Inference-Header-Content-Length.
    Raises:
        InvalidRequest: the body is shorter, or the header no number.
    """
    if not re.fullmatch(r"[0-9]{1,9}", header_length) or int(header_length) > len(content):
        raise InvalidRequest(
            f"expected a number up to the body's {len(content):,} bytes as 'Inference-Header-Content-Length', got "
            f"{shown(header_length)}"
        )
    return content[: int(header_length)], content[int(header_length) :]


def read_infer_body(body: Mapping[str, object], binary: bytes = b"") -> InferBody:
    """Take a v2 body apart.

    In the protocol each input is another argument of the model, and a batch is the first dimension of its shape; this model has
    one argument, so there is one input. Its name is free.

    Args:
        body: its JSON.
        binary: what stands behind that, by the binary extension.
    Raises:
        ClientError: the body has another form.
    """
    inputs = body[INPUTS]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        got = f"{len(inputs)} inputs" if isinstance(inputs, list) and len(inputs) != 1 else f"{shown(inputs)} as '{INPUTS}'"
        raise InvalidRequest(f"expected a list of one tensor, whose first dimension is the images, got {got}")
    tensor: dict[str, object] = inputs[0]
    own = _object_or_none(tensor.get("parameters"), "parameters")
    shared = _shared_options(body, {INPUTS, "id", "outputs"})
    all_binary = shared.pop("binary_data_output", False)
    options = _join_options(_without_ignored(shared), _without_ignored(own))
    outputs = _read_outputs(body.get("outputs"))
    infer = Infer(
        _read_id(body.get("id")), tuple(outputs), {n: b for n, b in outputs.items() if b is not None}, all_binary is True
    )
    return InferBody(options, _read_input(tensor, own, binary), infer)


def _read_input(
    tensor: Mapping[str, object], own: Mapping[str, object], binary: bytes
) -> Tensor | list[str | bytes | ClientError]:
    is_binary = own.get("binary_data_size") is not None
    missing = [name for name in ("name", "shape", "datatype", *(() if is_binary else ("data",))) if name not in tensor]
    unknown = sorted(tensor.keys() - {"name", "shape", "datatype", "data", "parameters"})
    if missing or unknown:
        what = f"without {', '.join(missing)}" if missing else f"with {shown(', '.join(unknown))}"
        raise InvalidRequest(f"expected name, shape, datatype, data and, optionally, parameters in an input, got one {what}")
    datatype, shape, data = tensor["datatype"], tensor["shape"], tensor.get("data")
    if not isinstance(datatype, str) or datatype not in (BYTES, *NUMPY_TYPES):
        raise InvalidRequest(f"expected one of {', '.join((BYTES, *NUMPY_TYPES))} as 'datatype', got {shown(datatype)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_SHAPE_LENGTH
        or not all(type(length) is int and -1 <= length < MAX_AXIS for length in shape)
    ):
        raise InvalidRequest(f"expected a list of up to {MAX_SHAPE_LENGTH} integers as 'shape', got {shown(shape)}")
    if is_binary:
        if data is not None:
            raise InvalidRequest("expected 'data' or 'binary_data_size' of an input, got both")
        if own["binary_data_size"] != len(binary):
            raise InvalidRequest(
                f"expected {shown(own['binary_data_size'])} bytes ('binary_data_size') behind the JSON, got {len(binary):,}"
            )
        content: list[Any] | bytes = binary if datatype != BYTES else _split_elements(binary)
    elif binary:
        raise InvalidRequest(f"expected 'binary_data_size' among the input's parameters, got {len(binary):,} bytes without it")
    elif isinstance(data, list):
        content = data
    else:
        raise InvalidRequest(f"expected a list as 'data', got {shown(data)}")
    if datatype != BYTES:
        return Tensor(datatype, tuple(shape), content)
    count = len(content)
    if math.prod(shape) != count and shape != [-1]:
        raise WrongShape(f"expected shape [{count}] or [-1] for {count} {BYTES}, got {shown(shape)}")
    require_image_count(count)
    return [
        element if isinstance(element, str | bytes) else InvalidRequest(f"expected base64 text as {BYTES}, got {shown(element)}")
        for element in content
    ]


def _split_elements(binary: bytes) -> list[bytes]:
    """Take binary BYTES apart: before each element stands its length, four bytes, the least significant first."""
    elements = []
    at = 0
    while at < len(binary):
        (length,) = LENGTH.unpack_from(binary, at) if len(binary) - at >= LENGTH.size else (len(binary),)
        at += LENGTH.size
        if length > len(binary) - at:
            raise InvalidRequest(
                f"expected elements of {BYTES}, each behind its length, got {len(binary):,} bytes that end within one"
            )
        elements.append(binary[at : at + length])
        at += length
        require_image_count(len(elements))
    return elements


def _read_id(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_ID_CHARACTERS or not _is_unicode(value):
        raise InvalidRequest(f"expected a text of at most {MAX_ID_CHARACTERS} characters as 'id', got {shown(value)}")
    return value


def _is_unicode(text: str) -> bool:
    """Whether a text can be sent back: JSON can hold half a character (a lone surrogate), UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_outputs(value: object) -> dict[str, bool | None]:
    """Read which outputs are asked for, in order, each once; and of each whether in binary, None where it does not say."""
    if value is None:
        return {}
    accepted = PREDICTION_OUTPUTS + EXPLANATION_OUTPUTS
    if not isinstance(value, list) or not all(isinstance(output, dict) for output in value):
        raise InvalidRequest(f"expected a list of {{\"name\": ...}} as 'outputs', got {shown(value)}")
    outputs: dict[str, bool | None] = {}
    for output in value:
        name = output.get("name")
        if name not in accepted:
            raise InvalidRequest(f"expected one of the outputs {', '.join(accepted)}, got {shown(name)}")
        parameters = _object_or_none(output.get("parameters"), "parameters")
        binary = parameters.get("binary_data")
        unknown = output.keys() - {"name", "parameters"} | _without_ignored(parameters).keys()
        if unknown:
            raise InvalidRequest(f"expected the name alone of the output {name!r}, got {shown(', '.join(sorted(unknown)))}")
        outputs[name] = binary if isinstance(binary, bool) else None
    return outputs


def _without_ignored(parameters: Mapping[str, object]) -> dict[str, object]:
    return {
        name: value
        for name, value in parameters.items()
        if name not in IGNORED_PARAMETERS and not name.startswith(IGNORED_PREFIX)
    }
