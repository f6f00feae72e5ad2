"""--mode=audit on the embedded data: what it writes, and training on it."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import running

from cbmlc_jax import audit, config, fit, page
from cbmlc_jax.data.dataset import Dataset, Dense, Ragged, Split
from cbmlc_jax.issues import Issues
from cbmlc_jax.thresholds import Rates

SETTINGS = {
    "model.name": "lr_knn",
    "logistic_regression.cost": 1.0,
    "train.crossfit": 2,
    "noise.kind": "nar",
}


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A workdir after the audit, and what was found."""
    workdir = str(tmp_path_factory.mktemp("audit") / "run")
    settings = running.tiny_config(**SETTINGS)
    found = audit.run_audit(settings, workdir, "test", top=5, apply="flip")
    return workdir, found


def test_the_list_and_the_page(audited):
    workdir, found = audited
    with open(f"{workdir}/issues.csv", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found.doubtful.sum() > 20
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0.5
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    first = found.ranked(1)[0]
    assert int(rows[0]["row"]) == first[0]
    assert int(rows[0]["given"]) == found.labels[tuple(first)]
    assert {int(r["given"]) + int(r["suggested"]) for r in rows} == {1}
    assert int(rows[0]["issues_in_row"]) == found.doubtful[first[0]].sum()
    text = open(f"{workdir}/issues.html", encoding="utf8").read()
    assert text.count("<strong>") == 5 and "average precision" in text


def test_training_on_repaired_labels_and_again(audited, capsys):
    workdir, found = audited
    settings = running.tiny_config(**SETTINGS)
    settings.noise.repaired = f"{workdir}/labels_repaired.npz"
    row = fit.train_and_evaluate(settings, f"{workdir}/fixed", "test")
    assert row["noise"]["repaired"]["how"] == "flip"
    assert row["noise"]["repaired"]["entries"] == found.doubtful.sum()
    assert row["config"]["noise.repaired"] == settings.noise.repaired
    assert "trained on repaired labels (flip)" in capsys.readouterr().out
    before = json.loads(open(f"{workdir}/results.jsonl").read())
    assert "repaired" not in before["noise"] and before["rates"] == row["rates"]
    # Most flips are right here, so that training on them must change the scores.
    assert before["metrics"] != row["metrics"]
    assert fit.train_and_evaluate(settings, f"{workdir}/fixed", "test") is None


@pytest.mark.parametrize("how", ["drop", "soft"])
@pytest.mark.slow
def test_a_neural_model_trains_on_every_kind(audited, how, tmp_path):
    workdir, _ = audited
    settings = running.tiny_config(**SETTINGS)
    audit.run_audit(settings, workdir, "test", top=1, apply=how)
    settings = running.tiny_config(**{"noise.kind": "nar", "train.num_epochs": 1})
    settings.noise.repaired = f"{workdir}/labels_repaired.npz"
    row = fit.train_and_evaluate(settings, str(tmp_path / "run"), "test")
    assert row["noise"]["repaired"]["how"] == how
    assert np.isfinite(row["selection"]["score"])


def test_without_cross_fitting_it_says_what_to_do():
    settings = running.tiny_config(**SETTINGS | {"train.crossfit": 0})
    with pytest.raises(config.ConfigError, match="train.crossfit=5.*lr_knn"):
        audit.run_audit(settings, "nowhere", "test", top=1, apply="none")


@pytest.mark.parametrize("kind", ["words", "numbers", "pictures"])
def test_a_page_shows_rows_as_text_never_as_markup(kind, pictures):
    bad = '<script>alert("x")</script>'
    labels = np.uint8([[1, 0], [0, 1], [0, 0]])
    inputs = {
        "words": Ragged.from_rows([[0, 1], [1], []]),
        "numbers": Dense(np.float32([[1, 2], [3, 4], [5, 6]])),
        "pictures": pictures.take(np.arange(3)),
    }[kind]
    data = Dataset(
        name=bad,
        train=Split(inputs, labels),
        test=Split(inputs, labels),
        label_names=(bad, "b"),
        feature_names=(bad, "word"),
        label_texts=("a", "b"),
    )
    wrong = np.float32([[0.9, 0.1], [0.2, 0.3], [0.1, 0.8]])
    found = Issues(wrong, labels, Rates(0.1, 0.1), True)
    text = page.render(data, found, found.ranked(3), bad)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert text.count("data:image/jpeg;base64,") == (3 if kind == "pictures" else 0)
    shown = {"words": "word", "numbers": "word 2", "pictures": "training row 0"}
    assert shown[kind] in text
    assert "remove <strong>" in text and "add <strong>b</strong>" in text
    # Row 1 (label b, .3) is third; each row's content stands on the page once.
    assert found.ranked(3)[:, 0].tolist() == [0, 2, 1]


def test_a_spreadsheet_runs_no_label_name():
    assert audit._cell("=1+1") == "'=1+1" and audit._cell("a=b") == "a=b"
