"""Sweeps: no row lost or doubled by a kill, failures, locks, choices, Ray."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import running

import cbmlc_jax
from cbmlc_jax import config as config_lib
from cbmlc_jax import files, fit, grids
from experiments import backends, ledger, records, sweep, worker

# Three runs of a second or two: two candidates, and the better one with another seed.
GRID = """
from cbmlc_jax import config as config_lib
from cbmlc_jax import grids


def get_config(preset=""):
    return config_lib.base()


GRIDS = {
    "three": [
        grids.Block(
            [{"model.name": "logistic_regression"}],
            [("nar", 0.3)],
            candidates={"logistic_regression.cost": (0.01, 10.0)},
            seeds=(0, 1),
        )
    ],
    "prior": [grids.Block([{"model.name": "label_prior"}], [("none", None)])],
}
"""
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray is not installed: pip install -e '.[sweep]'",
)


class Place:
    """A folder with a grid, results and runs."""

    def __init__(self, folder: pathlib.Path):
        self.grid, self.runs = folder / "grid.py", folder / "runs"
        self.results = folder / "results" / "three.jsonl"
        self.grid.write_text(GRID)

    def cells(self, name: str = "three", version: str | None = cbmlc_jax.__version__):
        name = f"{self.grid}:{name}"
        return grids.expand(name, *grids.load(name), version)

    def command(self, *flags: str, name: str = "three") -> list[str]:
        return [
            *(sys.executable, "-m", "experiments.sweep", f"--grid={self.grid}:{name}"),
            *(f"--results={self.results}", f"--workdir={self.runs}", *flags),
        ]

    def sweep(self, *flags: str, name: str = "three"):
        return subprocess.run(
            self.command(*flags, name=name),
            capture_output=True,
            text=True,
            timeout=300,
            cwd=running.ROOT,
            env=running.environment(),
        )

    @contextlib.contextmanager
    def started(self, *flags: str):
        """A sweep in a process group of its own, killed at the end if it is there."""
        process = subprocess.Popen(
            self.command(*flags),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=running.ROOT,
            env=running.environment(),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def rows(self) -> list[dict]:
        return files.read_jsonl(str(self.results))

    def run_pid(self, process, key: str) -> int:
        """Of the process that runs `key`, once it holds its lock."""
        lock = self.runs / f"{key}.lock"
        wait_for(lambda: lock.exists() and lock.read_text().strip(), process)
        return int(lock.read_text())


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except FileNotFoundError:
        return False
    return not state.startswith("Z")


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, dict]:
    """The rows of GRID's three runs, made one by one without a sweep."""
    place = Place(tmp_path_factory.mktemp("undisturbed"))
    rows = {}
    [cell] = place.cells()
    while now := grids.ready([cell], rows)[0]:
        config = config_lib.base()
        config.update_from_flattened_dict(dict(now[0].changes))
        workdir = str(place.runs / now[0].key)
        rows[now[0].key] = fit.train_and_evaluate(config, workdir, "test")
    return rows


def assert_same(rows: list[dict], undisturbed: dict[str, dict]) -> None:
    """Each key once, and every number that is no time the same to the last bit."""
    keys = [
        grids.row_key(r["config"], r["noise"]["rate"], cbmlc_jax.__version__)
        for r in rows
    ]
    assert sorted(keys) == sorted(undisturbed)
    for key, row in zip(keys, rows, strict=True):
        for name, value in json.loads(json.dumps(undisturbed[key])).items():
            if name not in ("seconds", "command"):
                assert row[name] == value, name
    assert {row["sweep"]["chosen"] for row in rows} == {True, False}
    best = max(rows, key=lambda r: (r["seed"] == 0, r["selection"]["score"]))
    for row in rows:
        cost = "logistic_regression.cost"
        chosen = row["config"][cost] == best["config"][cost]
        assert row["sweep"]["chosen"] == chosen and row["sweep"]["candidates"] == 2
        assert row["sweep"].get("score") == (
            best["selection"]["score"] if chosen else None
        )


