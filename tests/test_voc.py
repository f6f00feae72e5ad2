"""PASCAL VOC: its lists, their mistakes, and every place that it is read from."""

from __future__ import annotations

import pathlib
import pickle
import types

import numpy as np
import pytest
from PIL import Image

from cbmlc_jax.data import voc
from cbmlc_jax.data.dataset import DataError

# Class -> image -> value, -1 where it is not named.
VALUES = {
    "cat": {"000001": 1, "000002": 0, "000003": -1, "000005": 0},
    "dog": {"000003": 1},
    "tvmonitor": {"000004": 1},
}
SPLITS = {"trainval": ["000001", "000002", "000003"], "test": ["000004", "000005"]}
CAT, DOG = voc.CLASSES.index("cat"), voc.CLASSES.index("dog")


def write(base: pathlib.Path) -> None:
    """A small VOC: lists and images."""
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
    write(tmp_path / "VOCdevkit" / "VOC2007")
    return tmp_path


@pytest.fixture
def part(tmp_path) -> pathlib.Path:
    """A folder with two of the three training images."""
    base = tmp_path / "part" / "voc2007_small"
    write(base)
    (base / "trainval_have.txt").write_text("000003\n000001\n")
    (base / "test_have.txt").write_text("000004\n")
    (base / "JPEGImages" / "000002.jpg").unlink()
    (base / "JPEGImages" / "000005.jpg").unlink()
    return base.parent


def test_labels_and_the_policy_for_difficult_objects(folder):
    found = {
        policy: voc.load(str(folder), side=32, difficult=policy)
        for policy in ("positive", "ignore", "negative")
    }
    assert found["positive"].train.labels[:, CAT].tolist() == [1, 1, 0]
    assert found["positive"].test.labels[:, CAT].tolist() == [0, 1]
    for policy in ("ignore", "negative"):
        assert found[policy].train.labels[:, CAT].tolist() == [1, 0, 0]
        assert found[policy].test.labels[:, CAT].tolist() == [0, 0]
    assert found["positive"].train.labels[:, DOG].tolist() == [0, 0, 1]
    assert found["positive"].train.labels.sum() == 3
    assert found["positive"].train.ignored is found["negative"].train.ignored is None
    ignored = found["ignore"].train.ignored
    assert ignored.sum() == 1 and ignored[1, CAT]
    assert np.argwhere(found["ignore"].test.ignored).tolist() == [[1, CAT]]
    assert len({found[policy].fingerprint for policy in found}) == 3


def test_names_and_images(folder):
    dataset = voc.load(str(folder), side=32)
    assert dataset.name == "voc" and dataset.kind == "images"
    assert len(dataset.label_names) == 20
    assert list(dataset.label_names) == sorted(dataset.label_names)
    assert dataset.feature_names == ()
    texts = dict(zip(dataset.label_names, dataset.label_texts, strict=True))
    changed = {name: text for name, text in texts.items() if name != text}
    assert changed == {
        "diningtable": "dining table",
        "pottedplant": "potted plant",
        "tvmonitor": "tv monitor",
    }
    batch = dataset.train.inputs.batch(np.array([2, 0, -1]), 8)["images"]
    assert batch.shape == (3, 32, 32, 3) and batch.dtype == np.uint8
    np.testing.assert_allclose(batch[:, 5, 5, 0], [60, 20, 60], atol=3)


def test_a_part_of_the_images(part):
    dataset = voc.load(str(part), side=32)
    assert dataset.name == "voc-partial"  # its numbers are not VOC's
    assert dataset.train.labels[:, DOG].tolist() == [1, 0]
    assert dataset.train.labels[:, CAT].tolist() == [0, 1]
    assert [p[-10:] for p in dataset.train.inputs.paths] == ["000003.jpg", "000001.jpg"]
    assert len(dataset.test) == 1
    (part / "voc2007_small" / "test_have.txt").write_text("000009\n")
    with pytest.raises(DataError, match="_have.txt names 000009, .* not in test.txt"):
        voc.load(str(part))


