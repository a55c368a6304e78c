"""A costly file is decoded elsewhere: alike, within bounds, and without harm to whoever comes next."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from PIL import Image

from handler.errors import ImageTooLarge, Overloaded, UnreadableImage
from handler.images import decoder_process
from handler.images.budget import DecodingBudget
from handler.images.decode import decode_image
from handler.images.decoder_process import DecoderProcess
from handler.images.file_decoder import decode_file
from handler.limits import MAX_DECODE_SECONDS, MAX_DECODER_BYTES
from scripts.bench.attacks import deflate, encode, noise, png
from scripts.paths import ROOT, SAMPLE_FILES

MIB = 2**20
SLOW = png(4000, 4000, deflate(bytes((4000 * 8 + 1) * 4000), 32_000_000), depth=16, colour=6)  # two seconds on a fast processor
GOOD = SAMPLE_FILES[0].read_bytes()


@pytest.fixture
def decoder() -> Iterator[DecoderProcess]:
    process = DecoderProcess()
    yield process
    process.close()


FILES = {
    "grey": encode(noise(300, 200), "TIFF"),
    "colour": encode(noise(300, 200, "RGB"), "WEBP", lossless=True),
    "16 bits": encode(Image.fromarray(np.arange(60_000, dtype=np.uint16).reshape(200, 300)), "TIFF"),
    "floats": encode(Image.fromarray(np.linspace(0, 1, 60_000, dtype=np.float32).reshape(200, 300)), "TIFF"),
    "frames": encode(Image.new("L", (9, 9)), "GIF", save_all=True, append_images=[noise(9, 9)]),
    "one pixel": encode(Image.new("L", (1, 1), 7), "TIFF"),
    "a large JPEG": encode(noise(5000, 4000), "JPEG", quality=20),
}


@pytest.mark.parametrize("name", FILES)
def test_file_is_decoded_as_in_this_process(decoder: DecoderProcess, name: str) -> None:
    here, there = DecodingBudget(), DecodingBudget()
    expected, decoded = decode_file(FILES[name], here), decoder.decode(FILES[name], there)
    np.testing.assert_array_equal(decoded.levels, expected.levels)
    assert decoded.levels.dtype == expected.levels.dtype
    assert (decoded.image_format, decoded.reduction) == (expected.image_format, expected.reduction)
    assert (there.pixels_left, there.steps_left) == (here.pixels_left, here.steps_left)
    assert there.seconds_left < MAX_DECODE_SECONDS


def test_levels_stay_when_the_next_file_is_decoded(decoder: DecoderProcess) -> None:
    first = decoder.decode(FILES["grey"], DecodingBudget()).levels
    copy = first.copy()
    decoder.decode(FILES["floats"], DecodingBudget())
    np.testing.assert_array_equal(first, copy)


@pytest.mark.parametrize("content", [b"no image", FILES["grey"][:-9000], b"II*\0" + bytes(90)], ids=["text", "cut", "empty"])
def test_error_is_that_of_this_process(decoder: DecoderProcess, content: bytes) -> None:
    with pytest.raises(UnreadableImage) as expected:
        decode_file(content, DecodingBudget())
    for _ in range(2):
        with pytest.raises(UnreadableImage) as caught:
            decoder.decode(content, DecodingBudget())
        assert caught.value.message == expected.value.message


def test_file_that_takes_too_long_is_stopped_and_the_next_is_decoded(decoder: DecoderProcess) -> None:
    decoder.start()
    pid = decoder.pid
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    budget = DecodingBudget()
    with pytest.raises(ImageTooLarge, match=f"decoded in {MAX_DECODE_SECONDS} s of processor time, all of a request together"):
        decoder.decode(SLOW, budget)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < MAX_DECODE_SECONDS + 0.5
    with pytest.raises(ImageTooLarge):
        decode_image(GOOD.ljust(20_000, b"\0"), budget)  # the time was for all files of that request
    assert decoder.pid not in (pid, None)
    assert decoder.decode(FILES["grey"], DecodingBudget()).levels.shape == (200, 300)


def test_files_of_one_request_share_the_time(decoder: DecoderProcess) -> None:
    budget = DecodingBudget()
    budget.seconds_left = 0.02
    with pytest.raises(ImageTooLarge, match="of processor time"):
        decoder.decode(SLOW, budget)


def test_file_that_takes_too_much_memory_is_refused_by_its_size(decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less memory than ever is given: a limit that a client reaches is one of the file's structure before."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT], env={**os.environ}, capture_output=True, text=True, timeout=100, check=True
    )
    assert small.stdout.split("|") == [
        "ImageTooLarge",
        f"expected memory for an image of 4000 x 4000 pixels of at most {MAX_DECODER_BYTES:,} bytes, got one that needs more",
        "(28, 28)\n",
    ]


UNDER_A_LIMIT = """
import io, resource
from PIL import Image
from handler.images.budget import DecodingBudget
from handler.images.decoder_process import DecoderProcess
content, small = io.BytesIO(), io.BytesIO()
Image.new("RGBA", (4000, 4000), (9, 9, 9, 9)).save(content, "PNG")
Image.new("L", (28, 28), 9).save(small, "TIFF")
resource.setrlimit(resource.RLIMIT_DATA, (150 * 2**20, 150 * 2**20))
decoder = DecoderProcess()
try:
    decoder.decode(content.getvalue(), DecodingBudget())
except Exception as error:
    print(type(error).__name__, error, sep="|", end="|")
print(decoder.decode(small.getvalue(), DecodingBudget()).levels.shape)
decoder.close()
"""


def test_good_image_without_memory_here_is_no_damaged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("handler.images.file_decoder._first_with_ink", fail)
    with pytest.raises(Overloaded, match="expected memory for an image of 28 x 28 pixels, got too little: retry later") as caught:
        decode_file(GOOD, DecodingBudget())
    assert caught.value.headers["Retry-After"]


def test_process_that_was_killed_is_replaced(decoder: DecoderProcess) -> None:
    decoder.start()
    for _ in range(2):
        assert decoder.pid is not None
        os.kill(decoder.pid, signal.SIGKILL)
        with pytest.raises(Overloaded):
            decoder.decode(FILES["grey"], DecodingBudget())
        assert decoder.decode(FILES["grey"], DecodingBudget()).levels.shape == (200, 300)


def test_process_that_hangs_is_given_up(decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "WAIT_S", 0.5)
    decoder.start()
    hanging = decoder.pid
    assert hanging is not None
    os.kill(hanging, signal.SIGSTOP)
    with pytest.raises(Overloaded):
        decoder.decode(FILES["grey"], DecodingBudget())
    assert not psutil.pid_exists(hanging)


def test_several_threads_share_it(decoder: DecoderProcess) -> None:
    shapes = []

    def decode(name: str) -> None:
        shapes.append((name, decoder.decode(FILES[name], DecodingBudget()).levels.shape))

    threads = [threading.Thread(target=decode, args=(name,)) for name in ("grey", "one pixel", "floats") * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(shapes) == {("grey", (200, 300)), ("one pixel", (1, 1)), ("floats", (200, 300))}


def test_it_ends_with_the_process_that_started_it() -> None:
    program = """
import time
from handler.images.decoder_process import DECODER_PROCESS
DECODER_PROCESS.start()
print(DECODER_PROCESS.pid, flush=True)
time.sleep(100)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert psutil.pid_exists(pid)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_is_small(decoder: DecoderProcess) -> None:
    decoder.decode(FILES["grey"], DecodingBudget())
    assert psutil.Process(decoder.pid).memory_info().rss < 100 * MIB