def test_kill_9_loses_and_doubles_nothing(place, undisturbed):
    keys = [p.key for p in grids.ready(place.cells(), {})[0]]
    # The sweep and its runs, while the first one is in its workdir.
    with place.started() as process:
        workdir = place.runs / keys[0]
        wait_for((workdir / "config.json").exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not place.rows()
    # The sweep alone, the moment its first row is there: its next run dies with it.
    with place.started() as process:
        wait_for(place.rows, process)
        pid = place.run_pid(process, keys[1])
        process.kill()
        process.wait()
        wait_for(lambda: not alive(pid))
    results = place.runs / keys[1] / "results.jsonl"
    assert len(place.rows()) == 1 and not results.exists()
    # Between the end of a run and its row.
    with place.started() as process:
        wait_for(results.exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = place.sweep()
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(place.rows(), undisturbed)
    # Nothing is left to do, not even where the rows have to be found again.
    logs = {p: p.read_bytes() for p in place.runs.glob("*.log")}
    assert len(logs) == 3
    place.results.unlink()
    done = place.sweep()
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(place.rows(), undisturbed)
    assert logs == {p: p.read_bytes() for p in place.runs.glob("*.log")}


@needs_ray
def test_a_ray_worker_that_dies(place, undisturbed):
    """A local Ray instance; the worker process of the first run is killed."""
    key = grids.ready(place.cells(), {})[0][0].key
    with place.started("--backend=ray", "--workers=2", "--cpus_per_run=1") as process:
        pid = place.run_pid(process, key)
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        parent = int(stat.rpartition(") ")[2].split()[1])
        assert parent != process.pid
        os.kill(parent, signal.SIGKILL)
        wait_for(lambda: not alive(pid))
        assert not (place.runs / key / "results.jsonl").exists()
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    assert_same(place.rows(), undisturbed)


def test_one_sweep_at_a_time(place):
    folder = str(place.results.parent)
    with ledger.locked(folder):
        done = place.sweep()
    running.assert_one_sentence(
        done, "another sweep", f"process {os.getpid()} on {socket.gethostname()}"
    )
    # A process that is dead holds nothing.
    code = (
        "import os, signal, sys; from experiments import ledger\n"
        "with ledger.locked(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = running.environment()
    dead = subprocess.run([sys.executable, "-c", code, folder], env=env)
    assert dead.returncode == -9
    with ledger.locked(folder):
        pass


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_tried_again(place):
    done = place.sweep("--set=data.validation_size=5000", name="prior")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "5000 validation rows of 1400" in done.stderr
    [failure] = files.read_jsonl(str(place.runs / "failures.jsonl"))
    assert "5000 validation rows of 1400" in failure["error"]
    assert "model.name=label_prior" in failure["run"] and not place.rows()
    done = place.sweep("--set=data.validation_size=500", name="prior")
    assert done.returncode == 0, done.stderr
    assert len(place.rows()) == 1 and not (place.runs / "failures.jsonl").exists()


class Instant:
    """A backend whose runs end at once; `errors` has those that fail, by seed."""

    capacity = 2

    def __init__(self, place: Place, cells, errors: dict[int, str]):
        self.points = {p.key: p for c in cells for runs in c.points for p in runs}
        self.place, self.errors, self.jobs, self.stopped = place, errors, [], False
        self.order = []

    def start(self, job):
        assert len(self.jobs) < self.capacity
        self.jobs.append(job)
        self.order.append(job.key)

    def finished(self, timeout):
        job = self.jobs.pop()
        point = self.points[job.key]
        seed = point.delta.get("seed", 0)
        if seed in self.errors:
            return [(job, self.errors[seed])]
        os.makedirs(job.workdir)
        files.write_jsonl(job.results, [make_row(point)])
        return [(job, None)]

    def stop(self):
        self.stopped = True


def make_row(point: grids.Point, **changes) -> dict:
    score = point.delta["logistic_regression.cost"] / 100
    return {
        **dict.fromkeys(records.FIELDS, None),
        "fingerprint": "f",
        "config": point.delta,
        "seed": point.delta.get("seed", 0),
        "noise": {"kind": point.delta["noise.kind"], "rate": point.rate},
        "selection": {"rule": "corrected_val", "score": score},
        "seconds": {"train": 2.0, "eval": 1.0},
        "versions": {"cbmlc_jax": cbmlc_jax.__version__},
        **changes,
    }


def run_instantly(place, errors=(), **limits):
    cells = place.cells()
    backend = Instant(place, cells, dict(errors))
    with ledger.locked(str(place.results.parent)):
        book = ledger.Ledger(str(place.results))
        one = sweep.Sweep(cells, book, backend, str(place.runs), 1, **limits)
        one.run()
    assert backend.stopped
    return one, backend


def test_other_runs_go_on_after_a_failure(place, capsys):
    place.runs.mkdir()
    one, backend = run_instantly(place, {1: "killed by SIGKILL"})
    assert len(place.rows()) == 2 and len(one.failed) == 1
    assert len(backend.order) == 3  # a failure is not tried again by the same sweep
    assert "killed by SIGKILL" in capsys.readouterr().out
    two, backend = run_instantly(place)
    assert len(place.rows()) == 3 and len(backend.order) == 1 and not two.failed


def test_limits_of_a_working_period(place, capsys):
    place.runs.mkdir()
    one, _ = run_instantly(place, limit=1)
    assert len(place.rows()) == 1
    assert [len(runs) for runs in one.left()] == [1, 1]
    assert (
        "1 done, 0 running, 0 failed, 2 left, about 0:00:0" in capsys.readouterr().out
    )
    _, backend = run_instantly(place, hours=0.0)
    assert not backend.order


def test_a_row_of_another_config_is_refused(place):
    place.runs.mkdir()
    [cell] = place.cells()
    first, second = (runs[0] for runs in cell.points)
    (place.runs / first.key).mkdir()
    files.write_jsonl(str(place.runs / first.key / "results.jsonl"), [make_row(second)])
    one, _ = run_instantly(place)
    assert "another config" in one.failed[first.key]["error"]
    assert len(place.rows()) == 1 and one.left()[1]  # the choice waits for it


def test_rows_of_the_whole_folder_count(place):
    place.results.parent.mkdir()
    [cell] = place.cells()
    first, second = (runs[0] for runs in cell.points)
    old = make_row(second, versions={"cbmlc_jax": "0.0.9", "jax": "0.1"})
    by_hand = place.results.parent / "by_hand.jsonl"
    record = {"record": "predictions", "sha256": "0"}  # of details.jsonl
    files.write_jsonl(str(by_hand), [make_row(first), record, old])
    book = ledger.Ledger(str(place.results))
    assert set(book.rows) == {first.key} and book.of_other_versions == 1
    [cell] = place.cells(version=None)
    book = ledger.Ledger(str(place.results), version=None)
    assert cell.choose(book.rows) == 1
    [mixed] = book.other_versions(set(book.rows))
    assert mixed.startswith("jax 0.1 (here ")
    by_hand.write_text('{"config": {}}\n')
    with pytest.raises(ledger.SweepError, match="by_hand.jsonl is no file of result"):
        ledger.Ledger(str(place.results))


def test_tables_have_the_chosen_candidates_alone(place):
    place.runs.mkdir()
    run_instantly(place)
    rows = place.rows()
    kept = records.read([str(place.results)]).rows
    assert [r["seed"] for r in kept] == [0, 1] and len(rows) == 3
    assert kept[0]["config"]["logistic_regression.cost"] == 10.0


def test_time_left_is_that_of_like_runs(place):
    [cell] = place.cells()
    points = [p for runs in cell.points for p in runs]
    [[[prior]]] = [[runs for runs in c.points] for c in place.cells("prior")]
    assert sweep.estimate(points, [], {}, 1) is None
    rows = {
        "a": make_row(points[0], sweep={"seconds": 10.0}),
        "b": make_row(points[1]),  # without a sweep: what the run itself measured
        "c": make_row(points[0], config=prior.delta, sweep={"seconds": 50.0}),
    }
    assert sweep.estimate(points[:2], [], rows, 1) == 2 * 6.5
    assert sweep.estimate([prior], [], rows, 2) == 25
    now = time.monotonic()
    left = sweep.estimate([], [(prior, now - 20), (points[0], now - 99)], rows, 1)
    assert 29 < left <= 30
    assert sweep.duration(3725.9) == "1:02:05"


def test_why_a_run_ended(tmp_path):
    job = worker.Job("key", (), str(tmp_path), {})
    pathlib.Path(job.log).write_text(
        "error: old\n" + "x" * 9000 + "\nerror: disk full\n"
    )
    assert worker.reason(job, 1) == "status 1: disk full"
    assert "SIGKILL" in worker.reason(job, -9) and "memory" in worker.reason(job, -9)
    assert worker.reason(job, -15) == "killed by SIGTERM"
    pathlib.Path(job.log).write_text("Traceback\nZeroDivisionError: by zero\n")
    assert worker.reason(job, 1) == "status 1: ZeroDivisionError: by zero"


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setenv("CBMLC_DATA_DIR", "there")
    env = worker.environment(3)
    assert env["NPROC"] == env["OMP_NUM_THREADS"] == "3"
    assert env["CBMLC_DATA_DIR"] == "there" and str(running.ROOT) in env["PYTHONPATH"]
    assert backends.cores() >= 1


def test_stopping_leaves_a_run_to_go_on(place):
    """SIGTERM: the sweep ends its run and says how to go on."""
    key = grids.ready(place.cells(), {})[0][0].key
    with place.started() as process:
        pid = place.run_pid(process, key)
        process.terminate()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and "the same command resumes" in out
        assert "Traceback" not in out and not alive(pid)
    with open(place.runs / f"{key}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--workers=0"], ["workers"]),
        (["--set=train.num_epochs"], ["--set=KEY=VALUE"]),
        (["--set=train.num_epohcs=3"], ["num_epohcs"]),
        (["--grid=nowhere.py:x"], ["no file nowhere.py"]),
        (["now"], ["unknown argument 'now'"]),
    ],
)
def test_mistakes(place, flags, parts):
    running.assert_one_sentence(place.sweep(*flags), *parts)