def test_which_variant_is_found(folder, part):
    with pytest.raises(DataError, match="VOCdevkit.VOC2007: fetch VOCtrainval"):
        voc.load(str(part), variant="full")
    with pytest.raises(DataError, match="no .*voc2007_small: set config.data.variant"):
        voc.load(str(folder), variant="partial")
    (part / "voc2007_small").rename(folder / "voc2007_small")
    assert voc.load(str(folder)).name == "voc"  # the full one first
    assert voc.load(str(folder), variant="partial").name == "voc-partial"
    (folder / "VOCdevkit" / "VOC2007").rename(folder / "VOC2007")
    assert voc.load(str(folder), variant="full").name == "voc"
    with pytest.raises(DataError, match="variant='half' is none of"):
        voc.load(str(folder), variant="half")
    with pytest.raises(DataError, match="difficult='neg' is none of positive, ig"):
        voc.load(str(folder), difficult="neg")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("cat_trainval", lambda s: s.replace(" 0", " 2"), "line 2: '2' is not -1, 0"),
        ("cat_trainval", lambda s: s + "000009  1\n", "000009 is not in trainval.txt"),
        ("cat_trainval", lambda s: s + "000001  1\n", "line 4: 000001 is there twice"),
        ("cat_trainval", lambda s: s.splitlines()[0], "lacks 2 .* 3 .* them 000001"),
        ("cat_trainval", lambda s: s + "000009\n", "line 4: 1 words, expected 2"),
        ("trainval", lambda s: s + "000001\n", "trainval.txt names an image twice"),
        ("trainval", lambda s: s + "../../x\n", "line 4: '../../x' is no id"),
        ("trainval", lambda s: s + "000009\n", "aeroplane_trainval.txt lacks 1 .*09"),
        ("trainval", lambda s: "", "trainval.txt names no image"),
        ("test", lambda s: s.replace("4", "\u00e9"), r"000004 is not in test.txt"),
        ("test", lambda s: s + "0" * 1000, "test.txt is larger than 900 bytes"),
        ("test", None, "cannot read the list .*test.txt .*unpack its archive"),
        ("dog_test", None, "cannot read the list .*dog_test.txt"),
    ],
)
def test_lists_that_disagree(folder, monkeypatch, file, change, message):
    monkeypatch.setattr(voc, "LARGEST_LIST", 900)
    path = folder / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{file}.txt"
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()), encoding="utf8")
    with pytest.raises(DataError, match=message) as caught:
        voc.load(str(folder))
    assert str(caught.value).count("\n") == 0


def test_an_image_in_both_splits(folder):
    lists = folder / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    for path in lists.glob("*test.txt"):
        value = "" if path.name == "test.txt" else " -1"
        path.write_text(path.read_text() + f"000002{value}\n")
    with pytest.raises(DataError, match="000002.jpg is in trainval.txt and in test"):
        voc.load(str(folder))


def test_missing_images(folder):
    pictures = folder / "VOCdevkit" / "VOC2007" / "JPEGImages"
    (pictures / "000002.jpg").unlink()
    (pictures / "000003.jpg").unlink()
    with pytest.raises(DataError, match="2 of the 3 images .*000002.jpg: unpack"):
        voc.load(str(folder))


# TensorFlow Datasets.


def annotation(image: str) -> str:
    """Boxes that say what `VALUES` do."""
    objects = ""
    for of_class, values in VALUES.items():
        # Beside an object that is not difficult, a difficult one changes nothing.
        kinds = {1: "01", 0: "11"}.get(values.get(image, -1), "")
        objects += "".join(
            f"<object><name>{of_class}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{kind}</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
            "<xmax>9</xmax><ymax>9</ymax></bndbox></object>"
            for kind in kinds
        )
    size = "<size><width>50</width><height>40</height></size>"
    return f"<annotation>{size}{objects}</annotation>"


