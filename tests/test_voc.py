"""VOC's lists and images, the crops, and batches that are made ahead."""

from __future__ import annotations

import collections
import functools
import pathlib

import numpy as np
import pytest
from PIL import Image

from cbmlc_jax import rngs
from cbmlc_jax.data import images, pipeline, voc
from cbmlc_jax.data.dataset import DataError
from cbmlc_jax.data.feed import feed
from cbmlc_jax.data.images import Images, multi_scale_crop

VALUES = {"cat": {"000001": 1, "000002": 0, "000003": -1}, "dog": {"000003": 1}}
SPLITS = {"trainval": ["000001", "000002", "000003"], "test": ["000004"]}


def write_lists(base: pathlib.Path) -> None:
    lists = base / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (base / "JPEGImages").mkdir()
    for name, ids in SPLITS.items():
        (lists / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
        for of_class in voc.CLASSES:
            known = VALUES.get(of_class, {})
            # In another order than the split's list.
            text = "".join(f"{i} {known.get(i, -1):2d}\n" for i in ids[::-1])
            (lists / f"{of_class}_{name}.txt").write_text(text)
        for i in ids:
            color = (int(i) * 20, 100, 200)
            Image.new("RGB", (50, 40), color).save(base / "JPEGImages" / f"{i}.jpg")


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    write_lists(tmp_path / "VOCdevkit" / "VOC2007")
    return tmp_path


def test_labels_and_the_policy_for_difficult_objects(folder):
    cat, dog = voc.CLASSES.index("cat"), voc.CLASSES.index("dog")
    found = {
        policy: voc.load(str(folder), side=32, difficult=policy)
        for policy in ("positive", "ignore", "negative")
    }
    assert found["positive"].train.labels[:, cat].tolist() == [1, 1, 0]
    for policy in ("ignore", "negative"):
        assert found[policy].train.labels[:, cat].tolist() == [1, 0, 0]
    assert found["positive"].train.labels[:, dog].tolist() == [0, 0, 1]
    assert found["positive"].train.ignored is found["negative"].train.ignored is None
    ignored = found["ignore"].train.ignored
    assert ignored.sum() == 1 and ignored[1, cat]
    dataset = found["positive"]
    assert dataset.name == "voc" and dataset.kind == "images"
    texts = dict(zip(dataset.label_names, dataset.label_texts, strict=True))
    assert texts["tvmonitor"] == "tv monitor" and texts["cat"] == "cat"
    assert len({found[policy].fingerprint for policy in found}) == 3
    batch = dataset.train.inputs.batch(np.array([2, 0, -1]), 8)["images"]
    assert batch.shape == (3, 32, 32, 3) and batch.dtype == np.uint8
    np.testing.assert_allclose(batch[:, 5, 5, 0], [60, 20, 60], atol=3)


def test_a_part_of_the_images(folder, tmp_path):
    base = tmp_path / "part" / "voc2007_small"
    base.parent.mkdir()
    write_lists(base)
    (base / "trainval_have.txt").write_text("000003\n000001\n")
    (base / "test_have.txt").write_text("000004\n")
    (base / "JPEGImages" / "000002.jpg").unlink()
    dataset = voc.load(str(base.parent), side=32)
    assert dataset.name == "voc-partial"  # its numbers are not VOC's
    assert dataset.train.labels[:, voc.CLASSES.index("dog")].tolist() == [1, 0]
    assert [p[-10:] for p in dataset.train.inputs.paths] == ["000003.jpg", "000001.jpg"]
    with pytest.raises(DataError, match="VOCdevkit"):
        voc.load(str(base.parent), variant="full")
    (base / "test_have.txt").write_text("000009\n")
    with pytest.raises(DataError, match="line 1: 000009 is not in test.txt"):
        voc.load(str(base.parent))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("cat_trainval", lambda s: s.replace(" 0", " 2"), "line 2: '2' is not -1, 0"),
        ("cat_trainval", lambda s: s + "000009  1\n", "000009 is not in trainval.txt"),
        ("cat_trainval", lambda s: s + "000001  1\n", "line 4: 000001 is twice"),
        ("cat_trainval", lambda s: s.splitlines()[0], "says nothing of 000001 .2 ima"),
        ("cat_trainval", lambda s: s + "000009\n", "line 4: expected 2 words"),
        ("trainval", lambda s: s + "000001\n", "trainval.txt names an image twice"),
        ("test", lambda s: s.replace("4", "\u00e9"), "it is no ASCII text"),
        ("dog_test", None, "cannot read the list .*dog_test.txt"),
    ],
)
def test_lists_that_disagree(folder, file, change, message):
    path = folder / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{file}.txt"
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()), encoding="utf8")
    with pytest.raises(DataError, match=message):
        voc.load(str(folder))


def test_missing_images_and_folders(folder):
    pictures = folder / "VOCdevkit" / "VOC2007" / "JPEGImages"
    (pictures / "000002.jpg").unlink()
    with pytest.raises(DataError, match="1 of the 3 images .*000002.jpg: unpack"):
        voc.load(str(folder))
    with pytest.raises(DataError, match="VOC2007: fetch VOCtrainval and VOCtest"):
        voc.load(None)
    with pytest.raises(DataError, match="'half' is none of voc's"):
        voc.load(str(folder), variant="half")


