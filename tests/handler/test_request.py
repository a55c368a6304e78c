"""Every form in which a request arrives, and every way in which it can be wrong."""

import base64
import json
import re
from typing import Any

import pytest

from handler.errors import (
    ClientError,
    EmptyRequest,
    InvalidOption,
    InvalidRequest,
    MalformedBase64,
    MalformedJSON,
    NotAcceptable,
    UnknownOption,
)
from handler.gradients.methods import (
    GRADIENT,
    METHODS,
    PARAMETERS,
    Aggregate,
    Baseline,
    GradientXInput,
    IntegratedGradients,
    LossGradient,
    SmoothGrad,
)
from handler.images.preparation import Prepare
from handler.protocol.options import Encoding, Options, Targets, read_value
from handler.protocol.request import Part, ReplyFormat, Request, parse_request, read_correlation_id
from handler.render.drawing import Background, Colormap, Layout, Polarity, Style

IMAGE = b"\x89PNG any bytes"
BASE64 = base64.b64encode(IMAGE).decode()
JSON_HEADERS = {"Content-Type": "application/json"}


def parse(row: object, headers: dict[str, Any] | None = None) -> Request:
    return parse_request(row, headers or {}, class_count=10)


def parse_part(row: object, headers: dict[str, Any] | None = None) -> Part:
    """The one part of a request with one image."""
    request = parse(row, headers)
    assert (request.listed, request.infer) == (False, None)
    (part,) = request.parts
    assert isinstance(part, Part)
    return part


# --- where the image stands


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        pytest.param({"body": bytearray(IMAGE)}, {}, id="raw body"),
        pytest.param({"body": bytearray(IMAGE)}, {"Content-Type": "image/png"}, id="raw body with a type"),
        pytest.param({"data": bytearray(IMAGE)}, {}, id="form field data"),
        pytest.param({"image": bytearray(IMAGE), "target": bytearray(b"3")}, {}, id="form field image"),
        pytest.param({"body": bytearray(IMAGE), "target": bytearray(b"3")}, {}, id="form field body"),
        pytest.param({"body": {"data": BASE64}}, JSON_HEADERS, id="JSON that TorchServe parsed"),
        pytest.param({"body": {"image": BASE64}}, JSON_HEADERS, id="JSON image"),
        pytest.param({"body": bytearray(json.dumps({"data": BASE64}).encode())}, {}, id="JSON without a type"),
        pytest.param(
            {"body": bytearray(json.dumps({"data": BASE64}).encode())},
            {"content-type": "Application/JSON; charset=utf-8"},
            id="JSON whose type TorchServe does not know",
        ),
        pytest.param({"body": "  " + json.dumps({"data": BASE64})}, {"content-type": "text/plain"}, id="JSON as text"),
        pytest.param({"body": {"data": BASE64[:8] + "\n" + BASE64[8:] + "\n"}}, JSON_HEADERS, id="base64 with line breaks"),
        pytest.param({"body": {"data": "data:image/png;base64," + BASE64}}, JSON_HEADERS, id="data URL"),
    ],
)
def test_image_bytes_are_found(row: object, headers: dict[str, str]) -> None:
    assert parse_part(row, headers).payload == IMAGE


def test_nested_numbers_are_handed_on_unchecked() -> None:
    assert parse_part({"body": {"data": [[0, 1], [2, 3]]}}, JSON_HEADERS).payload == [[0, 1], [2, 3]]


def test_torchserves_own_sample_request_is_understood() -> None:
    request = parse_part({"body": {"data": BASE64, "target": 0}}, JSON_HEADERS | {"explain": "True"})
    assert request.payload == IMAGE
    assert request.options.explain
    assert request.options.target == Targets((0,), several=False)


