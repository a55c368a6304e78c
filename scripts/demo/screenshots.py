"""Draw on the page in a browser, and keep how it looks: the screenshots of the README. A server must be running.

    python -m scripts.demo.screenshots

Needs Chromium (Debian's package `chromium`) and the packages of tests/requirements.txt.
"""

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from scripts.command_line import HelpFormatter
from scripts.demo.command import choose_port
from scripts.demo.page import ServedModel, serving_page
from scripts.paths import MODEL_NAME, ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SEVEN = ((0.26, 0.3), (0.4, 0.28), (0.55, 0.285), (0.7, 0.28), (0.64, 0.42), (0.56, 0.55), (0.5, 0.68), (0.46, 0.8))
CHANGED_PIXELS = 12
VIEWS = {  # name -> width, height, colour scheme, pixels of the file for one of the page
    "demo": (1280, 900, "light", 1.0),
    "demo-phone": (390, 844, "dark", 1.5),
}


class ScreenshotError(RuntimeError):
    """There is nothing to take a screenshot of, or with; the message says why, for a person."""


def draw_stroke(page: Page, points: Sequence[tuple[float, float]]) -> None:
    """Draw one stroke with the mouse; places are shares of the paper's sides."""
    box = page.locator("#paper").bounding_box()
    if box is None:
        raise ScreenshotError("the page has no drawing area")
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


def wait_for_answer(page: Page) -> None:
    """Wait until the page waits for nothing."""
    page.wait_for_function("() => document.querySelector('main').ariaBusy === 'false'")


def compress(png: bytes, output: Path) -> None:
    """Write a screenshot as small as it can be without a loss."""
    with Image.open(io.BytesIO(png)) as opened:
        opened.convert("RGB").save(output, optimize=True)


def take_screenshots(address: str, browser: str, output_dir: Path) -> list[Path]:
    """Draw a seven, ask why it is no one, change what the map points at, and keep what is seen.

    Args:
        address: of the page.
        browser: path of a Chromium.
        output_dir: for the PNGs.
    Returns:
        the files.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    files = []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--disable-gpu", "--no-first-run"])
        for name, (width, height, scheme, scale) in VIEWS.items():
            page = opened.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if scheme == "dark" else "light",
                device_scale_factor=scale,
                reduced_motion="reduce",
                has_touch=name.endswith("phone"),
            )
            page.goto(address)
            page.locator("#option-method").wait_for()
            draw_stroke(page, SEVEN)
            wait_for_answer(page)
            page.select_option("#compared", "1")
            page.fill("#count", str(CHANGED_PIXELS))
            wait_for_answer(page)
            page.mouse.move(0, 0)
            page.evaluate("scrollTo(0, 0)")
            is_phone = name.endswith("phone")
            files.append(output_dir / f"{name}.png")
            compress(page.screenshot(full_page=not is_phone), files[-1])
        opened.close()
    return files


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo.screenshots",
        description="Draw on the page in a browser and keep screenshots of it; a server must be running.",
        epilog="example: %(prog)s --url http://127.0.0.1:8080",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="address of the inference API")
    parser.add_argument("--management-url", default="http://127.0.0.1:8081", metavar="URL", help="address of the management API")
    parser.add_argument("--model", default=MODEL_NAME, help="the served model's name")
    parser.add_argument("--browser", metavar="FILE", help="a Chromium; default: the one on the PATH")
    parser.add_argument("--output-dir", type=Path, default=ROOT / ".github", metavar="FOLDER", help="folder for the PNGs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Take the screenshots. Returns the exit code: 1 where there is no browser."""
    arguments = build_parser().parse_args(argv)
    browser = arguments.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(
            "error: no Chromium is on the PATH; install it (apt-get install chromium), or name it with --browser", file=sys.stderr
        )
        return 1
    served = ServedModel(arguments.url.rstrip("/"), arguments.model, arguments.management_url.rstrip("/"))
    with serving_page(served, choose_port(None)) as address:
        for file in take_screenshots(address, browser, arguments.output_dir):
            print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
