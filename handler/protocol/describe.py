"""What the service says of itself, taken from the tables that it works by."""

from importlib.metadata import version
from typing import Any

from handler.gradients.methods import METHODS, PARAMETERS, Method
from handler.images.arrays import NUMPY_TYPES
from handler.images.decode import ACCEPTED_FORMATS
from handler.limits import MAX_GRADIENTS, MAX_IMAGE_MAP_NUMBERS, MAX_IMAGES, MAX_MAPS, MAX_PIXELS, MAX_PREPARED_IMAGES
from handler.protocol.kserve import BYTES, EXPLANATION_OUTPUTS, PREDICTION_OUTPUTS
from handler.protocol.request import HEADER_PREFIX, OPTION_PARSERS, STYLE_OPTIONS, Options, Prepare, ReplyFormat, Targets
from handler.render.drawing import Style

VERSIONS_OF = ("torch", "torchserve", "numpy", "scipy", "pillow")


def describe_service(model: dict[str, str], height: int, width: int, class_count: int) -> dict[str, Any]:
    """List options, accepted values and defaults, formats, limits and versions.

    Args:
        model: name, version and checksum of the weights.
        height, width: of the network's input.
        class_count: how many classes the network has.
    """
    return {
        "model": model,
        "class_count": class_count,
        "input_shape": [height, width],
        "image_formats": ACCEPTED_FORMATS,
        "array_shapes": [[height, width], ["N", height, width], ["N", 1, height, width]],
        "tensor_datatypes": [BYTES, *NUMPY_TYPES],
        "options": {
            name: {
                "accepted": parser.accepted(class_count),
                "default": _default_of(name),
                "header": HEADER_PREFIX + name.replace("_", "-"),
            }
            for name, parser in OPTION_PARSERS.items()
        },
        "methods": {
            name: {
                "description": method.description,
                "output": method.output,
                "parameters": {name: parameter.description for name, parameter in method.parameters().items()},
            }
            for name, method in METHODS.items()
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
        },
        "versions": {package: version(package) for package in VERSIONS_OF},
    }


def _default_of(name: str) -> object:
    """An option's default, in the form in which a client would send it."""
    if name in PARAMETERS:
        return PARAMETERS[name].default
    default = getattr(Style() if name in STYLE_OPTIONS else Options(), name)
    if default is None:  # of `prepare`: it depends on the form of the image, and for images is this
        return Prepare.AUTO
    if isinstance(default, Method):
        return default.name
    if not isinstance(default, Targets):
        return default
    classes = ["predicted" if target is None else target for target in default.classes]
    return classes if default.several else classes[0]
