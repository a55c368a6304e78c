"""The page to draw on, in a real browser, with a real server behind it. Skipped where there is no Chromium.

Between the page and the server stands a relay (tests/upstream.py) that passes everything on, keeps what was asked, and can be
slow, gone or full. Every test ends with a check that nothing broke the Content-Security-Policy and no script failed.
"""

import base64
import json
import math
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from model.photograph import ink_of, photograph
from scripts.demo.page import ServedModel, serving_page
from scripts.paths import SAMPLE_FILES
from scripts.serving.launcher import Ports, TorchServe
from tests.client import TIMEOUT_S
from tests.servers import read_until, serving
from tests.upstream import Asked, Upstream, free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
FLAGS = [
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
    "--host-resolver-rules=MAP rebound.test 127.0.0.1",
]
WAIT_MS = 20_000
TOKEN = "TokenOfTheRelay123"
SEVEN = [(0.28, 0.27), (0.5, 0.26), (0.72, 0.27), (0.62, 0.45), (0.52, 0.62), (0.45, 0.8)]
ONE = [(0.5, 0.2), (0.5, 0.4), (0.5, 0.6), (0.5, 0.8)]
WATCH = """
addEventListener("securitypolicyviolation", (event) => console.error("CSP " + event.violatedDirective + " " + event.blockedURI));
"""
SIZES = {"phone": (375, 720), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def relay_server() -> Iterator[Upstream]:
    with Upstream().running() as running:
        yield running


@pytest.fixture
def relay(relay_server: Upstream, server: TorchServe) -> Upstream:
    """Passes everything on to the server."""
    relay_server.forget()
    relay_server.answer = passing_to(server)
    return relay_server


def passing_to(server: TorchServe) -> Callable[[Asked], tuple[int, object]]:
    def answer(asked: Asked) -> tuple[int, object]:
        address = server.management_address if asked.path.startswith("/models") else server.address
        headers = {"Content-Type": asked.headers.get("content-type", "")} if asked.body else {}
        reply = requests.request(asked.method, address + asked.path, data=asked.body, headers=headers, timeout=TIMEOUT_S)
        return reply.status_code, reply.content

    return answer


@pytest.fixture(scope="module")
def address(relay_server: Upstream) -> Iterator[str]:
    with serving_page(ServedModel(relay_server.address, "digits", relay_server.address), free_port()) as served:
        yield served


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, relay: Upstream, address: str) -> Iterator[Open]:
    """Open the page in a browser that knows nothing yet; at the end nothing may have gone wrong in it."""
    problems: list[str] = []
    with ExitStack() as stack:

        def opened(size: str = "desktop", path: str = "", *, ready: bool = True, at: str = address, **options: Any) -> Page:
            width, height = SIZES[size]
            context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **options)
            stack.callback(context.close)
            context.set_default_timeout(WAIT_MS)
            context.add_init_script(WATCH)
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.append(message.text) if is_problem(message.text) else None)
            page.goto(at + path)
            if ready:
                expect(page.locator("#option-method")).to_have_value("gradient")
            return page

        yield opened
    assert problems == []


def is_problem(text: str) -> bool:
    """Whether the console says something that it should not. That a reply was an error, it says of every one."""
    return not text.startswith(("Failed to load resource", "Canvas2D: Multiple readback"))


# --- what a person does


def draw(page: Page, points: list[tuple[float, float]] = SEVEN, steps: int = 5) -> None:
    """Draw one stroke with the mouse; places are shares of the paper's sides."""
    page.locator("#paper").scroll_into_view_if_needed()
    box = page.locator("#paper").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=steps)
    page.mouse.up()


def settled(page: Page, act: Callable[[], object]) -> dict[str, Any]:
    """Do something, and wait until the page shows the answer to what it led to; returns that reply."""
    replies: list[Response] = []

    def keep(reply: Response) -> None:
        replies.append(reply)

    page.on("response", keep)
    act()
    page.wait_for_function("() => document.querySelector('main').ariaBusy === 'false'")
    page.remove_listener("response", keep)
    mine = [reply for reply in replies if reply.url.endswith("/explanation") and reply.status == 200]
    content: dict[str, Any] = mine[-1].json()
    return content


def answer_of(page: Page) -> str:
    return page.locator("#answer").inner_text()


def pixels_of(page: Page, canvas: str) -> NDArray[np.uint8]:
    """What a canvas shows: (H, W, 4)."""
    width, height, encoded = page.evaluate(
        """(id) => {
            const canvas = document.getElementById(id);
            const {width, height} = canvas;
            const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            let text = "";
            for (let at = 0; at < data.length; at += 30000) text += String.fromCharCode(...data.subarray(at, at + 30000));
            return [width, height, btoa(text)];
        }""",
        canvas,
    )
    return np.frombuffer(base64.b64decode(encoded), np.uint8).reshape(height, width, 4)