@pytest.mark.parametrize(
    ("row", "headers", "error", "message"),
    [
        pytest.param({}, {}, EmptyRequest, "expected an image file .*got no image$", id="nothing"),
        pytest.param(
            {'{"data": "aGk': bytearray(b'="}')},
            {"Content-Type": "application/x-www-form-urlencoded"},
            EmptyRequest,
            "as 'curl -d' sends",
            id="curl -d",
        ),
        pytest.param({"body": bytearray()}, {}, EmptyRequest, "got no image$", id="empty body"),
        pytest.param({"body": {}}, JSON_HEADERS, EmptyRequest, "got no image$", id="empty object"),
        pytest.param({"target": bytearray(b"3")}, {}, EmptyRequest, "got no image$", id="form without image"),
        pytest.param({"data": bytearray()}, {}, EmptyRequest, "in 'data', got an empty field", id="empty field"),
        pytest.param({"body": {"data": " \n"}}, JSON_HEADERS, EmptyRequest, "in 'data', got an empty text", id="empty base64"),
        pytest.param(
            {"body": bytearray(b"{'a': 1}")}, JSON_HEADERS, MalformedJSON, "is not valid JSON at character 1", id="bad JSON"
        ),
        pytest.param(
            {"body": bytearray(b"{\xff}")},
            JSON_HEADERS,
            MalformedJSON,
            "expected a JSON object in UTF-8, got a body that is not valid JSON$",
            id="no UTF-8",
        ),
        pytest.param(
            {"body": bytearray(b"[" * 100_000)},
            {},
            MalformedJSON,
            "expected JSON nested at most 32 levels deep, got more",
            id="deep JSON",
        ),
        pytest.param(
            {"body": bytearray(b"9" * 5000)},
            JSON_HEADERS,
            MalformedJSON,
            "expected a JSON object in UTF-8, got a body that is not valid JSON",
            id="huge integer",
        ),
        pytest.param({"body": [1, 2]}, JSON_HEADERS, InvalidRequest, r"expected a JSON object .*, got \[1, 2\]", id="JSON list"),
        pytest.param({"body": None}, JSON_HEADERS, InvalidRequest, "expected a JSON object .*, got None", id="JSON null"),
        pytest.param({"body": {"data": 3}}, JSON_HEADERS, InvalidRequest, "in 'data', got 3", id="number as image"),
        pytest.param({"body": {"data": None}}, JSON_HEADERS, EmptyRequest, "got no image$", id="null as image"),
        pytest.param(
            {"body": {"data": BASE64, "image": BASE64}},
            JSON_HEADERS,
            InvalidRequest,
            r"got several \(data, image\)",
            id="two",
        ),
        pytest.param({"body": {"data": "%%%"}}, JSON_HEADERS, MalformedBase64, "in 'data', got '%%%'", id="bad base64"),
        pytest.param({"body": {"data": "abcde"}}, JSON_HEADERS, MalformedBase64, "got 'abcde'", id="base64 without padding"),
        pytest.param({"body": {"data": "\u00e4\ud800bc"}}, JSON_HEADERS, MalformedBase64, "got '.xe4.ud800bc'", id="not ASCII"),
    ],
)
def test_request_without_a_readable_image_is_refused(
    row: object, headers: dict[str, str], error: type[ClientError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        parse(row, headers)
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 400


# --- options


def test_defaults_are_those_of_the_contract() -> None:
    assert parse({"body": bytearray(IMAGE)}).reply_format is ReplyFormat.JSON
    options = parse_part({"body": bytearray(IMAGE)}).options
    assert options == Options()
    assert not options.explain
    assert options.target == Targets((None,), several=False)


OPTION_CASES = [
    pytest.param("explain", True, Options(explain=True), id="explain"),
    pytest.param("explain", False, Options(), id="no explain"),
    pytest.param("target", 7, Options(target=Targets((7,), several=False)), id="class"),
    pytest.param("target", "predicted", Options(), id="predicted"),
    pytest.param("target", [3, "predicted"], Options(target=Targets((3, None), several=True)), id="list"),
    pytest.param("target", [3], Options(target=Targets((3,), several=True)), id="list of one"),
    pytest.param("target", "all", Options(target=Targets(tuple(range(10)), several=True)), id="all"),
    pytest.param("method", "gradient", Options(), id="method"),
    pytest.param("method", "loss_gradient", Options(method=LossGradient()), id="loss gradient"),
    pytest.param("method", "gradient_x_input", Options(method=GradientXInput()), id="gradient x input"),
    pytest.param("method", "smoothgrad", Options(method=SmoothGrad(25, 0.15, 0, Aggregate.MEAN)), id="smoothgrad"),
    pytest.param(
        "method", "integrated_gradients", Options(method=IntegratedGradients(50, Baseline.ZERO)), id="integrated gradients"
    ),
    pytest.param("space", "canonical", Options(), id="space"),
    pytest.param("prepare", "none", Options(prepare=Prepare.NONE), id="prepare"),
    pytest.param("encoding", "base64", Options(encoding=Encoding.BASE64), id="encoding"),
    pytest.param("size", 28, Options(style=Style(size=28)), id="least size"),
    pytest.param("size", 1024, Options(style=Style(size=1024)), id="largest size"),
    pytest.param("colormap", "PuOr", Options(style=Style(colormap=Colormap.PUOR)), id="colormap"),
    pytest.param("polarity", "negative", Options(style=Style(polarity=Polarity.NEGATIVE)), id="polarity"),
    pytest.param("clip_percentile", 50, Options(style=Style(clip_percentile=50)), id="least percentile"),
    pytest.param("clip_percentile", 99.9, Options(style=Style(clip_percentile=99.9)), id="percentile"),
    pytest.param("clip_percentile", 100, Options(style=Style(clip_percentile=100)), id="largest percentile"),
    pytest.param("layout", "side_by_side", Options(style=Style(layout=Layout.SIDE_BY_SIDE)), id="layout"),
    pytest.param("background", "sent", Options(style=Style(background=Background.SENT)), id="background"),
]


@pytest.mark.parametrize(("name", "value", "expected"), OPTION_CASES)
def test_option_means_the_same_in_json_form_and_header(name: str, value: object, expected: Options) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    assert parse_part({"body": {"data": BASE64, name: value}}, JSON_HEADERS).options == expected
    assert parse_part({"data": bytearray(IMAGE), name: bytearray(text.encode())}).options == expected
    assert parse_part({"data": bytearray(IMAGE), name: text}).options == expected
    assert parse_part({"body": bytearray(IMAGE)}, {f"X-SALIENCY-{name}": f" {text} "}).options == expected
    assert parse_part({"body": bytearray(IMAGE)}, {f"x-saliency-{name.replace('_', '-')}": text}).options == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "smoothgrad", "samples": 1}, SmoothGrad(samples=1)),
        ({"samples": 500, "method": "smoothgrad", "noise": 0}, SmoothGrad(samples=500, noise=0)),
        ({"method": "smoothgrad", "seed": 2**32 - 1, "noise": 0.5}, SmoothGrad(seed=2**32 - 1, noise=0.5)),
        ({"method": "smoothgrad", "aggregate": "variance"}, SmoothGrad(aggregate=Aggregate.VARIANCE)),
        ({"method": "integrated_gradients", "steps": 300, "baseline": "mean"}, IntegratedGradients(300, Baseline.MEAN)),
    ],
    ids=str,
)
def test_parameters_mean_the_same_in_json_form_and_header(given: dict[str, object], expected: object) -> None:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    assert parse_part({"body": {"data": BASE64, **given}}, JSON_HEADERS).options.method == expected
    form = {name: bytearray(text.encode()) for name, text in texts.items()}
    assert parse_part({"data": bytearray(IMAGE), **form}).options.method == expected
    headers = {f"X-Saliency-{name}": text for name, text in texts.items()}
    assert parse_part({"body": bytearray(IMAGE)}, headers).options.method == expected


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_of_another_method_is_refused(name: str) -> None:
    value = PARAMETERS[name].default
    for method in METHODS.values():
        fields = {"data": BASE64, "method": method.name, name: value}
        if name in method.parameters():
            assert parse_part({"body": fields}, JSON_HEADERS).options.method == method()
        else:
            with pytest.raises(InvalidOption, match=f"expected 'method' .* with '{name}', got {method.name}, which takes "):
                parse({"body": fields}, JSON_HEADERS)
    with pytest.raises(InvalidOption, match=f"expected 'method' .* with '{name}', got gradient, which takes no parameters"):
        parse({"body": {"data": BASE64}}, JSON_HEADERS | {f"X-Saliency-{name}": str(value)})


