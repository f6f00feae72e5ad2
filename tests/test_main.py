"""The command line: what it accepts, and one sentence for what it does not."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import pty
import re
import subprocess
import sys
import termios

import pytest
import running

from cbmlc_jax import config as config_lib
from cbmlc_jax import fit, models
from cbmlc_jax.data import pipeline, synthetic

PRESETS = {
    "bibtex": ("fast", "robust"),
    "delicious": ("fast",),
    "reuters": ("fast",),
    "rcv1": ("sequence", "subsets"),
    "voc": ("frozen", "last_stage"),
    "own": ("images",),
}
CONFIGS = [
    (path, preset)
    for path in sorted((running.ROOT / "configs").glob("*.py"))
    for preset in ("", *PRESETS.get(path.stem, ()))
]


def load_config(path: pathlib.Path, preset: str = ""):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.trian.num_epochs=3"], ["trian", "train"]),
        (["--config.train.num_epoch=3"], ["num_epoch", "num_epochs"]),
        (["--config.train.num_epochs=many"], ["config.train.num_epochs", "many"]),
        (["--config.train.num_epochs=0"], ["train.num_epochs=0", "at least 1"]),
        (["--config.model.width=True"], ["config.model.width"]),
        (
            ["--config.model.width=30", "--config.model.num_heads=4"],
            ["width=30", "num_heads=4"],
        ),
        (["--config=configs/nope.py"], ["configs/nope.py", "No such file"]),
        (["--config=configs/synthetic.py:big"], ["no preset 'big'"]),
        (["--config="], ["empty"]),
        (["--config.noise.kind=loud"], ["noise.kind='loud'", "single_positive"]),
        (["--config.noise.rate=1.5"], ["noise.rate=1.5", "[0.0, 1.0]"]),
        (["--config.noise.rate=nan"], ["noise.rate=nan"]),
        (["--mode=fly"], ["fly", "train|eval|predict"]),
        (["--wrkdir=x"], ["--wrkdir", "did you mean --workdir"]),
        (["train"], ["unknown argument 'train'"]),
        (["--config.embeddings.source=file"], ["embeddings.path"]),
        (["--config.model.label_graph=file"], ["label_graph_file"]),
        (["--mode=predict", "--workdir=nowhere"], ["--input"]),
        (["--mode=eval", "--workdir=nowhere"], ["nowhere holds no run"]),
    ],
)
def test_mistakes_before_any_work(arguments, parts):
    running.assert_one_sentence(running.main(*arguments), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data.name": "bibtex", "data.dir": "nowhere"}, ["nowhere"]),
        ({"embeddings.source": "file", "embeddings.path": "none.txt"}, ["none.txt"]),
        ({"data.validation_size": 5000}, ["5000 validation rows of 1400"]),
        (
            {"model.label_graph": "file", "model.label_graph_file": "none.tsv"},
            ["none.tsv"],
        ),
    ],
)
def test_mistakes_in_data(tmp_path, changes, parts):
    done = running.main(f"--workdir={tmp_path / 'run'}", *running.flags(**changes))
    running.assert_one_sentence(done, *parts)
    assert not list((tmp_path / "run").iterdir()), "free for the mended command"


def test_a_batch_that_the_devices_do_not_divide(tmp_path):
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    arguments = [a for a in running.flags() if "num_devices" not in a]
    done = running.main(f"--workdir={tmp_path / 'run'}", *arguments, env=env)
    running.assert_one_sentence(done, "64 rows", "3 devices")


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = running.main(f"--workdir={tmp_path / 'file' / 'run'}", *running.flags())
    running.assert_one_sentence(done, "Not a directory")


def test_help_lists_the_flags_and_imports_no_jax():
    code = (
        "import sys, cbmlc_jax.main; "
        "print([m for m in ('jax', 'flax', 'gensim') if m in sys.modules]); "
        # Training CbMLC starts without what other models are fitted with.
        "import cbmlc_jax.fit; "
        "print([m for m in ('sklearn', 'scipy.optimize') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=running.ROOT,
        check=True,
    )
    assert done.stdout.split() == ["[]", "[]"]
    text = running.main("--help").stdout
    for flag in ("--config", "--workdir", "--mode", "--input", "--top_k"):
        assert flag in text


def test_default_workdir_names_config_noise_and_seed():
    config = load_config(running.ROOT / "configs" / "bibtex.py", "fast")
    config.noise.kind, config.seed = "nar", 3
    assert config_lib.run_name("a/bibtex.py:fast", config) == "bibtex-fast-nar-3"
    assert config_lib.run_name("configs/bibtex.py", config) == "bibtex-nar-3"


def test_noise_rate_defaults():
    config = config_lib.base()
    for kind, rate in [("none", 0), ("ncar", 0.05), ("nar", 0.5), ("combined", 0)]:
        config.noise.kind = kind
        assert config_lib.noise_rate(config) == rate
    config.noise.kind, config.noise.rate = "ncar", 0.0
    assert config_lib.noise_rate(config) == 0


def test_config_survives_its_json():
    config = running.tiny_config(**{"noise.rate": 0.2, "data.validation_size": 9})
    flat = config_lib.flatten(config)
    assert config_lib.flatten(config_lib.restore(flat)) == flat
    with pytest.raises(config_lib.ConfigError, match="another version: old.key"):
        config_lib.restore({"old.key": 1})
    old = flat | dict.fromkeys(config_lib.RETIRED, True)
    assert config_lib.flatten(config_lib.restore(old)) == flat
    assert config_lib.differences(flat, old) == []


NAMES = {"ids": lambda x: getattr(x, "stem", x or "paper")}


@pytest.mark.parametrize(("path", "preset"), CONFIGS, **NAMES)
def test_every_config_is_valid_and_whole(path, preset):
    config = load_config(path, preset)
    # What the user has to give.
    if config.data.name == "own":
        config.data.path = "rows.npz"
    config.model.encoder.weights = config.model.encoder.weights or "random"
    config_lib.validate(config)
    assert set(config_lib.flatten(config)) == set(config_lib.flatten(config_lib.base()))


# When shrunk, the others' models are one of these or the base config's; that of rcv1's
# sequences is in test_own.
QUICK = {("bibtex", "robust")}  # test_own.py trains on numbers


# What is not in the paper, and off in its configs -> its value in `robust`.
ADDED = {
    "loss.name": ("asl", "forward"),
    "model.linear_path": (False, True),
    "model.token_dropout": (0.0, 0.3),
    "noise.by_row": (False, True),
    "optim.averaging": (0.0, 0.99),
    "train.crossfit": (0, 0),
}


MIXTURE = (running.ROOT / "configs" / "bibtex.py", "mixture")


@pytest.mark.parametrize(("path", "preset"), [*CONFIGS, MIXTURE], **NAMES)
def test_what_is_not_in_the_paper_is_off_but_in_robust_and_mixture(path, preset):
    flat = config_lib.flatten(load_config(path, preset))
    on = preset in ("robust", "mixture")
    assert {key: flat[key] for key in ADDED} == {
        key: values[on] for key, values in ADDED.items()
    } | ({"train.crossfit": 5} if preset == "mixture" else {})
    if path.stem == "bibtex":
        assert flat["model.encoder.self_attention"] != on
        assert flat["model.name"] == ("mixture" if preset == "mixture" else "cbmlc")


@pytest.mark.parametrize(
    ("path", "preset"),
    [
        pytest.param(p, x, marks=() if (p.stem, x) in QUICK else pytest.mark.slow)
        for p, x in CONFIGS
    ],
    **NAMES,
)
def test_every_config_trains_when_shrunk(path, preset, tmp_path, monkeypatch):
    """With its own loss, encoder and graph, on the embedded data; what is slow is read
    and checked by the test before.

    Real numbers are the embedded data's counts; an image network gives way to sets
    here, test_pictures.py trains one.
    """
    config = load_config(path, preset)
    config.update_from_flattened_dict(running.TINY)
    config.train.num_epochs, config.noise.kind = 1, "none"
    if config.model.encoder.name == "dense":
        monkeypatch.setitem(pipeline.READERS, config.data.name, _embedded_numbers)
    else:
        config.data.name, config.embeddings.source = "synthetic", "dataset"
    if config.model.encoder.name in models.BACKBONES:
        config.model.encoder.name = "set"
        config.model.encoder.cache_features = False
    config_lib.validate(config)
    row = fit.train_and_evaluate(config, str(tmp_path / "run"), "test")
    assert row["preset"] == preset and 0 < row["metrics"]["oracle"]["ebF1"] < 1


def _embedded_numbers(settings, folder):
    """The embedded data set, its rows as 400 counts."""
    whole = synthetic.load()
    size = len(whole.feature_names)

    def dense(split):
        numbers = pipeline.Dense(split.inputs.matrix(size).toarray())
        return dataclasses.replace(split, inputs=numbers)

    train, test = dense(whole.train), dense(whole.test)
    return dataclasses.replace(whole, train=train, test=test)


@pytest.mark.slow
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path):
    arguments = [a for a in running.flags(**{"train.num_epochs": 2})]
    arguments = [a for a in arguments if "progress" not in a]
    plain = running.main(f"--workdir={tmp_path / 'plain'}", *arguments)
    assert re.search(r"^epoch 2/2 loss \d", plain.stdout, re.M), plain.stderr
    assert "\r" not in plain.stdout + plain.stderr
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = subprocess.Popen(
        running.command(f"--workdir={tmp_path / 'bar'}", *arguments),
        stdout=terminal,
        stderr=terminal,
        cwd=running.ROOT,
        env=running.environment(TERM="xterm"),
    )
    os.close(terminal)
    text = b""
    while True:
        try:
            piece = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        text += piece
    assert process.wait(60) == 0
    text = text.decode()
    assert "\r" in text and "examples/s" in text and "loss" in text
    # tqdm's elapsed<left, the time of arrival.
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", text)


def test_real_bibtex_from_the_command_line(data_dir, tmp_path):
    """The README's command on the published files, shrunk to an epoch of a tiny model,
    then eval, and predict on rows of the official test file."""
    # No attention among the tokens of a row, which takes most of the time here.
    changes = {"noise.kind": "ncar", "train.num_epochs": 1, "train.batch_size": 256}
    shrunk = running.flags(**changes, **{"model.encoder.layers": 0})
    workdir = f"--workdir={tmp_path / 'run'}"
    fast = {"XLA_FLAGS": ""}  # compiled well: here most of the time is arithmetic
    done = running.main("--config=configs/bibtex.py", workdir, *shrunk, env=fast)
    assert done.returncode == 0, done.stderr
    assert "rows: 4392 train, 488 validation, 2515 test" in done.stdout
    done = running.main("--mode=eval", workdir, env=fast)
    assert "reproduces the row in results.jsonl exactly" in done.stdout, done.stderr
    published = data_dir / "mulan" / "bibtex" / "bibtex-test.arff"
    header, _, rows = published.read_text("latin-1").partition("@data\n")
    source, target = tmp_path / "rows.arff", tmp_path / "out.jsonl"
    some = "\n".join(rows.splitlines()[:200])
    source.write_text(f"{header}@data\n{some}\n", "latin-1")
    words = [workdir, f"--input={source}", f"--output={target}", "--top_k=5"]
    done = running.main("--mode=predict", *words, env=fast)
    assert done.returncode == 0, done.stderr
    assert len(target.read_text().splitlines()) == 200