def floats_of(text: str, shape: list[int]) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)


# --- drawing


def test_drawing_by_mouse_gives_its_digit_and_a_map_that_lies_on_it_to_the_pixel(open_page: Open) -> None:
    page = open_page()
    reply = settled(page, lambda: draw(page))
    assert answer_of(page) == "7" == str(reply["digit"])
    window = np.array(reply["preparation"]["window"])
    seen = floats_of(reply["preparation"]["pixels"], [28, 28])
    saliency = floats_of(reply["explanation"]["saliency"], [28, 28])
    paper, overlay = pixels_of(page, "paper"), pixels_of(page, "overlay")
    zoom = overlay.shape[0] / 112  # the page sends 112x112
    centres_x = (window[0] + (np.arange(28) + 0.5) * (window[2] - window[0]) / 28) * zoom
    centres_y = (window[1] + (np.arange(28) + 0.5) * (window[3] - window[1]) / 28) * zoom
    rows, columns = (np.clip(np.rint(centres).astype(int), 0, len(overlay) - 1) for centres in (centres_y, centres_x))
    inside = np.ix_((centres_y > 3) & (centres_y < len(overlay) - 3), (centres_x > 3) & (centres_x < len(overlay) - 3))

    # Every pixel of the map is where it lies in the drawing, as opaque as its number is large, red or blue by its sign.
    shown = overlay[rows][:, columns][inside].astype(float)
    sizes = np.abs(saliency)
    shares = np.clip(sizes / np.percentile(sizes[sizes > 0], 99), 0, 1)[inside]
    np.testing.assert_allclose(shown[..., 3] / 255, shares * 0.75, atol=0.02)
    clear = shares > 0.1
    assert ((shown[..., 0] > shown[..., 2]) == (saliency[inside] > 0))[clear].all()

    # What the network saw lies on the stroke; moved by one of its pixels it does not lie on it as well.
    ink = 1 - paper[rows][:, columns][..., 0] / 255.0
    fits = {
        (dy, dx): np.corrcoef(np.roll(seen, (dy, dx), (0, 1))[inside].ravel(), ink[inside].ravel())[0, 1]
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert max(fits, key=lambda shift: fits[shift]) == (0, 0)
    assert fits[0, 0] > 0.9


def test_digit_and_map_follow_while_the_stroke_goes_on(open_page: Open, relay: Upstream) -> None:
    page = open_page()
    box = page.locator("#paper").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.8 * box["height"], steps=12)
    expect(page.locator("#answer")).to_have_text("1")
    assert np.count_nonzero(pixels_of(page, "overlay")[..., 3]) > 0
    page.mouse.up()


def test_newest_drawing_wins_and_nothing_is_queued(open_page: Open, relay: Upstream) -> None:
    page = open_page()
    relay.delay_s = 0.4
    for _ in range(3):
        draw(page, [(0.3, 0.3), (0.6, 0.3)], steps=10)
        page.keyboard.press("z")
    before = len(relay.asked)
    reply = settled(page, lambda: draw(page))
    assert reply["digit"] == 7
    assert answer_of(page) == "7"
    assert len(relay.asked) - before <= 6  # of more than thirty events
    relay.delay_s = 0
    page.wait_for_timeout(600)
    assert answer_of(page) == "7"


def test_touch_draws_and_does_not_scroll(open_page: Open) -> None:
    page = open_page("phone", has_touch=True, is_mobile=True)
    box = page.locator("#paper").bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        places = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    def stroke() -> None:
        touch("touchStart", SEVEN[0])
        for (x, y), (to_x, to_y) in pairwise(SEVEN):
            for share in (0.25, 0.5, 0.75, 1):
                touch("touchMove", (x + share * (to_x - x), y + share * (to_y - y)))
        touch("touchEnd")

    settled(page, stroke)
    assert answer_of(page) == "7"
    assert page.evaluate("scrollY") == 0
    assert page.locator("#chip").inner_text().startswith("7 ")  # beside the drawing, where the answer is further down


def test_pen_draws_by_its_pressure(open_page: Open) -> None:
    page = open_page()
    box = page.locator("#paper").bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)
    for y, force in ((0.3, 0.1), (0.7, 0.9)):
        for kind, x in (("mousePressed", 0.2), ("mouseMoved", 0.5), ("mouseMoved", 0.8), ("mouseReleased", 0.8)):
            place = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            held = {"button": "left", "buttons": 1, "clickCount": 1, "force": force, "pointerType": "pen"}
            session.send("Input.dispatchMouseEvent", {"type": kind, **place, **held})
    column = pixels_of(page, "paper")[:, 360, 0] < 128
    thin, thick = np.count_nonzero(column[:360]), np.count_nonzero(column[360:])
    assert 1 < thin < thick / 2


