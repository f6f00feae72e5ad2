"""What --mode=data says of a data set, by hand and on the embedded one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import running

from cbmlc_jax import describe
from cbmlc_jax.data import pipeline
from cbmlc_jax.data.dataset import UNKNOWN, Dataset, Dense, Ragged, Split

NAMES = ("cat", "dog", "qqq", "sky")


def by_hand(inputs, feature_names=("a", "b", "c")) -> Dataset:
    """Rows 0, 1 and 3 are equal, 0 and 3 with the same labels; qqq has no positive."""
    labels = np.array(
        [[1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1]],
        np.uint8,
    )
    return Dataset(
        name="by hand",
        train=Split(inputs, labels),
        test=Split(inputs.take(np.array([1, 4])), labels[[1, 4]]),
        label_names=NAMES,
        feature_names=feature_names,
        label_texts=NAMES,
        word_vectors={"cat": np.ones(2), "dog": -np.ones(2), "sky": np.zeros(2)},
    )


INPUTS = {
    "set": (Ragged.from_rows([[0, 1, 2], [0, 1, 2], [1], [0, 1, 2], []]), "abc"),
    "weighted": (
        Ragged(
            np.int32([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]),
            np.int64([0, 3, 6, 9, 12, 12]),
            np.float32([1, 2, 3, 1, 2, 3, 0, 2, 0, 1, 2, 3]),
        ),
        "abc",
    ),
    "sequence": (
        Ragged.from_rows([[1, 2, 1], [1, 2, 1], [0, 0, 1], [1, 2, 1], [0]]),
        (UNKNOWN, "a", "b"),
    ),
    "numbers": (
        Dense(np.float32([[1, 2, 3], [1, 2, 3], [0, 2, 0], [1, 2, 3], [0, 0, 0]])),
        "abc",
    ),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_what_is_counted_by_hand(kind, monkeypatch):
    inputs, names = INPUTS[kind]
    data = by_hand(inputs, tuple(names))
    assert data.kind == kind
    monkeypatch.setitem(pipeline.READERS, "synthetic", lambda *_: data)
    config = running.tiny_config(
        **{"noise.kind": "none", "train.crossfit": 2, "model.encoder.name": "auto"}
    )
    if kind == "numbers":
        config.data.name = "emotions"
        monkeypatch.setitem(pipeline.READERS, "emotions", lambda *_: data)
    found = describe.describe(config)
    train = found["sides"]["train"]
    assert train["rows"] == 5 and train["cardinality"] == 2.2
    assert train["most_labels"] == 3 and train["rows_without_labels"] == 0
    assert train["labels_without_positives"] == ["qqq"]
    assert train["labels_without_negatives"] == ["sky"]
    same = found["duplicates"]
    assert (same["groups"], same["rows"]) == (1, 3)
    assert same["groups_with_different_labels"] == 1
    assert same["rows_with_different_labels"] == 3
    assert same["examples"] == [
        {"rows": [0, 1], "labels": [["cat", "dog", "sky"], ["cat", "sky"]]}
    ]
    assert same["test_rows_that_are_in_train"] == 2
    alike = describe._duplicates(
        describe._digests(inputs), np.zeros((5, 4), np.uint8), data
    )
    assert alike["groups"] == 1 and alike["groups_with_different_labels"] == 0
    few = found["near_empty"]
    assert few["rows"] == 2 and few["empty"] == 1 and few["examples"] == [2, 4]
    first = found["pairs"][0]
    assert first == {"labels": ["cat", "sky"], "rows": 3, "share_of_rarer": 1.0}
    assert {tuple(p["labels"]): p["rows"] for p in found["pairs"]} == {
        ("cat", "sky"): 3,
        ("dog", "sky"): 3,
        ("cat", "dog"): 2,
    }
    assert found["vectors"]["coverage"] == {"whole": 3, "partial": 0, "none": 1}
    assert found["vectors"]["labels_without_vector"] == ["qqq"]
    assert not found["rates"]["reliable"] and found["rates"]["doubt"]
    text = describe.report(found)
    assert "no training row has qqq" in text and "every training row has sky" in text
    assert "no estimate that could be relied on: fewer than" in text


def test_one_label_a_row_is_called_a_guess(tmp_path):
    done = running.main(
        *running.flags(**{"noise.kind": "single_positive"}),
        "--mode=data",
        f"--output={tmp_path / 'audit.json'}",
    )
    assert done.returncode == 0, done.stderr
    rates = json.loads((tmp_path / "audit.json").read_text())["rates"]
    assert rates["partial"] and not rates["reliable"]
    assert f"P(1->0) counts as {rates['r1']:.3f}: no row has two labels" in done.stdout


def test_the_command_line_finds_noise_and_missing_vectors(tmp_path):
    out = tmp_path / "audit.json"
    done = running.main(
        *running.flags(**{"noise.kind": "ncar", "noise.rate": 0.1}),
        "--config.embeddings.source=file",
        "--config.embeddings.path=no-such-file.txt",
        "--mode=data",
        f"--output={out}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["sides"]["train"]["rows"] == 1260 and found["labels"] == 40
    assert found["sides"]["validation"]["rows"] == 140
    assert found["split"]["test"] == "published"
    assert "no-such-file.txt" in found["vectors"]["problem"]
    rates = found["rates"]
    assert rates["reliable"] and abs(rates["r0"] - 0.1) < 0.01, rates
    assert "P(0->1) 0." in done.stdout and "truly positive" in done.stdout
    assert "no-such-file.txt" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["audit.json"]


def test_what_would_take_long_is_left_out(monkeypatch):
    monkeypatch.setattr(describe, "MOST_WORK", 1000)
    found = describe.describe(running.tiny_config())
    assert "would take long" in found["rates"]["skipped"]
    assert "not estimated" in describe.report(found)