@pytest.mark.parametrize(
    ("options", "is_accepted"),
    [
        ({"method": "loss_gradient"}, True),
        ({"method": "gradient_x_input"}, True),
        ({"method": "smoothgrad"}, True),
        ({"method": "smoothgrad", "aggregate": "squared"}, False),
        ({"method": "smoothgrad", "aggregate": "variance"}, False),
        ({"method": "integrated_gradients"}, False),
    ],
    ids=str,
)
def test_map_without_a_meaning_in_the_clients_pixels_is_refused(options: dict[str, str], is_accepted: bool) -> None:
    row = {"body": {"data": BASE64, "space": "image", **options}}
    if is_accepted:
        assert parse_part(row, JSON_HEADERS).options.method.name == options["method"]
        return
    given = "".join(f" and '{name}' {value}" for name, value in options.items() if name != "method")
    with pytest.raises(
        InvalidOption, match=f"expected 'space' canonical with 'method' {options['method']}{given}, whose maps have no "
    ):
        parse(row, JSON_HEADERS)


def test_instances_have_methods_of_their_own_and_share_parameters_that_fit() -> None:
    instances = [BASE64, {"data": BASE64, "method": "smoothgrad"}, {"data": BASE64, "method": "loss_gradient"}]
    shared = parse({"body": {"instances": instances[1:2], "samples": 5, "noise": 0.1}}).parts
    assert [part.options.method for part in shared if isinstance(part, Part)] == [SmoothGrad(5, 0.1)]
    own = parse({"body": {"instances": instances}}).parts
    assert [part.options.method for part in own if isinstance(part, Part)] == [GRADIENT, SmoothGrad(), LossGradient()]
    plain, smooth, loss = parse({"body": {"instances": instances, "samples": 5}}).parts
    assert isinstance(smooth, Part)
    assert smooth.options.method == SmoothGrad(5)
    for part in (plain, loss):
        assert isinstance(part, InvalidOption)
        assert "with 'samples', got " in part.message