def test_eraser_undo_redo_and_clear(open_page: Open) -> None:
    page = open_page()
    settled(page, lambda: draw(page))
    full = pixels_of(page, "paper")
    page.click("#eraser")
    settled(page, lambda: draw(page, [(0.2, 0.27), (0.66, 0.27)]))
    assert (pixels_of(page, "paper")[..., 0] < 128).sum() < 0.7 * (full[..., 0] < 128).sum()
    expect(page.locator("#last-change")).to_contain_text("The map before it predicted")
    settled(page, lambda: page.click("#undo"))
    np.testing.assert_array_equal(pixels_of(page, "paper"), full)
    settled(page, lambda: page.click("#redo"))
    page.click("#clear")
    assert answer_of(page) == "–"
    assert (pixels_of(page, "paper")[..., :3] == 255).all()
    settled(page, lambda: page.keyboard.press("Control+z"))
    expect(page.locator("#answer")).not_to_have_text("–")


def test_everything_can_be_done_with_the_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "paper":
            break
    assert page.evaluate("document.activeElement.id") == "paper"
    for key in ["Shift+ArrowUp"] * 4 + ["Space"] + ["Shift+ArrowDown"] * 8:
        page.keyboard.press(key)
    settled(page, lambda: page.keyboard.press("Space"))
    assert answer_of(page) == "1"
    expect(page.locator("#announcer")).to_contain_text("The network reads 1")
    page.keyboard.press("e")
    expect(page.locator("#eraser")).to_have_attribute("aria-pressed", "true")
    page.focus("#bars button")
    settled(page, lambda: page.keyboard.press("Enter"))
    expect(page.locator("#caption-a")).to_have_text("gradient, for 0")
    page.focus("#map-a")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#map-readout")).to_contain_text("Row 1, column 2: ")


# --- photographs


@pytest.fixture(scope="module")
def photo() -> bytes:
    return photograph(ink_of(np.asarray(Image.open(SAMPLE_FILES[20]))), "phone", [1])


def put_in(page: Page, content: bytes, kind: str, how: str) -> None:
    """Paste or drop a file."""
    page.evaluate(
        """([encoded, type, how]) => {
            const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            if (bytes.length) transfer.items.add(new File([bytes], "file", { type }));
            const event = how === "paste"
                ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
                : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""",
        [base64.b64encode(content).decode(), kind, how],
    )


@pytest.mark.parametrize("how", ["paste", "drop", "file"])
def test_photograph_is_read_as_the_service_reads_it(open_page: Open, server: TorchServe, photo: bytes, how: str) -> None:
    page = open_page()

    def put() -> None:
        if how == "file":
            page.set_input_files("#photo-file", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo})
        else:
            put_in(page, photo, "image/jpeg", how)

    reply = settled(page, put)
    direct = requests.post(
        f"{server.address}/explanations/digits", data=photo, headers={"Content-Type": "image/jpeg"}, timeout=TIMEOUT_S
    )
    assert reply["digit"] == direct.json()["digit"] == 4
    assert page.locator("#steps li").count() == len(reply["preparation"]["steps"]) + 1 + (
        "scaled" in page.locator("#steps").inner_text().split("\n")[0]
    )
    settled(page, lambda: draw(page, [(0.1, 0.1), (0.15, 0.1)]))  # a stroke over it


def test_camera_gives_a_photograph(open_page: Open) -> None:
    page = open_page()
    page.click("#open-camera")
    page.wait_for_function("() => document.getElementById('viewfinder').videoWidth > 0")
    page.click("#take-photo")
    page.wait_for_function("() => document.getElementById('paper').classList.contains('photo')")
    assert not page.locator("#camera").is_visible()
    page.click("#undo")


def test_file_that_is_no_image_is_said_to_be_none(open_page: Open) -> None:
    page = open_page()
    for content, kind, title in [
        (b"", "", "There is no image in that."),
        (b"no image", "image/png", "This browser cannot show that file."),
        (b"%PDF-1.4", "application/pdf", "This browser cannot show that file."),
    ]:
        put_in(page, content, kind, "paste")
        expect(page.locator("#state-title")).to_have_text(title)
    settled(page, lambda: draw(page))
    expect(page.locator("#state")).to_be_hidden()


