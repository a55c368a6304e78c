"""One table of options: what a request may ask, where its values come from, and how they are read.

An option stands in a header (X-Saliency-...), in a JSON or form field, or among a protocol's parameters. `describe`, the OpenAPI
document and the API reference are made from this table. Knows nothing of images, of torch or of TorchServe.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeGuard

from handler.errors import InvalidOption, UnknownOption, shown
from handler.gradients.methods import GRADIENT, METHODS, PARAMETERS, Method, Parameter
from handler.images.preparation import Prepare
from handler.limits import MAX_OPTION_CHARACTERS, MAX_SIZE, MIN_PERCENTILE, MIN_SIZE
from handler.render.drawing import Background, Colormap, Layout, Polarity, Style

HEADER_PREFIX = "x-saliency-"  # an option's header is this and its name, in any letter case, with hyphens
IMAGE_FIELDS = ("data", "image", "body")  # a JSON or form field of one of these names holds the image


class Encoding(StrEnum):
    """How numbers of a saliency map stand in JSON."""

    NESTED = "nested"
    BASE64 = "base64"


class Space(StrEnum):
    """Which pixels the score is differentiated by: what the network got, or the image as it was sent."""

    CANONICAL = "canonical"
    IMAGE = "image"


@dataclass(frozen=True, slots=True)
class Targets:
    """Which classes to explain.

    Attributes:
        classes: class indices; None stands for the predicted class.
        several: asked for as a list, so that the reply's shape starts with their number, even where that is 1.
    """

    classes: tuple[int | None, ...]
    several: bool


@dataclass(frozen=True, slots=True)
class Options:
    """All options of one image, with the defaults of those that its request leaves out."""

    explain: bool = False
    target: Targets = Targets(classes=(None,), several=False)
    method: Method = GRADIENT
    space: Space = Space.CANONICAL
    prepare: Prepare = Prepare.AUTO
    encoding: Encoding = Encoding.NESTED
    pixels: bool = False
    style: Style = dataclasses.field(default_factory=Style)

    @property
    def gradient_count(self) -> int:
        """How many gradients the maps take that are asked for: their cost."""
        return len(self.target.classes) * self.method.gradient_count if self.explain else 0


# --- the table


@dataclass(frozen=True, slots=True)
class Flag:
    """Values that are true or false."""


@dataclass(frozen=True, slots=True)
class Classes:
    """A class, "predicted", a list of these, or "all". In text, a list is JSON (`[3, 5]`) or has commas (`3,5`)."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `lowest` to `highest`, whole ones or any."""

    lowest: float
    highest: float
    whole: bool