def test_gap_is_an_output_of_integrated_gradients_alone() -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "data": [BASE64]}
    body = {"inputs": [tensor], "outputs": [{"name": "completeness_gap"}], "explain": True}
    assert parse({"body": body | {"method": "integrated_gradients"}}).infer is not None
    with pytest.raises(
        InvalidRequest, match="expected 'method' integrated_gradients for the output 'completeness_gap', got gradient"
    ):
        parse({"body": body})


@pytest.mark.parametrize("text", ["3,9", "3, 9", "[3, 9]", " 3 ,9 "])
def test_list_of_targets_in_text_has_commas_or_is_json(text: str) -> None:
    options = parse_part({"body": bytearray(IMAGE)}, {"X-Saliency-Target": text}).options
    assert options.target == Targets((3, 9), several=True)


@pytest.mark.parametrize(
    "value",
    [
        *(-1, 10, True, 3.5, {}, [], [10], [3, True], ["all"], [[3]], [1] * 11, float("nan"), float("inf")),
        *("seven", "-1", "10", "3.5", "+3", "\u0663", "", "1e0", "3,,4", "[3", "3;4", "9" * 400, "Predicted"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_target_that_is_no_class_is_refused(value: object) -> None:
    with pytest.raises(InvalidOption, match=r"^expected a .* as 'target', got ") as caught:
        parse({"body": {"data": BASE64, "target": value}}, JSON_HEADERS)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("explain", "yes", "true or false"),
        ("explain", 1, "true or false"),
        ("explain", [True, True], "true or false"),
        ("method", "lime", "gradient, loss_gradient, gradient_x_input, smoothgrad, integrated_gradients"),
        *[
            ("samples", value, "an integer from 1 to 500")
            for value in (0, 501, 25.5, True, "-1", "1e2", "", "25.5", [25, 25], 10**400)
        ],
        *[("noise", value, "a number from 0 to 1") for value in (-0.1, 1.1, True, "nan", "-0", float("nan"), float("inf"))],
        *[("seed", value, "an integer from 0 to 4294967295") for value in (-1, 2**32, 0.5, False, "+1", "9" * 11)],
        *[("steps", value, "an integer from 1 to 300") for value in (0, 301, 50.5, "fifty")],
        ("aggregate", "median", "mean, squared, variance"),
        ("baseline", 0, "zero, mean"),
        ("space", "frequency", "canonical"),
        ("prepare", "Auto", "auto, none"),
        ("encoding", 64, "nested, base64"),
        ("encoding", ["nested", "base64"], "nested, base64"),
        *[("size", value, "an integer from 28 to 1024") for value in (27, 1025, 448.5, True, "-28", "1e2", "", "9" * 400)],
        *[
            ("clip_percentile", value, "a number from 50 to 100")
            for value in (49.9, 100.1, True, "nan", "inf", "+99", "1e2", "", float("nan"), "9" * 400)
        ],
        ("colormap", "jet", "RdBu_r, PuOr, viridis, plasma, cividis"),
        ("polarity", "both", "signed, absolute, positive, negative"),
        ("layout", "mosaic", "overlay, map, side_by_side"),
    ],
)
def test_value_that_an_option_does_not_take_is_refused(name: str, value: object, accepted: str) -> None:
    with pytest.raises(InvalidOption, match=rf"^expected .*{accepted}.* as '{name}', got "):
        parse({"body": {"data": BASE64, name: value}}, JSON_HEADERS)


@pytest.mark.parametrize(("name", "text"), [("target", "10"), ("target", "10.0"), ("samples", "100000"), ("noise", "7.50")])
def test_refused_number_is_shown_as_it_was_sent(name: str, text: str) -> None:
    with pytest.raises(InvalidOption, match=rf"as '{name}', got '{re.escape(text)}'$"):
        read_value(name, text, class_count=10)


def test_options_of_a_image_are_read_together_from_fields_and_headers() -> None:
    headers = JSON_HEADERS | {"X-Saliency-Polarity": "absolute", "X-Saliency-Clip-Percentile": "95", "X-Saliency-Size": "64"}
    options = parse_part({"body": {"data": BASE64, "colormap": "plasma", "size": 100}}, headers).options
    assert options.style == Style(size=100, colormap=Colormap.PLASMA, polarity=Polarity.ABSOLUTE, clip_percentile=95)


def test_signed_numbers_in_sequential_colours_are_refused() -> None:
    with pytest.raises(InvalidOption, match="expected one of RdBu_r, PuOr as 'colormap' with 'polarity' signed, got viridis"):
        parse({"body": {"data": BASE64, "colormap": "viridis"}}, JSON_HEADERS)


def test_option_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidOption, match="expected UTF-8 text in 'target'"):
        parse({"data": bytearray(IMAGE), "target": bytearray(b"\xff")})


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        pytest.param({"body": {"data": BASE64, "colour": "red"}}, JSON_HEADERS, id="JSON"),
        pytest.param({"data": bytearray(IMAGE), "colour": bytearray(b"red")}, {}, id="form"),
        pytest.param({"body": bytearray(IMAGE)}, {"X-Saliency-Colour": "red"}, id="header"),
    ],
)
def test_unknown_option_is_refused_and_the_known_ones_are_named(row: object, headers: dict[str, str]) -> None:
    with pytest.raises(
        UnknownOption,
        match="expected one of the options explain, target, method, space, prepare, encoding, pixels, "
        "size, colormap, polarity, clip_percentile, layout, background, samples, noise, seed, aggregate, steps, baseline ",
    ):
        parse(row, headers)


