"""Labels to train on in the place of those that were given, from an audit.

    drop   doubtful entries (more likely wrong than right) count in no loss
    flip   doubtful entries get the other label
    soft   every entry gets P(clean label = 1) as its target

Validation keeps the given labels: thresholds and epochs are chosen as without repair.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import zipfile

import numpy as np
from jaxtyping import Float, UInt8

from cbmlc_jax import files
from cbmlc_jax.data.dataset import DataError
from cbmlc_jax.issues import Issues

WAYS = ("drop", "flip", "soft")
SURE = 0.01  # soft targets nearer than this to 0 or 1 are made so: one copy, not two
# Models that read drop and soft: those whose loss is a sum over entries.
_READS_ALL = (
    "cbmlc",
    "lamp",
    "ml_gcn",
    "resnet_asl",
    "resnet_bce",
    "logistic_regression",
    "lr_knn",
)


@dataclasses.dataclass(frozen=True)
class Repaired:
    """Targets of all official training rows.

    Attributes:
        how: one of WAYS.
        targets: float32 [N, L] in [0, 1]; NaN where an entry is dropped.
        sha256: of the file.
    """

    how: str
    targets: Float[np.ndarray, "rows labels"]
    sha256: str

    def summary(self, noisy: UInt8[np.ndarray, "rows labels"]) -> dict[str, object]:
        """For a result row; `entries` is the number that differs from `noisy`."""
        changed = ~(self.targets == noisy)
        return {
            "how": self.how,
            "sha256": self.sha256,
            "entries": int(changed.sum()),
            "dropped": int(np.isnan(self.targets).sum()),
        }


def write(path: str, issues: Issues, how: str) -> int:
    """Writes the targets, atomically; returns how many entries changed."""
    doubtful, given = issues.doubtful, issues.labels.astype(np.float32)
    if how == "soft":
        targets = issues.posterior().astype(np.float32)
        targets = np.where(targets < SURE, 0, np.where(targets > 1 - SURE, 1, targets))
    elif how == "flip":
        targets = np.where(doubtful, 1 - given, given)
    else:
        targets = np.where(doubtful, np.nan, given)
    content = {
        "how": np.array(how),
        "targets": targets.astype(np.float32),
        "labels": np.array(_digest(issues.labels)),
    }
    files.write_arrays(path, content)
    return int((~(targets == given)).sum())


def read(path: str, noisy: UInt8[np.ndarray, "rows labels"], config) -> Repaired:
    """Reads what `write` wrote.

    Args:
        path: of the file.
        noisy: [N, L] labels of the run that is to train on it.
        config: of that run.

    Raises:
        DataError: it is no such file, of other labels, or not for this model or loss.
    """
    try:
        with open(path, "rb") as file:
            # What can be compressed is at most as large as what it is made from.
            content = file.read(8 * noisy.size + (1 << 20))
        how, targets, digest = _arrays(content, noisy.shape)
    except OSError as error:
        raise DataError(
            f"config.noise.repaired={path} cannot be read ({error.strerror}): "
            "--mode=audit --apply=flip writes such a file"
        ) from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is damaged, or not written by --mode=audit --apply: {error}"
        ) from error
    if digest != _digest(noisy):
        raise DataError(
            f"{path} was made for other training labels (data set, noise or its seed "
            "differ): run --mode=audit --apply again with these settings"
        )
    name, loss = config.model.name, config.loss.name
    if how != "flip" and name not in _READS_ALL:
        raise DataError(f"{name} cannot train on --apply={how}: use --apply=flip")
    if how == "soft" and loss not in ("asl", "bce", "hill") and _neural(name):
        raise DataError(
            f"config.loss.name={loss} reads labels of 0 and 1, not --apply=soft: use "
            "--apply=flip, or the loss asl, bce or hill"
        )
    if loss == "forward" and _neural(name):
        raise DataError(
            "config.loss.name=forward corrects for noise that repaired labels no "
            "longer have: choose another loss, or unset config.noise.repaired"
        )
    return Repaired(how, targets, hashlib.sha256(content).hexdigest())


def _neural(name: str) -> bool:
    return name not in ("logistic_regression", "lr_knn")


def _arrays(content: bytes, shape: tuple[int, int]) -> tuple[str, np.ndarray, str]:
    """How, targets and digest; sizes are looked at before anything is unpacked."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    most = {"targets.npy": 4 * shape[0] * shape[1], "how.npy": 64, "labels.npy": 1024}
    for name, size in sizes.items():
        if size > most.get(name, 0) + 1024:
            raise ValueError(f"{name} has {size} bytes")
    with np.load(io.BytesIO(content), allow_pickle=False) as found:
        how, digest = str(found["how"]), str(found["labels"])
        targets = found["targets"]
    if how not in WAYS:
        raise ValueError(f"{how!r} is not one of {', '.join(WAYS)}")
    if targets.shape != shape or targets.dtype != np.float32:
        raise ValueError(f"targets are {targets.dtype} {targets.shape}, not {shape}")
    sound = (targets >= 0) & (targets <= 1)
    if how == "drop":
        sound |= np.isnan(targets)
    if not sound.all():
        raise ValueError("targets outside [0, 1]")
    return how, targets, digest


def _digest(labels: np.ndarray) -> str:
    packed = np.packbits(labels != 0)
    return hashlib.sha256(repr(labels.shape).encode() + packed.tobytes()).hexdigest()


def default_path(workdir: str) -> str:
    """Where `--mode=audit --apply` writes."""
    return os.path.join(workdir, "labels_repaired.npz")
