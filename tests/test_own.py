"""A user's own data: every format, the splits, and prediction."""

from __future__ import annotations

import csv
import json
import pathlib

import numpy as np
import pytest
import running
import scipy.sparse

from cbmlc_jax import config as config_lib
from cbmlc_jax import files, fit, predict
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import (
    pipeline,
    reuters,
)
from cbmlc_jax.data.dataset import UNKNOWN, DataError

ROWS = 40
NAMES = ("late", "broken", "wrong")
WORDS = ("parcel came late", "screen broken glass", "wrong colour sent")


def labels() -> np.ndarray:
    """[40, 3]: rows 0-7 have none, the others each mixture several times."""
    return (np.arange(ROWS)[:, None] // 8 >> np.arange(3) & 1).astype(np.uint8)


def texts() -> list[str]:
    """What the labels say, and a word that stands in one row alone."""
    return [
        " ".join(w for w, on in zip(WORDS, row, strict=True) if on)
        + f" item {chr(97 + i // 26) * 3}{chr(97 + i % 26) * 3}"
        for i, row in enumerate(labels())
    ]


def numbers() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, 4)).round(3).astype(np.float32)


def sides() -> list[str]:
    """4 rows of validation, 8 of test, 28 of training."""
    wheel = ["train"] * 10
    wheel[4] = wheel[9] = "Test"
    wheel[8] = "dev"
    return wheel * 4


def sparse() -> np.ndarray:
    """No row of zeros alone: without labels, it would be a blank line."""
    return np.where(np.abs(numbers()) > 0.3, numbers(), 0)


def listed(separator: str = ",") -> list[str]:
    return [separator.join(np.array(NAMES)[row != 0]) for row in labels()]


def write_csv(
    path: pathlib.Path, table: dict[str, list], delimiter=","
) -> pathlib.Path:
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return path


