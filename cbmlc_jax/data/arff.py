"""Reader of Mulan data sets: ARFF files (Weka's format) and the XML of label names.

Labels are binary.  What the features are is said by the header, never guessed from the
values: where all are nominal, {0,1}, a row is the set of those that are 1 (`Ragged`);
where one is numeric, all are real numbers (`Dense`).

References:
    ARFF: https://waikato.github.io/weka-wiki/formats_and_processing/arff_stable/
    Mulan: http://mulan.sourceforge.net/format.html
"""

from __future__ import annotations

import array
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from xml.parsers import expat

import numpy as np

from cbmlc_jax.data.dataset import DataError, Dataset, Dense, Ragged, Split

LONGEST_LINE = 10 << 20  # characters
LARGEST_FILE = 2 << 30  # bytes
LARGEST_XML = 10 << 20  # bytes
LARGEST_DENSE = 1 << 30  # bytes of the numbers in memory
_LARGEST_NUMBER = float(np.finfo(np.float32).max)

# Blanks are named one by one: \s and str.strip() would also eat latin-1's no-break
# space, which is half of a letter in a name that was written as UTF-8.
_BLANK = " \t\r\n"
_ATTRIBUTE = re.compile(
    r"""@attribute[ \t]+('(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[^ \t'"{}%,][^ \t{}]*)"""
    r"(.*)",
    re.IGNORECASE,
)
_PAIR = r"[0-9]{1,9}[ \t]+[^\s,{}]+[ \t]*"
_SPARSE = re.compile(rf"\{{[ \t]*(?:{_PAIR}(?:,[ \t]*{_PAIR})*+)?\}}")