def png_of(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def test_image_that_is_too_large_or_blank_is_said_to_be_so(open_page: Open) -> None:
    page = open_page()
    put_in(page, png_of(Image.new("1", (4100, 4000), 1)), "image/png", "paste")
    expect(page.locator("#state-title")).to_have_text("That image is too large.")
    expect(page.locator("#state-text")).to_contain_text("at most 16 million pixels")
    put_in(page, png_of(Image.new("L", (100, 100), 255)), "image/png", "paste")
    expect(page.locator("#state-title")).to_have_text("There is nothing to read yet.")
    page.click("#clear")
    settled(page, lambda: draw(page))
    expect(page.locator("#state")).to_be_hidden()


# --- asking why


def test_class_method_and_parameters_are_asked_as_chosen(open_page: Open, relay: Upstream) -> None:
    page = open_page()
    settled(page, lambda: draw(page))
    reply = settled(page, lambda: page.click("#bars li:nth-child(2) button"))
    assert reply["explanation"]["target"] == 1
    expect(page.locator("#bars li:nth-child(2) button")).to_have_attribute("aria-pressed", "true")
    reply = settled(page, lambda: page.select_option("#compared", "7"))
    assert reply["explanation"]["target"] == [1, 7]
    assert [page.locator(f"#caption-{panel}").inner_text() for panel in "ab"] == ["gradient, for 1", "gradient, for 7"]
    settled(page, lambda: page.select_option("#option-method", "smoothgrad"))
    reply = settled(page, lambda: page.fill("#option-samples", "7"))
    assert reply["explanation"]["parameters"]["samples"] == 7
    asked = len(relay.asked)
    page.fill("#option-samples", "5000")
    assert not page.locator("#option-samples").evaluate("(input) => input.checkValidity()")
    assert len(relay.asked) == asked
    expect(page.locator("#option-steps")).to_be_hidden()
    reply = settled(page, lambda: page.select_option("#option-method", "integrated_gradients"))
    assert reply["explanation"]["parameters"] == {"steps": 50, "baseline": "zero"}
    expect(page.locator("#legend-text")).to_contain_text("Unit: logit.")
    assert len(relay.asked) < asked + 3


def test_pointing_at_a_pixel_gives_its_number(open_page: Open) -> None:
    page = open_page()
    reply = settled(page, lambda: draw(page))
    saliency = floats_of(reply["explanation"]["saliency"], [28, 28])
    row, column = np.unravel_index(np.abs(saliency).argmax(), saliency.shape)
    box = page.locator("#map-a").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + (column + 0.5) / 28 * box["width"], box["y"] + (row + 0.5) / 28 * box["height"])
    shown = page.locator("#map-readout").inner_text()
    found = re.match(r"Row (\d+), column (\d+): ([+−][\d.]+) logit per unit of intensity, intensity", shown)
    assert found is not None, shown
    assert [int(found[1]), int(found[2])] == [int(row) + 1, int(column) + 1]
    assert float(found[3].replace("−", "-")) == pytest.approx(float(saliency[row, column]), abs=0.006)
    assert f"row {saliency.argmax() // 28 + 1}, column {saliency.argmax() % 28 + 1}" in (
        page.locator("#map-a").get_attribute("aria-label") or ""
    )


def test_polarity_and_colours_change_the_drawing_and_ask_nothing(open_page: Open, relay: Upstream) -> None:
    page = open_page()
    settled(page, lambda: draw(page))
    asked = len(relay.asked)
    before = pixels_of(page, "map-a")
    page.select_option("#option-colormap", "viridis")
    expect(page.locator("#option-polarity")).to_have_value("absolute")  # viridis has no middle for zero
    assert (pixels_of(page, "map-a") != before).any()
    assert page.locator("#tick-low").inner_text() == "0"
    page.select_option("#option-polarity", "signed")
    assert page.locator("#option-colormap").input_value() in ("RdBu_r", "PuOr")
    page.fill("#opacity", "0")
    assert pixels_of(page, "overlay")[..., 3].max() == 0
    assert len(relay.asked) == asked


def test_map_in_the_pixels_of_the_drawing_is_as_large_as_it(open_page: Open) -> None:
    page = open_page()
    settled(page, lambda: draw(page))
    page.click("#options summary")
    reply = settled(page, lambda: page.select_option("#option-space", "image"))
    assert reply["explanation"]["shape"] == [112, 112]
    expect(page.locator("#legend-text")).to_contain_text("more ink raises the score")
    expect(page.locator("#legend-text")).to_contain_text("per unit of darkness")


def test_change_where_the_map_points_is_compared_with_what_the_map_predicted(open_page: Open, server: TorchServe) -> None:
    page = open_page()
    reply = settled(page, lambda: draw(page))
    pixels = floats_of(reply["preparation"]["pixels"], [28, 28])
    saliency = floats_of(reply["explanation"]["saliency"], [28, 28])
    settled(page, lambda: page.fill("#count", "12"))
    gains = saliency * pixels  # lost where the ink is erased
    chosen = np.argsort(-gains.ravel())[:12]
    changed = pixels.copy().ravel()
    changed[chosen] = 0
    direct = requests.post(
        f"{server.address}/predictions/digits",
        json={"data": changed.reshape(28, 28).tolist(), "prepare": "none"},
        timeout=TIMEOUT_S,
    ).json()
    numbers = [
        float(re.sub(r"\s*\(.*", "", page.locator(f"#score-{name}").inner_text()).replace("−", "-"))
        for name in ("before", "predicted", "after")
    ]
    expected = [reply["logits"][7], reply["logits"][7] - gains.ravel()[chosen].sum(), direct["logits"][7]]
    assert numbers == pytest.approx(expected, abs=0.06)
    assert "12 pixels changed" in page.locator("#changed-caption").inner_text()
    page.click("#restore")
    assert page.locator("#changed-caption").inner_text() == "Nothing changed"

    box = page.locator("#changed").bounding_box()  # and by hand
    assert box is not None
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    place = (box["x"] + (column + 0.5) / 28 * box["width"], box["y"] + (row + 0.5) / 28 * box["height"])
    settled(page, lambda: page.mouse.click(*place))
    assert page.locator("#changed-caption").inner_text().startswith("1 pixel changed")
    assert "(" in page.locator("#score-after").inner_text()


