"""A user's own data that is wrong: one sentence with file, line and what to do."""

from __future__ import annotations

import tracemalloc
import zipfile

import numpy as np
import pytest
import running
import scipy.sparse

from cbmlc_jax import config as config_lib
from cbmlc_jax.data import arff, labelling, npz, pipeline, tables
from cbmlc_jax.data.dataset import DataError

TEXT = {"text_column": "text", "label_column": "tags"}
CELLS = {"feature_columns": "x,y", "label_columns": "a,b"}
GOOD = b"text,tags\nsome words,a\nsome words,b\nsome words,a\n"


def load(path, /, **changes):
    config = config_lib.base()
    config.data.name, config.data.path = "own", str(path)
    config.update_from_flattened_dict({f"data.{k}": v for k, v in changes.items()})
    config_lib.validate(config)
    return pipeline.load(config.data)


def problem(path, **changes) -> str:
    """The sentence, which names the file."""
    with pytest.raises(DataError) as caught:
        load(path, **changes)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no rows"),
        (b"text,tags\n", "has no rows"),
        (b"text,tags\nna\xefve,a\n", "line 2: byte 0xef is not UTF-8: save the"),
        (b"text,tags\nx,a\nx,a,b\n", "line 3: 3 cells, but 2 columns"),
        (b'text,tags\nx,a\n"x,a\nx,b\n', "line 3: unexpected end of data: close the"),
        (b"text,text,tags\nx,y,a\n", "line 1: the column 'text' is there twice"),
        (b"text,tag\nx,a\n", "has no column 'tags' (config.data.label_column): its"),
        (b"text,tags\nx,a\nx,a\n", "all 2 training rows"),
        (b'text,tags\nx,\nx," , "\n', "has no label in any row"),
        (b"text,tags\nx,a\ny,b\nz,a\n", "0 test rows of 3 rows: set config.data.test"),
        (b"text,tags\n" + b"x,a\nx,b\n" * 5, "no word is in 2 training texts"),
    ],
)
def test_tables_of_text(content, said, tmp_path):
    path = tmp_path / "in.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path, **TEXT)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("nan,1,0,1", "line 3: the column 'x' is 'nan', not a finite number"),
        ("1,-inf,0,1", "line 3: the column 'y' is '-inf', not a finite"),
        ("1e39,1,0,1", "line 3: the column 'x' is '1e39', not a finite"),
        (",1,0,1", "line 3: the column 'x' is no number (empty): fill it in"),
        ("red,1,0,1", "line 3: the column 'x' is no number ('red')"),
        ("1,1,2,1", "line 3: 'a' is '2', but a label must be 0 or 1"),
        ("1,1,,1", "line 3: 'a' is '', but a label must be 0 or 1"),
    ],
)
def test_tables_of_numbers(row, said, tmp_path):
    path = tmp_path / "in.csv"
    path.write_text(f"x,y,a,b\n1,2,0,1\n{row}\n")
    assert said in problem(path, **CELLS)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[1]", "line 2: expected a JSON object"),
        ("{", "line 2: no JSON"),
        ("[" * 200_000, "line 2: no JSON"),
        ('{"text": "x"}', "line 2: the column 'tags' is missing; the line has 'text'"),
        ('{"text": 5, "tags": []}', "line 2: the column 'text' must be a string"),
        ('{"text": "x", "tags": [["a"]]}', "line 2: 'tags' must be a list of labels"),
        ('{"text": "x", "tags": {}}', "line 2: 'tags' must be a list of labels"),
    ],
)
def test_json_lines(row, said, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "x", "tags": "a"}\n' + row + "\n")
    assert said in problem(path, **TEXT)
    path.write_text('{"v": [1, 2], "tags": "a"}\n{"v": [1, NaN], "tags": "b"}\n')
    said = problem(path, feature_columns="v", label_column="tags")
    assert "line 2: 'v'[1] is nan, not a finite number" in said
    path.write_text('{"v": [1, 2], "tags": "a"}\n{"v": [1], "tags": "b"}\n')
    said = problem(path, feature_columns="v", label_column="tags")
    assert "line 2: 1 numbers, but 2 in the first row" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows"),
        ("0 1:1\n1 1:x\n", "line 2: could not convert string to float"),
        ("0 1:1\n1 1:nan\n", "line 2: feature 1 is nan, not a finite number"),
        ("0 1:1\n1 1:1e39\n", "line 2: feature 1 is inf, not a finite number"),
        ("0 2:1\n1 2:1 1:1\n", "line 2: Feature indices in SVMlight"),
        ("0 1:1\n1 1\n", "line 2: "),
        ("0 1:1\n1 -1:1\n", "line 2: Invalid index -1"),
        ("0 1:1\n-1 1:1\n", "line 2: the labels '-1' are not numbers from 0 on"),
        ("0 1:1\n0,x 1:1\n", "line 2: the labels '0,x' are not numbers"),
        ("0 1:1\n1 99999999:1\n", "99999999 features, but 1 to 16777216 are possible"),
        ("0 1:1\n1 99999999999999:1\n", "line 2: "),
        ("3 4 2\n0 1:1\n1 2:1\n", "has 2 rows, but 3 by its first line"),
        ("2 4 2\n0 1:1\n1 4:1\n", "line 3: feature 4 is out of range, 0 to 3"),
        ("2 4 2\n0 1:1\n5 3:1\n", "its first line says 2 labels"),
        ("2 999999999 2\n0 1:1\n5 3:1\n", "has 999999999 features, but 1 to"),
        ("2 4 999999999\n0 1:1\n5 3:1\n", "2 rows x 999999999 labels are more than"),
    ],
)
def test_svmlight(content, said, tmp_path):
    path = tmp_path / "in.svm"
    path.write_text(content)
    assert said in problem(path)


