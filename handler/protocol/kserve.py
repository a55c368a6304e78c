"""The bodies of KServe's two protocols, taken apart: which images, which options, which outputs.

KServe v1 is `{"instances": [...]}`, the Open Inference Protocol v2 `{"inputs": [...]}`. Works on parsed JSON and knows neither
the options nor images: `request` reads those.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from handler.errors import ClientError, InvalidRequest, WrongShape, shown
from handler.images.arrays import NUMPY_TYPES, Tensor, require_image_count
from handler.limits import MAX_ID_CHARACTERS

INSTANCES = "instances"  # the field that makes a body one of KServe v1
INPUTS = "inputs"  # the field that makes a body one of the Open Inference Protocol v2

BYTES = "BYTES"
PREDICTION_OUTPUTS = ("digit", "probability", "probabilities", "logits")
GAP_OUTPUT = "completeness_gap"  # only of a method that has one
EXPLANATION_OUTPUTS = ("target", "saliency", GAP_OUTPUT)  # only where an explanation was asked for


@dataclass(frozen=True, slots=True)
class Infer:
    """What the reply to a v2 request needs of it.

    Attributes:
        id: the request's own, None where it has none.
        outputs: names of the outputs asked for, in that order; empty for all.
    """

    id: str | None
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InferBody:
    """A v2 body, taken apart.

    Attributes:
        options: of all its images.
        images: a tensor of numbers; or base64 texts, with an error in the place of what is none.
    """

    options: dict[str, object]
    images: Tensor | list[str | ClientError]
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


def read_infer_body(body: Mapping[str, object]) -> InferBody:
    """Take a v2 body apart.

    In the protocol each input is another argument of the model, and a batch is the first dimension of its shape; this model has
    one argument, so there is one input. Its name is free.

    Raises:
        ClientError: the body has another form.
    """
    inputs = body[INPUTS]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        got = f"{len(inputs)} inputs" if isinstance(inputs, list) and len(inputs) != 1 else f"{shown(inputs)} as '{INPUTS}'"
        raise InvalidRequest(f"expected a list of one tensor, whose first dimension is the images, got {got}")
    tensor: dict[str, object] = inputs[0]
    options = _join_options(
        _without_binary_flag(_shared_options(body, {INPUTS, "id", "outputs"}), "binary_data_output"),
        _object_or_none(tensor.get("parameters"), "parameters"),
    )
    return InferBody(options, _read_input(tensor), Infer(_read_id(body.get("id")), _read_outputs(body.get("outputs"))))


def _read_input(tensor: Mapping[str, object]) -> Tensor | list[str | ClientError]:
    missing = [name for name in ("name", "shape", "datatype", "data") if name not in tensor]
    unknown = sorted(tensor.keys() - {"name", "shape", "datatype", "data", "parameters"})
    if missing or unknown:
        what = f"without {', '.join(missing)}" if missing else f"with {shown(', '.join(unknown))}"
        raise InvalidRequest(f"expected name, shape, datatype, data and, optionally, parameters in an input, got one {what}")
    datatype, shape, data = tensor["datatype"], tensor["shape"], tensor["data"]
    if not isinstance(datatype, str) or datatype not in (BYTES, *NUMPY_TYPES):
        raise InvalidRequest(f"expected one of {', '.join((BYTES, *NUMPY_TYPES))} as 'datatype', got {shown(datatype)}")
    if not isinstance(shape, list) or not all(type(length) is int for length in shape):
        raise InvalidRequest(f"expected a list of integers as 'shape', got {shown(shape)}")
    if not isinstance(data, list):
        raise InvalidRequest(f"expected a list as 'data', got {shown(data)}")
    if datatype != BYTES:
        return Tensor(datatype, tuple(shape), data)
    if len(shape) != 1 or shape[0] not in (-1, len(data)):
        raise WrongShape(f"expected shape [{len(data)}] or [-1] for {len(data)} {BYTES}, got {shown(shape)}")
    require_image_count(len(data))
    return [
        element if isinstance(element, str) else InvalidRequest(f"expected base64 text as {BYTES}, got {shown(element)}")
        for element in data
    ]


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


def _read_outputs(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    accepted = PREDICTION_OUTPUTS + EXPLANATION_OUTPUTS
    if not isinstance(value, list) or not all(isinstance(output, dict) for output in value):
        raise InvalidRequest(f"expected a list of {{\"name\": ...}} as 'outputs', got {shown(value)}")
    names: dict[str, None] = {}  # in order, each once
    for output in value:
        name = output.get("name")
        if name not in accepted:
            raise InvalidRequest(f"expected one of the outputs {', '.join(accepted)}, got {shown(name)}")
        unknown = output.keys() - {"name", "parameters"}
        unknown |= _without_binary_flag(_object_or_none(output.get("parameters"), "parameters"), "binary_data").keys()
        if unknown:
            raise InvalidRequest(f"expected the name alone of the output {name!r}, got {shown(', '.join(sorted(unknown)))}")
        names[name] = None
    return tuple(names)


def _without_binary_flag(parameters: dict[str, object], name: str) -> dict[str, object]:
    """Pass over what clients of the protocol's binary extension say to have none of it."""
    return {key: value for key, value in parameters.items() if not (key == name and value is False)}