def read_label_names(path: str | os.PathLike) -> list[str]:
    """Names of the `<label name="...">` elements in the order of the file.

    Raises:
        DataError: no such file, no well-formed XML, a DTD or entity (never needed here,
            and a known way to exhaust memory), no label, or a name twice or missing.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_XML + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > LARGEST_XML:
        raise DataError(f"{path} is larger than {LARGEST_XML} bytes; no label file is")
    names: list[str] = []
    parser = expat.ParserCreate(namespace_separator=" ")

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag.rpartition(" ")[2] == "label":
            names.append(attributes.get("name", ""))
            if not names[-1]:
                stop("a <label> has no name; expected <label name=...>")

    def refuse(*_) -> None:
        stop("a DTD or entity is not allowed; remove the <!DOCTYPE ...>")

    def stop(problem: str) -> None:
        raise DataError(f"{path}, line {parser.CurrentLineNumber}: {problem}")

    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except DataError:
        raise
    # ValueError and LookupError: an encoding that expat or Python does not know.
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise DataError(
            f"{path} is no well-formed XML ({error}); fetch it again"
        ) from error
    if not names:
        raise DataError(f"{path} names no label; expected <label name=...> elements")
    if twice := _twice(names):
        raise DataError(f"{path} names the label {twice!r} twice; remove one")
    return names


def read_header(path: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """Attribute name -> its nominal values, () for a numeric one, in file order.

    Raises:
        DataError: as `read_rows`, as far as the header goes.
    """
    return _header(path, _lines(path))


def read_rows(
    path: str | os.PathLike,
    label_names: Sequence[str] | None = None,
    *,
    ignore_labels: bool = False,
    dense: bool | None = None,
) -> tuple[tuple[str, ...], Split]:
    """Reads one ARFF file, with sparse rows or dense.

    Args:
        path: of the file, latin-1.
        label_names: L attributes that are labels, selected by name; None for none.
        ignore_labels: do not look at the values of labels, which may then be "?".
        dense: read the features as numbers (True) or as a set (False); None: as the
            types in the header say.

    Returns:
        F feature names in header order, and N rows: float32 [N, F] or the ids of the
        features that are 1 (ascending), and labels uint8 [N, L] in the order of
        `label_names`.

    Raises:
        DataError: the file is missing, cut off, malformed or larger than allowed, a
            label is not in the header, a value is missing or no finite number, or a
            label's, a nominal feature's or a set's is neither 0 nor 1.
    """
    lines = _lines(path)
    header = _header(path, lines)
    label_names = list(label_names or [])
    if missing := [name for name in label_names if name not in header]:
        raise DataError(
            f"{path}: label {missing[0]!r} is not in the header ({len(missing)} labels "
            "missing); the ARFF and the XML file must be of the same data set"
        )
    names, labels = list(header), frozenset(label_names)
    if dense is None:
        dense = not all(v for name, v in header.items() if name not in labels)
    binary = labels if dense else header.keys()
    rows = _rows(path, lines, header, binary, labels if ignore_labels else ())
    features = [i for i, name in enumerate(names) if name not in labels]
    column = {name: i for i, name in enumerate(names)}
    columns = len(names), features, [column[name] for name in label_names]
    split = _numbers(path, rows, *columns) if dense else _sets(rows, *columns)
    return tuple(names[i] for i in features), split


def read_mulan(
    name: str,
    train_arff: str | os.PathLike,
    test_arff: str | os.PathLike,
    xml: str | os.PathLike,
) -> Dataset:
    """Reads a Mulan data set; labels in the order of the XML.

    The training file says what the features are.

    Raises:
        DataError: as `read_label_names` and `read_rows`, or the ARFF files differ in
            their features.
    """
    label_names = read_label_names(xml)
    features, train = read_rows(train_arff, label_names)
    dense = isinstance(train.inputs, Dense)
    test_features, test = read_rows(test_arff, label_names, dense=dense)
    _check_features(test_arff, test_features, features, os.fspath(train_arff))
    return Dataset(
        name=name,
        train=train,
        test=test,
        label_names=tuple(label_names),
        feature_names=features,
        label_texts=tuple(n.removeprefix("TAG_") for n in label_names),
    )


def read_inputs(
    path: str | os.PathLike,
    feature_names: Sequence[str],
    label_names: Sequence[str],
    *,
    dense: bool | None = None,
) -> Ragged | Dense:
    """Reads the features of an ARFF file to predict; labels may be there, unread.

    Args:
        path: of the file.
        feature_names: F names that the model was trained on.
        label_names: attributes that are no features; present or not, of any value.
        dense: as `read_rows`; what the model reads, whatever the types in this file.

    Returns:
        N rows of feature ids, or float32 [N, F].

    Raises:
        DataError: as `read_rows`, or other features than the model's.
    """
    header = read_header(path)
    found = [name for name in label_names if name in header]
    labels = frozenset(found)
    features = [name for name in header if name not in labels]
    _check_features(path, features, feature_names, "the model")
    return read_rows(path, found, ignore_labels=True, dense=dense)[1].inputs


def _check_features(path, found: Sequence[str], wanted: Sequence[str], whose: str):
    for i, (here, there) in enumerate(itertools.zip_longest(found, wanted)):
        if here != there:
            here, there = ("nothing" if n is None else repr(n) for n in (here, there))
            raise DataError(
                f"{path}: feature {i} is {here}, but {there} in {whose}; both need the "
                "same features in the same order"
            )


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Line numbers and lines, without comments and blank lines."""
    try:
        with open(path, encoding="latin-1") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_FILE:
                raise DataError(f"{path} is larger than {LARGEST_FILE} bytes; split it")
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{path}, line {number} is longer than {LONGEST_LINE} "
                        "characters; is this an ARFF file?"
                    )
                line = line.strip(_BLANK)
                if line and line[0] != "%":
                    yield number, line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _header(path, lines: Iterator[tuple[int, str]]) -> dict[str, tuple[str, ...]]:
    """Takes lines up to and including @data."""
    header: dict[str, tuple[str, ...]] = {}
    for number, text in lines:
        try:
            keyword = re.match("@?[a-z]*", text, re.IGNORECASE)[0].lower()
            if keyword == "@data":
                if not header:
                    raise ValueError("@data comes before any @attribute")
                return header
            if keyword == "@relation":
                continue
            match = _ATTRIBUTE.fullmatch(text)
            if not match:
                raise ValueError(
                    "expected `@attribute name {0,1}`, `@attribute name numeric` or "
                    f"@data, found {_short(text)}"
                )
            name = _unquoted(match[1])
            if name in header:
                raise ValueError(f"attribute {name!r} is in the header twice")
            header[name] = _nominal_values(name, match[2])
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    raise DataError(f"{path} has no @data line; the file is not complete or no ARFF")


def _nominal_values(name: str, declared: str) -> tuple[str, ...]:
    """("0", "1") or ("1", "0") of a nominal attribute, () of a numeric one."""
    declared = declared.partition("%")[0].strip(_BLANK)
    if declared.lower() in ("numeric", "real", "integer"):
        return ()
    if declared[:1] == "{" and declared[-1:] == "}":
        values = tuple(v.strip(_BLANK + "'\"") for v in declared[1:-1].split(","))
        if sorted(values) == ["0", "1"]:
            return values
    raise ValueError(
        f"attribute {name!r} has the type {_short(declared)}; only {{0,1}} and numeric "
        "are supported"
    )


def _unquoted(name: str) -> str:
    # Only quoted names have escapes: delicious has a bare TAG_m\'usica in both files.
    if name[0] in "'\"":
        return re.sub(r"""\\(['"\\%])""", r"\1", name[1:-1])
    return name


