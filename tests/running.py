"""Small runs for the tests of training, evaluation and prediction."""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import xla

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


# Half to compile, for tests that are not about the network.
HALF = {"model.encoder.layers": 0, "model.intermediate_weight": 0.0}


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


def param_shapes(model):
    """Shapes and types of `init_params`; nothing is compiled."""
    return jax.eval_shape(lambda: init_params(model))


def flags(**changes) -> list[str]:
    """The same as command line flags."""
    return [f"--config.{k}={v}" for k, v in {**TINY, **changes}.items()]


def environment(**changes: str) -> dict[str, str]:
    """This process's, without the virtual devices of the tests; compiles cheaply."""
    return {**os.environ, "XLA_FLAGS": xla.FLAGS, "PYTHONPATH": str(ROOT), **changes}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cbmlc_jax.main", *arguments]


def main(
    *arguments: str, env: dict | None = None, largest_file_kb: int | None = None
) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own, with these changes of `env`.

    `largest_file_kb` makes longer writes fail half-way, as a full disk does.
    """
    if largest_file_kb is None:
        return forks().run("cbmlc_jax.main", *arguments, env=env)
    limit = f'ulimit -f {largest_file_kb}; exec "$@"'
    return subprocess.run(
        ["bash", "-c", limit, "-", *command(*arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment(**(env or {})),
    )


_FORKS = """
import json, os, runpy, signal, sys, tempfile
from cbmlc_jax import main, run
for line in sys.stdin:
    folder, env, module, *words = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (child := os.fork()):
            signal.alarm(300)
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            os.chdir(folder), os.environ.update(env)
            sys.argv = [module, *words]
            try:
                if module == "cbmlc_jax.main":
                    main.run()
                else:
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code
                if isinstance(code, str):
                    print(code, file=sys.stderr)
            else:
                code = 0
            sys.stdout.flush()
            os._exit(code if isinstance(code, int) else bool(code))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([code, out.read(), err.read()]), flush=True)
"""


class Forks:
    """`python -m` in forks of one process that imports once."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(),
        )

    def close(self) -> None:
        self._process.communicate()

    def run(
        self, *words: str, cwd: os.PathLike = ROOT, env: dict | None = None
    ) -> subprocess.CompletedProcess:
        """A module and its arguments; XLA reads `env` when it starts, Python not."""
        line = json.dumps([str(cwd), env or {}, *words])
        print(line, file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, *answer)


@functools.cache
def forks() -> Forks:
    """Those of this test process; closed at its end."""
    found = Forks()
    atexit.register(found.close)
    return found


def assert_one_sentence(done: subprocess.CompletedProcess, *parts: str) -> None:
    """A user's mistake: status 1, one line that names the parts, no traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]
