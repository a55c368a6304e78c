"""What the service says of itself, taken from the tables that it works by."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from handler.gradients.methods import METHODS
from handler.images.arrays import NUMPY_TYPES
from handler.images.file_decoder import ACCEPTED_FORMATS
from handler.limits import (
    MAX_BODY_BYTES,
    MAX_GRADIENTS,
    MAX_IMAGE_MAP_NUMBERS,
    MAX_IMAGES,
    MAX_MAPS,
    MAX_PIXELS,
    MAX_PREPARED_IMAGES,
)
from handler.protocol.kserve import BYTES, EXPLANATION_OUTPUTS, PREDICTION_OUTPUTS
from handler.protocol.options import OPTIONS, accepted_values, header_of, schema_of
from handler.protocol.request import ReplyFormat
from handler.render.drawing import ANCHORS, DIVERGING

VERSIONS_OF = ("torch", "torchserve", "numpy", "scipy", "pillow")


def describe_service(model: dict[str, str], height: int, width: int, class_names: Sequence[str]) -> dict[str, Any]:
    """List options, accepted values and defaults, formats, limits and versions.

    Args:
        model: name, version and checksum of the weights.
        height, width: of the network's input.
        class_names: of the network's classes, in the order of their indices.
    """
    class_count = len(class_names)
    return {
        "model": model,
        "class_count": class_count,
        "class_names": list(class_names),
        "input_shape": [height, width],
        "image_formats": ACCEPTED_FORMATS,
        "array_shapes": [[height, width], ["N", height, width], ["N", 1, height, width]],
        "tensor_datatypes": [BYTES, *NUMPY_TYPES],
        "options": {
            name: {
                "accepted": accepted_values(option.values, class_count),
                "default": option.default,
                "header": header_of(name),
                "description": option.description,
                "schema": schema_of(option, class_count),
            }
            for name, option in OPTIONS.items()
        },
        "methods": {
            name: {
                "description": method.description,
                "output": method.output,
                "unit": method().unit,
                "parameters": {name: parameter.description for name, parameter in method.parameters().items()},
            }
            for name, method in METHODS.items()
        },
        "colormaps": {
            name.value: {"diverging": name in DIVERGING, "colours": [f"#{colour}" for colour in anchors.split()]}
            for name, anchors in ANCHORS.items()
        },
        "reply_formats": list(ReplyFormat),
        "tensor_outputs": {"prediction": PREDICTION_OUTPUTS, "explanation": EXPLANATION_OUTPUTS},
        "limits": {
            "pictures_a_request": MAX_IMAGES,
            "prepared_pictures_a_request": MAX_PREPARED_IMAGES,
            "maps_a_request": MAX_MAPS,
            "gradients_a_request": MAX_GRADIENTS,
            "image_pixels_a_request": MAX_PIXELS,
            "image_map_numbers_a_request": MAX_IMAGE_MAP_NUMBERS,
            "body_bytes": MAX_BODY_BYTES,
        },
        "versions": {package: version(package) for package in VERSIONS_OF},
    }
