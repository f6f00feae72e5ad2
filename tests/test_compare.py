"""Paired differences of two systems: who is held against whom, and over which seeds."""

from __future__ import annotations

import pytest
import rows

from experiments import compare

OURS, THEIRS = {"model.name": "cbmlc"}, {"model.name": "lr_knn"}
COMPLETE = {"model.label_graph": "complete"}


def run(model: str, quality: float, seed: int = 0, **changes) -> list[dict]:
    """A row and its record."""
    row = rows.make(model, seed=seed, **changes)
    return [row, rows.with_predictions(row, quality, seed)]


def pairs_of(folder, *lines, ours=OURS, theirs=THEIRS):
    found = rows.read(folder, *lines)
    return found, compare.sides(found, ours, theirs)


def test_the_difference_is_over_the_seeds_that_both_have(tmp_path):
    lines = [*run("cbmlc", 0.9), *run("cbmlc", 0.9, 1), *run("cbmlc", 0.9, 2)]
    lines += [*run("lr_knn", 0.7), *run("lr_knn", 0.7, 1), rows.make("lr_knn", seed=2)]
    lines += [rows.make("lr_knn", "delicious"), *run("lr_knn", 0.2, noise="nar")]
    found, [(ours, theirs)] = pairs_of(tmp_path, *lines)
    seeds, compared = compare.rows(found, ours, theirs, 200)
    assert seeds == 2, "seed 2 of lr_knn has no predictions"
    scores = [[r["metrics"]["corrected_val"] for r in g.rows] for g in (ours, theirs)]
    for name, c in compared.items():
        mine, others = ([s[name] for s in side[:2]] for side in scores)
        assert c.difference == pytest.approx(sum(mine) / 2 - sum(others) / 2)
        assert 0 < c.low < c.difference < c.high
    text = list(compare.lines(found, [(ours, theirs)], 200))
    assert text[0] == "| data | noise | seeds | ebF1 | miF1 | maF1 |"
    assert text[2].startswith("| bibtex | none | 2 | +.") and len(text) == 3


def test_a_key_that_a_row_lacks_is_at_its_default(tmp_path):
    lines = [*run("cbmlc", 0.9), *run("lr_knn", 0.7)]
    lines += run("cbmlc", 0.5, model__label_graph="self")
    found, [(ours, _)] = pairs_of(tmp_path, *lines, ours=OURS | COMPLETE)
    assert "model.label_graph" not in ours.first["config"]
    _, [(ours, _)] = pairs_of(
        tmp_path, *lines, ours=OURS | {"model.label_graph": "self"}
    )
    assert ours.first["config"]["model.label_graph"] == "self"
    with pytest.raises(compare.RecordError, match="model.name=cbmlc is both .*add a"):
        pairs_of(tmp_path, *lines)


def test_mistakes_are_one_sentence(tmp_path):
    lines = [*run("cbmlc", 0.9), *run("lr_knn", 0.7, noise="nar")]
    with pytest.raises(compare.RecordError, match="no data and noise that both"):
        pairs_of(tmp_path, *lines)
    with pytest.raises(compare.RecordError, match="model.nam is no key"):
        pairs_of(tmp_path, *lines, ours={"model.nam": "cbmlc"})


def test_without_predictions_there_is_no_interval(tmp_path):
    lines = [rows.make("cbmlc"), *run("lr_knn", 0.7)]
    found, pairs = pairs_of(tmp_path, *lines)
    [_, _, line] = compare.lines(found, pairs, 200)
    assert line.startswith("| bibtex | none | 0 | no predictions |")