def test_field_stands_above_header() -> None:
    request = parse_part({"body": {"data": BASE64, "target": 3}}, JSON_HEADERS | {"X-Saliency-Target": "5"})
    assert request.options.target == Targets((3,), several=False)


def test_headers_that_torchserve_adds_for_form_fields_are_passed_over() -> None:
    """For each form field TorchServe puts {"content-type": ...} under the field's name among the headers."""
    added = {"X-Saliency-Target": {"content-type": "text/plain"}, "accept": {"content-type": ""}, "explain": {"content-type": ""}}
    assert parse({"body": bytearray(IMAGE)}, added) == parse({"body": bytearray(IMAGE)})


def test_only_the_frontends_own_header_makes_an_explanation_of_a_prediction() -> None:
    assert parse_part({"body": bytearray(IMAGE)}, {"explain": "True"}).options.explain
    assert not parse_part({"body": bytearray(IMAGE)}, {"explain": "False", "Explain": "True", "describe": "True"}).options.explain


# --- Accept


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", ReplyFormat.JSON),
        ("*/*", ReplyFormat.JSON),
        ("application/*", ReplyFormat.JSON),
        ("application/json", ReplyFormat.JSON),
        ("Application/X-NPY", ReplyFormat.NPY),
        ("application/x-npy, application/json", ReplyFormat.JSON),
        ("application/x-npy, application/json;q=0.5", ReplyFormat.NPY),
        ("application/x-npy;q=0.5, */*;q=0.1", ReplyFormat.NPY),
        ("text/html, application/xhtml+xml, */*;q=0.8", ReplyFormat.JSON),
        ("application/json;q=0, */*", ReplyFormat.NPY),
        ("application/json; charset=utf-8", ReplyFormat.JSON),
        ("image/png", ReplyFormat.PNG),
        ("image/*", ReplyFormat.PNG),
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", ReplyFormat.PNG),
        ("image/png;q=0.9, application/x-npy", ReplyFormat.NPY),
        ("image/png, application/json", ReplyFormat.JSON),
        ("application/*;q=0, */*", ReplyFormat.PNG),
    ],
)
def test_reply_format_follows_accept(accept: str, expected: ReplyFormat) -> None:
    assert parse({"body": bytearray(IMAGE)}, {"Accept": accept, "explain": "True"}).reply_format is expected


