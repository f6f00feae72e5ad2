"""TensorFlow Datasets builders of text data sets and emotions, without TensorFlow.

    builder = Bibtex(file_format="array_record")
    builder.download_and_prepare()
    builder.as_data_source("train")[0]  # {"features": int32 [n], "labels": int32 [m]}

The features of emotions are float32 [72].  `load` of `mulan` and `reuters` is the way
in for the rest of the package.
"""

from __future__ import annotations

import abc
import contextlib
import os
import sys
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from cbmlc_jax.data import mulan, reuters
from cbmlc_jax.data.dataset import DataError, Dataset, Dense, Ragged, Split


class _Info(tfds.core.DatasetInfo):
    """Does not ask TensorFlow Datasets' cloud bucket, which lacks these data sets."""

    def initialize_from_bucket(self) -> None:
        pass


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Rows of ids or of numbers, official split; names of labels and features as
    metadata."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Official train and test split, features and label ids."}
    DESCRIPTION = ""
    HOMEPAGE = ""
    CITATION = ""
    BASE_URL = ""
    NUMBERS = None  # real-valued features per row; None: ids, of any number
    # Where the base class looks for checksums and texts; to find out, it would need
    # importlib_resources, which it does not require.
    code_path = None

    def __init__(self, *, base_url: str | None = None, **kwargs):
        """As the base class; `base_url` stands in for the published address."""
        self._base_url = base_url or self.BASE_URL
        super().__init__(**kwargs)

    @abc.abstractmethod
    def _download(self, folder: str) -> Dataset:
        """Fetches what `folder` lacks and reads it."""

    def _info(self) -> tfds.core.DatasetInfo:
        ids = features = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        if self.NUMBERS:
            shape = (self.NUMBERS,)
            features = tfds.features.Tensor(shape=shape, dtype=np.float32)
        return _Info(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict({"features": features, "labels": ids}),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            metadata=tfds.core.MetadataDict(),
            # The order of the rows is part of a Dataset's fingerprint.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        # The download manager has no time-out, no bound on the size, and keeps what it
        # got when a checksum is wrong.
        dataset = self._download(os.fspath(dl_manager.download_dir))
        self.info.metadata.update(
            label_names=dataset.label_names,
            feature_names=dataset.feature_names,
            label_texts=dataset.label_texts,
            fingerprint=dataset.fingerprint,
        )
        return {
            "train": self._generate_examples(dataset.train),
            "test": self._generate_examples(dataset.test),
        }

    def _generate_examples(self, split: Split):
        inputs = split.inputs
        rows = inputs.values
        if isinstance(inputs, Ragged):
            rows = np.split(rows, inputs.offsets[1:-1])
        for row, (features, labels) in enumerate(zip(rows, split.labels, strict=True)):
            positives = np.flatnonzero(labels).astype(np.int32)
            yield row, {"features": features, "labels": positives}


class _Mulan(_Builder, skip_registration=True):
    HOMEPAGE = "http://mulan.sourceforge.net/datasets-mlc.html"
    BASE_URL = mulan.BASE_URL

    def _download(self, folder: str) -> Dataset:
        mulan.download(self.name, folder, self._base_url)
        return mulan.load_folder(self.name, folder)


class Bibtex(_Mulan):
    """Bookmarks and publications of BibSonomy and their tags."""

    DESCRIPTION = (
        "BibTeX entries of BibSonomy: 1,836 binary words and 159 tags; 4,880 training "
        "and 2,515 test rows."
    )
    CITATION = """@inproceedings{katakis2008multilabel,
  title = {Multilabel Text Classification for Automated Tag Suggestion},
  author = {Katakis, Ioannis and Tsoumakas, Grigorios and Vlahavas, Ioannis},
  booktitle = {Proceedings of the ECML/PKDD 2008 Discovery Challenge},
  year = {2008}
}"""


class Delicious(_Mulan):
    """Web pages and their tags on del.icio.us."""

    DESCRIPTION = (
        "Web pages of del.icio.us: 500 binary words and 983 tags; 12,920 training and "
        "3,185 test rows."
    )
    CITATION = """@inproceedings{tsoumakas2008effective,
  title = {Effective and Efficient Multilabel Classification in Domains with Large
           Number of Labels},
  author = {Tsoumakas, Grigorios and Katakis, Ioannis and Vlahavas, Ioannis},
  booktitle = {Proceedings of the ECML/PKDD 2008 Workshop on Mining Multidimensional
               Data (MMD'08)},
  year = {2008}
}"""


class Emotions(_Mulan):
    """Songs, by rhythm and timbre, and the moods that listeners hear in them."""

    NUMBERS = 72
    DESCRIPTION = (
        "Songs: 72 real-valued features of rhythm and timbre and 6 moods; 391 training "
        "and 202 test rows."
    )
    CITATION = """@inproceedings{trohidis2008multilabel,
  title = {Multilabel Classification of Music into Emotions},
  author = {Trohidis, Konstantinos and Tsoumakas, Grigorios and Kalliris, George and
            Vlahavas, Ioannis},
  booktitle = {Proceedings of the 9th International Conference on Music Information
               Retrieval (ISMIR 2008)},
  pages = {325--330},
  year = {2008}
}"""


class Reuters21578(_Builder):
    """Newswire stories of 1987 and their topics."""

    name = "reuters"
    # Tokens and vocabulary are part of what is kept: a change of them is a new version.
    RELEASE_NOTES = {"1.0.0": "ModApte split, 90 topics, word ids in document order."}
    DESCRIPTION = (
        "Reuters-21578, Distribution 1.0, ModApte split: stories as word ids and their "
        "90 topics; 7,770 training and 3,019 test documents."
    )
    HOMEPAGE = "https://www.daviddlewis.com/resources/testcollections/reuters21578/"
    CITATION = """@misc{lewis1997reuters,
  title = {{Reuters-21578} Text Categorization Collection, Distribution 1.0},
  author = {Lewis, David D.},
  year = {1997},
  doi = {10.24432/C52G6M}
}"""
    BASE_URL = reuters.BASE_URL

    def _download(self, folder: str) -> Dataset:
        reuters.download(folder, self._base_url)
        return reuters.load_folder(folder)


BUILDERS = {
    "bibtex": Bibtex,
    "delicious": Delicious,
    "emotions": Emotions,
    "reuters": Reuters21578,
}
# The only format that is written and read without TensorFlow.
_FORMAT = {"file_format": "array_record"}


def load(name: str, cache_dir: str | None, base_url: str | None = None) -> Dataset:
    """Reads the prepared data set; downloads and prepares it where it is not there.

    Args:
        name: a key of `BUILDERS`.
        cache_dir: of TensorFlow Datasets; None for its default.
        base_url: of the download; None for the published address.

    Raises:
        DataError: no download, or a prepared data set that is broken.
    """
    cache_dir = os.path.expanduser(cache_dir or constants.DATA_DIR)
    folder = os.path.join(cache_dir, name, str(BUILDERS[name].VERSION))
    if not os.path.isdir(folder):
        _prepare(BUILDERS[name](data_dir=cache_dir, base_url=base_url, **_FORMAT))
    try:
        return _read(BUILDERS[name](data_dir=cache_dir, **_FORMAT))
    # Damaged files surface as exceptions of json, protobuf, array_record and others.
    except Exception as error:
        raise DataError(
            f"the prepared data set in {folder} is broken ({type(error).__name__}: "
            f"{error}); delete that folder and run again"
        ) from error


def _prepare(builder: _Builder) -> None:
    options = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        # What it prints is no output of the program.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=options)
    except OSError:
        # Of two processes at once, the later one cannot rename its folder.
        if not os.path.isdir(builder.data_dir):
            raise


def _read(builder: _Builder) -> Dataset:
    names = builder.info.metadata
    width = len(names["label_names"])
    train, test = (_split(builder.as_data_source(s), width) for s in ("train", "test"))
    dataset = Dataset(
        builder.name,
        train,
        test,
        label_names=tuple(names["label_names"]),
        feature_names=tuple(names["feature_names"]),
        label_texts=tuple(names["label_texts"]),
    )
    if dataset.fingerprint != names["fingerprint"]:
        raise ValueError("its content has changed since it was prepared")
    return dataset


def _split(rows: Sequence[dict[str, np.ndarray]], width: int) -> Split:
    rows = list(rows)
    labels = np.zeros((len(rows), width), np.uint8)
    for target, row in zip(labels, rows, strict=True):
        target[row["labels"]] = 1
    features = [row["features"] for row in rows]
    if features[0].dtype == np.float32:
        return Split(Dense(np.stack(features)), labels)
    return Split(Ragged.from_rows(features), labels)
