"""Drawings as replies, through a real TorchServe: the right saliency map, every option, every refusal."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
import requests
from numpy.typing import NDArray
from PIL import Image

from handler.render.drawing import Colormap, Layout, Polarity, Row, Style, draw
from scripts.serving.launcher import TorchServe
from tests.client import (
    Arguments,
    Sample,
    ask,
    ask_at_once,
    base64_of,
    check_error,
    check_explanation,
    check_prediction,
    explain,
    predict,
)
from tests.oracle import compute_probabilities
from tests.tolerance import FLOAT32_SHARE, require_close

PNG = {"Accept": "image/png"}


def pixels_of(content: bytes) -> NDArray[np.int16]:
    with (
        warnings.catch_warnings(
            action="ignore", category=Image.DecompressionBombWarning
        ),  # handler.images.decode's limit is for inputs
        Image.open(io.BytesIO(content)) as image,
    ):
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image).astype(np.int16)


def check_image(reply: requests.Response, sample: Sample, target: int | list[int] | None, style: Style) -> None:
    """Check that a reply is the drawing of the oracle's saliency maps, up to float32 rounding."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "image/png"
    classes = [sample.predicted] if target is None else [int(k) for k in np.atleast_1d(target)]
    maps = sample.jacobian[classes]
    image = sample.levels.astype(np.float32) / np.float32(255)
    expected = pixels_of(draw([Row(image, maps.astype(np.float32), tuple(classes), "logit per unit of intensity")], style))
    drawn = pixels_of(reply.content)
    assert drawn.shape == expected.shape
    assert np.abs(drawn - expected).max() <= 4  # one level of the steepest colour map
    assert reply.headers["X-Digit"] == str(sample.predicted)
    probability = compute_probabilities(sample.logits).max()
    assert float(reply.headers["X-Probability"]) == pytest.approx(probability, rel=FLOAT32_SHARE)
    assert reply.headers["X-Saliency-Method"] == "gradient"
    assert reply.headers["X-Saliency-Target"] == ",".join(map(str, classes))
    extremes = [float(reply.headers[f"X-Saliency-{name}"]) for name in ("Min", "Max")]
    require_close(extremes, [maps.min(), maps.max()])


def test_default_drawing_is_an_overlay_of_448_pixels(server: TorchServe, samples: list[Sample]) -> None:
    for sample in samples[:3]:
        reply = ask(server, explain(data=sample.png, headers=PNG))
        check_image(reply, sample, None, Style())
        assert pixels_of(reply.content).shape == (448, 448, 3)


@pytest.mark.parametrize(
    ("options", "style"),
    [
        ({"size": 100}, Style(size=100)),
        ({"layout": "map", "colormap": "PuOr"}, Style(layout=Layout.MAP, colormap=Colormap.PUOR)),
        ({"layout": "side_by_side", "clip_percentile": 90.5}, Style(layout=Layout.SIDE_BY_SIDE, clip_percentile=90.5)),
        ({"polarity": "negative", "size": 56}, Style(polarity=Polarity.NEGATIVE, size=56)),
        (
            {"colormap": "viridis", "polarity": "absolute", "layout": "map"},
            Style(colormap=Colormap.VIRIDIS, polarity=Polarity.ABSOLUTE, layout=Layout.MAP),
        ),
    ],
    ids=str,
)
def test_options_of_a_drawing_work_as_json_form_and_headers(
    server: TorchServe, samples: list[Sample], options: dict[str, Any], style: Style
) -> None:
    sample = samples[4]
    as_headers = {f"X-Saliency-{name.replace('_', '-')}": str(value) for name, value in options.items()}
    for arguments in (
        explain(json={"data": base64_of(sample), "target": 8} | options, headers=PNG),
        explain(files={"data": sample.png}, data={"target": 8} | options, headers=PNG),
        predict(data=sample.png, headers=PNG | {"X-Saliency-Explain": "true", "X-Saliency-Target": "8"} | as_headers),
    ):
        check_image(ask(server, arguments), sample, 8, style)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("target", [[3], [4, 9], list(range(10))], ids=str)
def test_several_targets_are_one_drawing(server: TorchServe, samples: list[Sample], target: list[int], layout: Layout) -> None:
    fields = {"data": samples[2].levels.tolist(), "target": target, "size": 90, "layout": layout}
    check_image(ask(server, explain(json=fields, headers=PNG)), samples[2], target, Style(size=90, layout=layout))


def test_what_a_browsers_image_tag_accepts_gives_a_drawing(server: TorchServe, samples: list[Sample]) -> None:
    accept = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"
    check_image(ask(server, explain(data=samples[0].png, headers={"Accept": accept})), samples[0], None, Style())


def test_blank_image_is_drawn(server: TorchServe) -> None:
    for layout in Layout:
        reply = ask(
            server, explain(json={"data": [[0] * 28] * 28, "target": "all", "layout": layout, "prepare": "none"}, headers=PNG)
        )
        assert reply.status_code == 200, reply.text
        assert pixels_of(reply.content).size > 0


def test_one_batch_gives_numbers_drawings_and_errors_each_to_its_own_client(server: TorchServe, samples: list[Sample]) -> None:
    for first in range(0, 8, 4):
        one, two, three, four = samples[first : first + 4]
        batch: list[Arguments] = [
            explain(data=one.png, headers=PNG),
            explain(data=two.png, headers=PNG | {"X-Saliency-Target": "5", "X-Saliency-Layout": "map"}),
            explain(data=three.png),
            predict(data=four.png),
            explain(data=one.png, headers=PNG | {"X-Saliency-Target": "all", "X-Saliency-Size": "1024"}),
            explain(data=two.png, headers=PNG | {"X-Saliency-Size": "10000"}),
            predict(data=three.png, headers=PNG),
            explain(data=four.png, headers=PNG | {"X-Saliency-Colormap": "plasma"}),
        ]
        replies = ask_at_once(server, batch)
        check_image(replies[0], one, None, Style())
        check_image(replies[1], two, 5, Style(layout=Layout.MAP))
        check_explanation(replies[2], three)
        check_prediction(replies[3], four)
        check_error(replies[4], 400, "InvalidOption")
        check_error(replies[5], 400, "InvalidOption")
        check_error(replies[6], 406, "NotAcceptable")
        check_error(replies[7], 400, "InvalidOption")


def test_largest_drawing_gets_through(server: TorchServe, samples: list[Sample]) -> None:
    headers = PNG | {"X-Saliency-Size": "1024", "X-Saliency-Layout": "side_by_side"}
    check_image(
        ask(server, explain(data=samples[5].png, headers=headers)), samples[5], None, Style(size=1024, layout=Layout.SIDE_BY_SIDE)
    )
