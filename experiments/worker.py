"""One run of a sweep in a process of its own.

    python -m experiments.worker LOCK --config=... --workdir=...

is `python -m cbmlc_jax.main --config=... --workdir=...`, but for two things: it holds
LOCK while it runs, so that no other process enters the same workdir, and it ends with
its parent, whose end of its standard input closes however the parent dies.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import threading

import ml_collections
from absl import flags
from ml_collections import config_flags

from cbmlc_jax import config as config_lib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TAIL = 4096  # bytes of a log that an error is looked for in


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to start.

    Attributes:
        key: of its row.
        flags: of cbmlc_jax.main, without the workdir.
        folder: what all runs of the sweep share; the workdir is folder/key.
        env: what it gets besides the environment of who starts it.
    """

    key: str
    flags: tuple[str, ...]
    folder: str
    env: dict[str, str]

    @property
    def workdir(self) -> str:
        return os.path.join(self.folder, self.key)

    @property
    def log(self) -> str:
        return self.workdir + ".log"

    @property
    def results(self) -> str:
        return os.path.join(self.workdir, "results.jsonl")


def start(job: Job) -> subprocess.Popen:
    """Starts a run; its output is appended to job.log."""
    os.makedirs(job.folder, exist_ok=True)
    words = [sys.executable, "-m", "experiments.worker", job.workdir + ".lock"]
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            [*words, *job.flags, f"--workdir={job.workdir}"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | job.env,
        )


def config(job: Job) -> ml_collections.ConfigDict:
    """What main makes of the flags of a run."""
    values, words = flags.FlagValues(), ["main", *job.flags]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    values(words)
    config_lib.settle(values.config, set(values["config"].override_values))
    return values.config


def command(job: Job) -> str:
    """The command line that main would write into the row."""
    words = [*job.flags, f"--workdir={job.workdir}"]
    return "python -m cbmlc_jax.main " + shlex.join(words)


def environment(threads: int) -> dict[str, str]:
    """What a run needs of ours: our code and data, and so many threads of XLA (NPROC
    is its variable) and BLAS."""
    names = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    ours = {k: v for k, v in os.environ.items() if k.startswith("CBMLC_")}
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    return ours | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": path}


def reason(job: Job, status: int) -> str:
    """Why a process ended with a status other than 0: its signal, or its last words."""
    if status < 0:
        name = signal.Signals(-status).name
        memory = ", often for want of memory" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}"
    with open(job.log, "rb") as file:
        file.seek(max(0, os.path.getsize(job.log) - _TAIL))
        lines = file.read().decode("utf8", "replace").strip().splitlines()
    sentences = [line for line in lines if line.startswith("error: ")]
    last = sentences[-1] if sentences else (lines or ["it said nothing"])[-1]
    return f"status {status}: {re.sub('^error: ', '', last.strip())}"


def _end_with_parent() -> None:
    def watch():
        # os.read, not sys.stdin: a lock held on that would hang a normal exit.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> None:
    """Runs cbmlc_jax.main under the lock."""
    _end_with_parent()
    lock = open(arguments[0], "w")  # held until the process ends
    fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a dying process of an earlier sweep
    print(os.getpid(), file=lock, flush=True)
    from cbmlc_jax import main as main_lib

    sys.argv = ["cbmlc_jax.main", *arguments[1:]]
    main_lib.run()


if __name__ == "__main__":
    main(sys.argv[1:])
