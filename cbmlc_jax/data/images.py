"""Images as inputs: decoded when a batch needs them, uint8 squares for the network.

Pixels stay 0..255: a network normalises them on the device.  EXIF orientation is not
applied, as in the reference code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
from PIL import Image

from cbmlc_jax.data.dataset import DataError, filled

LARGEST_FILE = 64 << 20  # bytes
LARGEST_IMAGE = 80_000_000  # pixels
SCALES = (1.0, 0.875, 0.75, 0.66, 0.5)  # of the shorter side
MAX_DISTORT = 2  # width and height of a crop are at most so many scales apart


@dataclasses.dataclass(frozen=True)
class Images:
    """Files of images, one a row.

    Attributes:
        paths: N files.
        side: of the square that a batch holds.
    """

    paths: tuple[str, ...]
    side: int
    decodes: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], all 1."""
        return np.ones(len(self), np.int64)

    def take(self, rows: np.ndarray) -> Images:
        """The given rows, in the given order."""
        return Images(tuple(self.paths[row] for row in rows), self.side)

    def batch(self, rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """`images` uint8 [len(rows), side, side, 3], each warped to the square.

        Row -1 repeats a row of the batch.

        Raises:
            DataError: names a file that is no image, or not whole.
        """
        del width
        size = (self.side, self.side)

        def warped(image: Image.Image, row: int) -> Image.Image:
            return image.resize(size, Image.Resampling.BILINEAR)

        return self._images(rows, warped)

    def augmented(
        self, rows: np.ndarray, random: Callable[[int], np.random.Generator]
    ) -> dict[str, np.ndarray]:
        """As `batch`, with `multi_scale_crop` and a flip of every other image.

        Args:
            rows: as in `batch`.
            random: row -> its generator: what a row gets depends on nothing else.
        """

        def cropped(image: Image.Image, row: int) -> Image.Image:
            generator = random(int(row))
            box = multi_scale_crop(image.size, self.side, generator)
            size = (self.side, self.side)
            image = image.resize(size, Image.Resampling.BILINEAR, box=box)
            if generator.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return image

        return self._images(rows, cropped)

    def _images(self, rows: np.ndarray, view: Callable) -> dict[str, np.ndarray]:
        out = np.empty((len(rows), self.side, self.side, 3), np.uint8)
        for place, row in enumerate(filled(rows)):
            # Rows that fill up a batch are not decoded again.
            first = place if rows[place] >= 0 else np.flatnonzero(rows == row)
            if rows[place] < 0 and len(first):
                out[place] = out[first[0]]
                continue
            out[place] = np.asarray(view(decoded(self.paths[row]), row))
        return {"images": out}

    def matrix(self, num_features: int) -> np.ndarray:
        """Images have no features of their own.

        Raises:
            DataError: always.
        """
        raise DataError("an estimator cannot read images, only what a network makes")

    def content(self) -> Iterator[bytes]:
        """sha256 of each file: where it lies is of no matter."""
        for path in self.paths:
            yield hashlib.sha256(_bytes(path)).digest()


def _bytes(path: str) -> bytes:
    try:
        size = os.path.getsize(path)
        if size > LARGEST_FILE:
            raise DataError(f"{path} has {size} bytes, more than {LARGEST_FILE}")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror}") from error


def decoded(path: str) -> Image.Image:
    """An image in RGB.

    Raises:
        DataError: the file is missing, no image, cut off, or too large.
    """
    if not os.path.isfile(path):
        raise DataError(f"there is no image {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, and of large images
            with Image.open(path) as image:
                if image.width * image.height > LARGEST_IMAGE:
                    raise DataError(
                        f"{path} has {image.width} x {image.height} pixels, more than "
                        f"{LARGEST_IMAGE}: make it smaller"
                    )
                return image.convert("RGB")
    except DataError:
        raise
    # Pillow's plugins raise whatever a damaged file leads them to.
    except Exception as error:
        raise DataError(
            f"{path} is no image that can be read ({type(error).__name__}: {error}): "
            "replace it, or take it off the list"
        ) from error


def multi_scale_crop(
    size: tuple[int, int], side: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A crop of one of some sizes, at one of 13 places (Wang et al. 2016, TSN).

    Widths and heights are SCALES of the shorter side (or `side`, where within 2 pixels
    of it), at most MAX_DISTORT scales apart; places are 0, 1, 2, 3 or 4 quarter steps
    of the room that is left: corners, edges, the centre, and the four between.

    Args:
        size: (width, height) of the image.
        side: of the square that the crop is resized to.
        generator: two draws are taken.

    Returns:
        (left, top, right, bottom).
    """
    sizes = [int(min(size) * scale) for scale in SCALES]
    sizes = [side if abs(s - side) < 3 else s for s in sizes]
    pairs = [
        (min(w, size[0]), min(h, size[1]))
        for i, h in enumerate(sizes)
        for j, w in enumerate(sizes)
        if abs(i - j) <= MAX_DISTORT
    ]
    width, height = pairs[generator.integers(len(pairs))]
    across, down = PLACES[generator.integers(len(PLACES))]
    left = across * ((size[0] - width) // 4)
    top = down * ((size[1] - height) // 4)
    return left, top, left + width, top + height


# Steps across and down.
PLACES = (
    *((x, y) for x in (0, 2, 4) for y in (0, 2, 4)),
    *((x, y) for x in (1, 3) for y in (1, 3)),
)