def _cells(text: str, size: int) -> tuple[Sequence[int], list[str]]:
    """Attribute numbers and values that stand in a row of `size` attributes.

    Raises:
        ValueError: the row is malformed.
    """
    text = text.partition("%")[0].rstrip(_BLANK)
    if text[0] != "{":
        cells = [cell.strip(_BLANK) for cell in text.split(",")]
        if len(cells) != size:
            raise ValueError(
                f"{len(cells)} values in a row, but {size} attributes in the header"
            )
        return range(size), cells
    if text[-1] != "}":
        raise ValueError(
            f"the row ends without '}}' ({_short(text[-20:])}); the file is cut off"
        )
    if not _SPARSE.fullmatch(text):
        raise ValueError(f"expected a row `{{index value, ...}}`, found {_short(text)}")
    tokens = text[1:-1].replace(",", " ").split()
    indices = list(map(int, tokens[::2]))
    if indices and max(indices) >= size:
        raise ValueError(
            f"index {max(indices)} is out of range; the header has {size} attributes, "
            f"0 to {size - 1}"
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"index {_twice(indices)} stands twice in the row")
    return indices, tokens[1::2]


def _rows(
    path, lines: Iterator[tuple[int, str]], header, binary, unread
) -> Iterator[dict[int, float]]:
    """Of each row, attribute number -> value where it is not 0.

    Args:
        path, lines: of the file, after its header.
        header: of the file.
        binary: names of attributes that have to be 0 or 1.
        unread: names of attributes whose values are not looked at, unless 0 or 1.
    """
    names, values = list(header), list(header.values())
    # What a sparse row leaves out is 0, or the first nominal value: mostly 0, too.
    implied = {i for i, v in enumerate(values) if v[:1] == ("1",)}
    number = 0
    for number, text in lines:
        try:
            indices, cells = _cells(text, len(names))
            row = {}
            for i, cell in zip(indices, cells, strict=True):
                if cell == "1":
                    row[i] = 1.0
                elif cell == "0" or names[i] in unread:
                    continue
                elif value := _number(cell, names[i], values[i]):
                    if value != 1 and names[i] in binary:
                        raise ValueError(
                            f"attribute {names[i]!r} is {_short(cell)}, not 0 or 1"
                        )
                    row[i] = value
            if implied and text[0] == "{":
                row |= dict.fromkeys(implied.difference(indices), 1.0)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        yield row
    if not number:
        raise DataError(f"{path} has no rows after @data; the file is not complete")


def _sets(rows: Iterator[dict[int, float]], size: int, features, labels) -> Split:
    """Rows of `size` attributes -> ids of the `features` (attribute numbers) that are
    1, and the `labels` (likewise)."""
    present, lengths = array.array("i"), array.array("q")
    for row in rows:
        present.extend(sorted(row))
        lengths.append(len(row))
    # Attribute number -> its place among the features, or among the labels.
    place, is_label = np.zeros(size, np.int64), np.zeros(size, bool)
    place[features], place[labels] = np.arange(len(features)), np.arange(len(labels))
    is_label[labels] = True
    attribute = np.array(present, np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    is_feature = ~is_label[attribute]
    counts = np.bincount(row[is_feature], minlength=len(lengths))
    inputs = Ragged(
        place[attribute[is_feature]].astype(np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )
    matrix = np.zeros((len(lengths), len(labels)), np.uint8)
    matrix[row[~is_feature], place[attribute[~is_feature]]] = 1
    return Split(inputs, matrix)


def _numbers(
    path, rows: Iterator[dict[int, float]], size: int, features, labels
) -> Split:
    """As `_sets`, with the features' values."""
    table = []
    for row in rows:
        if (len(table) + 1) * 4 * size > LARGEST_DENSE:
            raise DataError(
                f"{path}: more than {len(table)} rows of {size} numbers do not fit the "
                f"{LARGEST_DENSE} bytes allowed; split the file, or declare features "
                "that are 0 or 1 as {0,1}"
            )
        table.append(np.zeros(size, np.float32))
        table[-1][list(row)] = list(row.values())
    matrix = np.stack(table)
    inputs = Dense(np.ascontiguousarray(matrix[:, features]))
    return Split(inputs, matrix[:, labels].astype(np.uint8))


def _number(cell: str, name: str, values: tuple[str, ...]) -> float:
    """The value of an attribute; `values` are its nominal ones, () if it is numeric.

    Raises:
        ValueError: it is missing, or of another type.
    """
    cell = cell.strip("'\"")
    if cell == "?":
        wanted = "0 or 1" if values else "a number"
        raise ValueError(f"attribute {name!r} has no value ('?'); give it {wanted}")
    # A nominal value is a word: 1.0 is not 1.
    if values and cell not in values:
        raise ValueError(f"attribute {name!r} is {_short(cell)}, not 0 or 1")
    try:
        number = float(cell)
    except ValueError:
        raise ValueError(f"attribute {name!r} is no number: {_short(cell)}") from None
    # Not the other way round: nan is not larger, either.
    if not abs(number) <= _LARGEST_NUMBER:
        raise ValueError(f"attribute {name!r} is {_short(cell)}, not finite in float32")
    return number


def _twice(items: Sequence):
    """An item that is there more than once, or None."""
    ordered = sorted(items)
    return next((a for a, b in itertools.pairwise(ordered) if a == b), None)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