# --- nothing hard-wired


def test_another_archive_is_shown_by_the_same_page(open_page: Open, relay: Upstream, server: TorchServe) -> None:
    """Other classes, a colour image of another shape, a new method with new parameters: all of it from the description."""
    passed_on = passing_to(server)
    names = [f"animal {number}" for number in range(30)]
    height, width = 20, 40
    random = np.random.default_rng(3)

    def answer(asked: Asked) -> tuple[int, object]:
        if asked.path.startswith("/models"):
            status, content = passed_on(asked)
            (model,) = json.loads(content) if isinstance(content, bytes) else []
            described = model["customizedMetadata"]
            described |= {"class_count": 30, "class_names": names, "input_shape": [3, height, width]}
            described["model"] |= {"name": "animals", "weights_sha256": "f" * 64}
            described["methods"]["occlude"] = {
                **{"description": "hide a patch", "output": "logit", "unit": "logit"},
                "parameters": {"patch_size": "side of a patch"},
            }
            described["options"]["patch_size"] = {
                "schema": {"type": "integer", "minimum": 2, "maximum": 9, "default": 4},
                "description": "side of a patch",
            }
            described["options"]["method"]["schema"]["enum"].append("occlude")
            return status, [model]
        body = json.loads(asked.body)
        logits = [0.0] * 30
        logits[17] = 9.0
        maps = random.standard_normal((3, height, width)).astype("<f4")
        pixels = random.random((3, height, width)).astype("<f4")
        return 200, {
            **{"digit": 17, "probability": 0.99, "probabilities": [*[0.0] * 17, 0.99, *[0.0] * 12], "logits": logits},
            "explanation": {
                **{
                    "method": body.get("method", "gradient"),
                    "output": "logit",
                    "unit": "logit per unit of intensity",
                    "target": 17,
                },
                **{"space": "canonical", "shape": [3, height, width], "saliency": base64.b64encode(maps.tobytes()).decode()},
            },
            "preparation": {
                **{"source": "PNG image", "steps": ["scaled"], "inverted": False, "window": [0, 0, 120, 60]},
                **{"shape": [3, height, width], "pixels": base64.b64encode(pixels.tobytes()).decode()},
            },
            "model": {"name": "animals", "version": "1.0", "weights_sha256": "f" * 64},
        }

    relay.answer = answer
    page = open_page()
    expect(page.locator("#served")).to_contain_text("animals")
    settled(page, lambda: draw(page))
    assert answer_of(page) == "animal 17"
    assert page.locator("#bars li").count() == 10
    assert page.locator("#chosen option").count() == 31
    assert page.locator("#seen-size").inner_text() == "(40×20)"
    assert pixels_of(page, "seen").shape[1] == 2 * pixels_of(page, "seen").shape[0]
    settled(page, lambda: page.select_option("#option-method", "occlude"))
    settled(page, lambda: page.fill("#option-patch_size", "6"))
    sent = json.loads(relay.asked[-1].body)
    assert (sent["method"], sent["patch_size"]) == ("occlude", 6)


def test_page_works_without_a_description_and_says_so(browser: Browser, relay: Upstream, open_page: Open) -> None:
    with serving_page(ServedModel(relay.address, "digits"), free_port()) as served:
        page = open_page(at=served, ready=False)
        settled(page, lambda: draw(page))
        assert answer_of(page) == "7"
        expect(page.locator("#served")).to_contain_text("its options are not known")
        page.context.close()


# --- sharing


