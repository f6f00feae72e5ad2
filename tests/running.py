"""Small runs for the tests of training, evaluation and prediction."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from cbmlc_jax import config as config_lib
from cbmlc_jax import models, systems

ROOT = pathlib.Path(__file__).parent.parent
# One shape to compile, a model of a few thousand parameters, one device.
TINY = {
    "data.length_buckets": 1,
    "noise.kind": "combined",
    "model.width": 8,
    "model.ffn_width": 8,
    "model.num_heads": 2,
    "model.num_blocks": 1,
    "model.encoder.layers": 1,
    "model.encoder.embedding_std": 0.3,
    "optim.learning_rate": 1e-2,
    "train.num_devices": 1,
    "train.batch_size": 64,
    "train.progress": False,
}


def tiny_config(**changes):
    """The base config on the embedded data, shrunk; keys as in a flat config."""
    config = config_lib.base()
    config.update_from_flattened_dict(TINY)
    config.update_from_flattened_dict(changes)
    config_lib.validate(config)
    return config


def meta(num_features: int, vectors: np.ndarray) -> models.Meta:
    """What a model knows of data with these word vectors [L, P]."""
    labels = len(vectors)
    return models.Meta(num_features, vectors, np.arange(labels, 0, -1), min(labels, 4))


def init_params(model, seed: int = 0, num_labels: int = 1):
    """Initial parameters of a model of tokens."""
    vectors = np.zeros((num_labels, 1), np.float32)
    return systems.init_variables(model, seed, meta(1, vectors))["params"]


def flags(**changes) -> list[str]:
    """The same as command line flags."""
    return [f"--config.{k}={v}" for k, v in {**TINY, **changes}.items()]


def environment(**changes: str) -> dict[str, str]:
    """This process's, without the virtual devices of the tests."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {**env, "PYTHONPATH": str(ROOT), **changes}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cbmlc_jax.main", *arguments]


def main(
    *arguments: str, env: dict | None = None, largest_file_kb: int | None = None
) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own.

    `largest_file_kb` makes longer writes fail half-way, as a full disk does.
    """
    words = command(*arguments)
    if largest_file_kb:
        words = ["bash", "-c", f'ulimit -f {largest_file_kb}; exec "$@"', "-", *words]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=env or environment(),
    )


_FORKS = """
import json, os, runpy, signal, sys, tempfile
from cbmlc_jax import main, run
for line in sys.stdin:
    folder, module, *words = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (child := os.fork()):
            signal.alarm(300)
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            os.chdir(folder)
            sys.argv = [module, *words]
            try:
                if module == "cbmlc_jax.main":
                    main.run()
                else:
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else bool(end.code))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([code, out.read(), err.read()]), flush=True)
"""


class Forks:
    """`python -m` in forks of one process that imports once; a context."""

    def __enter__(self) -> Forks:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        return self

    def __exit__(self, *_) -> None:
        self._process.communicate()

    def run(self, *words: str, cwd: os.PathLike = ROOT) -> subprocess.CompletedProcess:
        """A module and its arguments."""
        print(json.dumps([str(cwd), *words]), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, *answer)


def assert_one_sentence(done: subprocess.CompletedProcess, *parts: str) -> None:
    """A user's mistake: status 1, one line that names the parts, no traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]
