"""Repaired labels: written, read, refused, and what is trained on them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import running

from cbmlc_jax import files, repair, task
from cbmlc_jax.data.dataset import DataError
from cbmlc_jax.issues import Issues
from cbmlc_jax.models.baselines.logistic_regression import LogisticRegression
from cbmlc_jax.models.baselines.lr_knn import LRkNN
from cbmlc_jax.thresholds import Rates

LINEAR = {
    "model.name": "logistic_regression",
    "logistic_regression.cost": 1.0,
    "noise.kind": "nar",
}


def found(labels: np.ndarray, seed: int = 0) -> Issues:
    wrong = np.random.default_rng(seed).random(labels.shape, np.float32) ** 4
    return Issues(wrong, labels, Rates(0.1, 0.1), True)


@pytest.mark.parametrize("how", repair.WAYS)
def test_training_sees_repaired_labels_and_validation_the_given(how, tmp_path):
    config = running.tiny_config(**LINEAR)
    before = task.build(config)
    issues, path = found(before.noisy), str(tmp_path / "fixed.npz")
    changed = repair.write(path, issues, how)
    config.noise.repaired = path
    after = task.build(config)
    assert after.repaired.how == how and changed > 0
    assert after.repaired.summary(before.noisy)["entries"] == changed
    np.testing.assert_array_equal(after.noisy, before.noisy)
    np.testing.assert_array_equal(after.validation.labels, before.validation.labels)
    np.testing.assert_array_equal(after.prior, before.prior)
    assert after.validation.ignored is None
    rows, _ = task.rows(config, before.dataset, before.noisy)
    doubtful, given = issues.doubtful[rows], before.train.labels
    if how == "drop":
        np.testing.assert_array_equal(after.train.ignored, doubtful)
        np.testing.assert_array_equal(after.train.labels, given * ~doubtful)
    else:
        assert after.train.ignored is None
    if how == "flip":
        np.testing.assert_array_equal(after.train.labels, given ^ doubtful)
        assert after.train.labels.dtype == np.uint8
        assert after.meta.label_counts.tolist() == after.train.labels.sum(0).tolist()
    if how == "soft":
        np.testing.assert_allclose(
            after.train.labels, issues.posterior()[rows], atol=repair.SURE
        )


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    config = running.tiny_config(**LINEAR)
    labels = np.random.default_rng(0).integers(0, 2, (20, 3)).astype(np.uint8)
    path = str(tmp_path / "fixed.npz")

    def refused(part: str, labels=labels) -> None:
        with pytest.raises(DataError, match=part):
            repair.read(path, labels, config)

    refused("cannot be read.*--apply=flip")
    repair.write(path, found(labels), "flip")
    assert repair.read(path, labels, config).how == "flip"
    refused("other training labels", labels ^ 1)
    refused("not \\(19, 3\\)", labels[:19])
    content = open(path, "rb").read()
    files.write_atomic(path, content[: len(content) // 2])
    refused("damaged")
    whole = {"how": np.array("flip"), "labels": np.array(repair._digest(labels))}
    targets = np.ones((20, 3), np.float32)
    for changes, part in (
        ({"targets": targets * 2}, "outside"),
        ({"targets": targets * np.nan}, "outside"),
        ({"targets": targets.astype(np.float64)}, "float64"),
        ({"targets": targets, "how": np.array("mend")}, "'mend'"),
        ({"targets": np.zeros((3000, 3), np.float32)}, "bytes"),
        ({}, "targets"),
    ):
        files.write_arrays(path, whole | changes)
        refused(part)
    buffer = io.BytesIO()
    np.savez(buffer, **whole, targets=np.array([print], object), allow_pickle=True)
    files.write_atomic(path, buffer.getvalue())
    refused("damaged")


@pytest.mark.parametrize(
    ("how", "changes", "part"),
    [
        ("drop", {"model.name": "mlknn"}, "mlknn cannot train on --apply=drop"),
        ("soft", {"model.name": "label_prior"}, "use --apply=flip"),
        ("soft", {"model.name": "cbmlc", "loss.name": "splc"}, "splc reads"),
        ("flip", {"model.name": "cbmlc", "loss.name": "forward"}, "forward corrects"),
    ],
)
def test_what_a_model_or_loss_cannot_read_is_refused(how, changes, part, tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (20, 3)).astype(np.uint8)
    repair.write(str(tmp_path / "fixed.npz"), found(labels), how)
    config = running.tiny_config(**LINEAR | changes)
    with pytest.raises(DataError, match=part):
        repair.read(str(tmp_path / "fixed.npz"), labels, config)


def test_dropped_entries_count_in_no_fit_and_no_vote():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(80, 4)).astype(np.float32)
    labels = (rows[:, :2] + rng.normal(size=(80, 2)) > 0).astype(np.uint8)
    ignored = np.zeros((80, 2), bool)
    ignored[::3, 0] = True
    model = LogisticRegression(1.0)
    found = model.fit(rows, np.where(ignored, 1 - labels, labels), ignored=ignored)
    scale = {"mean": rows.mean(0), "deviation": rows.std(0)}
    kept = rows[~ignored[:, 0]], labels[~ignored[:, 0], :1]
    # The scale is of all rows; given it, label 0 is fitted on those that are left.
    alone = model.fit((kept[0] - scale["mean"]) / scale["deviation"], kept[1])
    ours = model.scores(found, rows)
    inner = (rows - scale["mean"]) / scale["deviation"]
    np.testing.assert_allclose(ours[:, :1], model.scores(alone, inner), atol=0.01)
    np.testing.assert_allclose(
        ours[:, 1:], model.scores(model.fit(rows, labels), rows)[:, 1:], atol=1e-6
    )
    voter = LRkNN(1.0, 5, 1.0)
    votes = voter.scores(voter.fit(rows, labels, ignored=ignored), rows)
    theirs = voter.scores(voter.fit(rows, 1 - labels, ignored=ignored), rows)
    # Of those that are known, each votes for 0 or for 1; there may be none.
    total = votes + theirs
    assert (np.isclose(total, 1) | (total == 0)).all() and np.mean(total > 0) > 0.95
    np.testing.assert_allclose(
        votes[:, 1:], voter.scores(voter.fit(rows, labels), rows)[:, 1:], atol=1e-6
    )


def test_a_soft_label_is_two_weighted_rows():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 3)).astype(np.float32)
    labels = rng.integers(0, 2, (60, 1)).astype(np.uint8)
    model = LogisticRegression(1.0)
    # Rows twice, once with y = 1: half of the copies are ones.
    twice = np.concatenate([rows, rows])
    both = np.concatenate([labels * 0 + 1, labels])
    soft = (1 + labels) / np.float32(2)
    hard = model.fit(twice, both)
    # C counts each row once here, twice there.
    half = LogisticRegression(2.0).fit(rows, soft)
    np.testing.assert_allclose(hard["weights"], half["weights"], atol=2e-3)
    exact = model.fit(rows, labels.astype(np.float32))
    np.testing.assert_allclose(
        exact["weights"], model.fit(rows, labels)["weights"], atol=1e-5
    )