def test_a_dry_run_lists_and_writes_nothing(place):
    done = place.sweep("--dry_run", "--set=train.num_epochs=7")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "cost=0.01" in lines[0] and "num_epochs=7" in lines[1]
    assert lines[2] == "2 runs, and 1 with the hyper-parameters that they choose"
    assert not place.runs.exists() and not place.results.parent.exists()


def test_runs_in_this_process(tmp_path, monkeypatch):
    place = Place(tmp_path)

    def run(**extra) -> sweep.Sweep:
        name = f"{place.grid}:prior"
        cells = grids.expand(name, *grids.load(name), cbmlc_jax.__version__, extra)
        with ledger.locked(str(place.results.parent)):
            book = ledger.Ledger(str(place.results))
            found = sweep.Sweep(cells, book, backends.Here(), str(place.runs), 1)
            found.run()
        return found

    run()
    [row] = files.read_jsonl(str(place.results))
    [log] = place.runs.glob("*.log")
    workdir = str(log.with_suffix(""))
    flags = ["--config.model.name=label_prior", "--config.noise.kind=none"]
    assert row["command"].startswith(f"python -m cbmlc_jax.main --config={place.grid}")
    assert set(flags) <= set(row["command"].split())
    assert row["command"].endswith(f" --workdir={workdir}")
    assert "label_prior on synthetic" in log.read_text()
    assert not run().failed and len(files.read_jsonl(str(place.results))) == 1

    broken = {"data.name": "own", "data.path": f"{tmp_path}/no-such.csv"}
    [failure] = run(**broken).failed.values()
    assert "no-such.csv" in failure["error"]
    assert failure["error"] in pathlib.Path(failure["log"]).read_text()

    def bug(*arguments):
        return 1 / 0

    monkeypatch.setattr(fit, "train_and_evaluate", bug)
    with pytest.raises(ZeroDivisionError):
        run(**{"train.batch_size": 16})
