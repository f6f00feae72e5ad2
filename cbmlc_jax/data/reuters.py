"""Reuters-21578, ModApte split, 90 topics: from a folder, a prepared cache, or GitHub.

A folder holds `reuters21578/reut2-000.sgm` to `reut2-021.sgm`, plain or gzipped
(`.sgm.gz`).  Whatever the source, only the published bytes are accepted and the same
Dataset results.

Documents: those with `TOPICS="YES"` and `LEWISSPLIT` "TRAIN" or "TEST" (ModApte), of
them the ones with a topic that has a positive document on both sides: 7,770 and 3,019
of 90 topics, R(90).

Text: the title and the body; of the 987 documents without a body the title alone, or
all of the text where nothing in it is marked up.  Date and place line are left out.

Tokens: in lower case, "u.s." and its like whole, else words of two letters or more;
each number ("1,350.5", "1986/87", "3-1/2") is `<num>`; the first 300 of a document in
their order.  A word that stands in fewer than two training documents is `<unk>`.

The texts are copyright Reuters Ltd., distributed for research only; results should
name "Reuters-21578, Distribution 1.0".

References:
    Lewis, Reuters-21578 text categorization test collection, README of version 1.2.
    Debole and Sebastiani, An analysis of the relative hardness of Reuters-21578
    subsets, 2005: R(90).
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import html
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cbmlc_jax.data import mulan
from cbmlc_jax.data.dataset import UNKNOWN, DataError, Dataset, Ragged, Split
from cbmlc_jax.data.words import tokens

BASE_URL = (
    "https://raw.githubusercontent.com/colibri17/TextCategorization/"
    "b6c2ca3d46a2540843400890792e5165448b4516/reuters21578"
)
# (bytes, sha256) of each plain file.
_PUBLISHED = (
    (1324350, "0ec53cda8f6d605a3ba710df14be7f00fc02f0c222a14748101df22326afe0f6"),
    (1254440, "1528e7e82d110d88d0234eb9619eadb7f9fd805711971df05975b92277dfdf4d"),
    (1217495, "99f18068d0518952987dedd78c622e5c2a584e357d264d3754696c815f3e6628"),
    (1298721, "78a3a8d7e04bc9d42c4614d5d5c60a4293dbe3f708df6fb5a71d9ef31f4b3fa3"),
    (1321623, "726342c19a65873330b412378cd6a3f0d512035f5223146ddd60930c62eb6ff0"),
    (1388644, "d09de619b6dd2d047d5124681f6df90550abaf592020d1c1ce338ae9b91522e7"),
    (1254765, "b5535c0d66b01f4976f84621a4a795afbc00d2c4bd0a1b7ae426df6630fb361d"),
    (1256772, "aa706007ec84a03537a3921ca976d60e11b3f99e4b9e9b2d5c81dd384d2c2062"),
    (1410117, "a3994583694a00b7c744097c1d7eabfcf90f2e6650cc21663e46828035a336cb"),
    (1338903, "29995f606dd1a9bdf907eacc9d879846c716860d9d9141676979474aaea39c7d"),
    (1371071, "996df6008089bd09fa5b28a4d2eb0ee5f7b9d4601cde566fed3926ac82960fa3"),
    (1304117, "d3a2782015247d9c2bffb8926267827fdd449c70d619435ef01a25a1c56a53ca"),
    (1323584, "da31035d483851f2aebce5b66d779e5e2c0ac9dcfe098596c6d544e81c5604ab"),
    (1129687, "8f7700bc0455fac3fcc12377ced4807b7df8aba1f21ecad059b9cc2b1cf0b8be"),
    (1128671, "ef936bd3e0f36cf722afa9a6957563549775af32e9e28b4f539c8737ceda83ab"),
    (1258665, "6d3bcec73eff871b8a5403588af814c4e50a0de6bc25707480522ab836f74026"),
    (1316417, "be2f03a185fff70131f3b4fdbd6229b7ee2be077eba9691eaa597c8cfbda8812"),
    (1546911, "f370e610b4b1342e41a98e0c426a08541044bd1d7e539674f32372a6060b73b5"),
    (1258819, "a5f971bf25448e915781962309e669359a35fbcaf3017a806eca0590897f209a"),
    (1261780, "d3b07097fba2633d130b4914aceba671645985248943ce9e39c289315339dffb"),
    (1049566, "f6ad1b724125c202566c63b35ea0b5ee23881f8b7ed47a32829d5af05d8e860d"),
    (621648, "3f5196d32869723c9042aa5756805b4e90360f1f45ea17f4594fa0e2b3630b18"),
)
FILES = {f"reut2-{i:03}.sgm": p for i, p in enumerate(_PUBLISHED)}
LARGEST_FILE = 16 << 20  # bytes, unpacked

MIN_DOCUMENTS = 2

# Topic -> how a person says it, after the distribution's cat-descriptions_120396.txt;
# the other topics are English words once "-" is a blank.  "rape" and "sun" are named as
# the plants that they mean, because their word vectors are of something else.
LABEL_TEXTS = {
    "acq": "acquisition",
    "alum": "aluminium",
    "bop": "balance of payments",
    "cpi": "consumer price index",
    "cpu": "capacity utilisation",
    "crude": "crude oil",
    "dfl": "netherlands guilder",
    "dlr": "us dollar",
    "dmk": "deutsche mark",
    "earn": "earnings",
    "fuel": "fuel oil",
    "gas": "gasoline",
    "gnp": "gross national product",
    "heat": "heating oil",
    "hog": "hogs",
    "housing": "housing starts",
    "income": "personal income",
    "instal-debt": "instalment debt",
    "interest": "interest rates",
    "ipi": "industrial production index",
    "jet": "jet kerosene",
    "jobs": "unemployment",
    "l-cattle": "live cattle",
    "lei": "leading economic indicators",
    "lin-oil": "linseed oil",
    "money-fx": "foreign exchange",
    "nat-gas": "natural gas",
    "nkr": "norwegian krone",
    "nzdlr": "new zealand dollar",
    "oat": "oats",
    "palmkernel": "palm kernel",
    "pet-chem": "petro chemicals",
    "rand": "south african rand",
    "rape-oil": "rapeseed oil",
    "retail": "retail sales",
    "ship": "shipping",
    "sun-meal": "sunflower meal",
    "sun-oil": "sunflower oil",
    "sunseed": "sunflower seed",
    "veg-oil": "vegetable oil",
    "wpi": "wholesale price index",
    "yen": "japanese yen",
}

_ATTRIBUTE = re.compile(r'\b([A-Z]+)="([^"]*)"')
_ATTRIBUTE_VALUES = {
    "TOPICS": ("YES", "NO", "BYPASS"),
    "LEWISSPLIT": ("TRAIN", "TEST", "NOT-USED"),
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One record of the ModApte split.

    Attributes:
        split: "TRAIN" or "TEST".
        topics: codes, in the order of the file; none, one or many.
        text: title and body, or what there is; entities replaced.
        has_body: whether the record marks up a body.
    """

    split: str
    topics: tuple[str, ...]
    text: str
    has_body: bool