def test_a_second_file_has_to_be_of_the_first(tmp_path):
    train, test = tmp_path / "train.svm", tmp_path / "test.svm"
    train.write_text("0 1:1\n1 2:1\n")
    test.write_text("0 1:1\n1 3:1\n")
    said = r"test\.svm, line 2: feature 3 is out of range, 1 to 2"
    with pytest.raises(DataError, match=said):
        load(train, test_path=str(test))
    test.write_text("0 1:1\n4 2:1\n")
    said = r"test\.svm, line 2: the label '4' is none of the 2 labels"
    with pytest.raises(DataError, match=said):
        load(train, test_path=str(test))
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_bytes(GOOD)
    test.write_bytes(b"text,tags\nwords,a\nwords,c\n")
    said = r"test\.csv, line 3: the label 'c' is none of the 2 labels"
    with pytest.raises(DataError, match=said):
        load(train, test_path=str(test), **TEXT)
    names = tmp_path / "names.tsv"
    names.write_text("a\nb\nc\n")
    data = load(train, test_path=str(test), label_file=str(names), **TEXT)
    assert data.train.labels.sum(0).tolist() == [2, 1, 0]  # c: nothing to learn from
    assert data.test.labels.sum(0).tolist() == [1, 0, 1]
    for content, said in (
        ("a\tone\nb\na\n", r"names\.tsv, line 3: the label 'a' is there twice"),
        ("\n", r"names\.tsv names no label"),
        ("b\n", r"train\.csv, line 2: the label 'a' is none of the 1 labels"),
    ):
        names.write_text(content)
        with pytest.raises(DataError, match=said):
            load(train, label_file=str(names), **TEXT)


class Mine:
    """Something that only a pickle can hold."""


def test_npz(tmp_path):
    path = tmp_path / "in.npz"
    rows, on = np.ones((4, 2)), np.eye(4, 3, dtype=np.uint8)

    def said(**arrays) -> str:
        np.savez(path, **arrays)
        return problem(path)

    assert "has no array `labels`" in said(features=rows)
    assert "has no matrix of features" in said(labels=on)
    assert "must be a matrix of 4 rows" in said(features=rows, labels=on[:3])
    odd = np.where(np.arange(12).reshape(4, 3) == 8, 7, on)
    assert "row 2 (from 0): label 2 is 7" in said(features=rows, labels=odd)
    assert "holds Python objects" in said(features=np.array([Mine()]), labels=on)
    assert "are <U1, not numbers" in said(features=rows.astype("U1"), labels=on)
    rows[3, 1] = np.nan
    assert "row 3 (from 0): a feature is nan" in said(features=rows, labels=on)
    names = np.array(["a", "b", "a"])
    rows[3, 1] = 0
    twice = said(features=rows, labels=on, label_names=names)
    assert "label_names has 3 names, 2 of them different" in twice
    path.write_bytes(b"no zip")
    assert "cannot be read as npz" in problem(path)
    matrix = scipy.sparse.csc_array(rows)
    matrix.indices[-1] = 1 << 20  # outside of the matrix
    scipy.sparse.save_npz(path, matrix)
    assert "cannot be read as npz" in problem(path)


