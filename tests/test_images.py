"""Images: decoding, the square of an evaluation, and the random crops of training."""

from __future__ import annotations

import collections
import functools
import io
import itertools
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cbmlc_jax import rngs
from cbmlc_jax.data import images
from cbmlc_jax.data.dataset import DataError
from cbmlc_jax.data.images import Images, multi_scale_crop

BILINEAR = Image.Resampling.BILINEAR


def jpeg(width=64, height=48) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """The head of a PNG, a few bytes for any number of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "neither JPEG nor PNG"),
        (b"GIF89a" + bytes(30), "neither JPEG nor PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "neither JPEG nor PNG"),
        (jpeg()[:300], "is no image that can be read"),  # within the head
        (jpeg()[:-700], "truncated"),
        (png_that_claims(8000, 11000), "8000 x 11000 pixels, more than 80000000: make"),
        (png_that_claims(30000, 30000), "is no image that can be read .*pixels"),
        (png_that_claims(100, 100), "is no image that can be read"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        images.decoded(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"there is no image .*b.jpg: put it back"):
        images.decoded(str(tmp_path / "b.jpg"))
    with pytest.raises(DataError, match="cannot read the image .*Is a directory"):
        images.decoded(str(tmp_path))
    (tmp_path / "c.jpg").write_bytes(jpeg())
    monkeypatch.setattr(images, "LARGEST_FILE", 1000)
    with pytest.raises(DataError, match="c.jpg has more than 1000 bytes"):
        images.decoded(str(tmp_path / "c.jpg"))


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    path = str(tmp_path / f"c.{suffix}")
    Image.new(mode, (8, 9)).save(path)
    batch = Images((path,), 16).batch(np.array([0]), 8)["images"]
    assert batch.shape == (1, 16, 16, 3)


def test_the_orientation_of_exif_is_not_applied(tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert images.decoded(str(tmp_path / "a.jpg")).size == (30, 20)


def test_a_batch_is_warped_bilinearly(pictures):
    rows = np.array([3, 0, -1, 3, -1])
    batch = pictures.batch(rows, 8)["images"]
    assert batch.shape == (5, 32, 32, 3) and batch.dtype == np.uint8
    for place, row in ((0, 3), (1, 0), (3, 3)):
        image = Image.open(pictures.paths[row])
        expected = np.asarray(image.resize((32, 32), BILINEAR))
        np.testing.assert_array_equal(batch[place], expected)
    # Row -1 repeats a row that is there, wherever it stands.
    first = pictures.batch(np.array([-1, 5]), 8)["images"]
    np.testing.assert_array_equal(first[0], first[1])


def test_protocol(pictures):
    assert len(pictures) == 7 and pictures.lengths.tolist() == [1] * 7
    taken = pictures.take(np.array([6, 2]))
    assert taken.paths == (pictures.paths[6], pictures.paths[2])
    assert taken.side == 32
    with pytest.raises(DataError, match="estimator cannot read images"):
        pictures.matrix(3)


def test_content_is_of_the_bytes_and_not_of_the_place(pictures, tmp_path):
    before = list(pictures.content())
    moved = str(tmp_path / "moved.png")
    os.rename(pictures.paths[0], moved)
    elsewhere = Images((moved, *pictures.paths[1:]), 64)
    assert list(elsewhere.content()) == before
    with open(pictures.paths[4], "ab") as file:
        file.write(b"x")
    after = list(elsewhere.content())
    assert [a != b for a, b in zip(after, before, strict=True)] == [
        row == 4 for row in range(7)
    ]


def in_memory(path: str) -> bytes:
    return jpeg(int(path), 40)


def test_images_need_not_be_files():
    inputs = pickle.loads(pickle.dumps(Images(("50", "70"), 16, in_memory)))
    batch = inputs.take(np.array([1])).batch(np.array([0]), 8)["images"]
    image = Image.open(io.BytesIO(jpeg(70, 40))).resize((16, 16), BILINEAR)
    np.testing.assert_array_equal(batch[0], np.asarray(image))
    broken = Images(("7.jpg",), 16, lambda path: b"nothing")
    with pytest.raises(DataError, match="^7.jpg is no image"):
        broken.batch(np.array([0]), 8)


class Draws:
    """A generator whose draws are given."""

    def __init__(self, *integers: int, flip: float = 0.9):
        self._integers, self._flip = list(integers), flip

    def integers(self, end: int) -> int:
        assert 0 <= self._integers[0] < end
        return self._integers.pop(0)

    def random(self) -> float:
        return self._flip


def test_all_shapes_at_all_places():
    """By hand for 500 x 334: 334 times the scales, in steps of quarters."""
    scaled = [334, 292, 250, 220, 167]
    shapes = {
        (w, h)
        for (i, w), (j, h) in itertools.product(enumerate(scaled), repeat=2)
        if abs(i - j) <= 2
    }
    steps = {(x, y) for x in (0, 2, 4) for y in (0, 2, 4)} | {
        (x, y) for x in (1, 3) for y in (1, 3)
    }
    expected = {
        (x * ((500 - w) // 4), y * ((334 - h) // 4), w, h)
        for w, h in shapes
        for x, y in steps
    }
    found = set()
    for shape, place in itertools.product(range(19), range(13)):
        box = multi_scale_crop((500, 334), 224, Draws(shape, place))
        found.add((*box[:2], box[2] - box[0], box[3] - box[1]))
    assert len(shapes) == 19 and len(steps) == 13
    assert found == expected
    # One of them in numbers: 250 x 167 at the upper right quarter.
    assert (3 * 62, 1 * 41, 250, 167) in found


def test_crops_are_drawn_alike_often():
    generator = np.random.default_rng(0)
    draws = 19 * 520
    boxes = [multi_scale_crop((400, 400), 224, generator) for _ in range(draws)]
    shapes = collections.Counter((b[2] - b[0], b[3] - b[1]) for b in boxes)
    # 520 of each are expected, with a deviation of 22.
    assert len(shapes) == 19 and all(410 < count < 630 for count in shapes.values())
    small = collections.Counter(
        b[:2] for b in boxes if b[2:] == (b[0] + 200, b[1] + 200)
    )
    # 40 of each, with a deviation of 6.
    assert len(small) == 13 and all(15 < count < 65 for count in small.values())


def test_a_scale_near_the_side_is_the_side():
    for size, expected in (
        ((226, 300), {224, 197, 169, 149, 113}),  # 2 from 224
        ((227, 300), {227, 198, 170, 149, 113}),  # 3 from it
        ((300, 222), {224, 194, 166, 146, 111}),  # there is room for 224 across
        ((223, 223), {223, 195, 167, 147, 111}),  # and here there is none
        ((1, 1), {1}),
    ):
        boxes = [
            multi_scale_crop(size, 224, Draws(shape, place))
            for shape in range(19)
            for place in range(13)
        ]
        assert all(0 <= b[0] < b[2] <= size[0] for b in boxes), size
        assert all(0 <= b[1] < b[3] <= size[1] for b in boxes), size
        assert {b[2] - b[0] for b in boxes} == expected, size


def test_a_crop_is_resized_and_flipped(pictures):
    """Row 0 is 60 x 40; shape 18 is half of 40 both ways, place 2 the lower left."""
    original = np.asarray(Image.open(pictures.paths[0]))
    across, down = images.PLACES[2]
    assert (across, down) == (0, 4)
    part = Image.fromarray(original[20:40, 0:20])
    expected = np.asarray(part.resize((32, 32), BILINEAR))
    for flip, turned in ((0.7, expected), (0.3, expected[:, ::-1])):
        random = functools.partial(lambda row, flip: Draws(18, 2, flip=flip), flip=flip)
        found = pictures.augmented(np.array([0]), random)["images"][0]
        np.testing.assert_array_equal(found, turned)


def test_a_row_is_augmented_alike_in_any_batch(pictures):
    random = functools.partial(rngs.generator, 5, "augment", 2)
    whole = pictures.augmented(np.arange(7), random)["images"]
    part = pictures.augmented(np.array([4, 1, -1]), random)["images"]
    np.testing.assert_array_equal(part, whole[[4, 1, 4]])
    other = functools.partial(rngs.generator, 5, "augment", 3)
    changed = pictures.augmented(np.arange(7), other)["images"] != whole
    assert changed.any((1, 2, 3)).all()
    # Row by row what its own generator draws: shape, place, flip.
    flips = 0
    for row in range(7):
        generator = random(row)
        image = Image.open(pictures.paths[row])
        box = multi_scale_crop(image.size, 32, generator)
        expected = np.asarray(image.crop(box).resize((32, 32), BILINEAR))
        if generator.random() < 0.5:
            expected, flips = expected[:, ::-1], flips + 1
        np.testing.assert_array_equal(whole[row], expected)
    assert 0 < flips < 7
