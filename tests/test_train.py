"""Training: what it writes, resuming bit for bit, refusing, surviving a full disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running

from cbmlc_jax import (
    checkpoints,
    details,
    evaluate,
    files,
    fit,
    losses,
    metrics,
    progress,
    replicas,
    results,
    steps,
    systems,
    thresholds,
    workdirs,
)
from cbmlc_jax import config as config_lib
from cbmlc_jax import run as run_lib
from cbmlc_jax.data import pipeline
from experiments import epochs, measure


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run of three epochs on noisy labels; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    changes = {"train.num_epochs": 3, "train.keep": 3}
    config = running.tiny_config(**changes, **running.HALF)
    fit.train_and_evaluate(config, str(workdir), "test")
    return workdir


@pytest.fixture
def copy(finished, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


def saved_params(workdir: pathlib.Path, epoch: int) -> list[np.ndarray]:
    store = checkpoints.Checkpoints(str(workdir / "checkpoints"), read_only=True)
    config = config_lib.restore(workdirs.saved_config(str(workdir)))
    run = run_lib.Run(config, str(workdir))
    params = store.params(epoch, run.system.like)
    store.close()
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def test_everything_that_the_readme_lists_is_written(finished):
    names = {p.name for p in finished.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "results.jsonl",
        "report.txt",
        "details.jsonl",
        "inputs.json",
    } <= names
    assert any(n.startswith("events.out.tfevents") for n in names)
    lines = files.read_jsonl(str(finished / "metrics.jsonl"))
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(0 < line["data_share"] < 1 for line in lines)


def test_waiting_for_batches_is_counted_and_their_use_is_not():
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    waited = progress.Waited(slow())
    for _ in waited:
        time.sleep(0.2)
    assert 0.06 <= waited.seconds < 0.4


def test_result_row(finished):
    [row] = files.read_jsonl(str(finished / "results.jsonl"))
    assert row["dataset"] == "synthetic" and len(row["fingerprint"]) == 64
    assert set(row["metrics"]) == set(thresholds.PROTOCOLS) == set(row["thresholds"])
    for protocol, scores in row["metrics"].items():
        for name, value in scores.items():
            assert 0 <= value <= row["metrics"]["oracle"][name] + 1e-12, protocol
            assert row["thresholds"][protocol][name] in thresholds.GRID
    assert row["rates"]["source"] == "known"
    assert row["rates"]["r0"] == row["noise"]["realised"]["p01"] > 0.01
    assert row["config"]["noise.kind"] == "combined"
    assert "train.progress" not in row["config"]
    assert row["selection"]["rule"] == "corrected_val"
    history = files.read_jsonl(str(finished / "metrics.jsonl"))
    best = max(history, key=lambda h: h["selection"]["score"])
    assert row["epoch"] == best["epoch"]
    assert set(row["expected_f1_metrics"]) == set(thresholds.PROTOCOLS) - {"oracle"}
    for key in ("ranking", "embeddings", "seconds", "versions", "command", "params"):
        assert row[key]


def test_details_belong_to_the_row(finished):
    [row] = files.read_jsonl(str(finished / "results.jsonl"))
    records = files.read_jsonl(str(finished / "details.jsonl"))
    assert row["details"] == {r["record"]: r["sha256"] for r in records}
    found = details.read_predictions(records[0])
    for name, predicted in found.predicted.items():
        scores = metrics.f1_scores(metrics.count(predicted, found.labels))
        assert scores[name] == row["metrics"]["corrected_val"][name]
    embeddings = details.read_label_embeddings(records[1])
    assert embeddings.vectors.shape == (40, row["embeddings"]["dim"])
    vectors = saved_params(finished, row["epoch"])
    assert any(np.array_equal(v, embeddings.vectors) for v in vectors)


@pytest.mark.slow
def test_curves_are_looked_at_and_choose_nothing(finished, tmp_path):
    """The same run with curves: the same row, whatever mAP says of its epochs.

    test_figures and test_report read such rows.
    """
    config = config_lib.restore(workdirs.saved_config(str(finished)))
    config.eval.curves = True
    row = fit.train_and_evaluate(config, str(tmp_path / "watched"), "test")
    [plain] = files.read_jsonl(str(finished / "results.jsonl"))
    curves = row.pop("curves")
    for name in results.PROVENANCE:
        row.pop(name), plain.pop(name)
    assert row == plain and "curves" not in plain
    assert curves["epoch"] == [1, 2, 3]
    assert curves["test_mAP"][row["epoch"] - 1] == row["ranking"]["mAP"]
    assert curves["train_mAP"] != curves["test_mAP"]
    history = files.read_jsonl(str(tmp_path / "watched" / "metrics.jsonl"))
    for i, line in enumerate(history):
        line["mAP"] = {"train": 0.1 * i, "test": 1.0 if i == 0 else 0.0}
        line["selection"]["score"] = [0.2, 0.3, 0.1][i]
    assert workdirs.choose_epoch(history) == 2


def test_report_says_what_the_row_says(finished):
    text = (finished / "report.txt").read_text()
    [row] = files.read_jsonl(str(finished / "results.jsonl"))
    for protocol in thresholds.PROTOCOLS:
        line = next(x for x in text.splitlines() if x.strip().startswith(protocol))
        for value in row["metrics"][protocol].values():
            assert f"{value:.4f}" in line
    assert f"P(1->0) {row['noise']['realised']['p10']:.4f}" in text
    assert f"mAP {row['ranking']['mAP']:.4f}" in text
    assert "worst 10 labels" in text and "best 10 labels" in text


def test_a_finished_run_is_left_alone(copy, capsys):
    before = (copy / "results.jsonl").read_bytes()
    config = config_lib.restore(workdirs.saved_config(str(copy)))
    assert fit.train_and_evaluate(config, str(copy), "again") is None
    assert (copy / "results.jsonl").read_bytes() == before


def test_a_workdir_of_another_config_is_refused(copy):
    config = config_lib.restore(workdirs.saved_config(str(copy)))
    config.loss.gamma_neg, config.seed, config.train.progress = 4.0, 5, True
    with pytest.raises(workdirs.RunError) as caught:
        fit.train_and_evaluate(config, str(copy), "")
    assert "loss.gamma_neg, seed." in str(caught.value)
    assert "progress" not in str(caught.value)


def test_a_key_that_came_later_has_its_default(copy):
    path = copy / "config.json"
    saved = json.loads(path.read_text())
    del saved["train.matmul_precision"]
    path.write_text(json.dumps(saved))
    config = config_lib.restore(workdirs.saved_config(str(copy)))
    assert fit.train_and_evaluate(config, str(copy), "again") is None
    config.train.matmul_precision = "bfloat16"
    with pytest.raises(workdirs.RunError, match="train.matmul_precision"):
        fit.train_and_evaluate(config, str(copy), "")


@pytest.mark.slow
def test_the_loss_in_bfloat16_is_that_in_float32(tmp_path):
    """Every epoch's within 1 %, over more than 200 steps.

    test_attention and test_neighbours compare single products.
    """
    losses = {}
    for precision in ("float32", "bfloat16"):
        workdir = tmp_path / precision
        config = running.tiny_config(
            **{
                "train.matmul_precision": precision,
                "train.num_epochs": 8,
                "train.eval_every": 8,
                "train.checkpoint_every": 8,
                "train.num_devices": 1,
                "train.batch_size": 8,
                "model.dropout": 0.2,
            }
        )
        fit.train_and_evaluate(config, str(workdir), "")
        history = files.read_jsonl(str(workdir / "metrics.jsonl"))
        assert history[-1]["step"] >= 200
        losses[precision] = np.array([line["loss"] for line in history])
    assert losses["float32"][-1] < 0.9 * losses["float32"][0]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)
    assert (losses["bfloat16"] != losses["float32"]).all()


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(workdirs.RunError, match=r"not empty .*thesis\.tex"):
        workdirs.claim(running.tiny_config(), str(tmp_path))


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    workdir = str(tmp_path / "run")
    with workdirs.held(workdir):
        config = running.tiny_config()
        for train_there in (fit.train_and_evaluate, replicas.train_and_evaluate):
            with pytest.raises(workdirs.RunError, match="another process is training"):
                train_there(config, workdir, "")
        assert os.listdir(workdir) == []
    with workdirs.held(workdir):
        pass
    with workdirs.held(os.path.join(workdir, "1")):  # a single run of one of the seeds
        several = running.tiny_config(**{"train.num_replicas": 2})
        with pytest.raises(workdirs.RunError, match=r"training in .*run.1:"):
            replicas.train_and_evaluate(several, workdir, "")


def test_eval_reproduces_the_row_exactly(copy, capsys):
    row = run_lib.evaluate_checkpoint(str(copy), None, "eval")
    [before] = files.read_jsonl(str(copy / "results.jsonl"))
    for key in set(before) - set(results.PROVENANCE):
        assert row[key] == before[key], key
    assert "reproduces the row in results.jsonl exactly" in capsys.readouterr().out


def test_eval_notices_a_changed_row(copy, capsys):
    [row] = files.read_jsonl(str(copy / "results.jsonl"))
    row["metrics"]["oracle"]["miF1"] += 1e-12
    files.write_jsonl(str(copy / "results.jsonl"), [row])
    run_lib.evaluate_checkpoint(str(copy), None, "eval")
    assert "differs from the row in results.jsonl in: metrics" in (
        capsys.readouterr().out
    )


def wait_for_epochs(workdir: pathlib.Path, epochs: int, process) -> None:
    deadline = time.monotonic() + 200
    folder = workdir / "checkpoints"
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if folder.exists() and any(
            p.name.isdigit() and int(p.name) >= epochs for p in folder.iterdir()
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of epoch {epochs}")


def test_every_kept_epoch_is_scored(finished, tmp_path, capsys):
    target = tmp_path / "epochs.jsonl"
    epochs.main([str(finished), f"--output={target}"])
    [line], [row] = map(
        files.read_jsonl, (str(target), str(finished / "results.jsonl"))
    )
    assert [e["epoch"] for e in line["epochs"]] == [1, 2, 3]
    assert line["command"] == row["command"]
    chosen = line["epochs"][row["epoch"] - 1]
    for part in ("metrics", "expected_f1_metrics", "thresholds", "ranking"):
        assert chosen[part] == row[part], part
    for name, best in line["own_epoch"]["oracle"].items():
        values = [e["metrics"]["oracle"][name] for e in line["epochs"]]
        assert best["value"] == max(values) == values[best["epoch"] - 1]
    assert "epoch" in capsys.readouterr().out
    with pytest.raises(workdirs.RunError, match="holds no run"):
        epochs.measure(str(tmp_path))


def test_an_f1_takes_the_epoch_where_validation_has_most_of_it():
    """The second epoch by validation, though test has more in the third."""
    names, protocols = ("ebF1", "miF1", "maF1"), thresholds.PROTOCOLS
    values, best = (0.1, 0.2, 0.3), (0.5, 0.7, 0.7)
    lines = [
        {
            "epoch": i + 1,
            "metrics": {p: dict.fromkeys(names, values[i]) for p in protocols},
        }
        for i in range(3)
    ]
    reached = [{p: dict.fromkeys(names, b) for p in protocols} for b in best]
    found = epochs.own_epochs(lines, reached)
    assert found["noisy_val"]["maF1"] == {"epoch": 2, "value": 0.2}
    assert epochs.published_epoch(reached) == 2, "the third is as good as the second"
    reached[2]["noisy_val"] = {"ebF1": 0.6, "miF1": 0.69, "maF1": 0.4}
    assert epochs.published_epoch(reached) == 1


def test_six_epochs_and_three_kill_three_give_the_same_bits(tmp_path):
    changes = {"train.num_epochs": 6, "train.keep": 6}
    arguments = running.flags(**changes, **running.HALF)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = running.main(f"--workdir={straight}", *arguments)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        running.command(f"--workdir={killed}", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=running.ROOT,
        env=running.environment(),
    )
    wait_for_epochs(killed, 1, process)
    done = running.main(f"--workdir={killed}", *arguments)
    running.assert_one_sentence(done, "another process is training in", "--workdir")
    wait_for_epochs(killed, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "results.jsonl").exists()
    epochs_before = {int(p.name) for p in (killed / "checkpoints").glob("[0-9]")}
    assert max(epochs_before) < 6
    done = running.main(f"--workdir={killed}", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"resuming {killed} after epoch {max(epochs_before)}" in done.stdout
    for a, b in zip(saved_params(straight, 6), saved_params(killed, 6), strict=True):
        assert a.tobytes() == b.tobytes()
    one, two = (files.read_jsonl(str(w / "metrics.jsonl")) for w in (straight, killed))
    for a, b in zip(one, two, strict=True):
        assert (a["loss"], a["selection"]) == (b["loss"], b["selection"])
    [a], [b] = (files.read_jsonl(str(w / "results.jsonl")) for w in (straight, killed))
    assert a["metrics"] == b["metrics"] and a["epoch"] == b["epoch"]


@pytest.mark.slow
def test_averaged_weights_score_and_the_others_go_on(tmp_path):
    """What is saved as `params` is the average; a resumed run has the same bits."""
    changes = {"train.num_epochs": 3, "train.keep": 3, "optim.averaging": 0.9}
    config = running.tiny_config(**changes, **{"model.linear_path": True})
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    row = fit.train_and_evaluate(config, str(straight), "")
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "3")
    (resumed / "results.jsonl").unlink()
    again = fit.train_and_evaluate(config, str(resumed), "")
    assert again["metrics"] == row["metrics"]
    for a, b in zip(saved_params(straight, 3), saved_params(resumed, 3), strict=True):
        assert a.tobytes() == b.tobytes()
    # Averaging changes what is scored, never how it is trained.
    config.optim.averaging = 0.0
    plain = tmp_path / "plain"
    fit.train_and_evaluate(config, str(plain), "")
    averages, last = saved_params(straight, 3), saved_params(plain, 3)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(averages, last, strict=True))
    histories = [
        [line["loss"] for line in files.read_jsonl(str(folder / "metrics.jsonl"))]
        for folder in (straight, plain)
    ]
    assert histories[0] == histories[1]


def test_a_full_disk_leaves_the_earlier_checkpoint(copy, tmp_path):
    """A limit on file sizes stands for the full disk: writing fails half-way."""
    (copy / "results.jsonl").unlink()
    store = checkpoints.Checkpoints(str(copy / "checkpoints"))
    store.keep_only({min(store.epochs)})
    [epoch] = store.epochs
    store.close()
    assert epoch < 3
    before = saved_params(copy, epoch)
    changes = {"train.num_epochs": 3, "train.keep": 3}
    arguments = [f"--workdir={copy}", *running.flags(**changes, **running.HALF)]

    done = running.main(*arguments, largest_file_kb=9)
    running.assert_one_sentence(
        done, "could not save the checkpoint of epoch", "intact", "File too large"
    )
    after = saved_params(copy, epoch)
    assert [a.tobytes() for a in before] == [a.tobytes() for a in after]
    done = running.main(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"resuming {copy} after epoch {epoch}" in done.stdout
    assert not list((copy / "checkpoints").glob("*tmp*"))


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    store = checkpoints.Checkpoints(str(tmp_path / "checkpoints"))
    tree = {"w": np.zeros(1000, np.float32)}
    store.save(1, tree, tree, [])
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 5 << 20)
    )
    with pytest.raises(checkpoints.CheckpointError, match=r"are 5 MB .* intact"):
        store.save(2, tree, tree, [])
    assert store.epochs == [1]
    store.close()


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_a_damaged_checkpoint_is_one_sentence(copy):
    for folder in (copy / "checkpoints").iterdir():
        if (folder / "params").exists():
            file = largest_file(folder / "params")
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = running.main("--mode=eval", f"--workdir={copy}")
    running.assert_one_sentence(done, "cannot be read", "damaged")


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d"])
def test_a_damaged_checkpoint_is_said_to_be_so_whatever_file_it_is(tmp_path, name):
    folder, like = tmp_path / "checkpoints", {"w": np.ones((20, 5), np.float32)}
    store = checkpoints.Checkpoints(str(folder))
    store.save(1, like, {"step": np.zeros(1)}, [])
    store.close()
    file = folder / "1" / "params" / name
    file = largest_file(file) if file.is_dir() else file
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with contextlib.closing(checkpoints.Checkpoints(str(folder), True)) as store:
        with pytest.raises(
            checkpoints.CheckpointError, match=r"1 cannot be read .*dam"
        ):
            store.params(1, like)


def test_only_closed_loops_are_silenced_after_an_error(tmp_path, monkeypatch):
    store = checkpoints.Checkpoints(str(tmp_path / "checkpoints"))
    store.save(1, {"w": np.zeros(3)}, {"w": np.zeros(3)}, [])
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    closed = types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = types.SimpleNamespace(exc_value=RuntimeError("another"))

    assert store.history(1) == []
    sys.unraisablehook(closed)
    assert shown == [closed]
    (tmp_path / "checkpoints" / "1" / "history" / "metadata").write_text("{")
    with pytest.raises(checkpoints.CheckpointError, match="damaged"):
        store.history(1)
    sys.unraisablehook(closed)  # as the threads that are still at it do
    sys.unraisablehook(other)
    assert shown == [closed, other]
    store.close()


def test_a_checkpoint_of_another_model_names_the_shapes(copy):
    path = copy / "config.json"
    content = json.loads(path.read_text())
    content["model.ffn_width"] = 16
    path.write_text(json.dumps(content))
    with pytest.raises(checkpoints.CheckpointError) as caught:
        run_lib.evaluate_checkpoint(str(copy), None, "eval")
    assert "ffn" in str(caught.value)
    assert "(8,)" in str(caught.value) and "(16,)" in str(caught.value)


def test_a_foreign_folder_as_checkpoint(copy):
    store = copy / "checkpoints"
    shutil.rmtree(store)
    (store / "7").mkdir(parents=True)
    (store / "7" / "weights.bin").write_bytes(b"no checkpoint")
    with pytest.raises(checkpoints.CheckpointError):
        run_lib.evaluate_checkpoint(str(copy), None, "eval")


def test_no_run_and_no_checkpoint(tmp_path, copy):
    with pytest.raises(workdirs.RunError, match="holds no run"):
        run_lib.evaluate_checkpoint(str(tmp_path), None, "eval")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(checkpoints.CheckpointError, match="train there first"):
        run_lib.evaluate_checkpoint(str(copy), None, "eval")


def test_a_diverging_run_says_so(tmp_path):
    config = running.tiny_config(**{"optim.learning_rate": 1e30}, **running.HALF)
    with pytest.raises(workdirs.RunError, match=r"not finite .*learning_rate"):
        fit.train_and_evaluate(config, str(tmp_path / "run"), "test")


def line(epoch: int, score: float | None, rule: str = "noisy_val") -> dict:
    return {"epoch": epoch, "selection": {"rule": rule, "score": score}}


def test_the_earlier_of_equal_epochs_is_chosen():
    history = [line(1, 0.2), line(2, 0.4), line(3, None), line(4, 0.4)]
    assert workdirs.choose_epoch(history) == 2
    assert workdirs.choose_epoch([line(1, None), line(2, None)]) == 2
    assert workdirs.choose_epoch([line(1, None, "last"), line(2, None, "last")]) == 2


def test_patience_counts_evaluations_after_the_best():
    history = [line(1, 0.4), line(2, 0.3), line(3, None), line(4, 0.2)]
    assert not run_lib.out_of_patience(history, 0)
    assert run_lib.out_of_patience(history, 2)
    assert not run_lib.out_of_patience(history, 3)
    assert not run_lib.out_of_patience([], 1)


def test_patience_stops_a_run_and_keeps_the_best(tmp_path):
    changes = {"train.num_epochs": 40, "train.patience": 2, "optim.learning_rate": 0.1}
    config = running.tiny_config(**changes, **running.HALF)
    row = fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    history = files.read_jsonl(str(tmp_path / "run" / "metrics.jsonl"))
    assert len(history) == row["epoch"] + 2 < 40
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")}
    assert kept == {row["epoch"], len(history)}


@pytest.mark.slow
def test_the_last_epoch_can_be_the_rule(tmp_path):
    config = running.tiny_config(
        **{"train.num_epochs": 2, "train.selection": "last", "train.eval_every": 2}
    )
    row = fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    assert row["epoch"] == 2 and row["selection"]["score"] is None
    assert "epoch 2, the last one" in (tmp_path / "run" / "report.txt").read_text()


def test_fixed_embeddings_stay_at_the_word_vectors():
    config = running.tiny_config(**{"embeddings.trainable": False})
    run = run_lib.Run(config, "")
    params = run.system.init()["params"]
    np.testing.assert_array_equal(
        params["decoder"]["label_embeddings"], run.task.meta.label_vectors
    )
    tx = steps.make_tx(config, 1)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert not np.any(updates["decoder"].pop("label_embeddings"))
    assert all(np.all(x != 0) for x in jax.tree.leaves(updates))


@pytest.mark.slow
def test_two_devices_train_as_one(tmp_path):
    """test_parallel compares the steps."""
    rows = []
    for n in (1, 2):
        config = running.tiny_config(
            **{"train.num_epochs": 1, "train.num_devices": n, "noise.kind": "none"}
        )
        workdir = tmp_path / str(n)
        fit.train_and_evaluate(config, str(workdir), "test")
        rows += files.read_jsonl(str(workdir / "metrics.jsonl"))
    assert math.isclose(rows[0]["loss"], rows[1]["loss"], rel_tol=1e-4)


@pytest.mark.parametrize(
    "reduction", [pytest.param("sum", marks=pytest.mark.slow), "mean"]
)
def test_a_row_of_weight_three_is_three_rows_of_a_step(reduction):
    changes = {"model.dropout": 0.0, "loss.reduction": reduction, "optim.name": "sgd"}
    config = running.tiny_config(**changes, **running.HALF)
    run = run_lib.Run(config, "")
    tx = steps.make_tx(config, 1)
    step = steps.make_train_step(run.system.model, config, tx, None, steps_per_epoch=1)
    params = run.system.init()["params"]
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))
    vectors, rates = run.task.meta.label_vectors, run.task.rates
    constants = steps.step_constants(config, None, vectors, rates)
    some = run.task.train.take(np.arange(3))
    weights = np.array([1, 3, 0], np.float32)
    weighted = dataclasses.replace(some, sample_weight=weights)
    after = {}
    for name, split, rows in (
        ("weighted", weighted, [0, 1, 2, -1]),
        ("repeated", some, [0, 1, 1, 1]),
        ("plain", some, [0, 1, 2, -1]),
    ):
        plan = pipeline.Plan(np.array([rows]), [int(some.inputs.lengths.max())])
        batch = pipeline.Batches(split.inputs, plan, split)[0]
        assert ("sample_weight" in batch) == (name == "weighted")
        found, metrics = jax.jit(step)(state, batch, constants)
        after[name] = jax.tree.leaves((found.params, metrics["loss"]))
    for one, other in zip(after["weighted"], after["repeated"], strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert abs(after["plain"][-1] - after["weighted"][-1]) > 1e-4


@pytest.mark.slow
def test_rows_in_parts_train_as_all_at_once(tmp_path, monkeypatch):
    """Two rows at a time: the same loss, parameters and scores."""
    config = running.tiny_config(**{"train.batch_size": 8, "train.num_epochs": 1})
    config.eval.batch_size = 8
    both = []
    for nodes in (2 * 40, 8 * 40):
        monkeypatch.setattr(systems, "LABEL_NODES", nodes)
        assert systems.num_parts("cbmlc", 8, 40) == 8 * 40 // nodes
        run = run_lib.Run(config, str(tmp_path))
        ours = measure.Ours(config, run.task, 2)
        for number in range(2):
            ours.compile(number)
            ours.step(number)
        scores = run.system.scores(run.system.init(), run.task.test.inputs)
        both.append((ours.params, scores))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *both
    )


def test_parts_divide_the_rows():
    parts = [systems.num_parts("cbmlc", rows, 983) for rows in (1, 7, 14, 32, 33)]
    assert parts == [1, 1, 2, 4, 11]
    assert systems.num_parts("cbmlc", 32, 30000) == 16
    assert systems.num_parts("cbmlc", 32, 159) == 1
    assert systems.num_parts("mpvae", 32, 30000) == 1


def test_selection_rules(tmp_path):
    """clean labels, noise that leaves nothing, and the fall-back with its warning."""
    rng = np.random.default_rng(0)
    clean = (rng.random((50, 4)) < 0.4).astype(np.uint8)
    scores = (clean * 0.3 + rng.random((50, 4)) * 0.7).astype(np.float32)
    noisy = clean ^ (rng.random((50, 4)) < 0.5).astype(np.uint8)
    rates = thresholds.Rates(0.5, 0.5)
    validation = evaluate.Validation(scores, noisy, clean, noisy.mean(0), rates)
    assert evaluate.selection_score(validation, "corrected_val")[1] == "noisy_val"
    parts, warnings = evaluate.protocols(validation, scores, clean)
    assert parts["thresholds"]["corrected_val"] == parts["thresholds"]["noisy_val"]
    assert len(warnings) == 1 and "leave no information" in warnings[0]
    seen = evaluate.Validation(
        scores, clean, clean, clean.mean(0), rates, labels_are_clean=True
    )
    score, rule = evaluate.selection_score(seen, "corrected_val")
    assert rule == "corrected_val"
    assert score == thresholds.f1_curves(scores, clean)["miF1"].max()
    assert evaluate.protocols(seen, scores, clean)[1] == []


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.txt"
    files.write_atomic(str(path), "old")

    def pieces():
        yield "half"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        files.write_atomic(str(path), pieces())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_forward_correction_without_information_is_refused(tmp_path):
    config = running.tiny_config(
        **{"loss.name": "forward", "noise.kind": "ncar", "noise.rate": 0.5}
    )
    with pytest.raises(
        workdirs.RunError, match=r"r0=0\.4.* no information: choose .* than forward"
    ):
        fit.train_and_evaluate(config, str(tmp_path / "run"), "test")


def test_the_config_names_the_loss_and_its_settings():
    """Each name is its function of losses.py with the values of config.loss."""
    c = config_lib.base().loss
    c.hill_weight, c.splc_threshold, c.rejected_per_epoch = 1.7, 0.55, 0.1
    c.positive_margin, c.positive_gamma = 0.5, 1.5
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 5)).astype(np.float32)
    labels = (rng.random((6, 5)) < 0.4).astype(np.float32)
    mask, rates = np.arange(6) < 5, thresholds.Rates(0.05, 0.3)
    positive = {"margin": 0.5, "gamma": 1.5}
    expected = {
        "bce": losses.bce(logits, labels),
        "asl": losses.asl(logits, labels, gamma_pos=1.0, gamma_neg=2.0, margin=0.05),
        "hill": losses.hill(logits, labels, weight=1.7, **positive),
        "splc": losses.splc(logits, labels, 3, tau=0.55, **positive),
        "large_loss": losses.large_loss(logits, labels, 0.2, mask),
        "forward": losses.forward(logits, labels, 0.05, 0.3),
    }
    assert set(expected) == set(config_lib.CHOICES["loss.name"])
    for name, values in expected.items():
        c.name = name
        mine = steps.element_losses(c, logits, labels, mask, 3, rates, lambda x: x)
        np.testing.assert_allclose(mine, values, rtol=1e-6, err_msg=name)
    different = {np.asarray(v).tobytes() for v in expected.values()}
    assert len(different) == len(expected)
