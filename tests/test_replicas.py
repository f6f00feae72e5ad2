"""Several seeds side by side against runs of one seed each."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
import running

from cbmlc_jax import (
    checkpoints,
    files,
    fit,
    parallel,
    processes,
    replicas,
    results,
    task,
    workdirs,
)
from cbmlc_jax import config as config_lib
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import pipeline
from experiments import seeds

# Two widths, so that seeds have batches of different widths in one step; noise rates in
# the loss; a patience that ends seed 0 before seed 1.
CHANGES = {
    "data.length_buckets": 2,
    "data.validation_fraction": 0.7,
    "loss.name": "forward",
    "model.token_dropout": 0.1,
    "optim.learning_rate": 0.1,
    "train.num_epochs": 4,
    "train.patience": 1,
}
EPOCHS = [2, 3]
# Of the parameters, none of which is above 10: other widths add in another order.
TOLERANCE = 1e-4


def config_of(seed: int = 0, **changes):
    seeds = {"seed": seed, "noise.seed": seed, "data.split_seed": seed}
    return running.tiny_config(**running.HALF | CHANGES | seeds | changes)


def two_seeds(**changes):
    return config_of(**{"train.num_replicas": 2, **changes})


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> pathlib.Path:
    """Stopped in epoch 2, when one of the two had saved it, and resumed."""
    workdir = tmp_path_factory.mktemp("runs") / "together"
    save = checkpoints.Checkpoints.save

    def stopping(self, epoch, *rest):
        if epoch == 2 and "/1/" in self.folder:
            raise KeyboardInterrupt
        save(self, epoch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            replicas.train_and_evaluate(two_seeds(), str(workdir), "test")
    saved = [sorted(p.name for p in workdir.glob(f"{k}/checkpoints/*")) for k in (0, 1)]
    assert saved == [["1", "2"], ["1"]]
    rows = replicas.train_and_evaluate(two_seeds(), str(workdir), "test")
    assert [row["seed"] for row in rows] == [0, 1]
    lines = [files.read_jsonl(str(workdir / k / "metrics.jsonl")) for k in "01"]
    assert [len(x) for x in lines] == EPOCHS
    return workdir


@pytest.mark.parametrize("seed", [0, 1])  # that ended first, and that went on alone
def test_a_seed_is_the_run_of_that_seed(together, tmp_path, seed):
    alone, one = tmp_path / "alone", together / str(seed)
    fit.train_and_evaluate(config_of(seed), str(alone), "test")
    both = [files.read_jsonl(str(p / "metrics.jsonl")) for p in (one, alone)]
    for mine, theirs in zip(*both, strict=True):
        assert np.isclose(mine["loss"], theirs["loss"], rtol=1e-5)
        assert mine["step"] == theirs["step"]
    for mine, theirs in zip(chosen(one), chosen(alone), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)
    rows = [files.read_jsonl(str(p / "results.jsonl"))[-1] for p in (one, alone)]
    # A score at a threshold may fall to either side of it.
    mine, theirs = ([r.pop("ranking"), *r.pop("metrics").values()] for r in rows)
    for some, others in zip(mine, theirs, strict=True):
        assert some == pytest.approx(others, abs=2e-3)
    for row in rows:
        for name in (*results.PROVENANCE, "details"):  # their digests, of all digits
            del row[name]
    assert rows[0] == rows[1]
    for name in ("config.json", "inputs.json"):
        assert (one / name).read_bytes() == (alone / name).read_bytes()
    mine, theirs = ({n.name.split(".")[0] for n in p.iterdir()} for p in (one, alone))
    assert mine == theirs


def chosen(workdir: pathlib.Path) -> list[np.ndarray]:
    params, _, _ = workdirs.chosen_params(str(workdir), None)
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def test_finished_seeds_are_left_alone_and_another_config_is_refused(together):
    before = (together / "1" / "results.jsonl").read_bytes()
    assert replicas.train_and_evaluate(two_seeds(), str(together), "again") == []
    assert (together / "1" / "results.jsonl").read_bytes() == before
    with pytest.raises(workdirs.RunError, match="these keys differ: model.dropout"):
        changed = two_seeds(**{"model.dropout": 0.1})
        replicas.train_and_evaluate(changed, str(together), "again")
    with pytest.raises(workdirs.RunError, match="several seeds.*--workdir=.*/0"):
        run_lib.evaluate_checkpoint(str(together), None, "")
    with pytest.raises(workdirs.RunError, match="is not empty"):
        fit.train_and_evaluate(config_of(), str(together), "again")
    with pytest.raises(workdirs.RunError, match="a run of one seed: choose another"):
        replicas.train_and_evaluate(two_seeds(), str(together / "0"), "again")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.num_replicas": 0}, "at least 1"),
        ({"model.name": "lr_knn"}, "not for lr_knn: start lr_knn once for each seed"),
        ({"model.name": "mixture"}, "not for mixture"),
        ({"model.name": "seq2seq", "loss.cb_weight": 0.0}, "not for seq2seq"),
        ({"train.crossfit": 5}, "cannot be cross-fitted"),
    ],
)
def test_configs_that_cannot_be_stacked(changes, sentence):
    with pytest.raises(config_lib.ConfigError, match=sentence):
        two_seeds(**{"model.token_dropout": 0.0, **changes})


def test_where_several_seeds_are_not_for(tmp_path, monkeypatch):
    with pytest.raises(workdirs.RunError, match="--mode=train alone"):
        fit.train_and_evaluate(two_seeds(), str(tmp_path / "run"), "")
    with pytest.raises(workdirs.RunError, match="--mode=train alone"):
        run_lib.Run(two_seeds(), "")  # of an estimator
    assert not (tmp_path / "run").exists()
    fewer = [config_of(k, **{"data.validation_size": 100 + k}) for k in (0, 1)]
    monkeypatch.setattr(replicas, "_of_each_seed", lambda config: fewer)
    with pytest.raises(
        workdirs.RunError, match="0 and 1 differ in the number of train"
    ):
        replicas.train_and_evaluate(two_seeds(), str(tmp_path / "two"), "")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(processes.ProcessError, match="takes one process"):
        replicas.train_and_evaluate(two_seeds(), str(tmp_path / "three"), "")


def test_the_config_of_each_seed():
    found = replicas._of_each_seed(config_of(3, **{"train.num_replicas": 2}))
    for k, one in enumerate(found):
        assert config_lib.flatten(one) == config_lib.flatten(config_of(3 + k))
    assert "train.num_replicas" not in json.dumps(config_lib.delta(found[1]))


def test_batches_side_by_side():
    """Those of each training, all as wide as the widest of them needs."""
    runs = [run_lib.Run(config_of(seed), "") for seed in (0, 1)]
    sources = [
        pipeline.Epochs(r.training, 64, r.task.widths, r.config.seed, 1) for r in runs
    ]
    both, padded = pipeline.SideBySide(sources, runs[0].task.widths), 0
    assert len(both) == len(sources[0])
    for step, batch in enumerate(pipeline.stream(both)):
        assert batch["tokens"].shape[2] in runs[0].task.widths
        for k, source in enumerate(sources):
            alone = source[step]
            width = alone["tokens"].shape[1]
            padded += batch["tokens"].shape[2] > width
            assert not batch["tokens"][:, k, width:].any()
            for name, values in alone.items():
                found = batch[name][:, k]
                np.testing.assert_array_equal(
                    found[:, :width] if name == "tokens" else found, values
                )
    assert padded


@pytest.mark.parametrize("number", [1, 2])
def test_a_step_of_several_on_several_devices(number):
    """The sum over devices is of one training, not of all."""
    devices = parallel.Devices(tuple(jax.devices()[:number]))

    def step(carried, batch, constants):
        sums = parallel.total(batch["x"].sum(), devices.axis)
        return carried + constants * sums, sums

    x = np.arange(12.0, dtype=np.float32).reshape(4, 3)  # [B, K]
    compiled = devices.compile(parallel.side_by_side(step, 3))
    state = devices.replicate(parallel.stacked(list(np.ones(3, np.float32))))
    weights = parallel.stacked(list(np.array([1, 2, 3], np.float32)))
    after, sums = devices.first(compiled(state, devices.shard({"x": x}), weights))
    np.testing.assert_array_equal(sums, x.sum(0))
    found = [parallel.one_of(after, 3, k) for k in range(3)]
    np.testing.assert_array_equal(found, 1 + weights * x.sum(0))


@pytest.mark.slow
def test_their_time_beside_taking_turns():
    config = config_of(**{"data.length_buckets": 1})
    found = seeds.measure(config, task.build(config), 2, 1)
    assert found["seeds"] == 2 and found["wider"] == 1.0
    assert found["ratio"] == pytest.approx(
        found["step_ms"] / found["turns_step_ms"], rel=0.05
    )
