"""What the image files of one request may take together: pixels, steps of decoders, processor time and memory.

Knows nothing of file formats.
"""

import sys
import time
from io import BytesIO

from handler.errors import ImageTooLarge, UnreadableImage
from handler.limits import MAX_DECODE_SECONDS, MAX_DECODER_OPERATIONS, MAX_PIXELS, MAX_SIDE, MAX_TAG_BYTES

UNCOUNTED_BYTES = 16_384  # of a request's files: too few for reads that matter, and counting would double the time of a small one
TOO_MANY_PARTS = "expected image files as encoders write them, got files of too many chunks, segments, tags or progressive bytes"


class DecodingBudget:
    """Counts what one request's image files declare and take, so that many images cost no more time than one may.

    Attributes:
        pixels_left, steps_left, uncounted_bytes_left: of MAX_PIXELS, MAX_DECODER_OPERATIONS and UNCOUNTED_BYTES.
        walk_steps_left: of as many steps again, for reading the files' structure.
        seconds_left: of MAX_DECODE_SECONDS, of processor time.
    """

    def __init__(self) -> None:
        self.pixels_left = MAX_PIXELS
        self.steps_left = MAX_DECODER_OPERATIONS
        self.walk_steps_left = MAX_DECODER_OPERATIONS
        self.uncounted_bytes_left = UNCOUNTED_BYTES
        self.seconds_left = MAX_DECODE_SECONDS

    def take_pixels(self, width: int, height: int) -> None:
        """Count an image before it is decoded.

        Raises:
            ImageTooLarge: it is too large by itself, or together with those before it.
        """
        if width * height > self.pixels_left or max(width, height) > MAX_SIDE:
            together = "" if self.pixels_left == MAX_PIXELS else " in all images of a request together"
            raise ImageTooLarge(
                f"expected at most {MAX_PIXELS:,} pixels{together} and at most {MAX_SIDE:,} a side, got an image of {width} x "
                f"{height} pixels"
            )
        self.pixels_left -= width * height

    def take_steps(self, count: int) -> None:
        """Count steps before they are taken.

        Raises:
            ImageTooLarge: they are too many, by themselves or together with those before.
        """
        if count > self.steps_left:
            raise ImageTooLarge(TOO_MANY_PARTS)
        self.steps_left -= count

    def walk(self, count: int) -> None:
        """Count parts of a file whose structure is read: chunks, segments, blocks, tags.

        Raises:
            ImageTooLarge: they are too many, by themselves or together with those before.
        """
        if count > self.walk_steps_left:
            raise ImageTooLarge(TOO_MANY_PARTS)
        self.walk_steps_left -= count

    def require_seconds(self) -> None:
        """Refuse the next file where those before have taken all of the processor time.

        Raises:
            ImageTooLarge: there is none left.
        """
        if self.seconds_left <= 0:
            raise ImageTooLarge(
                f"expected image files that are decoded in {MAX_DECODE_SECONDS} s of processor time, all of a request together, "
                "got files that take longer: send fewer pixels, or another format such as PNG"
            )

    def open_file(self, content: bytes) -> BytesIO:
        """Give a file for Pillow to read: one whose reads are counted, unless it is small."""
        self.uncounted_bytes_left -= len(content)
        return BytesIO(content) if self.uncounted_bytes_left >= 0 else _CountedFile(content, self)


class Stopwatch:
    """Processor seconds of this thread."""

    def __init__(self) -> None:
        self._started = time.thread_time()

    def seconds(self) -> float:
        """Say how many there were since this was made."""
        return time.thread_time() - self._started


class _CountedFile(BytesIO):
    """An image file that takes a step for each read."""

    def __init__(self, content: bytes, budget: DecodingBudget) -> None:
        super().__init__(content)
        self._budget = budget
        is_tiff = content.startswith((b"II", b"MM"))
        self._most_bytes = MAX_TAG_BYTES if is_tiff else sys.maxsize  # libtiff takes the pixels without a read

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes, all where it is negative.

        Raises:
            ImageTooLarge: this is one read too many.
            UnreadableImage: a tag is too long.
        """
        self._budget.take_steps(1)
        if size is not None and size > self._most_bytes:
            raise UnreadableImage(f"expected tags of at most {MAX_TAG_BYTES:,} bytes in a TIFF, got a longer one")
        return super().read(size)
