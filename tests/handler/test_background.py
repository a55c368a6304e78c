"""Maps drawn on the image as it was sent: at the place they come from, in the colours that they have elsewhere."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw

from handler.gradients.methods import METHODS
from handler.images.thumbnail import Thumbnail
from handler.preprocess import preprocess
from handler.protocol.request import parse_request
from handler.render.drawing import DIVERGING, Background, Colormap, Layout, Polarity, Row, Style, draw
from handler.saliency_handler import SaliencyHandler
from scripts.paths import SAMPLE_FILES
from tests.worker import answer

Levels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom

SIZE = 420  # of a panel
SENT = Style(size=SIZE, background=Background.SENT, clip_percentile=100)
STORED = {  # an upright image as a camera stores it that was held otherwise, by the Exif orientation that it then writes
    1: lambda levels: levels,
    2: lambda levels: levels[:, ::-1],
    3: lambda levels: levels[::-1, ::-1],
    4: lambda levels: levels[::-1],
    5: lambda levels: levels.T,
    6: lambda levels: levels.T[::-1],
    7: lambda levels: levels[::-1, ::-1].T,
    8: lambda levels: levels.T[:, ::-1],
}


def page(width: int, height: int, box: Box, *, bright_ink: bool = False) -> Levels:
    """A 0 whose ink fills a box of a page with some grain."""
    left, top, right, bottom = box
    drawing = Image.new("L", (width, height), 215)
    pen = max(2, (bottom - top) // 8)  # as wide as MNIST has it: a finer one is drawn wider
    ImageDraw.Draw(drawing).ellipse((left, top, right - 1, bottom - 1), outline=30, width=pen)
    levels = np.asarray(drawing) + np.random.default_rng(1).integers(-3, 4, (height, width))
    return (255 - levels if bright_ink else levels).astype(np.uint8)


def file_of(levels: Levels, image_format: str = "PNG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(STORED[orientation](levels))).save(content, image_format, exif=exif)
    return content.getvalue()


def drawn(content: bytes) -> NDArray[np.int16]:
    """Red minus blue of a drawing: (H, W), 0 where it is grey."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "RGB"
        pixels = np.asarray(image).astype(np.int16)
    return np.asarray(pixels[..., 0] - pixels[..., 2], np.int16)


def row_of(content: bytes, size: int = SIZE) -> tuple[Row, float]:
    """A row whose map is the ink that the network got, drawn where the image has it; and how many panel pixels a map's has."""
    fields = {"data": bytearray(content), "background": bytearray(b"sent"), "size": bytearray(str(size).encode())}
    prepared = preprocess(parse_request(fields, {"explain": "True", "Accept": "image/png"}, 10), 28, 28).images[0]
    assert prepared.thumbnail is not None
    grey, window = prepared.thumbnail.grey, prepared.thumbnail.window
    assert max(grey.shape) <= size
    ink = np.where(prepared.pixels > 0.5, 1, 0).astype(np.float32)
    return Row(grey, ink[None], (0,), window=window), (window[2] - window[0]) / 28 * size / max(grey.shape)


def box_of(coloured: NDArray[np.bool_]) -> list[int]:
    y, x = np.nonzero(coloured)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


# --- where the map is


def test_map_fills_its_window_and_leaves_the_rest_grey() -> None:
    row = Row(np.full((40, 60), 0.5, np.float32), np.array([[[1, -1], [-1, 1]]], np.float32), (0,), window=(10, 20, 30, 30))
    red_minus_blue = drawn(draw([row], replace(SENT, size=120)))
    expected = np.zeros((80, 120), int)
    expected[40:50, 20:40], expected[50:60, 40:60] = 1, 1
    expected[40:50, 40:60], expected[50:60, 20:40] = -1, -1
    np.testing.assert_array_equal(np.sign(red_minus_blue), expected)


def test_what_of_the_window_lies_beyond_the_image_is_cut_off() -> None:
    maps = np.arange(1, 17, dtype=np.float32).reshape(1, 4, 4)
    row = Row(np.zeros((20, 20), np.float32), maps, (0,), window=(-10, -10, 30, 30))
    whole = Row(np.zeros((20, 20), np.float32), maps[:, 1:3, 1:3], (0,))
    # The limit is that of all of the map, whatever of it is seen.
    style = replace(SENT, size=40)
    cut, seen = drawn(draw([row], style)), drawn(draw([whole], style))
    assert (cut[:20, :20] == cut[0, 0]).all()
    assert (cut[0, 0] < cut[0, -1] < cut[-1, 0] < cut[-1, -1]) == (seen[0, 0] < seen[0, -1] < seen[-1, 0] < seen[-1, -1])
    assert cut[-1, -1] < seen[-1, -1]


def test_window_smaller_than_its_map_averages_it() -> None:
    checked = np.indices((28, 28)).sum(axis=0) % 2 * 2 - 1
    row = Row(np.full((100, 100), 0.5, np.float32), checked[None].astype(np.float32), (0,), window=(40, 40, 47, 47))
    assert not drawn(draw([row], replace(SENT, size=100))).any()