Choices = Mapping[str, object]  # the accepted texts, and what each stands for
Values = Flag | Classes | Range | Choices


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        values: what is accepted.
        default: in the form in which a client would send it.
        description: for people, one line.
    """

    values: Values
    default: Any
    description: str


def _members(enumeration: type[StrEnum]) -> Choices:
    return {member.value: member for member in enumeration}


def _values_of(parameter: Parameter) -> Values:
    default = parameter.default
    if isinstance(default, StrEnum):
        return _members(type(default))
    return Range(parameter.lowest, parameter.highest, whole=isinstance(default, int))


_STYLE = Style()
STYLE_OPTIONS: Mapping[str, Option] = {  # of a drawing; the fields of Style
    "size": Option(Range(MIN_SIZE, MAX_SIZE, whole=True), _STYLE.size, "pixels of a panel's longer side"),
    "colormap": Option(
        _members(Colormap),
        _STYLE.colormap,
        "colours of a drawing; the first two diverge, the others take every polarity but `signed`",
    ),
    "polarity": Option(_members(Polarity), _STYLE.polarity, "which numbers are drawn; the others count as zero"),
    "clip_percentile": Option(
        Range(MIN_PERCENTILE, 100, whole=False),
        _STYLE.clip_percentile,
        "percentile of the absolute numbers that are not zero, from which on colours are full",
    ),
    "layout": Option(_members(Layout), _STYLE.layout, "the map over the image, the map alone, or image and maps side by side"),
    "background": Option(
        _members(Background),
        _STYLE.background,
        "image that a drawing has under its maps: what the network got, or the image as sent, with the maps where they come from",
    ),
}
OPTIONS: Mapping[str, Option] = {
    "explain": Option(Flag(), default=False, description="ask for an explanation on a route that predicts"),
    "target": Option(Classes(), "predicted", "class to explain, a list of classes, or all"),
    "method": Option(METHODS, GRADIENT.name, "how the saliency map is made"),
    "space": Option(_members(Space), Space.CANONICAL, "pixels to differentiate by: what the network got, or the image as sent"),
    "prepare": Option(
        _members(Prepare),
        Prepare.AUTO,
        "`auto` finds the digit in what lacks the framing of the training set, `none` only scales the image",
    ),
    "encoding": Option(
        _members(Encoding), Encoding.NESTED, "of the map in JSON: nested lists, or the base64 of little-endian float32 in C order"
    ),
    "pixels": Option(
        Flag(),
        default=False,
        description="put the pixels that the network got into a JSON reply, and where they lie in the image",
    ),
    **STYLE_OPTIONS,
    **{name: Option(_values_of(one), one.default, one.description) for name, one in PARAMETERS.items()},
}


def header_of(name: str) -> str:
    """The header of an option. It has hyphens, since many proxies drop headers with underscores."""
    return HEADER_PREFIX + name.replace("_", "-")


def accepted_values(values: Values, class_count: int) -> list[object]:
    """List the values that an option accepts, for people to read."""
    match values:
        case Flag():
            return [True, False]
        case Classes():
            return [*range(class_count), "predicted", "a list of these", "all"]
        case Range(lowest, highest, whole):
            return [f"an integer from {lowest:.0f} to {highest:.0f}" if whole else f"a number from {lowest} to {highest}"]
        case _:
            return list(values)


def schema_of(option: Option, class_count: int) -> dict[str, object]:
    """Describe the values that an option accepts for programs, as JSON Schema."""
    match option.values:
        case Flag():
            accepted: dict[str, object] = {"type": "boolean"}
        case Classes():
            one: dict[str, object] = {
                "anyOf": [{"type": "integer", "minimum": 0, "maximum": class_count - 1}, {"const": "predicted"}]
            }
            several = {"type": "array", "items": one, "minItems": 1, "maxItems": class_count}
            accepted = {"anyOf": [one, several, {"const": "all"}]}
        case Range(lowest, highest, whole):
            accepted = {"type": "integer" if whole else "number", "minimum": lowest, "maximum": highest}
        case choices:
            accepted = {"enum": list(choices)}
    return {**accepted, "default": option.default}


# --- one value


def read_value(name: str, value: object, class_count: int) -> object:
    """Check and convert the value of one option, as it was sent.

    Args:
        name: a key of OPTIONS.
        value: parsed JSON, or the text of a header or a form field.
        class_count: how many classes the network has.
    Raises:
        InvalidOption: the option does not take this value.
    """
    if isinstance(value, (bytes, bytearray, str)) and len(value) > MAX_OPTION_CHARACTERS:
        raise InvalidOption(f"expected a text of at most {MAX_OPTION_CHARACTERS:,} characters in {name!r}, got {len(value):,}")
    if isinstance(value, (bytes, bytearray)):
        try:
            value = bytes(value).decode()
        except UnicodeDecodeError as error:
            raise InvalidOption(f"expected UTF-8 text in {name!r}, got other bytes") from error
    if isinstance(value, list) and len(value) == 1 and not isinstance(OPTIONS[name].values, Classes):
        value = value[0]  # some languages write every scalar so
    if isinstance(value, str):
        value = value.strip()
    match OPTIONS[name].values:
        case Flag():
            return _read_flag(name, value)
        case Classes():
            return _read_targets(name, value, class_count)
        case Range() as numbers:
            return _read_number(name, value, numbers)
        case choices:
            if isinstance(value, str) and value in choices:
                return choices[value]
            raise InvalidOption(f"expected one of {', '.join(choices)} as {name!r}, got {shown(value)}")


def _read_flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise InvalidOption(f"expected true or false as {name!r}, got {shown(value)}")


def _read_number(name: str, value: object, accepted: Range) -> float:
    number = value  # the message below shows what was sent
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,9})?", value):
        number = float(value)
    if _is_number(number) and accepted.lowest <= number <= accepted.highest:  # false for NaN
        if not accepted.whole:
            return float(number)
        if number == int(number):
            return int(number)
    raise InvalidOption(f"expected {accepted_values(accepted, 0)[0]} as {name!r}, got {shown(value)}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_targets(name: str, value: object, class_count: int) -> Targets:
    if value == "all":
        return Targets(tuple(range(class_count)), several=True)
    members: object = value
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            members = json.loads(value)
    elif isinstance(value, str) and "," in value:
        members = [part.strip() for part in value.split(",")]
    if not isinstance(members, list):
        return Targets((_read_class(name, members, class_count),), several=False)
    if not 1 <= len(members) <= class_count:
        raise InvalidOption(f"expected a list of 1 to {class_count} classes as {name!r}, got {len(members)}")
    return Targets(tuple(_read_class(name, member, class_count) for member in members), several=True)


def _read_class(name: str, value: object, class_count: int) -> int | None:
    if value == "predicted":
        return None
    number = value  # the message below shows what was sent
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.0{1,9})?", value):
        number = float(value)
    if _is_number(number) and 0 <= number < class_count and number == int(number):
        return int(number)
    raise InvalidOption(
        f"expected a class from 0 to {class_count - 1}, 'predicted', a list of these, or 'all' as {name!r}, got {shown(value)}"
    )


# --- all of an image


def options_in(headers: Mapping[str, str]) -> dict[str, object]:
    """Find options among headers, whose names are in lower case: by name, as they were sent."""
    prefixed = {name.removeprefix(HEADER_PREFIX): value for name, value in headers.items() if name.startswith(HEADER_PREFIX)}
    return {name.replace("-", "_"): value for name, value in prefixed.items()}


def read_values(given: Mapping[str, object], class_count: int) -> dict[str, Any]:
    """Check and convert options one by one.

    Args:
        given: what was sent, by the option's name. JSON's null stands for what was not sent.
    Raises:
        UnknownOption, InvalidOption
    """
    for name in given:
        if name not in OPTIONS:
            raise UnknownOption(
                f"expected one of the options {', '.join(OPTIONS)} (as headers X-Saliency-...) or, for the image, one of "
                f"{', '.join(IMAGE_FIELDS)}, got {shown(name)}"
            )
    return {name: read_value(name, value, class_count) for name, value in given.items() if value is not None}


def fit_options(values: Mapping[str, Any], *, explain_route: bool) -> Options:
    """Make one value of all options, once they fit each other.

    Args:
        values: as of `read_values`.
        explain_route: the request came in by a route that explains, whatever its options say.
    Raises:
        InvalidOption: two of them do not fit.
    """
    if not values:  # as in most requests
        return _default_options(explain=explain_route)
    if explain_route:
        values = {**values, "explain": True}
    general = {name: value for name, value in values.items() if name not in STYLE_OPTIONS and name not in PARAMETERS}
    style = Style(**{name: values[name] for name in STYLE_OPTIONS if name in values})
    if not values.keys() & {"method", *PARAMETERS}:
        return Options(**general, style=style)
    general["method"] = _fit_method(
        values.get("method", type(GRADIENT)), {name: value for name, value in values.items() if name in PARAMETERS}
    )
    options = Options(**general, style=style)
    if options.space is Space.IMAGE and not options.method.has_image_space:
        chosen = "".join(f" and {name!r} {value}" for name, value in options.method.values.items() if name in values)
        raise InvalidOption(
            f"expected 'space' {Space.CANONICAL} with 'method' {options.method.name}{chosen}, whose maps have no meaning in the "
            f"pixels of the image, got {options.space}"
        )
    return options


@functools.cache
def _default_options(*, explain: bool) -> Options:
    """The options of a request that gives none; all such requests share them."""
    return Options(explain=explain)


def _fit_method(method: type[Method], parameters: Mapping[str, Any]) -> Method:
    """Give a method its parameters."""
    accepted = method.parameters()
    for name in parameters:
        if name not in accepted:
            takes = ", ".join(accepted) or "no parameters"
            of = ", ".join(other.name for other in METHODS.values() if name in other.parameters())
            raise InvalidOption(f"expected 'method' {of} with {name!r}, got {method.name}, which takes {takes}")
    return method(**parameters)
