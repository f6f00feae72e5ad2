"""Predicting from a workdir and a file, and every way to get the file wrong."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import running

from cbmlc_jax import files, fit, predict, thresholds
from cbmlc_jax import run as run_lib
from cbmlc_jax import task as task_lib
from cbmlc_jax.data import pipeline, synthetic
from cbmlc_jax.data.dataset import UNKNOWN, DataError
from cbmlc_jax.rules import Rule, RuleError


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    config = running.tiny_config(
        **{"train.num_epochs": 2, "model.label_graph": "cooccurrence"}
    )
    fit.train_and_evaluate(config, str(workdir), "test")
    return workdir


@pytest.fixture(scope="module")
def task():
    return task_lib.build(
        running.tiny_config(
            **{"train.num_epochs": 2, "model.label_graph": "cooccurrence"}
        )
    )


def rows_of(task, count=7) -> list[list[int]]:
    inputs = task.test.inputs
    return [
        inputs.values[inputs.offsets[i] : inputs.offsets[i + 1]].tolist()
        for i in range(count)
    ]


def predicted(workdir, source, tmp_path, **options) -> list[dict]:
    target = tmp_path / "out.jsonl"
    predict.predict_file(str(workdir), str(source), str(target), **options)
    return files.read_jsonl(str(target))


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_every_form_of_input_gives_the_scores_of_the_evaluation(
    trained, task, tmp_path
):
    names, rows = task.dataset.feature_names, rows_of(task)
    header = "".join(f"@attribute {n} {{0,1}}\n" for n in names)
    labels = "".join(f"@attribute {n} {{0,1}}\n" for n in task.dataset.label_names)
    sparse = "".join("{" + ",".join(f"{i} 1" for i in sorted(r)) + "}\n" for r in rows)
    forms = {
        "ids": write(tmp_path / "a.jsonl", [{"features": r} for r in rows]),
        "words": write(
            tmp_path / "b.jsonl", [{"tokens": [names[i] for i in r]} for r in rows]
        ),
        "values": write(
            tmp_path / "c.jsonl",
            [
                {"features": {names[i]: 1, names[0]: 0 if 0 not in r else 1}}
                for r in rows
                for i in [r[0]]
            ],
        ),
        "arff": tmp_path / "d.arff",
    }
    forms["arff"].write_text(f"@relation x\n{header}{labels}@data\n{sparse}")
    run = run_lib.Run(
        running.tiny_config(
            **{"train.num_epochs": 2, "model.label_graph": "cooccurrence"}
        ),
        str(trained),
    )
    predictor = predict.Predictor(str(trained))
    expected = run.system.scores(predictor.params, task.test.inputs.take(np.arange(7)))
    [row] = files.read_jsonl(str(trained / "results.jsonl"))
    threshold = row["thresholds"]["corrected_val"]["miF1"]
    for form in ("ids", "words", "arff"):
        out = predicted(trained, forms[form], tmp_path)
        assert len(out) == 7
        for line, scores in zip(out, expected, strict=True):
            mine = [line["scores"][n] for n in task.dataset.label_names]
            np.testing.assert_allclose(mine, scores, atol=2e-6)
            above = {
                n
                for n, s in zip(task.dataset.label_names, scores, strict=True)
                if s >= threshold
            }
            assert set(line["labels"]) == above
            assert list(line["scores"].values()) == sorted(mine, reverse=True)
    singles = [{"features": [r[0]] if 0 not in r else sorted({0, r[0]})} for r in rows]
    one = predicted(trained, forms["values"], tmp_path)
    other = predicted(trained, write(tmp_path / "e.jsonl", singles), tmp_path)
    assert one == other


def test_thresholds_and_top_k(trained, task, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"features": r} for r in rows_of(task)])
    everything = predicted(trained, source, tmp_path, rule=Rule(threshold=0.0))
    assert all(len(r["labels"]) == 40 for r in everything)
    none = Rule(threshold=1.0)
    nothing = predicted(trained, source, tmp_path, rule=none, top_k=3)
    for full, best in zip(everything, nothing, strict=True):
        assert best["labels"] == []
        assert list(best["scores"].items()) == list(full["scores"].items())[:3]
    [row] = files.read_jsonl(str(trained / "results.jsonl"))
    for protocol in thresholds.PROTOCOLS:
        for metric, value in row["thresholds"][protocol].items():
            rule = Rule(protocol=protocol, metric=metric)
            assert predict.choose(str(trained), rule).threshold == value


def test_auto_threshold_warns_where_the_rates_leave_nothing(trained, tmp_path):
    [row] = files.read_jsonl(str(trained / "results.jsonl"))
    row["rates"] |= {"r0": 0.5, "r1": 0.48}
    row["thresholds"]["noisy_val"]["miF1"] = 0.123
    files.write_jsonl(str(tmp_path / "results.jsonl"), [row])
    with pytest.warns(UserWarning, match="noisy_val"):
        assert predict.choose(str(tmp_path), Rule()).threshold == 0.123


def test_an_unfinished_run_has_no_threshold(tmp_path):
    for rule in (Rule(), Rule(per_label=True)):
        with pytest.raises(RuleError, match="give --threshold"):
            predict.choose(str(tmp_path), rule)
    assert predict.choose(str(tmp_path), Rule(threshold=0.4)).threshold == 0.4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"features": [1], "tokens": []}', "line 2: expected an object"),
        ('{"features": [400]}', "line 2: feature 400 is not in 0..399"),
        ('{"features": [-1]}', "line 2: feature -1 is not in"),
        ('{"features": [true]}', "must be a list of feature numbers"),
        ('{"features": {"no such word": 1}}', "'no such word' is no feature"),
        ('{"tokens": "text"}', "must be a list of strings"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(trained, tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    source.write_text('{"features": [1]}\n' + line + "\n")
    target = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"in\.jsonl") as caught:
        predict.predict_file(str(trained), str(source), str(target))
    assert message in str(caught.value)
    assert not target.exists() and not list(tmp_path.glob(".writing*"))


def test_missing_files(trained, tmp_path):
    with pytest.raises(DataError, match="needs --input"):
        predict.predict_file(str(trained), None, None)
    with pytest.raises(DataError, match="no such file"):
        predict.predict_file(str(trained), str(tmp_path / "none.arff"), None)


def test_unknown_words_are_counted(trained, tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [{"tokens": ["zzz", "yyy"]}])
    [row] = predicted(trained, source, tmp_path)
    assert len(row["scores"]) == 40
    assert "2 tokens are no feature" in capsys.readouterr().err


def test_a_model_of_sequences_keeps_order_and_unknown_words(tmp_path, monkeypatch):
    data = synthetic.load()
    names = (UNKNOWN, "oil", "price", *data.feature_names[3:])
    monkeypatch.setattr(
        pipeline, "load", lambda *_: dataclasses.replace(data, feature_names=names)
    )
    config = running.tiny_config(
        **{
            "model.name": "cbmlc",
            "model.encoder.name": "sequence",
            "embeddings.source": "random",
            "train.num_epochs": 1,
        }
    )
    fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    predictor = predict.Predictor(str(tmp_path / "run"))
    rows = [
        {"text": "Price of OIL: oil."},
        {"tokens": ["price", "of", "oil", "oil"]},
        {"features": [2, 0, 1, 1]},
    ]
    [inputs] = predictor.read(str(write(tmp_path / "a.jsonl", rows)))
    assert inputs.values.tolist() == 3 * [2, 0, 1, 1]
    turned = write(tmp_path / "b.jsonl", [{"tokens": ["oil", "oil", "of", "price"]}])
    [other] = predictor.read(str(turned))
    one, two = predictor.scores(inputs)[0], predictor.scores(other)[0]
    assert np.abs(one - two).max() > 1e-3, "the order counts"
    wrong = write(tmp_path / "c.jsonl", [{"text": "oil", "tokens": []}])
    with pytest.raises(DataError, match="one of `features`, `tokens`, `text`"):
        list(predictor.read(str(wrong)))
