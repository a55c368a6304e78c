"""How cost grows: what is sent, the medians, the drawing. The servers: tests/e2e."""

import base64
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.bench import scale
from scripts.bench.load import Call, Figures
from scripts.bench.scale import FORMATS, PROTOCOLS, Point, ScaleError, draw_on_paper, has_all_maps, many_images_call, medians
from scripts.paths import ROOT

ADDRESS = "http://127.0.0.1:1"


def point(question: str, series: str, x: int, round_index: int, p50_ms: float, errors: dict[str, int] | None = None) -> Point:
    load = Figures(1, 10, 1000 / p50_ms, p50_ms, 2 * p50_ms, errors or {}, 0.1)
    return Point(question, series, x, round_index, 500, load)


@pytest.fixture
def points() -> list[Point]:
    """Two rounds of two points of every question, with latencies as large as x."""
    series = {"workers": [""], "sides": list(FORMATS), "images": list(PROTOCOLS), "connections": [""]}
    return [
        point(question, name, x, index, float(x + index))
        for index in (0, 1)
        for question, names in series.items()
        for name in names
        for x in (1, 100)
    ]


def body_of(call: Call) -> bytes:
    return call.request.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("side", [28, 64, 1000])
def test_drawn_image_has_the_size_and_format_asked_for_and_a_digit_on_paper(side: int, image_format: str) -> None:
    content = draw_on_paper(side, image_format)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == image_format
        assert image.mode == ("RGB" if image_format == "JPEG" else "L")
        levels = np.asarray(image.convert("L"))
    assert levels.shape == (side, side)
    dark = levels < 120
    assert 0.02 < dark.mean() < 0.3
    ys, xs = np.nonzero(dark)
    assert 0.75 < (1 + max(np.ptp(ys), np.ptp(xs))) / (scale.DIGIT_SHARE * side) < 1.1  # the ink has a margin
    assert content == draw_on_paper(side, image_format)


def test_largest_image_and_request_are_within_the_services_limits() -> None:
    limit = 32 * 2**20
    assert scale.SIDES_PX[-1] ** 2 <= 16_000_000
    assert len(draw_on_paper(scale.SIDES_PX[-1], "PNG")) < limit
    assert all(len(many_images_call(ADDRESS, name, scale.IMAGE_COUNTS[-1]).request) < limit for name in PROTOCOLS)


def test_many_images_are_sent_as_many() -> None:
    array = np.load(io.BytesIO(body_of(many_images_call(ADDRESS, "npy", 64))))
    assert (array.shape, array.dtype) == ((64, 28, 28), np.uint8)
    instances = json.loads(body_of(many_images_call(ADDRESS, "kserve", 64)))["instances"]
    for levels, instance in zip(array, instances, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(instance["data"]))) as image:
            np.testing.assert_array_equal(np.asarray(image), levels)


def npy(shape: tuple[int, ...], value: float = 0.5) -> bytes:
    content = io.BytesIO()
    np.save(content, np.full(shape, value, np.float32))
    return content.getvalue()


def kserve(count: int) -> bytes:
    return json.dumps({"explanations": [{"saliency": [[0.5] * 28] * 28}] * count}).encode()


@pytest.mark.parametrize(
    ("protocol", "body", "expected"),
    [
        pytest.param("npy", npy((4, 28, 28)), True, id="npy"),
        pytest.param("npy", npy((3, 28, 28)), False, id="npy with one less"),
        pytest.param("npy", npy((4, 28, 28), np.nan), False, id="npy of NaN"),
        pytest.param("npy", b"", False, id="empty"),
        pytest.param("kserve", kserve(4), True, id="JSON"),
        pytest.param("kserve", kserve(5), False, id="JSON with one more"),
        pytest.param("kserve", b'{"error": {"code": 400}}', False, id="an error"),
        pytest.param("kserve", b'{"explanations": [null, null, null, null]}', False, id="null"),
    ],
)
def test_only_replies_with_all_maps_count(protocol: str, body: bytes, *, expected: bool) -> None:
    assert has_all_maps(4, protocol, body) is expected


def test_medians_are_over_rounds_and_leave_out_what_failed_once() -> None:
    points = [point("sides", "PNG", 64, index, p50) for index, p50 in enumerate((9.0, 1.0, 2.0))]
    points += [point("sides", "PNG", 28, 0, 5.0), point("sides", "JPEG", 28, 0, 7.0)]
    points += [point("sides", "PNG", 4000, 0, 5.0), point("sides", "PNG", 4000, 1, 5.0, {"timeout": 1})]
    assert medians(points, "sides", "PNG", "p50_ms") == ([28, 64], [5.0, 2.0])
    [error] = scale.describe_errors(points)
    assert error == "sides 4000 PNG, round 1: {'timeout': 1}"


def test_figure_is_drawn_again_from_the_file(points: list[Point], tmp_path: Path) -> None:
    conditions = {"machine": {"CPU": "a CPU", "cores": "2 of 2"}, "rounds": 2, "date": "2000-01-01", "command": "x"}
    raw, figure = tmp_path / "scale.json", tmp_path / "scaling.png"
    raw.write_text(json.dumps({**conditions, "points": [asdict(one) for one in points]}))
    assert scale.main(["--draw", str(raw), "--image", str(figure)]) == 0
    with Image.open(figure) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"), int).reshape(-1, 3)
    for colour in (scale.BLUE, scale.ORANGE, scale.GREEN):
        close = np.abs(pixels - tuple(bytes.fromhex(colour[1:]))).max(axis=1) < 12
        assert close.sum() > 100  # its lines and markers
    assert figure.stat().st_size < 150_000


def test_committed_figures_can_be_drawn_again(tmp_path: Path) -> None:
    committed = ROOT / "scripts" / "results" / "scale-2-shared-cores.json"
    assert scale.main(["--draw", str(committed), "--image", str(tmp_path / "scaling.png")]) == 0
    assert {one.question for one in scale.read_points(committed)[1]} == {"workers", "sides", "images", "connections"}


def test_a_panel_without_any_good_point_is_an_error(points: list[Point], tmp_path: Path) -> None:
    bad = [replace(one, load=replace(one.load, error_counts={"HTTP 503": 1})) if one.series == "npy" else one for one in points]
    with pytest.raises(ScaleError, match="no point of images npy is good"):
        scale.draw(bad, "caption", tmp_path / "scaling.png")


def test_a_file_of_something_else_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert scale.main(["--draw", str(tmp_path / "a.json"), "--image", str(tmp_path / "a.png")]) == 1
    assert "holds no points" in capsys.readouterr().err