def load(
    folder: str | None = None, cache_dir: str | None = None, base_url: str = BASE_URL
) -> Dataset:
    """Reads the data set from the first source there is: folder, cache, download.

    Args:
        folder: a data folder; where given, the only source.
        cache_dir: of TensorFlow Datasets; None for its default (`TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`).
        base_url: where `<file>` is downloaded from.

    Returns:
        Inputs are word ids in document order, repeats kept; labels by topic code.

    Raises:
        DataError: as `load_folder`; no download; or a prepared cache that is broken.
    """
    if folder:
        return load_folder(folder)
    # TensorFlow Datasets is slow to import, and not needed with a folder.
    from cbmlc_jax.data import builders

    return builders.load("reuters", cache_dir, base_url)


def load_folder(folder: str) -> Dataset:
    """Reads `<folder>/reuters21578/`.

    Raises:
        DataError: as `read_folder`.
    """
    return build(read_folder(folder))


def read_folder(folder: str) -> list[Document]:
    """The documents of `<folder>/reuters21578/`, in the order of the files.

    Raises:
        DataError: a file is missing, malformed, or not the published one.
    """
    documents = []
    for file, (_, sha256) in FILES.items():
        path = _find(folder, file)
        content = _content(path)
        documents.extend(parse(content, path))
        # Last, because the parser says where a file is broken and a checksum does not.
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(
                f"{path} is not the published file (its sha256 differs): it was "
                f"changed or is not complete; delete it and fetch {BASE_URL}/{file}"
            )
    return documents


def download(folder: str, base_url: str = BASE_URL) -> None:
    """Fetches what `<folder>/reuters21578/` lacks; each file arrives whole or not.

    Raises:
        DataError: a file cannot be had, or is not the published one.
    """
    for file, (size, sha256) in FILES.items():
        target = f"reuters21578/{file}"
        mulan.fetch_file(f"{base_url}/{file}", folder, target, size, sha256)