PAGES = {
    "small": (90, 70, (30, 20, 50, 52)),
    "wide": (1200, 400, (850, 60, 1010, 330)),
    "high": (500, 1500, (60, 900, 320, 1400)),
    "small digit": (1600, 1200, (1200, 200, 1300, 350)),
    "near the border": (600, 600, (8, 300, 150, 590)),
}


@pytest.mark.parametrize("bright_ink", [False, True], ids=["dark ink", "bright ink"])
@pytest.mark.parametrize("name", PAGES)
def test_ink_that_the_network_got_is_drawn_on_the_ink_that_was_sent(name: str, bright_ink: bool) -> None:
    width, height, box = PAGES[name]
    row, unit = row_of(file_of(page(width, height, box, bright_ink=bright_ink)))
    scale = SIZE / max(width, height)
    np.testing.assert_allclose(
        box_of(drawn(draw([row], SENT)) > 0), np.multiply(box, scale), atol=1.5 * unit + 1
    )  # finer strokes are drawn bolder


@pytest.mark.parametrize("orientation", STORED)
def test_image_turned_by_exif_is_drawn_upright_as_viewers_show_it(orientation: int) -> None:
    levels = page(640, 400, (400, 60, 520, 300))
    upright, _ = row_of(file_of(levels))
    turned, _ = row_of(file_of(levels, orientation=orientation))
    assert draw([turned], SENT) == draw([upright], SENT)


def test_huge_jpeg_is_kept_small_and_drawn_at_its_place() -> None:
    """20 megapixels, which are decoded at half of their size."""
    width, height, box = 5000, 4000, (3000, 900, 3900, 2400)
    row, unit = row_of(file_of(page(width, height, box), "JPEG"))
    assert row.image.shape == (336, SIZE)
    np.testing.assert_allclose(box_of(drawn(draw([row], SENT)) > 0), np.multiply(box, SIZE / width), atol=unit + 1)


def test_thumbnail_of_a_large_image_is_its_average_and_holds_nothing_of_it() -> None:
    grey = np.random.default_rng(2).random((3000, 2000), dtype=np.float32)
    thumbnail = Thumbnail.of(grey, (200, 300, 1000, 1500), 300)
    assert thumbnail.grey.shape == (300, 200)
    assert not np.shares_memory(thumbnail.grey, grey)
    np.testing.assert_allclose(thumbnail.grey, grey.reshape(300, 10, 200, 10).mean(axis=(1, 3)), atol=1e-5)
    assert thumbnail.window == pytest.approx((20, 30, 100, 150))


def test_small_image_is_kept_as_it_is() -> None:
    grey = np.eye(30, dtype=np.float32)
    thumbnail = Thumbnail.of(grey, (-1, 0, 30, 31), 300)
    assert thumbnail.grey is grey
    assert thumbnail.window == (-1, 0, 30, 31)


# --- through the handler


def explain(handler: SaliencyHandler, tmp_path: Path, row: dict[str, Any], accept: str = "image/png") -> tuple[int, bytes]:
    ((status, _, body),) = answer(handler, [(row, {"explain": "True", "Accept": accept})], tmp_path / "unpacked")
    return status, body


def request_of(content: bytes, **options: str) -> dict[str, Any]:
    return {"data": bytearray(content)} | {name: bytearray(value.encode()) for name, value in options.items()}


