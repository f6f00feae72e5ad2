"""Grids: what they expand to, what identifies a row, how a candidate is chosen."""

from __future__ import annotations

import dataclasses
import json

import pytest
import running

from cbmlc_jax import config as config_lib
from cbmlc_jax import files, grids

# A user's own data have no grid.
CONFIGS = sorted(p for p in (running.ROOT / "configs").glob("*.py") if p.stem != "own")


def get_config(preset: str = ""):
    return running.tiny_config(preset=preset)


def cells_of(*blocks: grids.Block, **extra) -> list[grids.Cell]:
    return grids.expand("configs/x.py:g", blocks, get_config, "1", extra)


def row(point: grids.Point, score: float | None, **changes) -> dict:
    selection = {"rule": "corrected_val", "score": score}
    return {"fingerprint": "f", "selection": selection, **changes}


def test_a_block_is_noise_times_models_times_candidates_times_seeds():
    block = grids.Block(
        [{}, {"model.name": "mlknn"}],
        [("ncar", 0.02), ("none", None)],
        candidates={"loss.margin": (0.0, 0.1), "loss.gamma_neg": (1.0, 2.0, 4.0)},
        seeds=(0, 3),
    )
    cells = cells_of(block)
    assert [len(cell.points) for cell in cells] == [6] * 4
    first = cells[0].points[0][0]
    assert first.flags() == [
        "--config=configs/x.py",
        "--config.noise.kind=ncar",
        "--config.noise.rate=0.02",
        "--config.loss.margin=0.0",
        "--config.loss.gamma_neg=1.0",
        "--config.seed=0",
        "--config.noise.seed=0",
        "--config.data.split_seed=0",
    ]
    points = [p for cell in cells for runs in cell.points for p in runs]
    assert len({p.key for p in points}) == len(points) == 4 * 6 * 2
    for cell in cells:
        for runs in cell.points:
            zero, three = runs
            differing = set(zero.delta.items()) ^ set(three.delta.items())
            assert differing == {(k, 3) for k in grids.SEED_KEYS}
    assert cells == cells_of(block)


def test_what_is_there_twice_is_run_once():
    block = grids.Block([{}, {}], [("none", None)], candidates={"loss.margin": (0, 0)})
    [cell] = cells_of(block, block)
    assert len(cell.points) == 1
    # The default rate, named and not; candidates that `extra` makes equal.
    rates = grids.Block([{}], [("ncar", None), ("ncar", 0.05)])
    assert len(cells_of(rates)) == 1
    many = grids.Block([{}], [("none", None)], candidates={"loss.margin": (0.0, 0.1)})
    [cell] = cells_of(many, **{"loss.margin": 0.2})
    assert len(cell.points) == 1
    assert cell.points[0][0].delta["loss.margin"] == 0.2


def test_a_point_is_what_main_makes_of_its_flags(tmp_path):
    """Published settings below the grid's own, as on the command line."""
    changes = {"model.name": "lamp", "model.width": 64, "model.num_heads": 4}
    block = grids.Block([changes], [("nar", 0.3)], seeds=(1,))
    name = "configs/synthetic.py:g"
    _, of_file = grids.load("configs/synthetic.py:smoke")
    [cell] = grids.expand(name, [block], of_file, None)
    [[point]] = cell.points
    assert point.delta["model.width"] == 64 and point.delta["model.ffn_width"] == 512
    # An impossible device count stops main after config.json was written, which stays
    # because it is not alone.
    (tmp_path / ".other").touch()
    done = running.main(
        f"--workdir={tmp_path}", *point.flags(), "--config.train.num_devices=64"
    )
    assert done.returncode == 1, done.stdout
    saved = json.loads((tmp_path / "config.json").read_text())
    assert config_lib.delta(config_lib.restore(saved)) == point.delta


def test_the_key_of_a_row_is_that_of_its_point():
    block = grids.Block([{}], [("ncar", None), ("combined", None)], seeds=(0, 1))
    for cell in cells_of(block):
        for point in cell.points[0]:
            text = json.dumps({"config": point.delta, "rate": point.rate})
            back = json.loads(text)
            assert grids.row_key(back["config"], back["rate"], "1") == point.key
            assert grids.row_key(back["config"], back["rate"], "2") != point.key
            assert grids.row_key(back["config"], 0.3, "1") != point.key