def test_files_that_are_no_images(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    good = tmp_path / "good.jpg"
    Image.new("RGB", (64, 48), (10, 20, 30)).save(good)
    for content in (b"", b"no image at all", good.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.jpg is no image that can be read"):
            images.decoded(str(path))
    with pytest.raises(DataError, match="there is no image .*b.jpg"):
        images.decoded(str(tmp_path / "b.jpg"))
    monkeypatch.setattr(images, "LARGEST_IMAGE", 3000)
    with pytest.raises(DataError, match="64 x 48 pixels, more than 3000: make it"):
        images.decoded(str(good))
    # Palette, grey and transparent images become RGB.
    for mode in ("P", "L", "RGBA"):
        Image.new(mode, (8, 8)).save(tmp_path / "c.png")
        assert images.decoded(str(tmp_path / "c.png")).mode == "RGB"
    with pytest.raises(DataError, match="estimator cannot read images"):
        Images((str(good),), 32).matrix(3)


def test_crops_of_every_size_at_every_place():
    size, side = (500, 334), 224
    scaled = [334, 292, 250, 224, 167]  # 334 times the scales; 220 is not near 224
    scaled[3] = 220
    seen = collections.Counter()
    for draw in range(6000):
        box = multi_scale_crop(size, side, rngs.generator(0, "test", draw))
        left, top, right, bottom = box
        assert 0 <= left and 0 <= top and right <= 500 and bottom <= 334
        seen[box] += 1
    sizes = {(b[2] - b[0], b[3] - b[1]) for b in seen}
    expected = {
        (w, h)
        for i, w in enumerate(scaled)
        for j, h in enumerate(scaled)
        if abs(i - j) <= 2
    }
    assert sizes == expected and len(expected) == 19
    # 250 x 167: quarter steps of 62 and 41 pixels.
    places = {b[:2] for b in seen if (b[2] - b[0], b[3] - b[1]) == (250, 167)}
    by_hand = {(62 * x, 41 * y) for x in (0, 2, 4) for y in (0, 2, 4)}
    by_hand |= {(62 * x, 41 * y) for x in (1, 3) for y in (1, 3)}
    assert places == by_hand and len(by_hand) == 13
    # A scale within 2 pixels of the side is the side.
    assert multi_scale_crop((225, 225), 224, np.random.default_rng(0))[2] <= 225
    widths = {
        multi_scale_crop((226, 300), 224, np.random.default_rng(i))[2]
        for i in range(60)
    }
    assert 224 in widths and 226 not in widths


@pytest.fixture
def pictures(tmp_path) -> Images:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(7):
        pixels = rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return Images(tuple(paths), 32)


def test_a_row_is_augmented_alike_in_any_batch(pictures):
    random = functools.partial(rngs.generator, 5, "augment", 2)
    whole = pictures.augmented(np.arange(7), random)["images"]
    part = pictures.augmented(np.array([4, 1, -1]), random)["images"]
    np.testing.assert_array_equal(part, whole[[4, 1, 4]])
    other = functools.partial(rngs.generator, 5, "augment", 3)
    assert (
        (pictures.augmented(np.arange(7), other)["images"] != whole)
        .any((1, 2, 3))
        .all()
    )
    # Row by row the crop and the flip of its generator.
    flips = 0
    for row in range(7):
        generator = random(row)
        image = images.decoded(pictures.paths[row])
        box = multi_scale_crop(image.size, 32, generator)
        image = image.resize((32, 32), Image.Resampling.BILINEAR, box=box)
        expected = np.asarray(image)
        if generator.random() < 0.5:
            expected, flips = expected[:, ::-1], flips + 1
        np.testing.assert_array_equal(whole[row], expected)
    assert 0 < flips < 7
    warped = pictures.batch(np.arange(7), 8)["images"]
    image = images.decoded(pictures.paths[3])
    size = (32, 32)
    np.testing.assert_array_equal(
        warped[3], np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    )


def epochs(pictures) -> pipeline.Epochs:
    labels = np.eye(7, 3, dtype=np.uint8)
    split = pipeline.Split(pictures, labels)
    return pipeline.Epochs(split, 3, [8], seed=1, epochs=2, augment=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_made_ahead_or_not_the_batches_are_the_same(pictures, workers):
    source = epochs(pictures)
    expected = [source[i] for i in range(6)]
    for start in (0, 4) if workers == 0 else (2,):
        found = list(feed(source, start, workers))
        assert len(found) == 6 - start
        for a, b in zip(found, expected[start:], strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_its_file_when_its_turn_comes(pictures, workers):
    with open(pictures.paths[2], "wb") as file:
        file.write(b"no image")
    batches = feed(epochs(pictures), 0, workers)
    with pytest.raises(DataError, match="^.*2.png is no image that can be read"):
        for _ in batches:
            pass
    batches = feed(epochs(pictures), 3, workers)
    batches.close()  # early, before anything was asked for


# The real part of VOC 2007.


def test_real_part(data_dir):
    dataset = voc.load(str(data_dir), side=32, variant="partial")
    assert (len(dataset.train), len(dataset.test)) == (942, 965)
    counts = voc.load(str(data_dir), side=32, difficult="negative")
    # Its README's table, of labels with value 1.
    expected = {"car": (455, 469), "cat": (224, 220), "person": (216, 232)}
    expected |= {"bus": (108, 108), "train": (175, 173), "sheep": (1, 0)}
    for name, (train, test) in expected.items():
        column = voc.CLASSES.index(name)
        assert counts.train.labels[:, column].sum() == train, name
        assert counts.test.labels[:, column].sum() == test, name
    batch = dataset.test.inputs.batch(np.arange(8), 8)["images"]
    assert batch.shape == (8, 32, 32, 3) and 60 < batch.mean() < 190
