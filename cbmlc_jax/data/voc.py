"""PASCAL VOC 2007 (Everingham et al. 2010): images and which of 20 classes they show.

A folder holds `VOCdevkit/VOC2007/` (the official archives, unpacked), or
`voc2007_small/`: the same lists with a part of the images and, in `trainval_have.txt`
and `test_have.txt`, the ids of that part.  That part is biased (every image of it shows
a car, bus, train or cat): its numbers are not those of VOC 2007.

Only image-level labels are read: `ImageSets/Main/<class>_<split>.txt`, lines of
`id value` with 1 for present, -1 for absent, 0 where every object is "difficult".
"""

from __future__ import annotations

import os

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
SITE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"
# Variant -> where it lies in a data folder.
FOLDERS = {
    "full": (os.path.join("VOCdevkit", "VOC2007"), "VOC2007"),
    "partial": ("voc2007_small",),
}
LARGEST_LIST = 10 << 20  # bytes


def load(
    folder: str | None,
    *,
    side: int = 224,
    difficult: str = "positive",
    variant: str = "",
) -> Dataset:
    """Reads VOC 2007: train is `trainval`, test is `test`.

    Args:
        folder: a data folder.  There is no download: the archives have a form to
            agree to, and the builder of TensorFlow Datasets needs TensorFlow.
        side: of the squares that images become.
        difficult: what an image with nothing but difficult objects of a class is for
            that class: "positive" (the paper), "ignore" (counts nowhere) or "negative".
        variant: "full", "partial", or "" for whichever is there, the full one first.

    Raises:
        DataError: a file is missing or malformed, or lists and images disagree.
    """
    base, variant = _find(folder, variant)
    parts = [
        _split(base, name, variant, side, difficult) for name in ("trainval", "test")
    ]
    return Dataset(
        name="voc" if variant == "full" else "voc-partial",
        train=parts[0],
        test=parts[1],
        label_names=CLASSES,
        feature_names=(),
        label_texts=tuple(_TEXTS.get(name, name) for name in CLASSES),
    )


def _find(folder: str | None, variant: str) -> tuple[str, str]:
    if variant not in ("", *FOLDERS):
        raise DataError(
            f"config.data.variant={variant!r} is none of voc's: full or partial"
        )
    if folder:
        for name, places in FOLDERS.items():
            for place in places:
                path = os.path.join(folder, place)
                if variant in ("", name) and os.path.isdir(path):
                    return path, name
    wanted = FOLDERS["partial" if variant == "partial" else "full"][0]
    raise DataError(
        f"there is no {os.path.join(folder or '.', wanted)}: fetch VOCtrainval and "
        f"VOCtest of 2007 from {SITE}, unpack both and set config.data.dir or "
        "CBMLC_DATA_DIR to the folder that holds VOCdevkit"
    )


def _split(base: str, name: str, variant: str, side: int, difficult: str) -> Split:
    lists = os.path.join(base, "ImageSets", "Main")
    ids = [words[0] for _, words in _lines(os.path.join(lists, f"{name}.txt"), 1)]
    place = {image: i for i, image in enumerate(ids)}
    if len(place) != len(ids):
        raise DataError(f"{lists}/{name}.txt names an image twice")
    values = np.zeros((len(ids), len(CLASSES)), np.int8)
    for number, of_class in enumerate(CLASSES):
        values[:, number] = _values(
            os.path.join(lists, f"{of_class}_{name}.txt"), place, f"{name}.txt"
        )
    if variant == "partial":
        path = os.path.join(base, f"{name}_have.txt")
        rows = []
        for line, (image,) in _lines(path, 1):
            if image not in place:
                raise DataError(f"{path}, line {line}: {image} is not in {name}.txt")
            rows.append(place[image])
        ids, values = [ids[row] for row in rows], values[rows]
    paths = [os.path.join(base, "JPEGImages", f"{image}.jpg") for image in ids]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(paths)} images of {name}.txt are missing, "
            f"the first of them {missing[0]}: unpack the archive again"
        )
    ignored = values == 0 if difficult == "ignore" else None
    positive = values >= 0 if difficult == "positive" else values == 1
    return Split(Images(tuple(paths), side), positive.astype(np.uint8), ignored)


def _values(path: str, place: dict[str, int], whose: str) -> np.ndarray:
    """int8 [N], the values of a class in the order of `place`."""
    values = np.full(len(place), 2, np.int8)
    for number, (image, value) in _lines(path, 2):
        if value not in ("-1", "0", "1"):
            raise DataError(f"{path}, line {number}: {value!r} is not -1, 0 or 1")
        if image not in place or values[place[image]] != 2:
            what = "twice" if image in place else f"not in {whose}"
            raise DataError(f"{path}, line {number}: {image} is {what}")
        values[place[image]] = int(value)
    if (values == 2).any():
        image = list(place)[int(np.argmax(values == 2))]
        raise DataError(
            f"{path} says nothing of {image} ({(values == 2).sum()} images of {whose} "
            "are missing): the file is not complete"
        )
    return values


def _lines(path: str, width: int):
    """Line number and its `width` words, blank lines left out."""
    try:
        if os.path.getsize(path) > LARGEST_LIST:
            raise DataError(f"{path} is larger than {LARGEST_LIST} bytes; no list is")
        with open(path, encoding="ascii") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no ASCII text"
        raise DataError(
            f"cannot read the list {path}: {reason}; fetch the archives again"
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words and len(words) != width:
            raise DataError(f"{path}, line {number}: expected {width} words: {line!r}")
        if words:
            yield number, words