def test_an_array_that_claims_more_than_it_has_is_not_allocated(tmp_path):
    path = tmp_path / "in.npz"
    np.savez(path, features=np.ones((4, 2)), labels=np.eye(4, 3, dtype=np.uint8))
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    # The header is padded with blanks.
    claim = (b"(4, 2), }            ", b"(4, 2000000000000), }")
    members["features.npy"] = members["features.npy"].replace(*claim)
    assert claim[1] in members["features.npy"]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    assert "features.npy claims more than it has" in problem(path)


def test_a_line_without_an_end_is_not_read_whole(tmp_path, monkeypatch):
    """A sparse file of 2 GiB, of which no more than the longest line is held."""
    monkeypatch.setattr(tables, "LONGEST_LINE", 1 << 20)
    for name, chosen in (("in.csv", TEXT), ("in.jsonl", TEXT), ("in.svm", {})):
        path = tmp_path / name
        with open(path, "wb") as file:
            file.truncate(1 << 31)
        tracemalloc.start()
        assert "line 1 is longer than 1048576 bytes" in problem(path, **chosen)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "in.csv"
    path.write_text("x,y,a,b\n1,2,0,1\n1,2,1,1\n")
    monkeypatch.setattr(arff, "LARGEST_DENSE", 8)
    assert "line 3: more numbers than fit 8 bytes" in problem(path, **CELLS)
    monkeypatch.undo()
    monkeypatch.setattr(labelling, "LARGEST_LABELS", 3)
    assert "2 rows x 2 labels are more than the 3 entries" in problem(path, **CELLS)
    monkeypatch.undo()
    wide = tmp_path / "in.npz"
    np.savez(wide, features=np.ones((4, 2)), labels=np.eye(4, 3, dtype=np.uint8))
    monkeypatch.setattr(npz, "LARGEST_FILE", 100)
    assert "unpacks to more than 100 bytes" in problem(wide)


def test_what_is_not_said_is_asked_for(tmp_path):
    path = tmp_path / "in.csv"
    path.write_bytes(GOOD)
    assert "label_column to the column of lists" in problem(path, text_column="text")
    assert "no column 'z' (config.data.label_columns)" in problem(
        path, text_column="text", label_columns="z"
    )
    assert "line 2: the column 'text' is no number" in problem(
        path, label_column="tags"
    )
    assert "'text' is a feature and a label" in problem(
        path, text_column="text", label_column="text"
    )
    assert "none of train, " in problem(path, **TEXT, split_column="tags")
    odd = tmp_path / "in.data"
    odd.write_bytes(GOOD)
    assert "does not say its format: set config.data.format" in problem(odd, **TEXT)
    assert "0 test rows of 3 rows: set" in problem(odd, **TEXT, format="csv")
    with pytest.raises(DataError, match=r"there is no file .*gone\.csv"):
        load(tmp_path / "gone.csv", **TEXT)
    for changes, said in (
        ({"path": ""}, "config.data.path is not set"),
        ({"text_column": "a", "image_column": "b"}, "are both set: unset one"),
        ({"label_column": "a", "label_columns": "b"}, "are both set: unset one"),
        ({"separator": ""}, "separator is empty"),
        ({"format": "xlsx"}, "data.format='xlsx' is not one of"),
    ):
        with pytest.raises(config_lib.ConfigError, match=said):
            load(path, **changes)


def test_rows_and_encoder_have_to_go_together():
    config = running.tiny_config(
        **{"model.encoder.name": "auto", "data.name": "own", "data.path": "rows.csv"}
    )
    assert config_lib.settled(config, "set").model.encoder.name == "set"
    assert config_lib.settled(config, "sequence").model.encoder.name == "sequence"
    assert config_lib.settled(config, "numbers").model.encoder.name == "dense"
    assert config.model.encoder.name == "auto"
    with pytest.raises(config_lib.ConfigError, match="choose one of resnet18"):
        config_lib.settled(config, "images")
    config.model.encoder.name = "set"
    assert config_lib.settled(config, "weighted") is config
    with pytest.raises(config_lib.ConfigError, match="does not read rows that are num"):
        config_lib.settled(config, "numbers")


def test_the_command_line_says_one_sentence_and_writes_nothing(tmp_path):
    path, out = tmp_path / "in.csv", tmp_path / "audit.json"
    path.write_bytes(b"text,tags\nna\xefve,a\n")
    flags = [f"--config.data.{k}={v}" for k, v in TEXT.items()]
    done = running.main(
        "--config=configs/own.py",
        f"--config.data.path={path}",
        *flags,
        "--mode=data",
        f"--output={out}",
    )
    running.assert_one_sentence(done, "in.csv, line 2", "UTF-8")
    assert sorted(tmp_path.iterdir()) == [path]