@pytest.mark.parametrize("accept", ["text/html", "image/gif", "application/json;q=0", "json", "*/*;q=0", "*;q=0"])
def test_accept_that_allows_no_reply_is_406(accept: str) -> None:
    with pytest.raises(NotAcceptable, match=r"^expected .* in Accept.*, got ") as caught:
        parse({"body": bytearray(IMAGE)}, {"Accept": accept, "explain": "True"})
    assert caught.value.status == 406


@pytest.mark.parametrize("accept", ["application/x-npy", "image/png", "image/*"])
def test_format_of_maps_is_refused_where_there_is_no_map(accept: str) -> None:
    with pytest.raises(
        NotAcceptable, match=r"expected one of application/json in Accept .*image/png are formats of maps: ask for an explanation"
    ):
        parse({"body": bytearray(IMAGE)}, {"Accept": accept})


# --- the correlation id


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param({"X-Correlation-Id": "Order.66_a-1"}, "Order.66_a-1", id="as documented"),
        pytest.param({"x-CORRELATION-id": "a" * 64}, "a" * 64, id="any letter case, longest"),
        pytest.param({"X-Request-Id": "proxy"}, "proxy", id="of a proxy"),
        pytest.param({"X-Request-Id": "proxy", "X-Correlation-Id": "own"}, "own", id="both"),
        pytest.param({"X-Request-Id": "proxy", "X-Correlation-Id": "no good"}, "proxy", id="the better one"),
        pytest.param({"X-Correlation-Id": "a" * 65}, None, id="too long"),
        pytest.param({"X-Correlation-Id": ""}, None, id="empty"),
        pytest.param({"X-Correlation-Id": "a\n[METRICS]b"}, None, id="a line of its own"),
        pytest.param({"X-Correlation-Id": "a\n"}, None, id="the end of a line"),
        pytest.param({"X-Correlation-Id": "\u0661"}, None, id="digits of another script"),
        pytest.param({"X-Correlation-Id": {"content-type": "a"}}, None, id="a form field of that name"),
        pytest.param({"Authorization": "secret", "X-Correlation": "a"}, None, id="none"),
    ],
)
def test_correlation_id_is_a_short_plain_word(headers: dict[str, object], expected: str | None) -> None:
    assert read_correlation_id(headers) == expected
