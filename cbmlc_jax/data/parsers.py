"""Parsers of a JSON row, one for each kind of data set; numpy alone, for serving."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np

from cbmlc_jax.data.dataset import DataError, Dense, Inputs, Pixels, Ragged
from cbmlc_jax.data.words import tokens


class Tokens:
    """Sets of features: `features` (numbers, or names with values), or `tokens`.

    Args:
        feature_names: F names.
    """

    def __init__(self, feature_names: Sequence[str]):
        self._names = feature_names
        self._index = {name: i for i, name in enumerate(feature_names)}
        self._unknown = 0

    def row(self, row: dict, where: str) -> list[int]:
        """Ascending feature numbers; unknown tokens are left out."""
        if _one_of(row, ("features", "tokens"), where) == "tokens":
            known = [self._index[t] for t in _tokens(row, where) if t in self._index]
            self._unknown += len(row["tokens"]) - len(known)
            return sorted(set(known))
        features = row["features"]
        if isinstance(features, dict):
            return sorted(i for i, value in _named(features, self._index, where))
        return sorted(set(_numbers(features, len(self._names), where)))

    def join(self, rows: list[list[int]]) -> Inputs:
        """Rows as inputs."""
        return Ragged.from_rows(rows)

    def close(self) -> None:
        """Tells how many tokens no feature stands for."""
        if self._unknown:
            print(
                f"note: {self._unknown} tokens are no feature of this model and were "
                "left out",
                file=sys.stderr,
            )


class Weighted(Tokens):
    """Sets of features with weights: `features` as {name or number: weight}."""

    def row(self, row: dict, where: str) -> list[tuple[int, float]]:
        """(feature number, weight), ascending."""
        _one_of(row, ("features",), where)
        if not isinstance(row["features"], dict):
            raise DataError(
                f"{where}: `features` must be an object {{feature name: weight}}"
            )
        return sorted(_named(row["features"], self._index, where))

    def join(self, rows: list[list[tuple[int, float]]]) -> Inputs:
        """Rows as inputs."""
        ids = Ragged.from_rows([[i for i, _ in row] for row in rows])
        weights = np.array([w for row in rows for _, w in row], np.float32)
        return Ragged(ids.values, ids.offsets, weights)


class Sequences(Tokens):
    """Words in their order: `tokens`, `features` (numbers), or `text`."""

    def row(self, row: dict, where: str) -> list[int]:
        """Numbers in the order of the words; 0 for an unknown one."""
        kind = _one_of(row, ("features", "tokens", "text"), where)
        if kind == "features":
            return _numbers(row["features"], len(self._names), where)
        if kind == "text":
            if not isinstance(row["text"], str):
                raise DataError(f"{where}: `text` must be a string")
            row = {"tokens": tokens(row["text"])}
        return [self._index.get(token, 0) for token in _tokens(row, where)]


class Numbers(Tokens):
    """Real numbers: `features`, a list of F numbers or {name: number} of all F."""

    def row(self, row: dict, where: str) -> list[float]:
        """F numbers."""
        _one_of(row, ("features",), where)
        values, width = row["features"], len(self._names)
        if isinstance(values, dict):
            missing = [name for name in self._names if name not in values]
            if missing:
                raise DataError(f"{where}: feature {missing[0]!r} is missing")
            _known(values, self._index, where)
            values = [values[name] for name in self._names]
        if not isinstance(values, list) or len(values) != width:
            raise DataError(f"{where}: `features` must be {width} numbers")
        return [_finite(value, where) for value in values]

    def join(self, rows: list[list[float]]) -> Inputs:
        """Rows as inputs."""
        return Dense(np.array(rows, np.float32))


class Pictures:
    """Images: `image`, the path of a file, relative to that of the JSON lines.

    Args:
        folder: that paths are relative to.
        side: of the square that they are resized to.
    """

    def __init__(self, folder: str, side: int):
        self._folder, self._side = folder, side

    def row(self, row: dict, where: str) -> str:
        """A path."""
        _one_of(row, ("image",), where)
        if not isinstance(row["image"], str) or "\0" in row["image"]:
            raise DataError(f"{where}: `image` must be the path of a file")
        path = os.path.join(self._folder, row["image"])
        if not os.path.isfile(path):
            raise DataError(f"{where}: there is no image {path}")
        return path

    def join(self, rows: list[str]) -> Inputs:
        """Rows as inputs."""
        from cbmlc_jax.data.images import Images

        return Images(tuple(rows), self._side)

    def close(self) -> None:
        """Nothing to tell."""


class Squares(Pictures):
    """Images that are decoded at once, so that a bad one is a bad row.

    `image` may also be an array uint8 [height, width, 3], as a program has it.
    """

    def row(self, row: dict, where: str) -> np.ndarray:
        """uint8 [side, side, 3], as `Images.batch` makes it."""
        from cbmlc_jax.data import images

        given = row.get("image")
        try:
            if isinstance(given, np.ndarray):
                image = images.of_array(given)
            else:
                image = images.decoded(super().row(row, where))
        except DataError as error:
            known = str(error).startswith(where)
            raise error if known else DataError(f"{where}: {error}") from error
        return np.asarray(images.square(image, self._side))

    def join(self, rows: list[np.ndarray]) -> Inputs:
        """Rows as inputs."""
        return Pixels(np.stack(rows))


KINDS = {
    "set": Tokens,
    "weighted": Weighted,
    "sequence": Sequences,
    "numbers": Numbers,
}


def _one_of(row: dict, kinds: tuple[str, ...], where: str) -> str:
    found = [kind for kind in kinds if kind in row]
    if len(found) != 1:
        wanted = ", ".join(f"`{kind}`" for kind in kinds)
        raise DataError(
            f"{where}: expected an object with "
            + (f"one of {wanted}" if len(kinds) > 1 else wanted)
        )
    return found[0]


def _all(values, kind: type) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, kind) and not isinstance(v, bool) for v in values
    )


def _tokens(row: dict, where: str) -> list[str]:
    if not _all(row["tokens"], str):
        raise DataError(f"{where}: `tokens` must be a list of strings")
    return row["tokens"]


def _numbers(features, size: int, where: str) -> list[int]:
    if not _all(features, int):
        raise DataError(f"{where}: `features` must be a list of feature numbers")
    for number in features:
        if not 0 <= number < size:
            raise DataError(f"{where}: feature {number} is not in 0..{size - 1}")
    return features


def _known(features: dict, index: dict[str, int], where: str) -> None:
    for name in features:
        if name not in index:
            raise DataError(f"{where}: {name!r} is no feature of this model")


def _named(
    features: dict, index: dict[str, int], where: str
) -> list[tuple[int, float]]:
    """(feature number, value) of the values that are not 0."""
    _known(features, index, where)
    pairs = [(index[n], _finite(v, where)) for n, v in features.items()]
    return [(i, value) for i, value in pairs if value]


def _finite(value, where: str) -> float:
    if not isinstance(value, (int, float)) or not abs(value) <= 3e38:
        raise DataError(f"{where}: {value!r} is no finite number")
    return float(value)
