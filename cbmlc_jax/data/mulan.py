"""Mulan's bibtex, delicious and emotions: from a folder, a prepared cache, or GitHub.

A folder holds `mulan/<name>/<name>-train.arff`, `<name>-test.arff` and `<name>.xml`.
Whatever the source, only the published bytes are accepted and the same Dataset results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import os
import tempfile
import time
import urllib.error
import urllib.request

from cbmlc_jax.data import arff
from cbmlc_jax.data.dataset import DataError, Dataset

BASE_URL = (
    "https://raw.githubusercontent.com/tsoumakas/mulan/"
    "43f6389095ad71984264db4387a8074b22bc7d4a/data/multi-label"
)
# Data set -> file -> (bytes, sha256), in the order train, test, label names.
FILES = {
    "bibtex": {
        "bibtex-train.arff": (
            2292961,
            "8dcc9de6e0b2cebaec8c1f4fac78431adeeb73cfd3ab879b530a66d366e59174",
        ),
        "bibtex-test.arff": (
            1215637,
            "9b03329cde64d3f994bdf7fbbac3f3b10fe185c311cb9ae725475f59c7f3f922",
        ),
        "bibtex.xml": (
            5880,
            "08fe20013c1e75dcf1888c185f5187c95e76495b8518ce289b4d3afce38d1232",
        ),
    },
    "delicious": {
        "delicious-train.arff": (
            3056590,
            "030186cdb542ebdd32052fcdbb1ebe30115b3a22518c1b4b198c45eb827aebe1",
        ),
        "delicious-test.arff": (
            757565,
            "2dfb01723a819914b0ca83361177ed413ce3f2169851d9f228d4692915d63944",
        ),
        "delicious.xml": (
            34303,
            "4e0c0f93c7d86a39b9fca4aaefaa00e9428f2c80277732dfbf03ca48e2c14da2",
        ),
    },
    "emotions": {
        "emotions-train.arff": (
            252080,
            "bbe704106c79bb8fb99c1d1d2e9bde081d6a2daeb01f100862f11fd91a3c1f98",
        ),
        "emotions-test.arff": (
            132007,
            "f13d4b746b7b5c8eb484bd751d6ac463d4560dff998a93516a5c1fe35daf6c8f",
        ),
        "emotions.xml": (
            323,
            "dbce8e6ccbbb2fcbfd9e9edbb230d7ed12692c6e13f59fdbc0161fa9b6cf2dc0",
        ),
    },
}
# Label names of emotions -> what they mean; published with two misspelt words.
_TEXTS = {
    "amazed-suprised": "amazed surprised",
    "happy-pleased": "happy pleased",
    "relaxing-calm": "relaxing calm",
    "quiet-still": "quiet still",
    "sad-lonely": "sad lonely",
    "angry-aggresive": "angry aggressive",
}
STALLED = 30  # seconds without a byte
TOO_SLOW = 600  # seconds for one file
OR_FOLDER = "set config.data.dir or CBMLC_DATA_DIR to a folder that holds"


def load(
    name: str,
    folder: str | None = None,
    cache_dir: str | None = None,
    base_url: str = BASE_URL,
) -> Dataset:
    """Reads a data set from the first source there is: folder, cache, download.

    Args:
        name: "bibtex", "delicious" or "emotions".
        folder: a data folder; where given, the only source.
        cache_dir: of TensorFlow Datasets; None for its default (`TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`).
        base_url: where `<name>/<file>` is downloaded from.

    Raises:
        DataError: as `load_folder`; no download; or a prepared cache that is broken.
    """
    if folder:
        return load_folder(name, folder)
    # TensorFlow Datasets is slow to import, and not needed with a folder.
    from cbmlc_jax.data import builders

    return builders.load(name, cache_dir, base_url)


def load_folder(name: str, folder: str) -> Dataset:
    """Reads `<folder>/mulan/<name>/`.

    Raises:
        DataError: a file is missing, malformed, or not the published one.
    """
    paths = _paths(name, folder)
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(
                f"there is no {path}; {OR_FOLDER} mulan/{name}/, or unset both to "
                "download the data set"
            )
    dataset = arff.read_mulan(name, *paths)
    # Last, because the parser says where a file is broken and a checksum does not.
    for path, (_, sha256) in zip(paths, FILES[name].values(), strict=True):
        if _sha256(path) != sha256:
            raise DataError(
                f"{path} is not the published file (its sha256 differs): it was "
                f"changed or is not complete; delete it and fetch it again from "
                f"{BASE_URL}/{name}/"
            )
    texts = tuple(_TEXTS.get(text, text) for text in dataset.label_texts)
    return dataclasses.replace(dataset, label_texts=texts)


def download(name: str, folder: str, base_url: str = BASE_URL) -> None:
    """Fetches what `<folder>/mulan/<name>/` lacks; each file arrives whole or not.

    Raises:
        DataError: a file cannot be had, or is not the published one.
    """
    for file, (size, sha256) in FILES[name].items():
        target = f"mulan/{name}/{file}"
        fetch_file(f"{base_url}/{name}/{file}", folder, target, size, sha256)


def fetch_file(url: str, folder: str, target: str, size: int, sha256: str) -> None:
    """Downloads a published file to `<folder>/<target>` unless it is there already.

    Args:
        url: of the file.
        folder: a data folder.
        target: of the file in a data folder; folders on the way are made.
        size, sha256: of the published bytes; no others are accepted.

    Raises:
        DataError: the file cannot be had, or is not the published one.
    """
    path = os.path.join(folder, target)
    if os.path.isfile(path) and _sha256(path) == sha256:
        return
    try:
        body = _fetch(url, size)
        if hashlib.sha256(body).hexdigest() != sha256:
            raise DataError("it is not the published file (its sha256 differs)")
    # URLError is an OSError, as is a time-out.
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(
            f"cannot download {url}: {error}; try again later, or {OR_FOLDER} {target}"
        ) from error
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _write(path, body)


def _paths(name: str, folder: str) -> list[str]:
    return [os.path.join(folder, "mulan", name, file) for file in FILES[name]]


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, size: int) -> bytes:
    """The body, which has to be of `size` bytes; all of it is small enough to keep."""
    deadline = time.monotonic() + TOO_SLOW
    body = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=STALLED) as response:
            while len(body) <= size and (chunk := response.read1(1 << 16)):
                body += chunk
                if time.monotonic() > deadline:
                    raise DataError(f"it is not complete after {TOO_SLOW} seconds")
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise DataError(f"the server says {error.code} {error.reason}") from error
    if len(body) != size:
        more = " or more" if len(body) > size else ""
        raise DataError(f"got {len(body)}{more} bytes of {size}")
    return bytes(body)


def _write(path: str, body: bytes) -> None:
    """Writes beside `path` and renames, so that nobody sees half of a file."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".part-")
    try:
        with open(handle, "wb") as file:
            file.write(body)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