def write_jsonl(path: pathlib.Path, table: dict[str, list]) -> pathlib.Path:
    rows = (
        dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def svm_line(row: np.ndarray, on: np.ndarray, first: int = 0) -> str:
    ids = ",".join(map(str, np.flatnonzero(on)))
    pairs = " ".join(f"{i + first}:{v:g}" for i, v in enumerate(row) if v)
    return f"{ids} {pairs}\n"


def write_svm(
    path: pathlib.Path, rows, first: int = 0, header: str = ""
) -> pathlib.Path:
    lines = (svm_line(r, on, first) for r, on in zip(rows, labels(), strict=False))
    path.write_text(header + "".join(lines))
    return path


def settings(path, **changes):
    """config.data of these files."""
    config = config_lib.base()
    config.data.name = "own"
    config.data.path = str(path)
    for key, value in changes.items():
        config.data[key] = str(value) if isinstance(value, pathlib.Path) else value
    config_lib.validate(config)
    return config.data


def load(path, **changes):
    return pipeline.load(settings(path, **changes))


def text_table(**more) -> dict[str, list]:
    return {"text": texts(), "tags": listed(), "part": sides(), **more}


TEXT = {"text_column": "text", "label_column": "tags"}


def test_tables_of_text_are_the_same_in_every_form(tmp_path):
    table = text_table()
    as_lists = table | {"tags": [t.split(",") if t else [] for t in table["tags"]]}
    found = [
        load(path, **TEXT, split_column="part")
        for path in (
            write_csv(tmp_path / "a.csv", table),
            write_csv(tmp_path / "a.tsv", table, "\t"),
            write_jsonl(tmp_path / "a.jsonl", table),
            write_jsonl(tmp_path / "b.ndjson", as_lists),
        )
    ]
    assert len({data.fingerprint for data in found}) == 1
    data = found[0]
    assert data.kind == "sequence" and data.label_names == tuple(sorted(NAMES))
    side = np.array(sides())
    order = np.argsort(NAMES)
    np.testing.assert_array_equal(data.train.labels, labels()[side != "Test"][:, order])
    np.testing.assert_array_equal(data.test.labels, labels()[side == "Test"][:, order])
    np.testing.assert_array_equal(
        data.validation, np.flatnonzero(side[side != "Test"] == "dev")
    )
    # The words of two training rows, neither validation nor test, and no others.
    learnt = [t for t, s in zip(texts(), sides(), strict=True) if s == "train"]
    words = [set(reuters.tokens(text)) for text in learnt]
    known = sorted(w for w in set().union(*words) if sum(w in x for x in words) > 1)
    assert data.feature_names == (UNKNOWN, *known) and "late" in known
    expected = reuters.encode(
        [reuters.tokens(t) for t, s in zip(texts(), side, strict=True) if s == "Test"],
        data.feature_names,
    )
    np.testing.assert_array_equal(data.test.inputs.values, expected.values)
    np.testing.assert_array_equal(data.test.inputs.offsets, expected.offsets)


def test_words_of_validation_and_test_rows_alone_are_unknown(tmp_path):
    table = text_table()
    for i, side in enumerate(sides()):
        if side != "train":
            table["text"][i] += " secret"
    data = load(write_csv(tmp_path / "a.csv", table), **TEXT, split_column="part")
    assert "secret" not in data.feature_names
    table["part"] = ["train"] * 30 + ["test"] * 10
    data = load(write_csv(tmp_path / "a.csv", table), **TEXT, split_column="part")
    assert "secret" in data.feature_names


def number_table() -> dict[str, list]:
    table = {f"x{i}": column.tolist() for i, column in enumerate(numbers().T)}
    return (
        {"id": list(range(ROWS))}
        | table
        | dict(zip(NAMES, labels().T.tolist(), strict=True))
    )


def test_columns_of_numbers_and_of_labels(tmp_path):
    path = write_csv(tmp_path / "a.csv", number_table())
    chosen = {"feature_columns": "x*", "label_columns": ",".join(NAMES)}
    data = load(path, **chosen, test_path=path)
    assert data.kind == "numbers" and data.feature_names == ("x0", "x1", "x2", "x3")
    assert data.label_names == NAMES and data.test_from == "given"
    np.testing.assert_array_equal(data.train.inputs.values, numbers())
    np.testing.assert_array_equal(data.train.labels, labels())
    everything = load(path, label_columns="late,broken,wrong", test_path=path)
    assert everything.feature_names[0] == "id"
    vectors = write_jsonl(
        tmp_path / "a.jsonl", {"v": numbers().tolist(), "tags": listed()}
    )
    data = load(vectors, feature_columns="v", label_column="tags", test_path=vectors)
    np.testing.assert_array_equal(data.train.inputs.values, numbers())
    assert data.feature_names == ("v[0]", "v[1]", "v[2]", "v[3]")


def test_svmlight_counts_features_as_the_file_does(tmp_path):
    rows = sparse()
    zero = write_svm(tmp_path / "zero.svm", rows)
    one = write_svm(tmp_path / "one.svm", rows, first=1)
    header = write_svm(tmp_path / "xc.txt", rows, header=f"{ROWS} 6 5\n")
    for path, names in (
        (zero, ("0", "1", "2", "3")),
        (one, ("1", "2", "3", "4")),
        (header, ("0", "1", "2", "3", "4", "5")),
    ):
        data = load(path, test_path=path)
        assert data.kind == "weighted" and data.feature_names == names
        matrix = data.train.inputs.matrix(len(names)).toarray()
        np.testing.assert_array_equal(matrix[:, :4], rows)
        np.testing.assert_array_equal(data.train.labels[:, :3], labels())
        assert data.train.inputs.values.dtype == np.int32
    assert data.label_names == ("0", "1", "2", "3", "4")  # by the header
    few = tmp_path / "few.svm"
    few.write_text("7,3 1:1\n\n# nothing\n3 2:1 # a comment\n 4:.5\n3 1:1\n")
    data = load(few, test_path=few)
    assert data.label_names == ("3", "7") and data.feature_names == tuple("1234")
    assert data.train.labels.tolist() == [[1, 1], [1, 0], [0, 0], [1, 0]]
    phrases = tmp_path / "names.tsv"
    phrases.write_text("late\tdelivery delay\nbroken\nwrong\twrong item\n")
    named = load(zero, test_path=zero, label_file=phrases)
    assert named.label_names == NAMES
    assert named.label_texts == ("delivery delay", "broken", "wrong item")


def test_npz_and_arff_hold_the_same(tmp_path):
    features, targets = tmp_path / "x.npz", tmp_path / "y.npz"
    scipy.sparse.save_npz(features, scipy.sparse.csc_array(sparse()))
    scipy.sparse.save_npz(targets, scipy.sparse.coo_array(labels()))
    both = f"{features},{targets}"
    data = load(both, test_path=both)
    assert data.kind == "weighted" and data.label_names == ("0", "1", "2")
    matrix = data.train.inputs.matrix(4).toarray()
    np.testing.assert_array_equal(matrix, sparse())
    np.testing.assert_array_equal(data.train.labels, labels())
    dense = tmp_path / "dense.npz"
    np.savez(dense, features=numbers(), labels=labels(), label_names=np.array(NAMES))
    data = load(dense, test_path=dense)
    assert data.kind == "numbers" and data.label_names == NAMES
    np.testing.assert_array_equal(data.train.inputs.values, numbers())
    header = [f"@attribute x{i} numeric\n" for i in range(4)]
    header += [f"@attribute {name} {{0,1}}\n" for name in NAMES]
    body = np.concatenate([numbers(), labels()], 1)
    path = tmp_path / "a.arff"
    rows = "".join(",".join(f"{v:g}" for v in row) + "\n" for row in body)
    path.write_text("".join(header) + "@data\n" + rows)
    xml = tmp_path / "a.xml"
    names = "".join(f'<label name="{name}"/>' for name in NAMES)
    xml.write_text(f"<labels>{names}</labels>")
    for how in ({"label_file": xml}, {"label_columns": "late,broken,wrong"}):
        data = load(path, test_path=path, **how)
        np.testing.assert_array_equal(data.train.inputs.values, numbers())
        np.testing.assert_array_equal(data.train.labels, labels())


def test_images_lie_beside_their_table(tmp_path, pictures):
    table = {
        "file": [pathlib.Path(p).name for p in pictures.paths],
        "tags": ["cat", "dog", "cat,dog", "", "cat", "dog", ""],
    }
    path = write_jsonl(tmp_path / "images.jsonl", table)
    chosen = {"image_column": "file", "label_column": "tags"}
    data = load(path, **chosen, test_path=path, side=32)
    assert data.kind == "images" and data.train.inputs.paths == pictures.paths
    rows = np.arange(3)
    np.testing.assert_array_equal(
        data.train.inputs.batch(rows, 1)["images"], pictures.batch(rows, 1)["images"]
    )
    table["file"][2] = "gone.png"
    write_jsonl(path, table)
    with pytest.raises(DataError, match=r"images\.jsonl, line 3: there is no image"):
        load(path, **chosen)


def test_a_drawn_test_part_is_stratified_and_belongs_to_its_seed(tmp_path):
    rng = np.random.default_rng(0)
    on = rng.random((400, 5)) < np.array([0.02, 0.05, 0.1, 0.3, 0.5])
    path = tmp_path / "a.npz"
    ids = np.arange(400, dtype=np.float32)[:, None]
    np.savez(path, features=ids, labels=on.astype(np.uint8))
    data, again = load(path), load(path)
    other = load(path, split_seed=1)
    assert len(data.test) == 80 and len(data.train) == 320
    assert data.test_from == "drawn (stratified, fraction 0.2, seed 0)"
    rows = data.test.inputs.values[:, 0]
    np.testing.assert_array_equal(rows, again.test.inputs.values[:, 0])
    assert set(rows) != set(other.test.inputs.values[:, 0])
    assert not set(rows) & set(data.train.inputs.values[:, 0])
    np.testing.assert_allclose(data.test.labels.sum(0), on.sum(0) * 0.2, atol=1.5)
    np.testing.assert_array_equal(data.test.labels, on[rows.astype(int)])
    assert len(load(path, test_fraction=0.5).test) == 200


def test_validation_rows_that_are_given_are_used(tmp_path):
    config = running.tiny_config(
        **{
            "data.name": "own",
            "data.path": str(write_csv(tmp_path / "a.csv", text_table())),
        },
        **{f"data.{k}": v for k, v in TEXT.items()},
        **{"data.split_column": "part", "model.encoder.name": "auto"},
        **{"model.name": "logistic_regression", "noise.kind": "none"},
    )
    row = fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    assert row["rows"] == {"train": 28, "validation": 4, "test": 8}
    assert row["split"] == {"test": "given", "validation": "given"}
    assert row["config"]["model.encoder.name"] == "sequence"
    other = tmp_path / "val.csv"
    write_csv(other, {k: v[:6] for k, v in text_table().items()})
    data = load(tmp_path / "a.csv", **TEXT, validation_path=other)
    assert data.validation.tolist() == list(range(32, 38))
    with pytest.raises(DataError, match="validation_path is set, but .*split_column"):
        load(tmp_path / "a.csv", **TEXT, split_column="part", validation_path=other)


FORMS = ("text", "numbers", "sparse", "arrays")


def raw(folder: pathlib.Path, form: str) -> tuple[pathlib.Path, dict]:
    """A file of 40 rows, and how it is to be read."""
    if form == "text":
        return write_csv(folder / "a.csv", text_table()), TEXT
    if form == "numbers":
        chosen = {"feature_columns": "x*", "label_columns": "late,broken,wrong"}
        return write_csv(folder / "a.csv", number_table()), chosen
    if form == "sparse":
        return write_svm(folder / "a.svm", sparse(), first=1), {}
    np.savez(folder / "a.npz", features=numbers(), labels=labels())
    return folder / "a.npz", {}


@pytest.mark.parametrize("form", FORMS)
def test_raw_rows_are_predicted_as_they_were_evaluated(form, tmp_path):
    path, chosen = raw(tmp_path, form)
    config = running.tiny_config(
        **{"data.name": "own", "data.path": str(path), "data.test_path": str(path)},
        **{f"data.{k}": v for k, v in chosen.items()},
        **{"model.encoder.name": "auto", "model.name": "logistic_regression"},
        **{"noise.kind": "none", "logistic_regression.cost": 1.0},
    )
    workdir = str(tmp_path / "run")
    fit.train_and_evaluate(config, workdir, "test")
    again = run_lib.evaluate_checkpoint(workdir, None, "test")
    assert (
        again["metrics"] == files.read_jsonl(workdir + "/results.jsonl")[0]["metrics"]
    )
    task = run_lib.Run(config, workdir).task
    predictor = predict.Predictor(workdir)
    [inputs] = predictor.read(str(path))
    expected = predictor.scores(task.test.inputs)
    np.testing.assert_array_equal(predictor.scores(inputs), expected)
    assert expected.std(0).min() > 0.01


def test_a_neural_model_trains_on_own_rows_and_predicts_without_labels(tmp_path):
    path = write_csv(tmp_path / "a.csv", text_table())
    config = running.tiny_config(
        **{"data.name": "own", "data.path": str(path), "train.num_epochs": 2},
        **{f"data.{k}": v for k, v in TEXT.items()},
        **{"model.encoder.name": "auto", "embeddings.source": "random"},
    )
    workdir = str(tmp_path / "run")
    row = fit.train_and_evaluate(config, workdir, "test")
    assert row["dataset"] == "own:a" and row["split"]["test"].startswith("drawn")
    assert fit.train_and_evaluate(config, workdir, "test") is None
    new = write_csv(tmp_path / "new.csv", {"text": ["parcel late", "glass"]})
    target = tmp_path / "out.jsonl"
    predict.predict_file(workdir, str(new), str(target))
    out = files.read_jsonl(str(target))
    assert len(out) == 2 and set(out[0]["scores"]) == set(NAMES)
    assert out[0]["scores"] != out[1]["scores"]
    target.unlink()
    write_csv(new, {"text": ["a", "b"], "tags": ["late", "late,lost"]})
    with pytest.raises(DataError, match=r"new\.csv, line 3: the label 'lost' is none"):
        predict.predict_file(workdir, str(new), str(target))
    write_csv(new, {"body": ["a"]})
    with pytest.raises(DataError, match=r"new\.csv, line 2: the column 'text' is"):
        predict.predict_file(workdir, str(new), str(target))
    assert not target.exists() and not list(tmp_path.glob(".writing*"))
