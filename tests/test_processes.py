"""Two processes train as one, and each writes what is its own: all, or nothing."""

from __future__ import annotations

import contextlib
import socket
import subprocess

import jax
import numpy as np
import pytest
import running

from cbmlc_jax import checkpoints, files, fit, parallel, processes, workdirs
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import pipeline
from cbmlc_jax.data.dataset import Ragged

SECONDS = 120  # that two processes may take on a busy machine


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def trained_by_two(workdirs: list, **changes) -> list[str]:
    """Starts a process for each workdir; returns what they printed."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    env = running.environment()
    with contextlib.ExitStack() as stack:
        started = []
        for i, workdir in enumerate(workdirs):
            words = [coordinator, f"--num_processes={len(workdirs)}"]
            words += [f"--process_id={i}", f"--workdir={workdir}"]
            process = subprocess.Popen(
                running.command(*running.flags(**changes), *words),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=running.ROOT,
                env=env,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        printed = [process.communicate(timeout=SECONDS)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], printed
        return printed


def last_variables(workdir, like):
    store = checkpoints.Checkpoints(str(workdir / "checkpoints"), True)
    with contextlib.closing(store):
        return store.params(store.epochs[-1], like)


def test_two_processes_train_as_one(tmp_path):
    changes = {"train.num_epochs": 1, "optim.averaging": 0.9}
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    config = running.tiny_config(**changes)
    row = fit.train_and_evaluate(config, str(one), "test")
    printed = trained_by_two([two, other], **changes)
    like = run_lib.Run(config, "").system.like
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        last_variables(one, like),
        last_variables(two, like),
    )
    lines = [files.read_jsonl(str(w / "metrics.jsonl")) for w in (one, two)]
    for mine, theirs in zip(*lines, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-5
        assert mine["selection"]["rule"] == theirs["selection"]["rule"]
    [again] = files.read_jsonl(str(two / "results.jsonl"))
    assert again["metrics"]["corrected_val"] == pytest.approx(
        row["metrics"]["corrected_val"], abs=1e-3
    )
    assert sorted(p.name for p in one.iterdir() if "tfevents" not in p.name) == sorted(
        p.name for p in two.iterdir() if "tfevents" not in p.name
    )
    # The second writes nothing, and says nothing: its folder is not even made.
    assert not other.exists()
    assert "thresholds" not in printed[1] and "epoch" not in printed[1]


def test_the_parts_of_a_batch_are_the_batch():
    """Rows, positions and the padding's mask, cut over two processes."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(9)[:n] for n in rng.integers(1, 5, 10)]
    split = pipeline.Split(
        Ragged.from_rows(rows), rng.integers(0, 2, (10, 3)).astype(np.uint8)
    )
    given = (split, 8, [4, 8], 3, 2)
    whole = list(pipeline.stream(pipeline.Epochs(*given)))
    halves = [
        list(pipeline.stream(pipeline.Epochs(*given, part=part)))
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert not whole[0]["mask"].all() or not whole[1]["mask"].all()
    for batch, *parts in zip(whole, *halves, strict=True):
        for name, array in batch.items():
            assert len(parts[0][name]) == 4
            both = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(both, array)


def test_the_rows_of_one_process_are_all():
    devices = parallel.Devices.everywhere(8)
    assert devices == parallel.Devices.local(8)
    assert devices.part(8) == slice(0, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("127.0.0.1:1", None, 0), "needs --num_processes"),
        (("127.0.0.1:1", 2, None), "needs --num_processes"),
        (("127.0.0.1:1", 2, 2), "0 ... N - 1"),
        (("127.0.0.1", 2, 0), "is not host:port"),
    ],
)
def test_what_is_missing_is_said(given, message):
    with pytest.raises(processes.ProcessError, match=message):
        processes.join(*given)


def test_a_process_that_is_gone_is_one_sentence():
    with pytest.raises(processes.ProcessError, match="has ended.* resume"):
        with processes.together():
            raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed")
    for error in (workdirs.RunError("no barrier"), ValueError("an entry is wrong")):
        with pytest.raises(type(error), match=str(error)), processes.together():
            raise error


def test_one_process_hears_itself():
    assert processes.of_first(lambda: (1, 2)) == (1, 2)
    tree = {"a": np.ones(2)}
    assert processes.tree_of_first(tree) is tree
    processes.check_equal("config", {"a": (1, 2)})  # which JSON makes a list
    processes.wait()
