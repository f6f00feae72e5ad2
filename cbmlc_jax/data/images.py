"""Images as inputs: decoded when a batch needs them, uint8 squares for the network.

Pixels stay 0..255: a network normalises them on the device, so that a batch is a
quarter of its float32 size on the way there.  The orientation that EXIF notes is not
applied, as in ML-GCN's code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from cbmlc_jax.data.dataset import DataError, filled

LARGEST_FILE = 64 << 20  # bytes
LARGEST_IMAGE = 80_000_000  # pixels; Pillow itself warns of 89 million
# No others: some of Pillow's readers start programs (Ghostscript).
FORMATS = ("JPEG", "PNG")
SCALES = (1.0, 0.875, 0.75, 0.66, 0.5)  # of the shorter side
MAX_DISTORT = 2  # width and height of a crop are at most so many scales apart
# Where a crop lies, in quarters of the room that is left across and down.
PLACES = (
    *((x, y) for x in (0, 2, 4) for y in (0, 2, 4)),
    *((x, y) for x in (1, 3) for y in (1, 3)),
)


def read_file(path: str) -> bytes:
    """The content of an image file.

    Raises:
        DataError: the file is missing, cannot be read or is too large.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise DataError(
            f"there is no image {path}: put it back, or take it off the list"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot read the image {path} ({error.strerror}): is it a file, and yours "
            "to read?"
        ) from error
    if len(content) > LARGEST_FILE:
        raise DataError(
            f"{path} has more than {LARGEST_FILE} bytes: make the image smaller"
        )
    return content


@dataclasses.dataclass(frozen=True)
class Images:
    """Images, one a row, that are decoded anew whenever a batch needs them.

    Attributes:
        paths: N files, or names that `read` knows.
        side: of the square that a batch holds.
        read: path -> the encoded image (JPEG or PNG); can be pickled, and several
            threads call it at once.
    """

    paths: tuple[str, ...]
    side: int
    read: Callable[[str], bytes] = read_file
    decodes: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], all 1."""
        return np.ones(len(self), np.int64)

    def take(self, rows: np.ndarray) -> Images:
        """The given rows, in the given order."""
        return dataclasses.replace(self, paths=tuple(self.paths[row] for row in rows))

    def batch(self, rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """`images` uint8 [len(rows), side, side, 3], each warped to the `square`.

        Row -1 repeats a row of the batch.

        Raises:
            DataError: names a file that is no image, or not whole.
        """
        del width
        return self._views(rows, lambda image, row: square(image, self.side))

    def augmented(
        self, rows: np.ndarray, random: Callable[[int], np.random.Generator]
    ) -> dict[str, np.ndarray]:
        """As `batch`, of a `multi_scale_crop` that is flipped with probability 1/2.

        Args:
            rows: as in `batch`.
            random: row -> its generator: what a row gets depends on nothing else.

        Raises:
            DataError: as `batch`.
        """

        def view(image: Image.Image, row: int) -> Image.Image:
            generator = random(row)
            # Not `resize(box=)`: that mixes in what lies beside the crop.
            image = image.crop(multi_scale_crop(image.size, self.side, generator))
            image = square(image, self.side)
            if generator.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return image

        return self._views(rows, view)

    def _views(
        self, rows: np.ndarray, view: Callable[[Image.Image, int], Image.Image]
    ) -> dict[str, np.ndarray]:
        rows = filled(rows)
        out = np.empty((len(rows), self.side, self.side, 3), np.uint8)
        for row in np.unique(rows).tolist():  # what fills up is not decoded again
            path = self.paths[row]
            out[rows == row] = np.asarray(view(decoded(path, self.read), row))
        return {"images": out}

    def matrix(self, num_features: int) -> np.ndarray:
        """Images have no features of their own.

        Raises:
            DataError: always.
        """
        raise DataError(
            "an estimator cannot read images: give it the features that a network "
            "makes of them"
        )

    def content(self) -> Iterator[bytes]:
        """sha256 of each file: where it lies is of no matter."""
        for path in self.paths:
            yield hashlib.sha256(self.read(path)).digest()


def decoded(path: str, read: Callable[[str], bytes] = read_file) -> Image.Image:
    """An image in RGB; transparency is dropped.

    Always in full: JPEG's reduced decoding makes other pixels, and would begin only
    where an image is twice as large as the square both ways; at side 224, few of VOC's.

    Args:
        path: of a JPEG or PNG file.
        read: path -> its content.

    Raises:
        DataError: the file is missing, no image, cut off, or too large.
    """
    content = read(path)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels, more than "
                    f"{LARGEST_IMAGE}: make the image smaller"
                )
            return image.convert("RGB")
    except DataError:
        raise
    # Pillow's readers raise whatever a damaged file leads them to.
    except Exception as error:
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):  # says nothing of the file
            reason = "neither JPEG nor PNG" if content else "the file is empty"
        raise DataError(
            f"{path} is no image that can be read ({reason}): replace it, or take it "
            "off the list"
        ) from error


def of_array(pixels: np.ndarray) -> Image.Image:
    """An image from its pixels, uint8 [height, width, 3] in the order RGB.

    Raises:
        DataError: they are not, or too many.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(
            f"an array {pixels.dtype} {list(pixels.shape)} is no image: give uint8 "
            "[height, width, 3]"
        )
    if not 0 < pixels.shape[0] * pixels.shape[1] <= LARGEST_IMAGE:
        raise DataError(
            f"an image of {pixels.shape[1]} x {pixels.shape[0]} pixels: give 1 to "
            f"{LARGEST_IMAGE}"
        )
    return Image.fromarray(pixels)


def square(image: Image.Image, side: int) -> Image.Image:
    """The whole image as side x side pixels: bilinear, the aspect is not kept."""
    return image.resize((side, side), Image.Resampling.BILINEAR)


def multi_scale_crop(
    size: tuple[int, int], side: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A crop of one of 19 shapes, at one of 13 places (Wang et al. 2015, as in ML-GCN).

    Widths and heights are SCALES of the shorter side, rounded down (or `side`, where
    within 2 pixels of it and not beyond the image), at most MAX_DISTORT scales apart.
    Places are in steps of a quarter, rounded down, of the room that is left: corners,
    middles of the edges, the centre, and the four halfway to the corners.

    Args:
        size: (width, height) of the image.
        side: of the square that the crop is resized to.
        generator: two draws are taken.

    Returns:
        (left, top, right, bottom).
    """
    sizes = [max(1, int(min(size) * scale)) for scale in SCALES]
    sizes = [side if abs(s - side) < 3 else s for s in sizes]
    shapes = [
        (min(width, size[0]), min(height, size[1]))
        for i, height in enumerate(sizes)
        for j, width in enumerate(sizes)
        if abs(i - j) <= MAX_DISTORT
    ]
    width, height = shapes[generator.integers(len(shapes))]
    across, down = PLACES[generator.integers(len(PLACES))]
    left = across * ((size[0] - width) // 4)
    top = down * ((size[1] - height) // 4)
    return left, top, left + width, top + height
