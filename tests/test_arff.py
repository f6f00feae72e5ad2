"""ARFF and label XML: real files, every error, and a round trip of awkward files."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbmlc_jax.data import arff
from cbmlc_jax.data.dataset import DataError, Dense, Ragged

HEADER = """% comment
@RELATION 'a set'

@Attribute red {0,1}
@attribute 'deep blue' { 0, 1 }
@attribute TAG_b {0,1}  % also a comment
@attribute green NUMERIC
@attribute TAG_a {0,1}

@DATA
"""


def write(folder, text, name="x.arff"):
    path = folder / name
    path.write_bytes(text.encode("latin-1"))
    return path


def rows(ragged):
    return [r.tolist() for r in np.split(ragged.values, ragged.offsets[1:-1])]


def test_sparse_and_dense_rows_read_the_same(tmp_path):
    sparse = "{0 1, 4 1}\n% comment\n\n{}\n{3 1,2 1,\t1 1}\n{ 1 0 , 0 '1' } % end\n"
    dense = "1,0,0,0,1\n0,0,0,0,0\n0, 1 ,1,1.0,0\n'1',0,0,0.0,0"
    for text in (sparse, dense, sparse.replace("\n", "\r\n")):
        path = write(tmp_path, HEADER + text)
        names, split = arff.read_rows(path, ["TAG_a", "TAG_b"], dense=False)
        assert names == ("red", "deep blue", "green")
        assert rows(split.inputs) == [[0], [], [1, 2], [0]]
        # TAG_b stands first in the header, TAG_a first in the result.
        assert split.labels.tolist() == [[1, 0], [0, 0], [0, 1], [0, 0]]
    assert split.inputs.values.dtype == np.int32
    assert split.inputs.offsets.dtype == np.int64
    assert split.labels.dtype == np.uint8


def test_without_label_names_all_attributes_are_features(tmp_path):
    path = write(tmp_path, HEADER + "{0 1,4 1}\n")
    names, split = arff.read_rows(path, dense=False)
    assert names == ("red", "deep blue", "TAG_b", "green", "TAG_a")
    assert rows(split.inputs) == [[0, 4]]
    assert split.labels.shape == (1, 0)


def test_value_left_out_of_a_sparse_row_is_the_first_nominal_value(tmp_path):
    header = "@attribute a {1,0}\n@attribute b {0,1}\n@data\n"
    _, split = arff.read_rows(write(tmp_path, header + "{}\n{0 0}\n{1 1}\n0,1\n"))
    assert rows(split.inputs) == [[0], [], [0, 1], [1]]


def test_names_keep_quotes_escapes_and_latin_1(tmp_path):
    header = (
        "@attribute 'it\\'s' {0,1}\n"
        '@attribute "say \\"%\\"" {0,1}\n'
        "@attribute TAG_m\\'usica {0,1}\n"
        "@attribute TAG_dise\\~no {0,1}\n"
        "@attribute TAG_?? {0,1}\n"
        "@attribute caf\xe9{0,1}\n"
        "@attribute voil\xc3\xa0 {0,1}\n"
        "@data\n{6 1}\n"
    )
    path = write(tmp_path, header)
    assert list(arff.read_header(path)) == [
        "it's",
        'say "%"',
        "TAG_m\\'usica",
        "TAG_dise\\~no",
        "TAG_??",
        "caf\xe9",
        "voil\xc3\xa0",
    ]
    _, split = arff.read_rows(path, ["TAG_??", "voil\xc3\xa0"])
    assert split.labels.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{0 1,4 1", "ends without '}'"),
        ("{0 1 4 1}", "expected a row"),
        ("{0 1,,4 1}", "expected a row"),
        ("{0 1,}", "expected a row"),
        ("{0}", "expected a row"),
        ("{-1 1}", "expected a row"),
        ("{a 1}", "expected a row"),
        ("{9999999999 1}", "expected a row"),
        ("{0 1}, {5}", "expected a row"),
        ("{5 1}", "index 5 is out of range; the header has 5 attributes"),
        ("{1 1,0 1,1 0}", "index 1 stands twice"),
        ("{0 2}", "attribute 'red' is '2', not 0 or 1"),
        ("{4 x}", "attribute 'TAG_a' is 'x', not 0 or 1"),
        ("{3 many}", "'green' is no number: 'many'"),
        ("{3 ?}", r"'green' has no value \('\?'\); give it a number"),
        ("{3 nan}", "'green' is 'nan', not finite in float32"),
        ("0,0,0,-inf,0", "'green' is '-inf', not finite in float32"),
        ("{3 3.5e38}", "'green' is '3.5e38', not finite in float32"),
        ("{3 0.5, 0 0.5}", "'red' is '0.5', not 0 or 1"),
        ("{0 ?}", r"'red' has no value \('\?'\); give it 0 or 1"),
        ("1,0,0,0", "4 values in a row, but 5 attributes"),
        ("1,0,0,0,0,1", "6 values in a row, but 5 attributes"),
        ("1,0,,0,0", "'TAG_b' is '', not 0 or 1"),
        ("@attribute late {0,1}", "2 values in a row"),
    ],
)
def test_broken_row_names_file_and_line(tmp_path, row, message):
    path = write(tmp_path, HEADER + "{0 1}\n" + row + "\n")
    with pytest.raises(DataError, match=message) as caught:
        arff.read_rows(path, ["TAG_a", "TAG_b"])
    assert str(caught.value).startswith(f"{path}, line 12: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@attribute a string\n@data\n", "line 1: .*'a' has the type 'string'"),
        ("@attribute a {0,1,2}\n@data\n", r"line 1: .*type '\{0,1,2\}'"),
        ("@attribute a {yes,no}\n@data\n", r"line 1: .*type '\{yes,no\}'"),
        ("@attribute a\n@data\n", "line 1: .*type ''"),
        ("@attribute 'a {0,1}\n@data\n", "line 1: expected `@attribute"),
        ("@attribute\n@data\n", "line 1: expected `@attribute"),
        ("\xa0\n@data\n", "line 1: expected `@attribute"),
        ("hello\n", "line 1: expected .* found 'hello'"),
        ("@attribute a {0,1}\n\n@attribute 'a' {0,1}\n@data\n", "line 3: .*twice"),
        ("@data\n{}\n", "line 1: @data comes before any"),
        ("@attribute a {0,1}\n", "has no @data line"),
        ("", "has no @data line"),
        ("@attribute a {0,1}\n@data\n% nothing\n\n", "has no rows after @data"),
    ],
)
def test_broken_header_or_empty_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        arff.read_rows(path)
    assert str(path) in str(caught.value)


def test_numeric_features_make_rows_of_numbers(tmp_path):
    sparse = "{3 -2.5,1 1,4 1}\n{}\n{3 1,0 1}\n{2 1,3 .5e-3}\n"
    dense = "0,1,0,-2.5,1\n0,0,0,0,0\n1,0,0,1.0,0\n0,0,1,0.0005,0\n"
    for text in (sparse, dense):
        path = write(tmp_path, HEADER + text)
        names, split = arff.read_rows(path, ["TAG_a", "TAG_b"])
        assert names == ("red", "deep blue", "green")
        assert isinstance(split.inputs, Dense)
        assert split.inputs.values.dtype == np.float32
        assert split.inputs.values.flags.c_contiguous
        np.testing.assert_array_equal(
            split.inputs.values,
            np.float32([[0, 1, -2.5], [0, 0, 0], [1, 0, 1], [0, 0, 0.0005]]),
        )
        assert split.labels.tolist() == [[1, 0], [0, 0], [0, 0], [0, 1]]
        assert split.labels.dtype == np.uint8


def test_types_in_the_header_decide_unless_the_caller_does(tmp_path):
    # All values are 0 or 1 in both: they say nothing about the kind.
    nominal = "@attribute a {1,0}\n@attribute b {0,1}\n@attribute l NUMERIC\n@data\n"
    numeric = nominal.replace("b {0,1}", "b Integer")
    for header, kind in ((nominal, Ragged), (numeric, Dense)):
        path = write(tmp_path, header + "{1 1,2 1}\n0,0,0\n")
        assert isinstance(arff.read_rows(path, ["l"])[1].inputs, kind)
        as_set = arff.read_rows(path, ["l"], dense=False)[1]
        as_numbers = arff.read_rows(path, ["l"], dense=True)[1]
        assert rows(as_set.inputs) == [[0, 1], []]
        assert as_numbers.inputs.values.tolist() == [[1, 1], [0, 0]]
        assert as_set.labels.tolist() == as_numbers.labels.tolist() == [[1], [0]]
    for row, message in (
        ("0,0.5,0", "'b' is '0.5', not"),
        ("0,0,2", "'l' is '2', not"),
    ):
        path = write(tmp_path, numeric + row)
        with pytest.raises(DataError, match=f"line 5: attribute {message} 0 or 1"):
            arff.read_rows(path, ["l"], dense=message.startswith("'l'"))


def test_numbers_in_memory_are_bounded(tmp_path, monkeypatch):
    path = write(tmp_path, HEADER + "{3 .5}\n" * 3)
    monkeypatch.setattr(arff, "LARGEST_DENSE", 3 * 5 * 4)
    assert len(arff.read_rows(path)[1]) == 3
    monkeypatch.setattr(arff, "LARGEST_DENSE", 3 * 5 * 4 - 1)
    with pytest.raises(DataError, match=r"x\.arff: more than 2 rows of 5 numbers"):
        arff.read_rows(path)
    # Sets of few of many words are what takes little.
    path = write(tmp_path, HEADER.replace("NUMERIC", "{0,1}") + "{3 1}\n" * 3)
    assert len(arff.read_rows(path)[1]) == 3


def test_label_that_the_header_lacks(tmp_path):
    path = write(tmp_path, HEADER + "{}\n")
    with pytest.raises(DataError, match=r"x\.arff: label 'TAG_c' is not in the header"):
        arff.read_rows(path, ["TAG_a", "TAG_c"])


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.arff", tmp_path):
        with pytest.raises(DataError, match=f"cannot read {re.escape(str(path))}"):
            arff.read_rows(path)
        with pytest.raises(DataError, match=f"cannot read {re.escape(str(path))}"):
            arff.read_label_names(path)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = write(tmp_path, HEADER + "{0 1}\n{" + " " * 200 + "}\n")
    xml = write(tmp_path, '<labels><label name="a"/></labels>', "x.xml")
    assert len(arff.read_rows(path)[1]) == 2
    monkeypatch.setattr(arff, "LONGEST_LINE", 200)
    with pytest.raises(DataError, match="line 12 is longer than 200"):
        arff.read_rows(path)
    monkeypatch.setattr(arff, "LARGEST_FILE", 100)
    with pytest.raises(DataError, match="larger than 100 bytes"):
        arff.read_rows(path)
    monkeypatch.setattr(arff, "LARGEST_XML", 20)
    with pytest.raises(DataError, match="larger than 20 bytes"):
        arff.read_label_names(xml)


def test_label_names_keep_the_order_of_the_xml(tmp_path):
    xml = write(
        tmp_path,
        '<?xml version="1.0" encoding="iso-8859-1"?><!-- note -->\n'
        '<labels xmlns="http://mulan.sourceforge.net/labels">\n'
        '<label name="z"><label name="a &amp; b"/></label>\n'
        '<label name="caf\xe9"></label><label name="TAG_m\\\'usica"/></labels>',
        "x.xml",
    )
    assert arff.read_label_names(xml) == ["z", "a & b", "caf\xe9", "TAG_m\\'usica"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<labels><label name="a"/>', "no well-formed XML"),
        ("", "no well-formed XML"),
        ('<?xml version="1.0" encoding="none"?><labels/>', "no well-formed XML"),
        ("<labels></labels>", "names no label"),
        ("<labels>\n<label/></labels>", "line 2: a <label> has no name"),
        ('<labels><label name="a"/><label name="a"/></labels>', "'a' twice"),
        ('\n<!DOCTYPE labels><labels><label name="a"/></labels>', "line 2: a DTD"),
        (
            '<!DOCTYPE l [<!ENTITY a "b">]><l><label name="&a;"/></l>',
            "line 1: a DTD or entity is not allowed",
        ),
        (
            '<!DOCTYPE l SYSTEM "file:///etc/hostname"><l/>',
            "line 1: a DTD or entity is not allowed",
        ),
    ],
)
def test_broken_xml(tmp_path, text, message):
    path = write(tmp_path, text, "x.xml")
    with pytest.raises(DataError, match=message) as caught:
        arff.read_label_names(path)
    assert str(path) in str(caught.value)


def test_read_mulan_wants_the_same_features_in_both_files(tmp_path):
    xml = write(tmp_path, '<l><label name="TAG_a"/><label name="TAG_b"/></l>', "x.xml")
    train = write(tmp_path, HEADER + "{0 1,4 1}\n", "train.arff")
    dataset = arff.read_mulan("x", train, train, xml)
    assert dataset.label_names == ("TAG_a", "TAG_b")
    assert dataset.label_texts == ("a", "b")
    assert dataset.feature_names == ("red", "deep blue", "green")
    other = write(tmp_path, HEADER.replace("green", "pink") + "{}\n", "test.arff")
    with pytest.raises(
        DataError, match=r"test\.arff: feature 2 is 'pink', but 'green'"
    ):
        arff.read_mulan("x", train, other, xml)


def test_read_mulan_reads_both_files_as_the_training_file_says(tmp_path):
    xml = write(tmp_path, '<l><label name="TAG_a"/><label name="TAG_b"/></l>', "x.xml")
    nominal = HEADER.replace("NUMERIC", "{0,1}") + "{3 1}\n"
    paths = [write(tmp_path, HEADER + "{3 1}\n", "a"), write(tmp_path, nominal, "b")]
    for train, test, kind in ((*paths, Dense), (*paths[::-1], Ragged)):
        dataset = arff.read_mulan("x", train, test, xml)
        assert isinstance(dataset.train.inputs, kind)
        assert isinstance(dataset.test.inputs, kind)


def test_read_inputs_needs_no_labels_and_ignores_their_values(tmp_path):
    features, labels = ("red", "deep blue", "green"), ("TAG_a", "TAG_b")
    with_labels = write(tmp_path, HEADER + "1,0,?,1,?\n{1 1,4 ?,2 maybe}\n")
    header = "\n".join(line for line in HEADER.splitlines() if "TAG" not in line)
    without = write(tmp_path, header + "\n1,0,1\n{1 1}\n", "without.arff")
    for path in (with_labels, without):
        found = arff.read_inputs(path, features, labels, dense=False)
        assert rows(found) == [[0, 2], [1]]
        found = arff.read_inputs(path, features, labels)
        assert isinstance(found, Dense)
        assert found.values.tolist() == [[1, 0, 1], [0, 1, 0]]
    unknown = write(tmp_path, header + "\n1,?,1\n", "unknown.arff")
    with pytest.raises(DataError, match="line 9: attribute 'deep blue' has no value"):
        arff.read_inputs(unknown, features, labels)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (("red", "green", "deep blue"), "feature 1 is 'deep blue', but 'green' in the"),
        (("red", "deep blue"), "feature 2 is 'green', but nothing in the model"),
        (("red", "deep blue", "green", "x"), "feature 3 is nothing, but 'x' in the"),
    ],
)
def test_read_inputs_says_which_feature_differs(tmp_path, features, message):
    path = write(tmp_path, HEADER + "{}\n")
    with pytest.raises(DataError, match=message):
        arff.read_inputs(path, features, ("TAG_a", "TAG_b"))


# A line break cannot stand in a name, and UTF-16 surrogates not in latin-1.
NAME = st.text(
    st.characters(max_codepoint=255, exclude_categories=["Cc"]), min_size=1, max_size=8
)


@st.composite
def tables(draw):
    names = draw(st.lists(NAME, min_size=1, max_size=6, unique=True))
    cells = st.lists(st.booleans(), min_size=len(names), max_size=len(names))
    table = np.array(draw(st.lists(cells, min_size=1, max_size=5)), bool)
    labels = draw(st.permutations(names))[: draw(st.integers(0, len(names)))]
    return names, table, labels


def quoted(name, quote):
    escaped = re.sub(r"([\\'\"%])", r"\\\1", name)
    return f"{quote}{escaped}{quote}"


@given(tables(), st.data())
def test_round_trip(tmp_path_factory, table, data):
    names, cells, labels = table
    dense, numeric = data.draw(st.sampled_from([None, True, False])), []
    lines = ["@relation r"]
    for name in names:
        kind = data.draw(st.sampled_from(["{0,1}", "{1, 0}", "numeric", "REAL"]))
        numeric += [name] if "{" not in kind and name not in labels else []
        quote = data.draw(st.sampled_from("'\""))
        lines.append(f"@attribute {quoted(name, quote)} {kind}")
    inverted = ["{1" in line[-7:] for line in lines[1:]]
    lines.append("@data")
    for row in cells:
        if data.draw(st.booleans()):
            lines.append(",".join("01"[int(cell)] for cell in row))
        else:
            # The first nominal value may be left out; the order is free.
            said = [i for i, cell in enumerate(row) if cell != inverted[i]]
            said += [i for i in range(len(row)) if i not in said and i % 2]
            order = data.draw(st.permutations(said))
            lines.append("{" + ",".join(f"{i} {int(row[i])}" for i in order) + "}")
    path = write(tmp_path_factory.mktemp("arff"), "\n".join(lines))
    found, split = arff.read_rows(path, labels, dense=dense)
    features = [i for i, name in enumerate(names) if name not in labels]
    assert list(found) == [names[i] for i in features]
    assert isinstance(split.inputs, Dense) == (
        bool(numeric) if dense is None else dense
    )
    matrix = split.inputs.matrix(len(features))
    matrix = matrix if isinstance(split.inputs, Dense) else matrix.toarray()
    assert matrix.tolist() == cells[:, features].tolist()
    columns = [names.index(name) for name in labels]
    assert split.labels.tolist() == cells[:, columns].astype(int).tolist()


@pytest.mark.parametrize(
    ("name", "train", "test", "features", "labels"),
    [("bibtex", 4880, 2515, 1836, 159), ("delicious", 12920, 3185, 500, 983)],
)
def test_real_files(data_dir, name, train, test, features, labels):
    folder = data_dir / "mulan" / name
    start = time.perf_counter()
    dataset = arff.read_mulan(
        name,
        folder / f"{name}-train.arff",
        folder / f"{name}-test.arff",
        folder / f"{name}.xml",
    )
    assert time.perf_counter() - start < 5  # about 0.3 on one core
    assert (len(dataset.train), len(dataset.test)) == (train, test)
    assert len(dataset.feature_names) == features
    assert len(dataset.label_names) == len(set(dataset.label_texts)) == labels
    # All attributes after the features are labels: count without the parser.
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        text = (folder / f"{name}-{part}.arff").read_text("latin-1")
        ids = np.array(re.findall(r"[{,](\d+) 1\b", text.partition("@data")[2]), int)
        assert len(split.inputs.values) == (ids < features).sum()
        assert split.labels.sum() == (ids >= features).sum()
        np.testing.assert_array_equal(
            split.labels.sum(0),
            np.bincount(ids, minlength=features + labels)[features:],
        )


def test_real_first_rows(data_dir):
    folder = data_dir / "mulan" / "delicious"
    labels = arff.read_label_names(folder / "delicious.xml")
    assert {"TAG_dise\\~no", "TAG_m\\'usica", "TAG_??"} <= set(labels)
    names, split = arff.read_rows(folder / "delicious-train.arff", labels)
    # {60 1,248 1,279 1,316 1,490 1,577 1,591 1,815 1,1044 1,1075 1,1121 1,1218 1,
    # 1318 1,1319 1,1334 1,1408 1}, and 500 features come first.
    assert rows(split.inputs)[0] == [60, 248, 279, 316, 490]
    assert np.flatnonzero(split.labels[0]).tolist() == [
        i - 500 for i in (577, 591, 815, 1044, 1075, 1121, 1218, 1318, 1319, 1334, 1408)
    ]
    assert names[0] == "_qacct"
    assert (split.labels.sum(1) == 0).sum() == 10


def test_real_numbers(data_dir):
    folder = data_dir / "mulan" / "emotions"
    paths = [folder / f"emotions{e}" for e in ("-train.arff", "-test.arff", ".xml")]
    dataset = arff.read_mulan("emotions", *paths)
    assert dataset.feature_names[0] == "Mean_Acc1298_Mean_Mem40_Centroid"
    # Songs per mood of both files, as in the table of Trohidis et al. 2008.
    assert (dataset.train.labels.sum(0) + dataset.test.labels.sum(0)).tolist() == [
        *(173, 166, 264),
        *(148, 168, 189),
    ]
    for path, split in zip(paths, (dataset.train, dataset.test), strict=False):
        # numpy's reader of text takes the 72 features and 6 labels, too.
        text = path.read_text("latin-1").partition("@data")[2]
        table = np.loadtxt(text.splitlines(), delimiter=",")
        assert table.shape == (len(split), 78)
        np.testing.assert_array_equal(
            split.inputs.values, table[:, :72].astype(np.float32)
        )
        np.testing.assert_array_equal(split.labels, table[:, 72:])
    found = arff.read_inputs(paths[1], dataset.feature_names, dataset.label_names)
    np.testing.assert_array_equal(found.values, dataset.test.inputs.values)
