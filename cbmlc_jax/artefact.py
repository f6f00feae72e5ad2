"""The files of an exported model, and that they are what was exported; numpy alone.

manifest.json    format, kind of rows, padded lengths, side of the squares that images
                 are resized to, sha256 of the other files
model.stablehlo  (weights, inputs) -> scores, of jax.export, any batch size
weights.npz      no pickles
vocabulary.json  names of the labels and of the features
decision.json    which labels are said, given scores
card.json, MODEL_CARD.md
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile

import numpy as np

from cbmlc_jax.data import parsers

FORMAT = 1
MANIFEST = "manifest.json"
FILES = (
    "model.stablehlo",
    "weights.npz",
    "vocabulary.json",
    "decision.json",
    "card.json",
    "MODEL_CARD.md",
)
MOST_BYTES = 4 << 30  # of a file of an artefact
MOST_MANIFEST = 1 << 20
MOST_SIDE = 1 << 12  # pixels of the square that images are resized to
LANES = 16  # padded lengths are multiples of it, as the model was exported


class ArtefactError(ValueError):
    """An artefact that cannot be used; the message names the file and the remedy."""


def read_manifest(folder: str) -> tuple[dict, str]:
    """The manifest and its sha256.

    Raises:
        ArtefactError: there is none, or it is damaged or of another format.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise ArtefactError(
            f"{folder} is no artefact (no {MANIFEST} there): `python -m "
            "cbmlc_jax.main --mode=export` writes one"
        )
    found = bounded(path, MOST_MANIFEST)
    try:
        manifest = json.loads(found)
        version = manifest["format"]
        made_by = manifest.get("made_by", "another version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ArtefactError(f"{path} is damaged: export the model again") from None
    if version != FORMAT:
        raise ArtefactError(
            f"{path} is of format {version!r} (by {made_by}), and this version reads "
            f"format {FORMAT}: export the model again with this version, or serve it "
            "with that one"
        )
    try:
        whole = all(
            type(manifest["files"][name]["bytes"]) is int
            and type(manifest["files"][name]["sha256"]) is str
            for name in FILES
        )
        widths, length = manifest["widths"], manifest["typical_length"]
        whole &= all(type(w) is int and 0 < w < 1 << 24 for w in [*widths, length])
        whole &= widths == sorted(widths) and not any(w % LANES for w in widths)
        whole &= len(widths) > 0
        if manifest["kind"] == "images":
            side = manifest["side"]
            whole &= type(side) is int and 0 < side <= MOST_SIDE
        else:
            whole &= manifest["kind"] in parsers.KINDS
    except (TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ArtefactError(f"{path} is damaged: export the model again")
    return manifest, hashlib.sha256(found).hexdigest()


def bounded(path: str, most: int) -> bytes:
    """A file of at most so many bytes.

    Raises:
        ArtefactError: it has more.
    """
    with open(path, "rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ArtefactError(f"{path} has more than {most} bytes: it is no such file")
    return found


def content(folder: str, manifest: dict, name: str) -> bytes:
    """A file's bytes, those that the manifest knows.

    Raises:
        ArtefactError: they are not.
    """
    path, known = os.path.join(folder, name), manifest["files"][name]
    if not os.path.isfile(path):
        raise ArtefactError(f"{path} is missing: export the model again")
    found = bounded(path, min(known["bytes"], MOST_BYTES))
    if hashlib.sha256(found).hexdigest() != known["sha256"]:
        raise ArtefactError(
            f"{path} is not what was exported (its sha256 differs): export the model "
            "again"
        )
    return found


def read_json(folder: str, manifest: dict, name: str) -> dict:
    """The object in a file that the manifest knows."""
    return json.loads(content(folder, manifest, name))


def read_weights(folder: str, manifest: dict) -> dict[str, np.ndarray]:
    """The arrays of weights.npz.

    Raises:
        ArtefactError: they unpack to more than MOST_BYTES.
    """
    buffer = io.BytesIO(content(folder, manifest, "weights.npz"))
    with zipfile.ZipFile(buffer) as file:
        if sum(info.file_size for info in file.infolist()) > MOST_BYTES:
            raise ArtefactError(f"{folder}/weights.npz unpacks to too many bytes")
    with np.load(buffer, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