@pytest.mark.parametrize("bright_ink", [False, True], ids=["dark ink", "bright ink"])
def test_red_is_where_more_ink_raises_the_score_whatever_the_ink(
    handler: SaliencyHandler, tmp_path: Path, bright_ink: bool
) -> None:
    """The network's ink is always bright: its derivative's sign is that of more ink."""
    content = file_of(page(600, 400, (250, 60, 380, 330), bright_ink=bright_ink))
    status, body = explain(handler, tmp_path, request_of(content, target="9"), "application/x-npy")
    assert status == 200
    saliency = np.load(io.BytesIO(body))
    status, body = explain(handler, tmp_path, request_of(content, target="9", pixels="true"), "application/json")
    left, top, right, bottom = json.loads(body)["preparation"]["window"]
    status, body = explain(handler, tmp_path, request_of(content, target="9", background="sent", size="600"))
    assert status == 200
    red_minus_blue = drawn(body)
    full = np.abs(saliency) > np.abs(saliency).max() / 4
    y, x = np.nonzero(full)
    along_y, along_x = top + (y + 0.5) * (bottom - top) / 28, left + (x + 0.5) * (right - left) / 28
    inside = (along_y > 0) & (along_y < 400) & (along_x > 0) & (along_x < 600)
    assert np.count_nonzero(inside) > 10
    seen = red_minus_blue[along_y[inside].astype(int), along_x[inside].astype(int)]
    np.testing.assert_array_equal(np.sign(seen), np.sign(saliency[full][inside]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [Layout.OVERLAY, Layout.SIDE_BY_SIDE])
def test_every_method_is_drawn_for_several_targets_on_its_own_image(
    handler: SaliencyHandler, tmp_path: Path, method: str, layout: Layout
) -> None:
    options = {"method": method, "target": "4,9", "size": "100", "layout": layout, "background": "sent"}
    sizes = []
    for width, height in ((600, 300), (300, 600)):
        content = file_of(page(width, height, (110, 60, 220, 250)))
        status, body = explain(handler, tmp_path, request_of(content, **options))
        assert status == 200, body
        assert drawn(body).any()
        with Image.open(io.BytesIO(body)) as image:
            sizes.append(image.size)
    assert sizes[0][0] > sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


@pytest.mark.parametrize(
    ("colormap", "polarity"),
    [(colormap, polarity) for colormap in Colormap for polarity in Polarity if colormap in DIVERGING or polarity != "signed"],
)
def test_colours_lie_in_the_window_alone(colormap: Colormap, polarity: Polarity) -> None:
    maps = np.random.default_rng(3).choice(np.array([-1, 1], np.float32), (1, 28, 28))
    row = Row(np.full((100, 200), 0.6, np.float32), maps, (3,), window=(20, 30, 60, 70))
    with Image.open(io.BytesIO(draw([row], replace(SENT, size=200, colormap=colormap, polarity=polarity)))) as image:
        coloured = np.ptp(np.asarray(image).astype(int), axis=2) > 0
    assert box_of(coloured) == [20, 30, 60, 70]


def test_side_by_side_has_the_image_the_map_over_it_and_a_bar_in_the_colours_on_its_paper() -> None:
    maps = np.zeros((1, 2, 2), np.float32)
    maps[0, 0, 0], maps[0, 1, 1] = 1, -1
    row = Row(np.full((50, 100), 0.8, np.float32), maps, (3,), window=(40, 10, 60, 30))
    with Image.open(io.BytesIO(draw([row], replace(SENT, size=200, layout=Layout.SIDE_BY_SIDE)))) as image:
        pixels = np.asarray(image)
    red, blue = (drawn(draw([row], replace(SENT, size=200)))[y, x] for y, x in ((30, 90), (50, 110)))
    colours = pixels.astype(int)[..., 0] - pixels.astype(int)[..., 2]
    assert (colours == red).sum() > 400  # the map's pixel, and the upper end of the bar
    assert (colours == blue).sum() > 400
    assert {colours[colours > 0].max(), colours[colours < 0].min()} == {red, blue}  # no colour is fuller than on the image
    assert (pixels == 204).all(axis=2).sum() >= 2 * 200 * 100 - 2 * 40 * 40  # the paper of both panels


def test_images_of_one_request_are_drawn_below_each_other(handler: SaliencyHandler, tmp_path: Path) -> None:
    contents = [file_of(page(400, 200, (150, 40, 220, 170))), file_of(page(200, 400, (60, 90, 140, 300)))]
    heights = []
    for sent in (contents[:1], contents):
        body = {"instances": [base64.b64encode(content).decode() for content in sent], "background": "sent", "size": 100}
        status, png = explain(handler, tmp_path, {"body": body})
        assert status == 200, png
        with Image.open(io.BytesIO(png)) as image:
            heights.append(image.height)
    assert heights[1] >= heights[0] + 100


def test_numbers_that_go_straight_to_the_network_are_their_own_background(handler: SaliencyHandler, tmp_path: Path) -> None:
    with Image.open(SAMPLE_FILES[36]) as image:
        levels = np.asarray(image)
    drawings = [
        explain(handler, tmp_path, {"body": {"data": levels.tolist(), "background": background}})
        for background in ("canonical", "sent")
    ]
    assert drawings[0] == drawings[1]
    assert drawings[0][0] == 200


def test_maps_of_the_image_s_own_pixels_lie_on_it_in_any_case(handler: SaliencyHandler, tmp_path: Path) -> None:
    content = file_of(page(300, 200, (110, 30, 180, 170)))
    drawings = [
        explain(handler, tmp_path, request_of(content, space="image", background=background))
        for background in ("canonical", "sent")
    ]
    assert drawings[0] == drawings[1]
    assert drawings[0][0] == 200


def test_numbers_of_a_reply_do_not_depend_on_the_background(handler: SaliencyHandler, tmp_path: Path) -> None:
    content = file_of(page(300, 200, (110, 30, 180, 170)))
    replies = [
        explain(handler, tmp_path, request_of(content, background=background), "application/json")
        for background in ("canonical", "sent")
    ]
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "paper"}, "expected one of canonical, sent as 'background', got 'paper'"),
        ({"background": "sent", "layout": "map"}, "expected 'layout' overlay or side_by_side with 'background' sent, got map"),
    ],
    ids=["unknown", "map alone"],
)
def test_background_that_means_nothing_is_refused(
    handler: SaliencyHandler, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    status, body = explain(handler, tmp_path, request_of(file_of(page(300, 200, (110, 30, 180, 170))), **options))
    assert status == 400
    error = json.loads(body)["error"]
    assert error["type"] == "InvalidOption"
    assert message in error["message"]
