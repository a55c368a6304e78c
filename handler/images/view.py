"""A small copy of an image, or of a part of it, in which everything is looked for. Knows nothing of ink."""

from dataclasses import dataclass

from handler.images.preparation import Array, resample, resample_both

WORKING_SIZE = 160  # pixels of the longer side in which ink is looked for
SMALLEST_WORKING_SIZE = 64  # smaller images are enlarged to this, so that filters have something to work on

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the copy
Region = tuple[float, float, float, float]  # the same, in pixels of the image


@dataclass(frozen=True, slots=True)
class View:
    """A small copy of a part of the image: working = rows @ grey @ columns.T.

    Attributes:
        rows, columns: (h', H) and (w', W).
        working: (h', w').
        region: left, top, right, bottom of the part, in pixels of the image.
    """

    rows: Array
    columns: Array
    working: Array
    region: Region

    @classmethod
    def of(cls, grey: Array, region: Region | None = None) -> "View":
        """Copy a region of an image (H, W), or all of it."""
        left, top, right, bottom = region or (0.0, 0.0, float(grey.shape[1]), float(grey.shape[0]))
        longer = max(right - left, bottom - top)
        scale = min(max(longer, SMALLEST_WORKING_SIZE), WORKING_SIZE) / longer
        rows = resample(grey.shape[0], top, bottom, max(2, round((bottom - top) * scale)))
        columns = resample(grey.shape[1], left, right, max(2, round((right - left) * scale)))
        return cls(rows, columns, resample_both(rows, grey, columns), (left, top, right, bottom))

    @property
    def shrinks(self) -> bool:
        """Whether the image has more detail than the copy."""
        return bool(self.working.shape[0] < self.region[3] - self.region[1])

    @property
    def unit(self) -> tuple[float, float]:
        """Pixels of the image in one pixel of the copy, along y and x."""
        left, top, right, bottom = self.region
        return (bottom - top) / self.working.shape[0], (right - left) / self.working.shape[1]

    def region_around(self, box: Box, margin: float) -> Region:
        """A region of the image around a box of the copy, wider by this share of the box on each side, within this view's."""
        left, top, right, bottom = self.to_image(box)
        margin *= max(right - left, bottom - top)
        limits = self.region
        return (
            max(left - margin, limits[0]),
            max(top - margin, limits[1]),
            min(right + margin, limits[2]),
            min(bottom + margin, limits[3]),
        )

    def to_image(self, box: Box | Region) -> Region:
        """A box of the copy in pixels of the image."""
        unit_y, unit_x = self.unit
        left, top = self.region[:2]
        return left + box[0] * unit_x, top + box[1] * unit_y, left + box[2] * unit_x, top + box[3] * unit_y
