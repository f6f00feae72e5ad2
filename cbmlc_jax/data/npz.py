"""Arrays of .npz files: numpy's and scipy.sparse's; pickles are never read.

A file holds `features` [N, F] and `labels` [N, L], and may hold `feature_names` and
`label_names`; or it is a matrix of scipy.sparse.save_npz, which may have these arrays
beside its own.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from cbmlc_jax.data.arff import LARGEST_DENSE
from cbmlc_jax.data.dataset import DataError, Dense, Inputs, Ragged

LARGEST_FILE = 8 << 30  # bytes, unpacked
_SPARSE = {"csr", "csc", "coo"}


def read(path: str) -> dict[str, np.ndarray | scipy.sparse.csr_array]:
    """The arrays of a file; scipy's matrix under the name "matrix", as CSR.

    Raises:
        DataError: no npz file, one that is damaged or too large, an array of Python
            objects, or one that claims more than the file has.
    """
    try:
        _check(path)
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            sparse = {"format", "shape", "data"} <= names
            own = {"format", "shape", "data", "indices", "indptr", "row", "col"}
            found = {n: file[n] for n in names - (own if sparse else set())}
            if sparse and file["format"].item().decode() not in _SPARSE:
                raise ValueError(f"its format is {file['format']}, not {_SPARSE}")
        if sparse:
            matrix = scipy.sparse.load_npz(path)  # with allow_pickle=False, too
            if matrix.format != "coo":  # which has checked its indices
                matrix.check_format(full_check=True)
            found["matrix"] = scipy.sparse.csr_array(matrix)
            found["matrix"].sum_duplicates()
    except DataError:
        raise
    # Damaged files surface as exceptions of zipfile, zlib, numpy and scipy.
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as npz ({error}): write it with np.savez or "
            "scipy.sparse.save_npz, without Python objects"
        ) from error
    return found


def inputs(paths: Sequence[str]) -> tuple[Inputs, tuple[str, ...], dict]:
    """The features of a data set.

    Args:
        paths: a file of features and labels, or one of features and one of labels; a
            sparse matrix of the second is `labels`.

    Returns:
        The rows: weighted if they are sparse, real numbers if not; the names of the
        features; and all arrays.

    Raises:
        DataError: as `read`, or there are no features that are finite numbers.
    """
    whole, arrays = paths[0], read(paths[0])
    for path in paths[1:]:
        beside = read(path)
        arrays |= {"labels" if n == "matrix" else n: a for n, a in beside.items()}
    features = arrays.get("matrix", arrays.get("features"))
    if features is None or features.ndim != 2 or not all(features.shape):
        raise DataError(
            f"{whole} has no matrix of features: write it with scipy.sparse.save_npz, "
            "or as the array `features` [rows, features] with np.savez"
        )
    found = names(arrays, "feature_names", features.shape[1], whole)
    sparse = scipy.sparse.issparse(features)
    numbers = features.data if sparse else features
    if numbers.dtype.kind not in "biuf":
        raise DataError(f"{whole}: the features are {numbers.dtype}, not numbers")
    if not sparse and 4 * numbers.size > LARGEST_DENSE:
        raise DataError(
            f"{whole}: {numbers.shape[0]} rows of {numbers.shape[1]} numbers do not "
            f"fit the {LARGEST_DENSE} bytes allowed: write them as a sparse matrix"
        )
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    wrong = ~np.isfinite(numbers)
    if wrong.any():
        place = np.argwhere(wrong)[0]
        row = place[0]
        if sparse:
            row = np.searchsorted(features.indptr, row, side="right") - 1
        raise DataError(
            f"{whole}, row {row} (from 0): a feature is {numbers[tuple(place)]}, not a "
            "finite number: fill it in, or leave the row out"
        )
    if not sparse:
        return Dense(numbers), found, arrays
    indices = features.indices.astype(np.int32, copy=False)
    return Ragged(indices, features.indptr.astype(np.int64), numbers), found, arrays


def names(arrays: dict, key: str, count: int, path: str) -> tuple[str, ...]:
    """The array `key` of `count` names, or the numbers from 0 on.

    Raises:
        DataError: it has not as many, or one twice.
    """
    if key not in arrays:
        return tuple(map(str, range(count)))
    found = tuple(map(str, arrays[key].tolist()))
    if len(found) != count or len(set(found)) != count:
        raise DataError(
            f"{path}: {key} has {len(found)} names, {len(set(found))} of them "
            f"different, for {count} columns: give each one a name of its own"
        )
    return found


def _check(path: str) -> None:
    """Sizes, before anything is unpacked: numpy allocates what a header claims."""
    with zipfile.ZipFile(path) as file:
        if sum(info.file_size for info in file.infolist()) > LARGEST_FILE:
            raise DataError(
                f"{path} unpacks to more than {LARGEST_FILE} bytes: split it, or write "
                "it as svmlight text"
            )
        for info in file.infolist():
            with file.open(info) as member:
                version = np.lib.format.read_magic(member)
                reader = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = reader(member)
            if dtype.hasobject:
                raise ValueError(f"{info.filename} holds Python objects")
            if np.prod(shape, dtype=object) * dtype.itemsize > info.file_size:
                raise ValueError(f"{info.filename} claims more than it has")