def test_rows_made_by_hand_count():
    """Those of baselines.jsonl, from before rows named the version."""
    blocks, of_file = grids.load("configs/bibtex.py:small")
    cells = grids.expand("configs/bibtex.py:small", blocks, of_file, None)
    path = running.ROOT / "experiments" / "results" / "baselines.jsonl"
    rows = {
        grids.row_key(r["config"], r["noise"]["rate"], None): r
        for r in files.read_jsonl(str(path))
    }
    now, later = grids.ready(cells, rows)
    found = {
        (rows[p.key]["model"], rows[p.key]["noise"]["kind"])
        for cell in cells
        for [p] in cell.points
        if p.key in rows
    }
    assert {("lr_knn", "ncar"), ("mlknn", "none"), ("mlknn", "combined")} <= found
    assert len(now) == len(cells) - len(found) and not later


def test_the_validation_score_chooses():
    block = grids.Block(
        [{}],
        [("nar", None)],
        candidates={"loss.margin": (0.0, 0.05, 0.1, 0.2)},
        seeds=(0, 1, 2),
    )
    [cell] = cells_of(block)
    firsts = [runs[0] for runs in cell.points]
    assert grids.ready([cell], {}) == (firsts, list(cell.points[0][1:]))
    # The best on test is the worst on validation.
    scores, tests = (0.2, 0.4, 0.4, 0.3), (0.9, 0.2, 0.8, 0.5)
    rows = {
        p.key: row(p, s, metrics={"oracle": {"miF1": t}})
        for p, s, t in zip(firsts, scores, tests, strict=True)
    }
    assert cell.choose(rows) == 1  # of two equal ones the earlier
    assert grids.ready([cell], rows) == (list(cell.points[1][1:]), [])
    rows[cell.points[1][1].key] = row(firsts[1], 0.0)
    assert grids.ready([cell], rows) == ([cell.points[1][2]], [])
    del rows[firsts[3].key]
    assert cell.choose(rows) is None
    assert grids.ready([cell], rows)[0] == [firsts[3]]


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "g"},
        {"selection": {"rule": "noisy_val", "score": 0.5}},
        {"selection": {"rule": "corrected_val", "score": None}},
    ],
)
def test_scores_that_cannot_be_compared_choose_nothing(changes):
    block = grids.Block([{}], [("nar", None)], candidates={"loss.margin": (0.0, 0.1)})
    [cell] = cells_of(block)
    first, second = (runs[0] for runs in cell.points)
    rows = {first.key: row(first, 0.3), second.key: row(second, 0.5) | changes}
    with pytest.raises(config_lib.ConfigError, match="none can be chosen"):
        cell.choose(rows)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"loss.marign": 0.1}, "loss.marign"),
        ({"loss.margin": 2.0}, "loss.margin=2.0"),
        ({"loss.margin": "wide"}, "loss.margin"),
        ({"model.name": "mpvae", "loss.cb_weight": 1.0}, "mpvae has no trained"),
    ],
)
def test_a_grid_is_checked_before_anything_runs(model, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        cells_of(grids.Block([model], [("none", None)]))


def test_without_scores_nothing_can_be_chosen():
    block = grids.Block(
        [{"train.selection": "last"}],
        [("none", None)],
        candidates={"loss.margin": (0.0, 0.1)},
    )
    with pytest.raises(config_lib.ConfigError, match="no score to choose by"):
        cells_of(block)


def test_grids_that_are_not_there(tmp_path):
    with pytest.raises(config_lib.ConfigError, match="no file nowhere.py"):
        grids.load("nowhere.py:paper")
    with pytest.raises(config_lib.ConfigError, match="'big', but paper, noisy, small"):
        grids.load(f"{running.ROOT}/configs/bibtex.py:big")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_grid_of_the_configs_expands(path):
    """With the first value of each hyper-parameter alone, for speed."""
    module, extra = str(path), {}
    if path.stem == "voc":  # the paper's network needs a file
        extra["model.encoder.weights"] = "random"
    names = ["smoke"] if path.stem == "synthetic" else ["paper", "small"]
    for name in names:
        blocks, of_file = grids.load(f"{module}:{name}")
        short = [
            dataclasses.replace(
                b, candidates={k: v[:1] for k, v in b.candidates.items()}
            )
            for b in blocks
        ]
        cells = grids.expand(f"{module}:{name}", short, of_file, "1", extra)
        assert len(cells) == sum(len(b.models) * len(b.noise) for b in blocks)
        if name == "paper":
            assert blocks[0].candidates == grids.CANDIDATES
            assert all(len(c.points[0]) == 5 for c in cells)
            noise = grids.IMAGE_NOISE if path.stem == "voc" else grids.TEXT_NOISE
            assert {
                (p.delta.get("noise.kind", "none"), p.rate)
                for c in cells
                for [p, *_] in c.points
            } == {(kind, rate or 0.0) for kind, rate in noise}
