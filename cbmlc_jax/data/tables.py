"""Rows of CSV, TSV and JSON lines files, one at a time: memory does not grow with them.

A row is a dict of column name -> cell: text, or in JSON lines whatever JSON has.
"""

from __future__ import annotations

import codecs
import csv
import fnmatch
import json
from collections.abc import Iterator, Sequence

from cbmlc_jax.data.dataset import DataError

LONGEST_LINE = 1 << 24  # bytes
DELIMITERS = {"csv": ",", "tsv": "\t"}
SHOWN = 12  # columns that a message names


def byte_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Line numbers, from 1, and lines with their ends.

    Raises:
        DataError: the file cannot be read, or a line is longer than LONGEST_LINE bytes;
            no more than that of it is held.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{path}, line {number} is longer than {LONGEST_LINE} bytes: "
                        "put one row on a line, and shorten the text of this one"
                    )
                yield number, line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def lines(path: str) -> Iterator[tuple[int, str]]:
    """As `byte_lines`, as text.

    Raises:
        DataError: as `byte_lines` and `decoded`.
    """
    for number, line in byte_lines(path):
        yield number, decoded(path, number, line)


def decoded(path: str, number: int, line: bytes) -> str:
    """The text of a line; a byte order mark in the first one is dropped.

    Raises:
        DataError: a byte is not UTF-8.
    """
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        return line.decode("utf8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte {line[error.start]:#04x} is not UTF-8: "
            "save the file as UTF-8 (iconv -f latin1 -t utf8)"
        ) from None


def rows(path: str, form: str) -> Iterator[tuple[int, dict]]:
    """Line number where it begins, and cells, of each row.

    Args:
        path: of the file.
        form: "csv", "tsv" or "jsonl".

    Raises:
        DataError: as `lines`; a header with a name twice, a row of another width than
            the header, bad quotes; a line that is no JSON object; no row at all.
    """
    number = None
    for number, row in _json(path) if form == "jsonl" else _cells(path, form):
        yield number, row
    if number is None:
        raise DataError(f"{path} has no rows: is it the right file, and complete?")


def _json(path: str) -> Iterator[tuple[int, dict]]:
    for number, line in lines(path):
        if line.strip():
            yield number, json_object(line, f"{path}, line {number}")


def json_object(line: str, where: str) -> dict:
    """The object on a line.

    Raises:
        DataError: there is none.
    """
    try:
        row = json.loads(line)
    # Of deep nesting, too; a number of thousands of digits is a ValueError.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: no JSON ({error}): put one object on a line"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object {{column: value}}")
    return row


def _cells(path: str, form: str) -> Iterator[tuple[int, dict[str, str]]]:
    # The module's own limit, 131,072, is that of a long text.
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(
        (text for _, text in lines(path)), delimiter=DELIMITERS[form], strict=True
    )
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {number}: {error}: close the quotes of this row, and "
                'write a quote inside of them as ""'
            ) from None
        if not cells:
            continue
        if not header:
            header = _header([cell.strip() for cell in cells], f"{path}, line {number}")
        elif len(cells) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(cells)} cells, but {len(header)} columns "
                "in the header: put quotes around a cell that contains the delimiter"
            )
        else:
            yield number, dict(zip(header, cells, strict=True))


def _header(names: list[str], where: str) -> list[str]:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise DataError(f"{where}: the column {name!r} is there twice: rename one")
    return names


def number(cell, where: str) -> float:
    """A cell as a number that float32 can hold.

    Raises:
        DataError: it is none, or not finite.
    """
    try:
        if isinstance(cell, (bool, list, dict)) or cell is None:
            raise ValueError
        value = float(cell)
    except (ValueError, OverflowError):
        shown = repr(cell)[:40] if cell != "" else "empty"
        raise DataError(
            f"{where} is no number ({shown}): fill it in, leave the row out, or leave "
            "the column out of config.data.feature_columns"
        ) from None
    # Not the other way round: nan is not larger, either.
    if not abs(value) <= 3.4e38:
        raise DataError(
            f"{where} is {cell!r}, not a finite number: fill it in, or leave the row "
            "out"
        )
    return value


def matching(wanted: str, columns: Sequence[str], key: str, path: str) -> list[str]:
    """The columns that a list of names and patterns stands for, in their own order.

    Args:
        wanted: "age,income,word_*", as the user wrote it.
        columns: of the file.
        key: of the config, for the message.
        path: of the file, for the message.

    Raises:
        DataError: a name or pattern that no column matches.
    """
    chosen: set[str] = set()
    for item in filter(None, (part.strip() for part in wanted.split(","))):
        found = {item} & set(columns) or set(fnmatch.filter(columns, item))
        if not found:
            raise DataError(
                f"{path} has no column {item!r} (config.data.{key}): its columns are "
                + listed(columns)
            )
        chosen |= found
    return [name for name in columns if name in chosen]


def listed(names: Sequence[str]) -> str:
    """Some names, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
