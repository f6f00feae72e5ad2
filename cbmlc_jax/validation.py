"""What a run keeps of its validation rows: validation.npz.

Scores and the labels that training may see, so that thresholds and calibration can be
chosen later, without the data set and without training.  The scores of a cross-fitted
run lie in out_of_fold.npy already.
"""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np

from cbmlc_jax import files
from cbmlc_jax.evaluate import Validation
from cbmlc_jax.thresholds import Rates

NAME = "validation.npz"
OUT_OF_FOLD = "out_of_fold.npy"
MOST_BYTES = 1 << 32  # of an array


class ValidationError(ValueError):
    """No validation scores, or damaged ones; the message says what to do."""


def write(workdir: str, found: Validation, ignored: np.ndarray | None) -> None:
    """Writes validation.npz: labels as bits, scores unless out_of_fold.npy has them.

    Args:
        workdir: of the run.
        found: scores with 0 at ignored entries.
        ignored: bool [N, L] or None.
    """
    arrays = {
        "shape": np.array(found.labels.shape),
        "labels": np.packbits(found.labels != 0),
        "prior": found.prior,
        "rates": np.array([found.rates.r0, found.rates.r1]),
        "source": np.array(found.rates.source),
        "doubt": np.array(found.rates.doubt),
        "partial": np.array(found.rates.partial),
        "labels_are_clean": np.array(found.labels_are_clean),
        "grid": found.grid,
    }
    if ignored is not None:
        arrays["ignored"] = np.packbits(ignored)
    if not os.path.exists(os.path.join(workdir, OUT_OF_FOLD)):
        arrays["scores"] = found.scores.astype(np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    files.write_atomic(os.path.join(workdir, NAME), buffer.getvalue())


def read(workdir: str) -> Validation:
    """The inverse of `write`; clean labels were not kept.

    Raises:
        ValidationError: the run has none, is of an older version, or a file is damaged.
    """
    path = os.path.join(workdir, NAME)
    if not os.path.exists(path):
        raise ValidationError(
            f"{path} is not there: `python -m cbmlc_jax.main --mode=eval "
            f"--workdir={workdir}` writes it, from the data set and the checkpoint"
        )
    try:
        return _read(workdir, path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValidationError(
            f"{path} cannot be read ({' '.join(str(error).split())}): --mode=eval "
            "writes it again"
        ) from error


def _read(workdir: str, path: str) -> Validation:
    with zipfile.ZipFile(path) as archive:
        if max(info.file_size for info in archive.infolist()) > MOST_BYTES:
            raise ValueError(f"an array has more than {MOST_BYTES} bytes")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    rows, labels = (int(n) for n in arrays["shape"])

    def bits(name: str) -> np.ndarray:
        if arrays[name].size != -(-rows * labels // 8):
            raise ValueError(f"{name} is not of its shape")
        flat = np.unpackbits(arrays[name], count=rows * labels)
        return flat.reshape(rows, labels)

    scores = arrays.get("scores")
    if scores is None:
        scores = np.load(os.path.join(workdir, OUT_OF_FOLD), allow_pickle=False)
        if "ignored" in arrays:
            scores = np.where(bits("ignored"), np.float32(0), scores)
    if scores.shape != (rows, labels) or arrays["prior"].shape != (labels,):
        raise ValueError("its arrays are not of one shape")
    r0, r1 = arrays["rates"].tolist()
    partial = bool(arrays.get("partial", False))  # runs of before have none
    return Validation(
        scores=scores,
        labels=bits("labels"),
        clean=None,
        prior=arrays["prior"],
        rates=Rates(r0, r1, str(arrays["source"]), str(arrays["doubt"]), partial),
        labels_are_clean=bool(arrays["labels_are_clean"]),
        grid=arrays["grid"],
    )