def parse(content: bytes, path: str) -> Iterator[Document]:
    """Reads the records of one SGML file; those outside ModApte are passed over.

    Args:
        content: of the file, latin-1.
        path: its name in messages.

    Raises:
        DataError: there is no record, or one lacks its end, an attribute or an element.
    """
    text = content.decode("latin-1")
    start = text.find("<REUTERS ")
    if start < 0:
        raise DataError(f"{path} holds no <REUTERS ...> record; is it Reuters-21578?")
    number = 0
    while start >= 0:
        number += 1
        following = text.find("<REUTERS ", start + 1)
        record = text[start : following if following >= 0 else len(text)]
        try:
            document = _document(record)
        except ValueError as error:
            raise DataError(f"{path}, record {number}: {error}") from None
        if document:
            yield document
        start = following


def build(documents: Sequence[Document]) -> Dataset:
    """Chooses the topics, learns the vocabulary from training alone, makes ids."""
    train, test = ([d for d in documents if d.split == s] for s in ("TRAIN", "TEST"))
    topics = sorted(
        {t for d in train for t in d.topics} & {t for d in test for t in d.topics}
    )
    train, test = (
        [d for d in side if not set(topics).isdisjoint(d.topics)]
        for side in (train, test)
    )
    train_words, test_words = ([tokens(d.text) for d in side] for side in (train, test))
    found_in = collections.Counter(w for words in train_words for w in set(words))
    known = sorted(w for w, count in found_in.items() if count >= MIN_DOCUMENTS)
    feature_names = (UNKNOWN, *known)
    return Dataset(
        name="reuters",
        train=Split(encode(train_words, feature_names), _labels(train, topics)),
        test=Split(encode(test_words, feature_names), _labels(test, topics)),
        label_names=tuple(topics),
        feature_names=feature_names,
        label_texts=tuple(LABEL_TEXTS.get(t, t.replace("-", " ")) for t in topics),
    )


def encode(rows: Iterable[Sequence[str]], feature_names: Sequence[str]) -> Ragged:
    """Ids of tokens, in their order; a token without a name is id 0, `<unk>`."""
    index = {name: i for i, name in enumerate(feature_names)}
    return Ragged.from_rows([[index.get(word, 0) for word in row] for row in rows])


def _labels(documents: Sequence[Document], topics: Sequence[str]) -> np.ndarray:
    rows = [[t in d.topics for t in topics] for d in documents]
    return np.array(rows, np.uint8).reshape(len(documents), len(topics))


def _find(folder: str, file: str) -> str:
    path = os.path.join(folder, "reuters21578", file)
    for candidate in (path, f"{path}.gz"):
        if os.path.isfile(candidate):
            return candidate
    raise DataError(
        f"there is no {path} or {file}.gz; {mulan.OR_FOLDER} reuters21578/, or unset "
        "both to download the data set"
    )


def _content(path: str) -> bytes:
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is no whole gzip file ({error}); delete it and fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > LARGEST_FILE:
        raise DataError(
            f"{path} holds more than {LARGEST_FILE} bytes; is it of Reuters-21578?"
        )
    return content


def _document(record: str) -> Document | None:
    """Reads from one `<REUTERS ` up to the next; None outside ModApte.

    Raises:
        ValueError: the record is malformed.
    """
    record, end, _ = record.partition("</REUTERS>")
    if not end:
        raise ValueError("it has no </REUTERS>; the file is cut off or was edited")
    attributes = dict(_ATTRIBUTE.findall(record[: record.find(">")]))
    for name, values in _ATTRIBUTE_VALUES.items():
        if attributes.get(name) not in values:
            found = attributes.get(name, "missing")
            raise ValueError(f"its {name} is {found}, not one of {', '.join(values)}")
    if attributes["TOPICS"] != "YES" or attributes["LEWISSPLIT"] == "NOT-USED":
        return None
    topics, text = (_element(record, tag) for tag in ("TOPICS", "TEXT"))
    if topics is None or text is None:
        raise ValueError(f"it has no <{'TOPICS' if topics is None else 'TEXT'}>")
    title, body = (_element(text, tag) for tag in ("TITLE", "BODY"))
    # Beside a lone title, the distribution put "Blah blah blah." where a body was.
    parts = [p for p in (title, body) if p is not None] or [text]
    return Document(
        split=attributes["LEWISSPLIT"],
        topics=tuple(re.findall(r"<D>([^<>]+)</D>", topics)),
        text=html.unescape("\n".join(parts)),
        has_body=body is not None,
    )


def _element(markup: str, tag: str) -> str | None:
    """What stands in the first `<tag ...>`; None where there is none."""
    start = re.search(rf"<{tag}(?: [^<>]*)?>", markup)
    if not start:
        return None
    end = markup.find(f"</{tag}>", start.end())
    if end < 0:
        raise ValueError(f"its <{tag}> has no </{tag}>")
    return markup[start.end() : end]
