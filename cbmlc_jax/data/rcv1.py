"""RCV1-v2 (Lewis et al. 2004): newswire stories and their topics.

`standard` (23,149 training, 781,265 test stories) and `swapped` (the other way round,
as the paper has it) have 103 topics and two forms: sets of stems with their published
weights (log tf-idf, rows of length 1), or lists of stems.  These lists are published
without stop words and in scrambled order, equal stems together, so that nobody can
restore the texts: they tell how often a stem occurs, not where.

`subsets` is what Mulan has of it: 27,613 distinct stories, weights alone, and 101
topics (M143 and MCAT are missing upstream, so that a story with M141 lacks its MCAT).
Of stories with equal weights the first stays; in 72 of the 2,099 such groups the
topics differ.

A data folder holds, in `rcv1/`, plain or gzipped,

    lyrl2004_vectors_train.dat, lyrl2004_vectors_test_pt0.dat ... pt3.dat     weights
    lyrl2004_tokens_train.dat, lyrl2004_tokens_test_pt0.dat ... pt3.dat       stems
    rcv1-v2.topics.qrels                                                      topics
    rcv1subset1_rows0000-2999.npz ... rcv1subset5_rows3000-5999.npz           subsets

Without a folder scikit-learn downloads the weights.  No row is ever made dense.
"""

from __future__ import annotations

import array
import contextlib
import gzip
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse

from cbmlc_jax.data.dataset import UNKNOWN, DataError, Dataset, Ragged, Split
from cbmlc_jax.data.rcv1_tables import SUBSETS, TOPICS

VARIANTS = ("standard", "swapped", "subsets")
ROWS = {"train": 23_149, "test": 781_265}
NUM_FEATURES = 47_236
LONGEST = 300  # stems of a story
RAREST = 2  # training stories that have a word of the vocabulary, at least
LARGEST_VOCABULARY = 50_000
_CHUNK = 10_000  # stories at once: memory does not grow with their number
LONGEST_LINE = 1 << 20  # bytes
LARGEST_FILE = 4 << 30  # bytes, decompressed
LARGEST_SUBSET = 16 << 20  # bytes, decompressed
SITE = "http://www.ai.mit.edu/projects/jmlr/papers/volume5/lewis04a/"
_PARTS = ("train", "test_pt0", "test_pt1", "test_pt2", "test_pt3")
_TOPICS = "rcv1-v2.topics.qrels"
# All that a line of a vector file, `document id:weight ...`, is made of: no comments,
# no "qid:", no "nan", which scikit-learn would take.
_VECTOR = b"0123456789+-.eE: \t\r\n"
_DIGITS = 9  # of a document's number, at most; the largest is 810596


def load(
    folder: str | None,
    variant: str = "",
    *,
    tokens: bool = False,
    split_seed: int = 0,
) -> Dataset:
    """Reads a variant of RCV1.

    Args:
        folder: a data folder; None: scikit-learn's cache or its download.
        variant: one of `VARIANTS`; "" is "standard".
        tokens: stems, as they are listed, instead of weights; of each story the first
            LONGEST.  A stem that fewer than RAREST training stories have, or that is
            not among the LARGEST_VOCABULARY most frequent, is `<unk>`.
        split_seed: of training and test in `subsets`, half and half: the stories in
            the order of the sha256 of the seed and of their `row_md5`.  The official
            splits have none.

    Raises:
        DataError: a file is missing, broken or too large, or not the published one.
    """
    variant = variant or "standard"
    if variant not in VARIANTS:
        raise DataError(
            f"config.data.variant={variant!r} is none of rcv1's: {', '.join(VARIANTS)}"
        )
    if variant == "subsets":
        if tokens:
            raise DataError(
                "rcv1's subsets have no words: set config.data.tokens=False"
            )
        return _subsets(folder, split_seed)
    if tokens:
        parts, words = _token_parts(folder, variant)
    else:
        parts = _vector_parts(folder)
        words = tuple(f"f{i}" for i in range(NUM_FEATURES))
    train, test = parts if variant == "standard" else parts[::-1]
    return _dataset(variant, train, test, tuple(TOPICS), words)


def _dataset(variant, train, test, codes: tuple[str, ...], words) -> Dataset:
    return Dataset(
        name="rcv1" if variant == "standard" else f"rcv1-{variant}",
        train=train,
        test=test,
        label_names=codes,
        feature_names=words,
        label_texts=tuple(TOPICS[code] for code in codes),
    )


# Official files.