def test_link_holds_the_drawing_and_what_was_asked(open_page: Open) -> None:
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    settled(page, lambda: draw(page))
    settled(page, lambda: page.select_option("#option-method", "gradient_x_input"))
    settled(page, lambda: page.click("#bars li:nth-child(10) button"))
    page.click("#copy-link")
    expect(page.locator("#shared")).to_contain_text("Link copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert len(link) < 1500
    first = pixels_of(page, "paper")[..., 0] < 128
    parts = urlsplit(link)
    other = open_page(path="#" + parts.fragment, ready=False)
    expect(other.locator("#caption-a")).to_have_text("gradient x input, for 9")
    assert answer_of(other) == "7"
    second = pixels_of(other, "paper")[..., 0] < 128
    assert (first != second).mean() < 0.005


def test_link_that_holds_no_drawing_is_said_to_hold_none(open_page: Open) -> None:
    for fragment in ("d=", "d=AQ", "d=%00", "d=" + "A" * 9000, "d=<script>alert(1)</script>&method=<b>", "d=AQAB"):
        page = open_page(path="#" + fragment)
        expect(page.locator("#state-title")).to_have_text("This link holds no drawing that can be read.")
        settled(page, lambda page=page: draw(page))  # type: ignore[misc]
        assert answer_of(page) == "7"
        page.context.close()


def test_copied_command_gives_the_same_answer(open_page: Open, relay: Upstream) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl runs the command")
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reply = settled(page, lambda: draw(page))
    reply = settled(page, lambda: page.click("#bars li:nth-child(4) button"))
    page.click("#copy-curl")
    expect(page.locator("#shared")).to_contain_text("Command copied")
    command = page.evaluate("navigator.clipboard.readText()")
    printed = subprocess.run(["sh", "-c", f"{command} --silent --show-error"], check=True, capture_output=True, timeout=TIMEOUT_S)
    again = json.loads(printed.stdout)
    assert again["explanation"]["target"] == 3 == reply["explanation"]["target"]
    np.testing.assert_allclose(again["logits"], reply["logits"], atol=1e-4)


def test_png_and_json_are_saved(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    reply = settled(page, lambda: draw(page))
    with page.expect_download() as saved:
        page.click("#save-json")
    assert saved.value.suggested_filename == "reply.json"
    assert json.loads(Path(saved.value.path()).read_text()) == reply
    with page.expect_download() as saved:
        page.click("#save-png")
    with Image.open(saved.value.path()) as image:
        assert image.format == "PNG"
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    assert image.width > 1200
    assert (colours[:, 0] - colours[:, 2] > 60).sum() > 500  # the map's red
    assert (colours[:, 2] - colours[:, 0] > 60).sum() > 500  # and its blue


# --- states that people meet

STATES = [
    ((503, {"code": 503, "type": "ServiceUnavailableException", "message": "no worker"}), "The model's server is busy."),
    ((503, {"error": {"code": 503, "type": "Overloaded", "message": "retry"}}), "The model's server is busy."),
    (
        (404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: digits"}),
        "The server does not serve this model yet.",
    ),
    ((400, {"code": 400, "type": "InvalidKeyException", "message": "no"}), "The server refuses the token (401)."),
    ((401, {}), "The server refuses the token (401)."),
    (
        (507, {"code": 507, "type": "InternalServerException", "message": "Worker died."}),
        "A worker of the model's server has ended.",
    ),
    ((500, {"error": {"code": 500, "type": "InternalError", "message": "failed"}}), "The model's server failed on this image."),
    ((200, b"<html>"), "Something else answers in the model's place."),
]


def test_every_state_of_the_server_is_said_and_recovered_from(open_page: Open, relay: Upstream, server: TorchServe) -> None:
    page = open_page()
    for answer, title in STATES:
        relay.answer = lambda _, answer=answer: answer  # type: ignore[misc]
        draw(page)
        expect(page.locator("#state-title")).to_have_text(title)
        assert page.locator("#state").get_attribute("data-kind") == "wait"
        relay.answer = passing_to(server)
        expect(page.locator("#state")).to_be_hidden()
        expect(page.locator("#answer")).to_have_text("7")


def test_refusals_of_the_model_are_said_and_not_repeated(open_page: Open, relay: Upstream, server: TorchServe) -> None:
    page = open_page()
    for status, kind, title in [
        (422, "SeveralDigits", "The server does not take this image."),
        (413, "ImageTooLarge", "That image is too large."),
        (400, "InvalidOption", "The server does not take this setting."),
    ]:
        refusal = {"error": {"code": status, "type": kind, "message": "expected one, got <b>two</b>"}}
        relay.answer = lambda _, refusal=refusal, status=status: (status, refusal)  # type: ignore[misc]
        draw(page)
        expect(page.locator("#state-title")).to_have_text(title)
        expect(page.locator("#state-text")).to_contain_text("xpected one, got <b>two</b>")
        page.wait_for_function("() => document.querySelector('main').ariaBusy === 'false'")
        asked = len(relay.asked)
        page.wait_for_timeout(500)
        assert len(relay.asked) == asked
        assert answer_of(page) == "–"  # no answer to another drawing
    relay.answer = passing_to(server)
    settled(page, lambda: draw(page))
    expect(page.locator("#state")).to_be_hidden()


def test_slow_server_is_said_to_be_slow(open_page: Open, relay: Upstream) -> None:
    page = open_page()
    relay.delay_s = 2.5
    draw(page)
    expect(page.locator("#state-title")).to_have_text("Waiting for the answer …")
    expect(page.locator("#answer")).to_have_text("7")
    expect(page.locator("#state")).to_be_hidden()


def test_server_and_page_server_come_and_go_under_the_page(browser: Browser, server: TorchServe, open_page: Open) -> None:
    """The model's server is gone before the page opens, comes, goes and comes again; then the page's own server does."""
    model_port, page_port = free_port(), free_port()

    def model_server(stack: ExitStack) -> None:
        stack.enter_context(Upstream(model_port).running()).answer = passing_to(server)

    served = ServedModel(f"http://127.0.0.1:{model_port}", "digits", f"http://127.0.0.1:{model_port}")
    with ExitStack() as stack, ExitStack() as model:
        stack.enter_context(serving_page(served, page_port))
        page = open_page(at=f"http://127.0.0.1:{page_port}/", ready=False)
        expect(page.locator("#state-title")).to_have_text("The model's server does not answer.")
        draw(page)
        model_server(model)
        expect(page.locator("#answer")).to_have_text("7")
        expect(page.locator("#option-method")).to_have_value("gradient")
        model.close()
        draw(page, [(0.4, 0.5), (0.7, 0.5)])
        expect(page.locator("#state-title")).to_have_text("The model's server does not answer.")
        model_server(model)
        expect(page.locator("#state")).to_be_hidden()
        stack.close()
        draw(page, [(0.4, 0.55), (0.7, 0.55)])
        expect(page.locator("#state-title")).to_have_text("This page has lost its own server.")
        stack.enter_context(serving_page(served, page_port))
        expect(page.locator("#state")).to_be_hidden()
        page.context.close()


# --- other pages


def test_page_of_another_site_gets_nothing_through(browser: Browser, relay: Upstream, address: str, open_page: Open) -> None:
    """By fetch, form, frame, image and script, as a site that a person visits could try."""
    open_page()
    with Upstream().running() as hostile:
        hostile.answer = lambda _: (200, b"<!doctype html><title>hostile</title><body></body>")
        page = browser.new_context().new_page()
        page.goto(hostile.address)
        asked = len(relay.asked)
        outcomes = page.evaluate(
            """async (address) => {
                const outcomes = [];
                const body = JSON.stringify({ data: [[0.5]] });
                for (const [path, options] of [
                    ["explanation", { method: "POST", body, mode: "no-cors" }],
                    ["explanation", { method: "POST", body, headers: { "Content-Type": "application/json" } }],
                    ["description", {}], ["description", { mode: "no-cors" }], ["settings.json", {}],
                ]) {
                    try {
                        const reply = await fetch(address + path, { credentials: "include", ...options });
                        outcomes.push(reply.type === "opaque" ? "opaque" : await reply.text());
                    } catch (error) { outcomes.push("refused"); }
                }
                const form = document.createElement("form");
                Object.assign(form, { method: "POST", action: address + "explanation", enctype: "text/plain", target: "inside" });
                const frame = document.createElement("iframe");
                frame.name = "inside";
                const input = document.createElement("input");
                Object.assign(input, { name: '{"data":[[0.5]],"a":"', value: '"}' });
                form.append(input);
                document.body.append(frame, form);
                form.submit();
                const script = document.createElement("script");
                script.src = address + "description";
                document.body.append(script);
                await new Promise((resolve) => setTimeout(resolve, 500));
                frame.src = address;
                await new Promise((resolve) => setTimeout(resolve, 500));
                return outcomes;
            }""",
            address,
        )
        assert set(outcomes) <= {"refused", "opaque"}
        assert len(relay.asked) == asked
        framed = page.frame("inside")
        assert framed is None or framed.locator("#paper").count() == 0
        page.context.close()


def test_name_that_another_site_points_here_is_not_answered(browser: Browser, relay: Upstream, address: str) -> None:
    page = browser.new_context().new_page()
    reply = page.goto(address.replace("127.0.0.1", "rebound.test"))
    assert reply is not None
    assert reply.status == 421
    assert page.locator("#paper").count() == 0
    assert relay.asked == []
    page.context.close()


def test_token_never_reaches_the_browser(open_page: Open, relay: Upstream, server: TorchServe, tmp_path: Path) -> None:
    key_file = tmp_path / "key_file.json"
    key_file.write_text(json.dumps({"inference": {"key": "outdated"}, "management": {"key": TOKEN}}))
    passed_on = passing_to(server)
    refusal = {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed"}
    relay.answer = lambda asked: passed_on(asked) if asked.headers.get("authorization") == f"Bearer {TOKEN}" else (400, refusal)
    received: list[str] = []
    with serving_page(ServedModel(relay.address, "digits", relay.address, key_file), free_port()) as served:
        page = open_page(at=served, ready=False)
        page.on("response", lambda reply: received.append(str(reply.headers) + reply.text()))
        page.reload()
        draw(page)
        expect(page.locator("#state-title")).to_have_text("The server refuses the token (401).")
        key_file.write_text(json.dumps({"inference": {"key": TOKEN}, "management": {"key": TOKEN}}))
        expect(page.locator("#answer")).to_have_text("7")
        expect(page.locator("#state")).to_be_hidden()
        page.click("#copy-curl")
        command = page.locator("#to-copy").input_value()
        kept = page.evaluate(
            "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}, document.documentElement.outerHTML])"
        )
        page.context.close()
    assert str(key_file) in command
    assert len(received) > 5
    assert all(TOKEN not in text and "outdated" not in text for text in [*received, command, kept])


# --- how it looks, and to whom


@pytest.mark.parametrize(("size", "scheme"), [("phone", "dark"), ("desktop", "light")])
def test_axe_finds_nothing(open_page: Open, relay: Upstream, size: str, scheme: str) -> None:
    page = open_page(size, color_scheme=scheme)

    def check(what: str) -> None:
        found = Axe().run(page)
        assert found.violations_count == 0, f"{what}: {found.generate_report()}"

    check("empty")
    settled(page, lambda: draw(page))
    page.select_option("#compared", "1")
    settled(page, lambda: page.fill("#count", "5"))
    page.click("#options summary")
    page.click("#copy-curl")
    check("explained")
    relay.answer = lambda _: (503, {})
    draw(page, ONE)
    expect(page.locator("#state")).to_be_visible()
    check("overloaded")
    page.click("#open-camera")
    check("camera")


def test_nothing_is_wider_than_the_window(open_page: Open) -> None:
    """320 pixels are a window of 640 at 200 %, or of 1280 at 400 %."""
    page = open_page()
    settled(page, lambda: draw(page))
    settled(page, lambda: page.select_option("#compared", "1"))
    settled(page, lambda: page.select_option("#option-method", "smoothgrad"))
    for width in (320, 375, 640, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 600})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        spilled = page.evaluate(
            """() => [...document.querySelectorAll("main *, header *, footer *")].filter((element) => {
                const box = element.getBoundingClientRect();
                return box.width > 1 && (box.right > innerWidth + 1 || box.left < -1) && !element.closest(".hidden");
            }).map((element) => element.outerHTML.slice(0, 80))"""
        )
        assert spilled == []


def test_tree_of_a_screen_reader_names_everything(open_page: Open) -> None:
    page = open_page()
    settled(page, lambda: draw(page))
    tree = page.locator("body").aria_snapshot()
    for part in (
        'application "Drawing area"',
        'heading "The network reads"',
        'combobox "Method',
        'slider "Width"',
        'button "Copy as curl"',
    ):
        assert part in tree, tree
    assert re.search(r'button "7 (> )?[\d.]+ %" \[pressed\]', tree), tree
    unnamed = re.findall(
        r"- (?:button|combobox|slider|spinbutton|textbox|img|application)(?: \[[^\]]*\])*:?$", tree, re.MULTILINE
    )
    assert unnamed == []


# --- time


def test_latency_from_stroke_to_map_is_measured(open_page: Open, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, as it depends on the machine. The server of these tests waits 60 ms for others to share its batch."""
    page = open_page()
    for _ in range(4):
        settled(page, lambda: draw(page))
        page.click("#clear")
    spans = page.evaluate("performance.getEntriesByName('stroke to map').map((entry) => entry.duration)")
    assert len(spans) >= 4
    assert all(math.isfinite(span) and span > 0 for span in spans)
    with capsys.disabled():
        quantiles = statistics.quantiles(spans, n=20)
        print(f"\nstroke to map: median {statistics.median(spans):.0f} ms, p95 {quantiles[-1]:.0f} ms, {len(spans)} answers")


# --- all of it, as a person starts it


@pytest.mark.long
def test_real_server_is_stopped_and_started_again_under_the_page(open_page: Open, tmp_path: Path, archive: Path) -> None:
    ports = Ports.free()
    address = f"http://127.0.0.1:{ports.inference}"
    with serving_page(ServedModel(address, "digits", f"http://127.0.0.1:{ports.management}"), free_port()) as served:
        page = open_page(at=served, ready=False)
        draw(page)
        expect(page.locator("#state-title")).to_have_text("The model's server does not answer.")
        for start in range(2):
            with serving(ports, tmp_path / f"logs{start}", f"--archive={archive}", "--workers=1") as process:
                read_until(process, "workers ready")
                expect(page.locator("#answer")).to_have_text("7")
                expect(page.locator("#state")).to_be_hidden()
            draw(page)
            expect(page.locator("#state-title")).to_have_text("The model's server does not answer.")
        page.context.close()
