"""Runs a grid of experiments, each once, however often it is stopped.

    python -m experiments.sweep --grid=configs/bibtex.py:paper --workers=2

Reads the rows in the folder of --results, starts what they lack, and adds a row for
each run that ends.  experiments/README.md says how to stop, resume and use Ray.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence

from absl import app, flags

import cbmlc_jax
from cbmlc_jax import errors, grids
from experiments import backends, ledger, worker

_TICK = 0.5  # seconds between looks at the runs
_LINE_EVERY = 300.0  # seconds between lines where nothing happens


def define_flags() -> None:
    """Defines the flags of the command line."""
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    flags.DEFINE_multi_string("grid", [], "configs/x.py:name, as often as you like.")
    text("results", None, "Where rows go; default experiments/results/<grid>.jsonl.")
    text("workdir", os.path.join("runs", "sweep"), "The runs' folders and logs.")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE of the config, for every run.")
    flags.DEFINE_enum("backend", "local", ("local", "ray"), "Where runs run.")
    number("workers", 1, "Runs at a time.", 1)
    number("cpus_per_run", None, "Threads of a run; default cores / workers.", 1)
    flags.DEFINE_float("gpus_per_run", 0.0, "ray: GPUs that a run needs.", 0.0)
    text("ray_address", None, "ray: a cluster; default: an instance of its own.")
    number("limit", None, "Start at most so many runs.", 0)
    flags.DEFINE_float("hours", None, "Start no run after so many hours.", 0.0)
    flags.DEFINE_bool("dry_run", False, "List what would run.")
    flags.DEFINE_bool(
        "ignore_versions", False, "Rows of other versions of cbmlc_jax count, too."
    )


class Sweep:
    """The loop: starts runs, adds their rows, tells how it goes.

    Args:
        cells: of all grids.
        book: of the rows.
        backend: see backends.py.
        workdir: of all runs.
        threads: of each run.
        limit: of runs to start; None: none.
        hours: after which no run is started; None: no end.
    """

    def __init__(self, cells, book, backend, workdir, threads, limit=None, hours=None):
        self.cells, self.book, self.backend = cells, book, backend
        self.workdir, self.env = workdir, worker.environment(threads)
        self.limit = limit
        self.until = None if hours is None else time.monotonic() + 3600 * hours
        self.running: dict[str, tuple[grids.Point, float]] = {}
        self.failed: dict[str, dict] = {}
        self.started = 0
        self._failures = os.path.join(workdir, "failures.jsonl")
        self._shown, self._last = "", 0.0

    def run(self) -> None:
        """Until everything has a row, has failed or may not be started."""
        try:
            ledger.write_failures(self._failures, {})
            while self._fill():
                for job, error in self.backend.finished(_TICK):
                    self._ended(job, error)
        finally:
            self.backend.stop()

    def left(self) -> tuple[list[grids.Point], list[grids.Point]]:
        """Runs that can start and have not yet; those that wait for a choice."""
        now, later = grids.ready(self.cells, self.book.rows)
        busy = self.running.keys() | self.failed.keys()
        return [p for p in now if p.key not in busy], later

    def _fill(self) -> bool:
        """Starts what can start; whether anything runs."""
        left, later = self.left()
        # Of a sweep that was killed before it had added their rows, which may choose.
        while found := [p for p in left if os.path.exists(self._job(p).results)]:
            for point in found:
                self._collect(point, None)
            left, later = self.left()
        for point in left[: self.backend.capacity - len(self.running)]:
            late = self.until is not None and time.monotonic() >= self.until
            if late or self.started == self.limit:
                break
            self.running[point.key] = point, time.monotonic()
            self.started += 1
            self.backend.start(self._job(point))
        self._show(left + later)
        return bool(self.running)

    def _job(self, point: grids.Point) -> worker.Job:
        return worker.Job(point.key, tuple(point.flags()), self.workdir, self.env)

    def _ended(self, job: worker.Job, error: str | None) -> None:
        point, start = self.running.pop(job.key)
        if error is None:
            self._collect(point, round(time.monotonic() - start, 1))
        else:
            self._fail(point, error)

    def _collect(self, point: grids.Point, seconds: float | None) -> None:
        row = ledger.read_row(self._job(point).results)
        if row is None or self.book.key(row) != point.key:
            self._fail(point, "it ended well, but its row is of another config")
            return
        self.book.add(row, seconds, self.cells)
        score = row["selection"]["score"]
        text = "" if score is None else f", miF1 on validation {score:.4f}"
        self._say(f"done: {point}{text}" + (f", {seconds:.0f} s" if seconds else ""))

    def _fail(self, point: grids.Point, error: str) -> None:
        job = self._job(point)
        self.failed[point.key] = {
            "run": str(point),
            "error": error,
            "log": job.log,
            "flags": job.flags,
        }
        ledger.write_failures(self._failures, self.failed)
        self._say(f"failed: {point}: {error} (see {job.log})")

    def _show(self, left: Sequence[grids.Point]) -> None:
        """The line of numbers: on a terminal in its place, else when it has changed."""
        waiting = [p for p in left if p.key not in self.running]
        done = sum(1 for runs in self._wanted() if runs in self.book.rows)
        text = (
            f"{done} done, {len(self.running)} running, {len(self.failed)} failed, "
            f"{len(waiting)} left"
        )
        seconds = estimate(
            waiting, list(self.running.values()), self.book.rows, self.backend.capacity
        )
        if seconds is not None:
            text += f", about {duration(seconds)} to go"
        now = time.monotonic()
        if sys.stdout.isatty():
            print(f"\r{text}\033[K", end="", flush=True)
        elif text.split(", about")[0] != self._shown or now - self._last > _LINE_EVERY:
            print(text, flush=True)
            self._last = now
        self._shown = text.split(", about")[0]

    def _wanted(self) -> set[str]:
        return {p.key for cell in self.cells for runs in cell.points for p in runs}

    def _say(self, text: str) -> None:
        print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)


def estimate(
    waiting: Sequence[grids.Point],
    running: Sequence[tuple[grids.Point, float]],
    rows: dict[str, dict],
    workers: int,
) -> float | None:
    """Seconds until all is done, by the mean of the rows of like runs.

    A run without like rows counts as the mean of all; None: there is no row yet.
    """
    measured = collections.defaultdict(list)
    for row in rows.values():
        seconds = row.get("sweep", {}).get("seconds") or sum(row["seconds"].values())
        measured[grids.like(row["config"])].append(seconds)
    if not measured:
        return None
    mean = {k: sum(v) / len(v) for k, v in measured.items()}
    of_all = sum(map(sum, measured.values())) / sum(map(len, measured.values()))

    def expected(point):
        return mean.get(grids.like(point.delta), of_all)

    now = time.monotonic()
    total = sum(expected(p) for p in waiting)
    total += sum(max(0.0, expected(p) - (now - start)) for p, start in running)
    return total / workers


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def changes(words: Sequence[str]) -> dict[str, object]:
    """{"train.num_epochs": 3} of --set=train.num_epochs=3.

    Raises:
        SweepError: there is no "=".
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ledger.SweepError(f"--set={word}: write --set=KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[key] = value  # text needs no quotes
    return found


def list_runs(cells: Sequence[grids.Cell], book: ledger.Ledger, workers: int) -> None:
    """What --dry_run prints."""
    now, later = grids.ready(cells, book.rows)
    for point in now:
        print(point)
    text = (
        f"{len(now)} runs, and {len(later)} with the hyper-parameters that they choose"
    )
    seconds = estimate(now + later, [], book.rows, workers)
    if seconds is not None:
        text += f"; about {duration(seconds)} at {workers} a time"
        known = {grids.like(row["config"]) for row in book.rows.values()}
        if guessed := sum(grids.like(p.delta) not in known for p in now + later):
            text += f", a guess for {guessed} of them, which no row is like"
    print(text)


def main(argv: list[str]) -> int:
    """Returns the exit status: 1 where a run failed."""
    if len(argv) > 1:
        raise ledger.SweepError(f"unknown argument {argv[1]!r}")
    values = flags.FLAGS
    if not values.grid:
        raise ledger.SweepError("name a grid: --grid=configs/bibtex.py:small")
    version = None if values.ignore_versions else cbmlc_jax.__version__
    extra = changes(values.set)
    cells = [
        cell
        for name in values.grid
        for cell in grids.expand(name, *grids.load(name), version, extra)
    ]
    names = sorted({name.partition(":")[2] for name in values.grid})
    path = values.results or os.path.join(
        "experiments", "results", "-".join(names) + ".jsonl"
    )
    if values.dry_run:
        list_runs(cells, _book(path, version, cells), values.workers)
        return 0
    folders = {os.path.dirname(os.path.abspath(path)), os.path.abspath(values.workdir)}
    with contextlib.ExitStack() as stack:
        for folder in sorted(folders):
            stack.enter_context(ledger.locked(folder))
        book = _book(path, version, cells)
        threads = values.cpus_per_run or max(1, backends.cores() // values.workers)
        sweep = Sweep(
            cells,
            book,
            _backend(values, threads),
            values.workdir,
            threads,
            values.limit,
            values.hours,
        )
        sweep.run()
        return _summary(sweep)


def _book(path: str, version: str | None, cells) -> ledger.Ledger:
    book = ledger.Ledger(path, version)
    if book.of_other_versions:
        print(
            f"note: {book.of_other_versions} rows there are not of cbmlc_jax {version} "
            "and do not count (--ignore_versions)"
        )
    wanted = {p.key for cell in cells for runs in cell.points for p in runs}
    if mixed := book.other_versions(wanted):
        print(
            f"note: rows that count were made with {', '.join(mixed)}: numbers may "
            "differ in their last digits"
        )
    return book


def _backend(values, threads: int):
    if values.backend == "local":
        return backends.Local(values.workers)
    return backends.Ray(
        values.workers, values.ray_address, threads, values.gpus_per_run
    )


def _summary(sweep: Sweep) -> int:
    left, later = sweep.left()
    if sys.stdout.isatty():
        print()
    print(f"rows in {sweep.book.path}")
    if left or later:
        print(f"{len(left) + len(later)} runs are left: the same command goes on")
    for failure in sweep.failed.values():
        print(f"failed: {failure['run']}: {failure['error']}", file=sys.stderr)
    return 1 if sweep.failed else 0


def _parse(argv: list[str]) -> list[str]:
    with errors.in_flags():
        return flags.FLAGS(argv)


def _stop(number, frame) -> None:
    raise KeyboardInterrupt


def run() -> None:
    """Entry point: a user's mistake becomes one sentence, not a traceback."""
    signal.signal(signal.SIGTERM, _stop)
    with errors.explained():
        define_flags()
        app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