def _find(folder: str, name: str) -> str:
    for path in (os.path.join(folder, "rcv1", name + end) for end in ("", ".gz")):
        if os.path.isfile(path):
            return path
    raise DataError(
        f"there is no {os.path.join(folder, 'rcv1', name)} (nor .gz): fetch it from "
        f"{SITE}, or choose --config.data.variant=subsets"
    )


@contextlib.contextmanager
def _opened(path: str):
    """The file, decompressed; damage becomes a DataError."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is damaged or not complete ({error}): fetch it again from {SITE}"
        ) from error


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Line number and line."""
    total = 0
    with _opened(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number, total = number + 1, total + len(line)
            if len(line) == LONGEST_LINE or total > LARGEST_FILE:
                raise DataError(
                    f"{path}, line {number}: longer than {LONGEST_LINE} bytes, or the "
                    f"file than {LARGEST_FILE}; it is not the published file"
                )
            yield number, line


def _topics(path: str, documents: np.ndarray) -> np.ndarray:
    """uint8 [N, 103] from lines of `topic document 1`; those of others are left out."""
    place: dict[int, int] = {}
    for i, document in enumerate(documents.tolist()):
        if place.setdefault(document, i) != i:
            raise DataError(
                f"document {document} is there twice in the files beside {path}: fetch "
                f"them again from {SITE}"
            )
    column = {code.encode(): i for i, code in enumerate(TOPICS)}
    labels = np.zeros((len(documents), len(TOPICS)), np.uint8)
    for number, line in _lines(path):
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or words[2] != b"1" or words[0] not in column:
            document = None
        else:
            document = _number(words[1])
        if document is None:
            raise DataError(
                f"{path}, line {number}: expected a topic, a document's number and 1, "
                f"found {line[:60]!r}; fetch the file again from {SITE}"
            )
        row = place.get(document)
        if row is not None:
            labels[row, column[words[0]]] = 1
    bare = np.flatnonzero(~labels.any(1))
    if len(bare):
        raise DataError(
            f"{path} has no topic of document {documents[bare[0]]} ({len(bare)} "
            f"documents lack theirs): it is not complete; fetch it again from {SITE}"
        )
    return labels


def _number(text: bytes) -> int | None:
    """A document's number; None: this is none."""
    # The length first: int() refuses, or is slow with, what is very long.
    return int(text) if len(text) <= _DIGITS and text.isdigit() else None


def _counted(files: str, side: str, found: int) -> None:
    """A plain file that was cut off between two stories is no broken file."""
    if found != ROWS[side]:
        raise DataError(
            f"{files} hold {found:,} documents, not the published {ROWS[side]:,}: "
            f"fetch what is cut off or of another distribution again from {SITE}"
        )


def _split(matrix: scipy.sparse.csr_array, labels: np.ndarray) -> Split:
    """Weighted sets from rows; ascending ids."""
    matrix.sort_indices()
    inputs = Ragged(
        matrix.indices.astype(np.int32, copy=False),
        matrix.indptr.astype(np.int64),
        matrix.data.astype(np.float32, copy=False),
    )
    return Split(inputs, labels)


def _vector_parts(folder: str | None) -> tuple[Split, Split]:
    if folder is None:
        return _fetched()
    paths = [_find(folder, f"lyrl2004_vectors_{part}.dat") for part in _PARTS]
    topics = _find(folder, _TOPICS)
    parts = [_vectors(path) for path in paths]
    documents = np.concatenate([ids for _, ids in parts])
    rows = len(parts[0][1])
    _counted(paths[0], "train", rows)
    _counted(", ".join(paths[1:]), "test", len(documents) - rows)
    labels = _topics(topics, documents)
    test = scipy.sparse.vstack([matrix for matrix, _ in parts[1:]], format="csr")
    return _split(parts[0][0], labels[:rows]), _split(test, labels[rows:])


class _VectorLines:
    """The lines of a vector file; scikit-learn iterates over it as over a file.

    Attributes:
        numbers: of the lines that are rows, up to the one that is read now.
    """

    def __init__(self, path: str):
        self.numbers = array.array("q")
        self._path = path

    def read(self, size: int = -1) -> bytes:
        """Only what makes it a file to scikit-learn."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[bytes]:
        for number, line in _lines(self._path):
            if line.strip():
                self.numbers.append(number)
                if line.translate(None, _VECTOR):
                    raise ValueError(f"expected numbers, found {line[:60]!r}")
                yield line

    def error(self, row: int, message: str) -> DataError:
        """Names the line of a row."""
        line = f", line {self.numbers[row]}" if self.numbers else ""
        return DataError(
            f"{self._path}{line}: {message}; fetch the file again from {SITE}"
        )


def _vectors(path: str) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """float32 [N, 47236] and the documents' numbers int64 [N]."""
    from sklearn.datasets import load_svmlight_file

    lines = _VectorLines(path)
    try:
        matrix, documents = load_svmlight_file(
            lines, dtype=np.float32, zero_based=False
        )
    except DataError:
        raise
    except (ValueError, IndexError, OverflowError) as error:
        raise lines.error(-1, str(error).rstrip(".")) from error
    if not lines.numbers:
        raise DataError(f"{path} has no documents: fetch it again from {SITE}")
    wrong = (documents % 1 != 0) | (documents < 0) | (documents >= 10**_DIGITS)
    if wrong.any():
        raise lines.error(wrong.argmax(), "its first number is not a document's")
    for wrong, message in (
        (matrix.indices >= NUM_FEATURES, f"an id is above {NUM_FEATURES}"),
        (~np.isfinite(matrix.data), "a weight is not finite"),  # as float32
        (matrix.data < 0, "a weight is negative"),
    ):
        if wrong.any():
            row = np.searchsorted(matrix.indptr, wrong.argmax(), "right") - 1
            raise lines.error(row, message)
    parts = (matrix.data, matrix.indices.astype(np.int32, copy=False), matrix.indptr)
    shape = (matrix.shape[0], NUM_FEATURES)
    return scipy.sparse.csr_array(parts, shape=shape), documents.astype(np.int64)


def _fetched() -> tuple[Split, Split]:
    from sklearn.datasets import fetch_rcv1

    try:
        whole = fetch_rcv1(subset="all", shuffle=False)
    except Exception as error:  # urllib's, ssl's, joblib's
        raise DataError(
            f"scikit-learn could not fetch RCV1 ({type(error).__name__}: {error}): try "
            f"again, or fetch the files of {SITE} and set config.data.dir or "
            "CBMLC_DATA_DIR to the folder that holds rcv1/"
        ) from error
    names = [str(name) for name in whole.target_names]
    shape = (sum(ROWS.values()), NUM_FEATURES)
    if names != list(TOPICS) or whole.data.shape != shape:
        raise DataError(
            "scikit-learn's RCV1 has other topics, documents or features than "
            "published: delete RCV1 in ~/scikit_learn_data or SCIKIT_LEARN_DATA"
        )
    matrix = scipy.sparse.csr_array(whole.data)
    labels = whole.target.toarray().astype(np.uint8, copy=False)
    train = ROWS["train"]
    return _split(matrix[:train], labels[:train]), _split(
        matrix[train:], labels[train:]
    )


def _token_parts(folder: str | None, variant: str) -> tuple[tuple, tuple[str, ...]]:
    if folder is None:
        raise DataError(
            "the words of RCV1 are not downloaded: fetch lyrl2004_tokens_*.dat and "
            f"{_TOPICS} from {SITE} into a folder's rcv1/, and set config.data.dir or "
            "CBMLC_DATA_DIR to that folder"
        )
    paths = [_find(folder, f"lyrl2004_tokens_{part}.dat") for part in _PARTS]
    topics = _find(folder, _TOPICS)
    numbers: dict[bytes, int] = {}  # every stem's number, in order of appearance
    parts = [_stems(paths[:1], numbers), _stems(paths[1:], numbers)]
    for files, side, (_, ids) in zip(
        (paths[0], ", ".join(paths[1:])), ROWS, parts, strict=True
    ):
        _counted(files, side, len(ids))
    documents = np.concatenate([ids for _, ids in parts])
    labels = _topics(topics, documents)
    chosen, words = _vocabulary(parts[variant != "standard"][0], list(numbers))
    rows = len(parts[0][1])
    splits = [
        Split(Ragged(chosen[stems.values], stems.offsets), part)
        for (stems, _), part in zip(parts, (labels[:rows], labels[rows:]), strict=True)
    ]
    return tuple(splits), words


def _stems(
    paths: Sequence[str], numbers: dict[bytes, int]
) -> tuple[Ragged, np.ndarray]:
    """Stems of the documents by number, and the documents' own numbers int64 [N]."""
    values, lengths, documents = array.array("i"), array.array("i"), array.array("q")
    for path in paths:
        state = "end"
        for number, line in _lines(path):
            if line.startswith(b".I "):
                document = _number(line[3:].strip())
                ok = state in ("end", "words") and document is not None
                if ok:
                    documents.append(document)
                    lengths.append(0)
                state = "document"
            elif line.rstrip() == b".W":
                ok, state = state == "document", "words"
            elif not line.strip():
                ok, state = state in ("words", "end"), "end"
            else:
                ok = state == "words"
                if ok:
                    room = LONGEST - lengths[-1]
                    found = [
                        numbers.setdefault(w, len(numbers)) for w in line.split()[:room]
                    ]
                    values.extend(found)
                    lengths[-1] += len(found)
            if not ok:
                raise DataError(
                    f"{path}, line {number}: expected documents of `.I number`, `.W`, "
                    f"lines of words and a blank line, found {line[:60]!r}; fetch the "
                    f"file again from {SITE}"
                )
        if state == "document":
            raise DataError(
                f"{path} ends inside a document: it is not complete; fetch it again "
                f"from {SITE}"
            )
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
    return Ragged(np.frombuffer(values, np.int32), offsets), np.array(documents)


def _vocabulary(
    train: Ragged, stems: list[bytes]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """int32 number of each stem in the vocabulary, and the vocabulary."""
    frequency = np.zeros(len(stems), np.int64)
    for start in range(0, len(train), _CHUNK):
        some = train.take(np.arange(start, min(start + _CHUNK, len(train))))
        rows = np.repeat(np.arange(len(some), dtype=np.int64), some.lengths)
        pairs = np.unique(rows * len(stems) + some.values)
        frequency += np.bincount(pairs % len(stems), minlength=len(stems))
    order = np.argsort(-frequency, kind="stable")
    kept = order[frequency[order] >= RAREST][: LARGEST_VOCABULARY - 1]
    chosen = np.zeros(len(stems), np.int32)
    chosen[kept] = np.arange(1, len(kept) + 1)
    return chosen, (UNKNOWN, *(stems[i].decode("latin-1") for i in kept))


# Mulan's subsets.


def _subsets(folder: str | None, seed: int) -> Dataset:
    if folder is None:
        raise DataError(
            "rcv1's subsets are not downloaded: set config.data.dir or CBMLC_DATA_DIR "
            "to the folder that holds rcv1/rcv1subset1_rows0000-2999.npz and the others"
        )
    paths = [os.path.join(folder, "rcv1", name) for name in SUBSETS]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(f"there is no {missing[0]} ({len(missing)} parts are missing)")
    parts = [_npz(path) for path in paths]
    for path, sha256 in zip(paths, SUBSETS.values(), strict=True):
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DataError(
                    f"{path} is not the published file (its sha256 differs): fetch it "
                    "again"
                )
    matrix = scipy.sparse.vstack([p[0] for p in parts], format="csr")
    labels = np.concatenate([p[1] for p in parts])
    digests = np.concatenate([p[2] for p in parts])
    # The subsets overlap: the first of equal stories stays.
    _, first = np.unique(digests, return_index=True)
    key = [hashlib.sha256(b"%d:" % seed + bytes(digests[i])).digest() for i in first]
    order = first[sorted(range(len(first)), key=key.__getitem__)]
    sides = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    train, test = (_split(matrix[rows], labels[rows]) for rows in sides)
    codes = parts[0][3]
    words = tuple(f"f{i}" for i in range(NUM_FEATURES))
    return _dataset("subsets", train, test, codes, words)


def _npz(path: str):
    """Matrix [3000, F], labels [3000, 101], digest of each row, topic codes."""
    try:
        with zipfile.ZipFile(path) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > LARGEST_SUBSET:
            raise ValueError(f"{size} bytes, decompressed")
        with np.load(path, allow_pickle=False) as z:
            parts = (z["data"], z["indices"], z["indptr"])
            matrix = scipy.sparse.csr_array(parts, shape=tuple(z["shape"]))
            labels, digests = z["Y"], z["row_md5"]
            codes = tuple(str(code) for code in z["label_codes"])
    except Exception as error:  # zipfile's, zlib's, numpy's, scipy's
        raise DataError(f"{path} is damaged ({error}): fetch it again") from error
    if (
        matrix.shape[1] != NUM_FEATURES
        or labels.shape != (matrix.shape[0], len(codes))
        or digests.shape != matrix.shape[:1]
        or not set(codes) <= set(TOPICS)
    ):
        raise DataError(f"{path} has parts that do not fit together: fetch it again")
    return matrix, labels.astype(np.uint8), digests, codes
