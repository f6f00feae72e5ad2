"""Where the runs of a sweep run: here, in processes of this machine, or on Ray.

A backend has `capacity` (runs at a time), `start(job)`, `finished(timeout)`, which
waits for runs to end and gives (job, error) with None for a success, and `stop()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time

from cbmlc_jax import errors
from experiments import worker
from experiments.ledger import SweepError

_POLL = 0.05  # seconds
_GRACE = 10.0  # seconds from SIGTERM to SIGKILL
RETRIES = 3  # of a run whose Ray worker or node died


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Here:
    """This process, one run after another.

    For notebooks: of a GPU or TPU that this process holds another one gets little or
    nothing.  What is no mistake of the user is raised.
    """

    capacity = 1

    def __init__(self):
        self._ended: list[tuple[worker.Job, str | None]] = []

    def start(self, job: worker.Job) -> None:
        """Returns when the run has ended; its output is appended to job.log."""
        from cbmlc_jax import fit  # imports JAX, which a sweep itself does without

        config, error = worker.config(job), None
        os.makedirs(job.folder, exist_ok=True)
        with open(job.log, "a", encoding="utf8") as log:
            try:
                with contextlib.redirect_stdout(log):
                    fit.train_and_evaluate(config, job.workdir, worker.command(job))
            except Exception as exception:
                if not errors.is_mistake(exception):
                    raise
                error = errors.sentence(exception)
                print(f"error: {error}", file=log)
        self._ended.append((job, error))

    def finished(self, timeout: float) -> list[tuple[worker.Job, str | None]]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        """Nothing runs between the calls."""


class Local:
    """Processes of this machine, `workers` at a time."""

    def __init__(self, workers: int):
        self.capacity = workers
        self._running: list[tuple[worker.Job, subprocess.Popen]] = []

    def start(self, job: worker.Job) -> None:
        self._running.append((job, worker.start(job)))

    def finished(self, timeout: float) -> list[tuple[worker.Job, str | None]]:
        until = time.monotonic() + timeout
        while True:
            ended = [(j, p) for j, p in self._running if p.poll() is not None]
            if ended or time.monotonic() > until:
                break
            time.sleep(_POLL)
        for pair in ended:
            self._running.remove(pair)
            pair[1].stdin.close()
        return [
            (j, worker.reason(j, p.returncode) if p.returncode else None)
            for j, p in ended
        ]

    def stop(self) -> None:
        """Ends what runs; each run goes on from its checkpoints another time."""
        for _, process in self._running:
            process.terminate()
        until = time.monotonic() + _GRACE
        for _, process in self._running:
            try:
                process.wait(max(0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdin.close()
        self._running.clear()


class Ray:
    """Tasks of a Ray cluster, or of an instance that is started here.

    Every node needs this checkout, its Python environment and the working directory
    at the same paths, and the sweep's --workdir on a file system that all share: a run
    whose worker died goes on elsewhere from its checkpoints; its row is read there.

    Args:
        workers: runs at a time.
        address: of a cluster; None starts an instance with what `workers` need.
        cpus, gpus: of each run.

    Raises:
        SweepError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, workers: int, address: str | None, cpus: int, gpus: float):
        try:
            import ray
        except ImportError:
            raise SweepError(
                "--backend=ray needs Ray: pip install -e '.[sweep]'"
            ) from None
        self.capacity, self._ray = workers, ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report home
        own = {"num_cpus": workers * cpus, "include_dashboard": False}
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level="error",
                **({} if address else own),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SweepError(f"--ray_address={address}: {error}") from error
        # By value: a Ray worker finds this package only once _run_to_end has begun.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(
            _run_to_end
        )
        self._running = {}

    def start(self, job: worker.Job) -> None:
        ref = self._task.remote(dataclasses.asdict(job), worker.ROOT, os.getcwd())
        self._running[ref] = job

    def finished(self, timeout: float) -> list[tuple[worker.Job, str | None]]:
        if not self._running:
            return []
        ended, _ = self._ray.wait(list(self._running), timeout=timeout)
        return [(self._running.pop(ref), self._error(ref)) for ref in ended]

    def _error(self, ref) -> str | None:
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return f"Ray: {str(error).strip().splitlines()[0]}"

    def stop(self) -> None:
        for ref in self._running:
            self._ray.cancel(ref, force=True)
        self._ray.shutdown()


def _run_to_end(job: dict, root: str, folder: str) -> str | None:
    """What a Ray worker does; when it dies, the run dies with it."""
    sys.path.insert(0, root)
    from experiments import worker

    os.chdir(folder)
    job = worker.Job(**job)
    process = worker.start(job)
    status = process.wait()
    return worker.reason(job, status) if status else None