@pytest.fixture
def prepared(folder, tmp_path, monkeypatch, capfd) -> str:
    """A cache with `voc/2007`, made by its own builder.

    What the builder would have TensorFlow do, read files and unpack archives, is done
    here: TensorFlow is not installed.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.object_detection import voc as theirs

    base = folder / "VOCdevkit" / "VOC2007"
    (base / "Annotations").mkdir()
    for image in SPLITS["trainval"] + SPLITS["test"]:
        (base / "Annotations" / f"{image}.xml").write_text(annotation(image))
    # Theirs are three, and the images of one are not in their order.
    parts = {"train": ["000003", "000001"], "val": ["000002"], "test": SPLITS["test"]}
    for name, ids in parts.items():
        text = "".join(f"{i}\n" for i in ids)
        (base / "ImageSets" / "Main" / f"{name}.txt").write_text(text)

    class Voc(theirs.Voc, skip_registration=True):
        name, code_path = "voc", None

        def _split_generators(self, dl_manager):
            names = {"train": "train", "validation": "val", "test": "test"}
            return {
                split: self._generate_examples(str(folder), name)
                for split, name in names.items()
            }

    gfile = types.SimpleNamespace(GFile=open)
    io = types.SimpleNamespace(gfile=gfile)
    monkeypatch.setattr(theirs, "tf", types.SimpleNamespace(io=io))
    cache = str(tmp_path / "cache")
    builder = Voc(config="2007", data_dir=cache, file_format="array_record")
    options = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=options)
    return cache


def test_a_prepared_data_set_is_the_folder(folder, prepared):
    for policy in voc.DIFFICULT:
        options = {"side": 32, "difficult": policy}
        expected = voc.load(str(folder), **options)
        found = voc.load(None, cache_dir=prepared, **options)
        assert found.fingerprint == expected.fingerprint, policy
    rows = np.array([2, 0])
    batch = found.train.inputs.batch(rows, 8)["images"]
    np.testing.assert_array_equal(batch, expected.train.inputs.batch(rows, 8)["images"])
    # In a worker, and where an image is broken.
    inputs = pickle.loads(pickle.dumps(found.train.inputs.take(rows)))
    np.testing.assert_array_equal(inputs.batch(np.arange(2), 8)["images"], batch)


def test_a_prepared_data_set_that_is_missing_or_broken(prepared, tmp_path):
    with pytest.raises(DataError, match="not downloaded: fetch VOCtrain.*array_record"):
        voc.load(None, cache_dir=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="not downloaded"):
        voc.load(None, cache_dir=prepared, variant="partial")
    (file,) = pathlib.Path(prepared).rglob("voc-test.array_record*")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="5.0.0 is broken or not array_record"):
        voc.load(None, cache_dir=prepared)


# The real part of VOC 2007.

# Its README's table: labels with value 1 in trainval and in test.
COUNTS = {
    "aeroplane": (5, 5),
    "bicycle": (15, 9),
    "bird": (1, 1),
    "boat": (6, 7),
    "bottle": (5, 6),
    "bus": (108, 108),
    "car": (455, 469),
    "cat": (224, 220),
    "chair": (22, 11),
    "cow": (1, 1),
    "diningtable": (2, 2),
    "dog": (12, 16),
    "horse": (8, 6),
    "motorbike": (25, 28),
    "person": (216, 232),
    "pottedplant": (16, 8),
    "sheep": (1, 0),
    "sofa": (14, 10),
    "train": (175, 173),
    "tvmonitor": (8, 12),
}


def test_real_part(data_dir):
    dataset = voc.load(str(data_dir), side=32, difficult="negative", variant="partial")
    assert (len(dataset.train), len(dataset.test)) == (942, 965)
    for split, column in ((dataset.train, 0), (dataset.test, 1)):
        found = dict(zip(dataset.label_names, split.labels.sum(0), strict=True))
        assert found == {name: counts[column] for name, counts in COUNTS.items()}
    positive = voc.load(str(data_dir), side=32, variant="partial")
    assert positive.train.labels.sum() > dataset.train.labels.sum()
    batch = dataset.test.inputs.batch(np.arange(8), 8)["images"]
    assert batch.shape == (8, 32, 32, 3) and 60 < batch.mean() < 190
