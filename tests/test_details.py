"""Records beside a row: what was packed comes back, and nothing else is believed."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib

import numpy as np
import pytest

from cbmlc_jax import details, metrics, thresholds

CHOSEN = {"ebF1": 0.3, "miF1": 0.5, "maF1": 0.7}


def scores_and_labels(rows: int = 13, labels: int = 5):
    """13 x 5 entries fill no whole number of bytes."""
    rng = np.random.default_rng(0)
    scores = rng.random((rows, labels), np.float32)
    return scores, (rng.random((rows, labels)) < 0.3).astype(np.uint8)


def through_a_file(record: dict) -> dict:
    return json.loads(json.dumps(record))


def test_predictions_come_back():
    scores, labels = scores_and_labels()
    record = details.predictions(scores, labels, CHOSEN)
    found = details.read_predictions(through_a_file(record))
    assert found.labels.dtype == bool and (found.labels == labels).all()
    for name, threshold in CHOSEN.items():
        wanted = thresholds.apply(scores, threshold)
        assert (found.predicted[name] == wanted).all()
    assert list(found.predicted) == list(metrics.F1_NAMES)


def test_label_embeddings_come_back():
    _, labels = scores_and_labels()
    vectors = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    names = ("a", "b", "<c>", "d", "e")
    record = details.label_embeddings(vectors, names, labels)
    found = details.read_label_embeddings(through_a_file(record))
    assert (found.vectors == vectors).all() and found.names == names
    assert (found.counts == labels.sum(0)).all()
    assert (found.pairs == details.top_pairs(labels)).all()


def test_top_pairs_by_hand():
    labels = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    # (1, 3) and (2, 3) meet twice, (0, 1), (0, 3), (1, 2) once, (0, 2) never.
    wanted = [[1, 3], [2, 3], [0, 1], [0, 3], [1, 2]]
    assert details.top_pairs(labels).tolist() == wanted
    assert details.top_pairs(labels, 3).tolist() == wanted[:3]


def test_pair_distance_by_hand():
    vectors = np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], np.float32)
    pairs = np.array([[0, 1], [0, 2]])  # distances 5 and 3; maximum (3, 4)
    found = details.LabelEmbeddings(("a", "b", "c"), np.ones(3), pairs, vectors)
    assert details.pair_distance(found) == pytest.approx(4 / 5)


def damaged():
    scores, labels = scores_and_labels()
    good = details.predictions(scores, labels, CHOSEN)
    other = details.predictions(1 - scores, labels, CHOSEN)
    bomb = base64.b64encode(zlib.compress(bytes(1 << 20))).decode()
    return {
        "of another run": good | {"miF1": other["miF1"]},
        "another shape": good | {"shape": [5, 13]},
        "too long": good | {"labels": bomb},
        "too short": good | {"labels": base64.b64encode(zlib.compress(b"")).decode()},
        "too large": good | {"shape": [1 << 20, 1 << 20]},
        "negative": good | {"shape": [-13, -5]},
        "no shape": good | {"shape": "13, 5"},
        "no base64": good | {"labels": "?"},
        "no zlib": good | {"labels": "AAAA"},
        "missing": {k: v for k, v in good.items() if k != "ebF1"},
        "unsigned": {k: v for k, v in good.items() if k != "sha256"},
    }


def test_a_bomb_does_not_go_off():
    """No more is unpacked than the shape says, whatever lies there."""
    bomb = base64.b64encode(zlib.compress(bytes(1 << 26))).decode()
    scores, labels = scores_and_labels()
    record = details.predictions(scores, labels, CHOSEN) | {"labels": bomb}
    tracemalloc.start()
    with pytest.raises(details.DetailError, match="labels is not of its shape"):
        details.read_predictions(record)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    with pytest.raises(details.DetailError, match="one too large"):
        details.read_predictions(record | {"shape": [1 << 15, 1 << 15]})


@pytest.mark.parametrize("name", damaged())
def test_damaged_records_are_refused(name):
    with pytest.raises(details.DetailError, match="of predictions is damaged"):
        details.read_predictions(damaged()[name])
