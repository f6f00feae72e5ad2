"""PASCAL VOC 2007 (Everingham et al. 2010): images and which of 20 classes they show.

A folder holds `VOCdevkit/VOC2007/` (the official archives, unpacked), or
`voc2007_small/`: the same lists with a part of the images and, in `trainval_have.txt`
and `test_have.txt`, the ids of that part.  That part is biased (every image of it shows
a car, bus, train or cat): its numbers are not those of VOC 2007, and the name of the
data set is "voc-partial".

Without a folder, `voc/2007` of TensorFlow Datasets is read where it has been prepared
as array_record; preparing it needs TensorFlow, reading it does not.  (Run so far: the
partial set, and small sets of both other forms that the tests make.  The full set was
not at hand.)

Only image-level labels are read: `ImageSets/Main/<class>_<split>.txt`, lines of
`id value` with 1 for present, -1 for absent, 0 where every object is "difficult".
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np

from cbmlc_jax.data.dataset import DataError, Dataset, Split
from cbmlc_jax.data.images import Images

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
# Words where a name is none.
_TEXTS = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
# What an image with nothing but difficult objects of a class is for that class:
# "positive" (the paper), "ignore" (it counts nowhere) or "negative".
DIFFICULT = ("positive", "ignore", "negative")
SITE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"
# Variant -> where it lies in a data folder.
FOLDERS = {
    "full": (os.path.join("VOCdevkit", "VOC2007"), "VOC2007"),
    "partial": ("voc2007_small",),
}
# Split -> its parts in TensorFlow Datasets.
SPLITS = {"trainval": "train+validation", "test": "test"}
LARGEST_LIST = 10 << 20  # bytes
_HOW = (
    f"fetch VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from {SITE}, "
    "unpack both into one folder, and set config.data.dir or CBMLC_DATA_DIR to the "
    "folder that holds VOCdevkit"
)


def load(
    folder: str | None,
    *,
    side: int = 224,
    difficult: str = "positive",
    variant: str = "",
    cache_dir: str | None = None,
) -> Dataset:
    """Reads VOC 2007: train is `trainval`, test is `test`.

    Args:
        folder: a data folder; where given, the only source.
        side: of the squares that images become.
        difficult: one of `DIFFICULT`.
        variant: "full", "partial", or "" for whichever is there, the full one first.
        cache_dir: of TensorFlow Datasets; None for its default (`TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`).

    Raises:
        DataError: a file is missing or malformed, or lists and images disagree.
    """
    if difficult not in DIFFICULT:
        raise DataError(
            f"config.data.difficult={difficult!r} is none of {', '.join(DIFFICULT)}"
        )
    if variant not in ("", *FOLDERS):
        raise DataError(
            f"config.data.variant={variant!r} is none of voc's: full or partial"
        )
    if folder:
        base, variant = _find(folder, variant)
        parts = [_listed(base, name, variant) for name in SPLITS]
    else:
        parts = _prepared(cache_dir, variant)
    train, test = (
        _split(values, dataclasses.replace(images, side=side), difficult)
        for images, values in parts
    )
    twice = {os.path.basename(path) for path in train.inputs.paths} & {
        os.path.basename(path) for path in test.inputs.paths
    }
    if twice:
        raise DataError(
            f"{min(twice)} is in trainval.txt and in test.txt of {base}: fetch the "
            "archives again"
        )
    return Dataset(
        name="voc-partial" if variant == "partial" else "voc",
        train=train,
        test=test,
        label_names=CLASSES,
        feature_names=(),
        label_texts=tuple(_TEXTS.get(name, name) for name in CLASSES),
    )


def _split(values: np.ndarray, images: Images, difficult: str) -> Split:
    """Labels of values 1, 0 and -1."""
    ignored = values == 0 if difficult == "ignore" else None
    positive = values >= 0 if difficult == "positive" else values == 1
    return Split(images, positive.astype(np.uint8), ignored)


def _find(folder: str, variant: str) -> tuple[str, str]:
    for name, places in FOLDERS.items():
        for place in places:
            path = os.path.join(folder, place)
            if variant in ("", name) and os.path.isdir(path):
                return path, name
    wanted = os.path.join(folder, FOLDERS[variant or "full"][0])
    if variant == "partial":
        raise DataError(f"there is no {wanted}: set config.data.variant to full or ''")
    raise DataError(f"there is no {wanted}: {_HOW}")


def _listed(base: str, name: str, variant: str) -> tuple[Images, np.ndarray]:
    """The images of a split and int8 [N, L], what the lists say of them."""
    lists = os.path.join(base, "ImageSets", "Main")
    ids = _ids(os.path.join(lists, f"{name}.txt"))
    place = {image: row for row, image in enumerate(ids)}
    values = np.empty((len(ids), len(CLASSES)), np.int8)
    for number, of_class in enumerate(CLASSES):
        path = os.path.join(lists, f"{of_class}_{name}.txt")
        values[:, number] = _values(path, place, f"{name}.txt")
    if variant == "partial":
        path = os.path.join(base, f"{name}_have.txt")
        have = _ids(path)
        for image in have:
            if image not in place:
                raise DataError(
                    f"{path} names {image}, which is not in {name}.txt: take it out"
                )
        ids, values = have, values[[place[image] for image in have]]
    paths = tuple(os.path.join(base, "JPEGImages", f"{image}.jpg") for image in ids)
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(paths)} images of {name}.txt are missing, "
            f"the first of them {missing[0]}: unpack the archive of images again"
        )
    return Images(paths, 0), values


def _ids(path: str) -> list[str]:
    ids = []
    for number, (image,) in _lines(path, 1):
        if image in ids[-1:] or os.path.basename(image) != image:
            raise DataError(
                f"{path}, line {number}: {image!r} is no id, or is there twice; fetch "
                "the list again"
            )
        ids.append(image)
    if len(set(ids)) != len(ids) or not ids:
        what = "names an image twice" if ids else "names no image"
        raise DataError(f"{path} {what}: fetch the list again")
    return ids


def _values(path: str, place: dict[str, int], whose: str) -> np.ndarray:
    """int8 [N], the values of a class in the order of `place`."""
    unknown = 2
    values = np.full(len(place), unknown, np.int8)
    for number, (image, value) in _lines(path, 2):
        if value not in ("-1", "0", "1"):
            raise DataError(
                f"{path}, line {number}: {value!r} is not -1, 0 or 1; fetch the list "
                "again"
            )
        if image not in place or values[place[image]] != unknown:
            what = "there twice" if image in place else f"not in {whose}"
            raise DataError(
                f"{path}, line {number}: {image} is {what}; fetch the list again"
            )
        values[place[image]] = int(value)
    lacking = np.flatnonzero(values == unknown)
    if len(lacking):
        raise DataError(
            f"{path} lacks {len(lacking)} of the {len(place)} images of {whose}, the "
            f"first of them {list(place)[lacking[0]]}: fetch the list again"
        )
    return values


def _lines(path: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and its `width` words, blank lines left out."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_LIST + 1)
    except OSError as error:
        raise DataError(
            f"cannot read the list {path} ({error.strerror}): unpack its archive again"
        ) from error
    if len(content) > LARGEST_LIST:
        raise DataError(f"{path} is larger than {LARGEST_LIST} bytes; no list is")
    # What is not ASCII is no id and no value, and shown as such.
    text = content.decode("ascii", "backslashreplace")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words and len(words) != width:
            raise DataError(
                f"{path}, line {number}: {len(words)} words, expected {width} "
                f"({line[:40]!r}); fetch the list again"
            )
        if words:
            yield number, words


@dataclasses.dataclass(frozen=True)
class _Records:
    """Reads encoded images out of a prepared data set.

    Attributes:
        source: by number, `image` and what else there is of a row.
        numbers: path -> number.
    """

    source: Sequence[dict]
    numbers: dict[str, int]

    def __call__(self, path: str) -> bytes:
        return self.source[self.numbers[path]]["image"]


def _prepared(cache_dir: str | None, variant: str) -> list[tuple[Images, np.ndarray]]:
    """As `_listed`, of both splits, out of TensorFlow Datasets' `voc/2007`.

    Of its boxes, `labels` has the classes with any object, `labels_no_difficult` those
    with one that is not difficult; rows are put in the order of their file names, which
    is that of the official lists.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    cache_dir = os.path.expanduser(cache_dir or constants.DATA_DIR)
    folder = os.path.join(cache_dir, "voc", "2007", "5.0.0")
    if variant == "partial" or not os.path.isdir(folder):
        raise DataError(
            f"voc is not downloaded: {_HOW}; or, where TensorFlow is installed, "
            "prepare tfds.builder('voc/2007', file_format='array_record') with "
            f"data_dir={cache_dir!r}"
        )
    try:
        builder = tfds.builder_from_directory(folder)
        if tuple(builder.info.features["labels"].feature.names) != CLASSES:
            raise ValueError("its classes are others")
        skip = {"image": tfds.decode.SkipDecoding()}
        return [
            _records(folder, builder.as_data_source(split, decoders=skip))
            for split in SPLITS.values()
        ]
    # Damaged files surface as exceptions of json, protobuf, array_record and others.
    except Exception as error:
        raise DataError(
            f"the prepared data set in {folder} is broken or not array_record "
            f"({type(error).__name__}: {error}); prepare it again, or {_HOW}"
        ) from error


def _records(folder: str, source: Sequence[dict]) -> tuple[Images, np.ndarray]:
    values = np.full((len(source), len(CLASSES)), -1, np.int8)
    names = []
    for row in range(len(source)):
        record = source[row]
        names.append(record["image/filename"].decode())
        values[row, record["labels"]] = 0
        values[row, record["labels_no_difficult"]] = 1
    numbers = {os.path.join(folder, name): row for row, name in enumerate(names)}
    paths = tuple(sorted(numbers))
    order = [numbers[path] for path in paths]
    return Images(paths, 0, _Records(source, numbers)), values[order]
