"""An exported model: equal scores without the training code, streams, bad artefacts."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types

import jax
import numpy as np
import pytest
import running

from cbmlc_jax import export, fit, models, predict, rules, serving, systems
from cbmlc_jax.artefact import ArtefactError
from cbmlc_jax.data.dataset import DataError, Dense, Ragged
from cbmlc_jax.decision import Decision
from cbmlc_jax.models import baselines

pytest.importorskip("flatbuffers", reason="jax.export needs the package flatbuffers")
CHANGES = {
    "train.num_epochs": 1,
    "noise.kind": "ncar",
    "model.label_graph": "cooccurrence",
    "model.linear_path": True,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[str, str]:
    """A workdir, and its artefact with a threshold for each label."""
    folder = tmp_path_factory.mktemp("serving")
    workdir, target = str(folder / "run"), str(folder / "artefact")
    fit.train_and_evaluate(running.tiny_config(**CHANGES), workdir, "the command")
    export.export_run(workdir, target, rules.Rule(per_label=True, max_labels=3))
    return workdir, target


@pytest.fixture(scope="module")
def artefact(exported) -> serving.Artefact:
    return serving.Artefact(exported[1], batch_size=8)


def ragged(rows: int = 30, size: int = 400, weighted: bool = False) -> Ragged:
    """Sets of 0 to 70 features."""
    rng = np.random.default_rng(0)
    found = [rng.permutation(size)[: rng.integers(0, 70)] for _ in range(rows)]
    inputs = Ragged.from_rows(found)
    weights = rng.random(len(inputs.values)).astype(np.float32) + 0.1
    return Ragged(inputs.values, inputs.offsets, weights if weighted else None)


def rows_of(inputs: Ragged) -> list[dict]:
    return [
        {"features": inputs.values[a:b].tolist()}
        for a, b in zip(inputs.offsets[:-1], inputs.offsets[1:], strict=True)
    ]


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_artefact_gives_the_scores_of_the_run(exported, artefact):
    predictor = predict.Predictor(exported[0])
    inputs = ragged()
    expected = predictor.scores(inputs)
    np.testing.assert_allclose(artefact.scores(inputs), expected, atol=1e-6, rtol=0)
    one = serving.Artefact(exported[1], batch_size=1).scores(inputs)
    np.testing.assert_allclose(one, expected, atol=1e-6, rtol=0)
    assert np.ptp(expected, axis=0).max() > 0.01, "scores that do not differ"
    assert artefact.predict([]) == [] and len(artefact.scores(ragged(0))) == 0


EMOTIONS = {"data.name": "emotions", "model.encoder.name": "dense"}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def trained(name: str, system, inputs, labels: int, rng):
    """Variables of a model, fitted to random labels or at random."""
    if name not in baselines.ESTIMATORS:
        return system.init()
    given = (rng.random((len(inputs), labels)) < 0.3).astype(np.uint8)
    more = {}
    if name in ("kernel_ridge", "lr_knn"):  # what changes a row's part in it
        more["added"] = rng.random(len(inputs)).astype(np.float32) * 0.2
    if name == "lr_knn":
        more["ignored"] = rng.random(given.shape) < 0.1
    return system.candidates[0][1].fit(system.inputs(inputs), given, **more)


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("cbmlc", "weighted", {}),
        slow("cbmlc", "sequence", {"model.encoder.name": "sequence"}),
        slow("cbmlc", "numbers", EMOTIONS),
        slow("mpvae", "set", {"loss.cb_weight": 0.0}),
        ("logistic_regression", "set", {}),
        ("logistic_regression", "sequence", {}),  # words that stand there twice
        ("logistic_regression", "weighted", {}),
        ("logistic_regression", "numbers", {}),
        # Of rows without weights many are equally near.
        ("lr_knn", "set", {}),
        ("lr_knn", "weighted", {}),
        ("lr_knn", "numbers", {}),
        ("kernel_ridge", "set", {}),
        ("kernel_ridge", "weighted", {}),
        ("kernel_ridge", "numbers", {}),
        ("label_prior", "set", {}),
        ("mlknn", "set", {}),
        ("mlknn", "weighted", {}),
        ("mlknn", "numbers", {}),
        ("sleec", "set", {}),
        ("sleec", "weighted", {"sleec.clusters": 3, "sleec.learners": 2}),
        ("sleec", "numbers", {}),
    ],
)
def test_every_exported_model_is_the_one_that_was_trained(name, kind, changes):
    size, labels, rng = 30, 5, np.random.default_rng(1)
    inputs = ragged(40, size, kind == "weighted")
    if kind == "numbers":
        inputs = Dense(rng.normal(size=(40, size)).astype(np.float32))
    if kind == "sequence":
        words = rng.integers(0, size, inputs.offsets[-1], np.int32)
        inputs = Ragged(words, inputs.offsets)
    inputs = inputs.take(np.arange(60) % 40)  # some twice: equally near to all
    example = inputs.batch(np.array([-1, 0]), 80)
    config = running.tiny_config(**changes)
    config.model.name = name
    meta = models.Meta(
        size,
        rng.normal(size=(labels, 8)).astype(np.float32),
        np.arange(labels, 0, -1),
        3,
        {k: (v.shape[1:], str(v.dtype)) for k, v in example.items()},
        np.full(size, 0.1, np.float32),
        np.full(size, 2.0, np.float32),
    )
    system = systems.create(config, meta, [32, 64], None)
    params = trained(name, system, inputs, labels, rng)
    predictor = types.SimpleNamespace(
        config=config, meta=meta, kind=kind, system=system, params=params, graph=None
    )
    weights, program = export.exported(predictor)
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    call, expected = jax.jit(program.call), system.scores(params, inputs)
    for width, rows in ((80, np.arange(60)), (96, np.array([3]))):
        scores = call(weights, inputs.batch(rows, width))
        np.testing.assert_allclose(scores, expected[rows], atol=1e-6, rtol=0)
        if name == "sleec" and not changes:  # shares of k rows, as thresholds often are
            np.testing.assert_array_equal(scores, expected[rows])
    if name != "label_prior":
        assert np.ptp(expected, axis=0).max() > 0.01, "scores that do not differ"


def test_a_mixture_is_exported_with_the_members_that_count():
    config = running.tiny_config(
        **{
            "model.name": "mixture",
            "mixture.members": "kernel_ridge,sleec,logistic_regression,seq2seq",
            "loss.name": "bce",
            "loss.cb_weight": 0.0,
        }
    )
    size, labels, rng = 30, 5, np.random.default_rng(1)
    inputs, vectors = ragged(40, size, True), np.ones((labels, 8), np.float32)
    of_rows = {"tokens": ((8,), "int32"), "weights": ((8,), "float32")}
    meta = models.Meta(size, vectors, np.arange(labels, 0, -1), 3, of_rows)
    system = systems.create(config, meta, [64], None)
    shares = {"kernel_ridge": 0.5, "sleec": 0.3, "logistic_regression": 0.2}
    shares |= {"seq2seq": 0.0}
    members = {
        name: trained(name, system.members[name], inputs, labels, rng)
        for name, share in shares.items()
        if share
    }
    params = {
        "weights": {name: np.float32(share) for name, share in shares.items()},
        "members": members,
    }
    predictor = types.SimpleNamespace(
        config=config, meta=meta, kind="weighted", system=system, params=params
    )
    weights, program = export.exported(predictor)
    assert {name.partition("/")[0] for name in weights} == set(members)
    assert {str(a.dtype) for a in weights.values()} <= {"float32", "int32", "uint8"}
    scores = jax.jit(program.call)(weights, inputs.batch(np.arange(40), 80))
    expected = system.scores(params, inputs)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    params["weights"]["seq2seq"] = np.float32(0.1)
    params["members"]["seq2seq"] = None
    with pytest.raises(export.ExportError, match="seq2seq is not exported"):
        export.exported(predictor)


def test_a_stack_is_exported_with_its_members():
    names = ("kernel_ridge", "logistic_regression")
    config = running.tiny_config(
        **{
            "model.name": "stack",
            "stack.members": ",".join(names),
            "loss.name": "forward",
            "train.crossfit": 2,
        }
    )
    size, labels, rng = 30, 5, np.random.default_rng(1)
    inputs, vectors = ragged(40, size, True), rng.normal(size=(labels, 8))
    of_rows = {"tokens": ((8,), "int32"), "weights": ((8,), "float32")}
    counts = np.arange(labels, 0, -1)
    meta = models.Meta(size, vectors.astype(np.float32), counts, 3, of_rows)
    system = systems.create(config, meta, [64], None)
    members = {n: trained(n, system.members[n], inputs, labels, rng) for n in names}
    start = system.top.init()
    tops = {
        k: jax.tree.map(  # nothing at its start, where the graph says nothing
            lambda x: np.asarray(x) + rng.normal(size=x.shape).astype(np.float32) / 9,
            start,
        )
        for k in ("1", "2")
    }
    platt = np.array([[1.5, 0.4], [0.8, -0.2]], np.float32)
    platt = dict(zip(names, platt, strict=True))
    params = {"members": members, "calibration": platt, "stack": tops}
    predictor = types.SimpleNamespace(
        config=config, meta=meta, kind="weighted", system=system, params=params
    )
    weights, program = export.exported(predictor)
    scores = jax.jit(program.call)(weights, inputs.batch(np.arange(40), 80))
    expected = system.scores(params, inputs)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    told = [m.scores(members[n], inputs) for n, m in system.members.items()]
    assert np.abs(scores - np.mean(told, 0)).max() > 0.01, "the top says nothing"


@pytest.mark.slow
def test_rounded_products_are_exported_without_hints_for_one_compiler():
    config = running.tiny_config(**{"train.matmul_precision": "bfloat16"})
    vectors = np.ones((5, 8), np.float32)
    meta = models.Meta(30, vectors, np.arange(5, 0, -1), 3)
    system = systems.create(config, meta, [64], None)
    params, inputs = system.init(), ragged(8, 30)
    predictor = types.SimpleNamespace(
        config=config, meta=meta, kind="set", system=system, params=params, graph=None
    )
    weights, program = export.exported(predictor)
    scores = jax.jit(program.call)(weights, inputs.batch(np.arange(8), 80))
    # Two libraries of products sum in another order, before the next rounding.
    expected = system.scores(params, inputs)
    np.testing.assert_allclose(scores, expected, atol=1e-2, rtol=0)
    assert "bf16" in program.mlir_module()


FOREIGN = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        ours = name.startswith("cbmlc_jax.") and name.split(".")[1] in (
            "config", "models", "run", "predict", "evaluate", "thresholds", "metrics"
        )
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        # jax needs scipy for itself.
        scipy = first == "scipy" and "cbmlc_jax" in frame.f_code.co_filename
        if first in REFUSED or ours or scipy:
            raise ImportError(f"{name} is not for serving")

REFUSED = {
    "absl", "array_record", "chex", "flax", "gensim", "grain", "jaxtyping",
    "ml_collections", "optax", "orbax", "pandas", "PIL", "safetensors", "sklearn",
    "tensorboardX", "tensorflow_datasets", "tqdm",
}
sys.meta_path.insert(0, Refuse())
sys.argv = ["serving", *sys.argv[1:]]
import runpy
runpy.run_module("cbmlc_jax.serving", run_name="__main__")
"""


def serve(*arguments: str, code: str = FOREIGN) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=running.ROOT,
        env=running.environment(),
    )


def test_jax_and_numpy_alone_serve_what_predict_says(exported, tmp_path):
    workdir, folder = exported
    source = write(tmp_path / "in.jsonl", rows_of(ragged()))
    target = str(tmp_path / "out.jsonl")
    done = serve(f"--artefact={folder}", f"--input={source}", f"--output={target}")
    assert done.returncode == 0, done.stderr
    assert "30 rows scored" in done.stderr
    mine = [json.loads(line) for line in open(target)]  # noqa: SIM115
    other = str(tmp_path / "other.jsonl")
    predict.predict_file(
        workdir, source, other, rules.Rule(per_label=True, max_labels=3)
    )
    theirs = [json.loads(line) for line in open(other)]  # noqa: SIM115
    assert [row.pop("line") for row in mine] == list(range(1, 31))
    assert any(row["labels"] for row in mine)
    for one, two in zip(mine, theirs, strict=True):
        assert one["labels"] == two["labels"]
        assert one["scores"] == pytest.approx(two["scores"], abs=2e-6)


def test_a_killed_stream_goes_on(exported, artefact, tmp_path):
    source = write(tmp_path / "in.jsonl", rows_of(ragged(4000)))
    whole, target = str(tmp_path / "whole.jsonl"), str(tmp_path / "out.jsonl")
    serving.predict_stream(artefact, source, whole, batch_size=8, top_k=2)
    words = [f"--artefact={exported[1]}", f"--input={source}", f"--output={target}"]
    words += ["--top_k=2", "--batch_size=8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cbmlc_jax.serving", *words],
        cwd=running.ROOT,
        env=running.environment(),
        stderr=subprocess.DEVNULL,
    )
    for _ in range(6000):
        if os.path.exists(target) and os.path.getsize(target) > 2000:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    kept = pathlib.Path(target).read_bytes()
    assert 2000 < len(kept) < os.path.getsize(whole)
    with open(target, "ab") as file:
        file.write(b'{"line": 17, "lab')  # of a machine that lost power
    counts = serving.predict_stream(artefact, source, target, batch_size=8, top_k=2)
    assert counts["before"] == kept.count(b"\n") > 0
    assert counts["rows"] == 4000 - counts["before"]
    found = [json.loads(line) for line in open(target)]  # noqa: SIM115
    expected = [json.loads(line) for line in open(whole)]  # noqa: SIM115
    assert [row["line"] for row in found] == [row["line"] for row in expected]
    assert [row["labels"] for row in found] == [row["labels"] for row in expected]
    again = serving.predict_stream(artefact, source, target, batch_size=8, top_k=2)
    assert again == {"rows": 0, "before": 4000, "bad": 0}


def test_an_output_of_something_else_is_left_alone(artefact, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"features": [1]}])
    target = tmp_path / "out.jsonl"
    target.write_text("mine\n")
    with pytest.raises(serving.ServingError, match="choose another --output"):
        serving.predict_stream(artefact, source, str(target))
    assert target.read_text() == "mine\n"
    target.unlink()
    serving.predict_stream(artefact, source, str(target))
    with pytest.raises(serving.ServingError, match="--top_k"):
        serving.predict_stream(artefact, source, str(target), top_k=1)


def test_a_bad_line_is_named_or_skipped(artefact, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", str(tmp_path / "out.jsonl")
    source.write_bytes(
        b'{"features": [1]}\n\n{"features": [400]}\n\xff\n{"features": []}'
    )
    with pytest.raises(DataError, match=r"in\.jsonl, line 3: feature 400 is not in"):
        serving.predict_stream(artefact, str(source), target, batch_size=1)
    counts = serving.predict_stream(
        artefact, str(source), target, batch_size=1, skip_bad=True
    )
    assert counts == {"rows": 1, "before": 1, "bad": 2}
    assert [json.loads(line)["line"] for line in open(target)] == [1, 5]  # noqa: SIM115
    told = capsys.readouterr().err
    assert "skipped: " in told and "line 3: feature" in told and "line 4: byte" in told


class Still:
    """An artefact that does nothing, so that only the stream's memory is seen."""

    digest, label_names, decision = "", ["a", "b"], Decision(0.5)

    def parser(self, folder):
        return serving.parsers.KINDS["set"](["x"] * 400)

    def scores(self, inputs):
        return np.zeros((len(inputs), 2), np.float32)


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for rows in (500, 5000):
        source = write(tmp_path / f"{rows}.jsonl", rows_of(ragged(500)) * (rows // 500))
        tracemalloc.start()
        serving.predict_stream(Still(), source, f"{source}.out", batch_size=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 30_000, peaks


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("manifest.json", lambda m: m | {"format": 2}, ["format 2", "reads format 1"]),
        ("manifest.json", lambda m: m | {"widths": [17]}, ["manifest.json is damaged"]),
        ("manifest.json", lambda m: [], ["manifest.json is damaged"]),
        ("manifest.json", lambda m: m | {"kind": "images"}, ["manifest.json is damag"]),
        ("manifest.json", None, ["is no artefact", "--mode=export"]),
        ("weights.npz", None, ["weights.npz is missing", "export the model again"]),
        ("model.stablehlo", b"\0", ["model.stablehlo", "sha256 differs"]),
        ("vocabulary.json", b" " * 100_000, ["vocabulary.json has more than"]),
        ("decision.json", b"{}", ["decision.json", "sha256 differs"]),
    ],
)
def test_a_damaged_artefact_is_one_sentence(exported, tmp_path, name, change, parts):
    folder = tmp_path / "artefact"
    shutil.copytree(exported[1], folder)
    path = folder / name
    if change is None:
        path.unlink()
    elif isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ArtefactError) as caught:
        serving.Artefact(str(folder))
    for part in [str(folder), *parts]:
        assert part in str(caught.value)


def test_content_that_fits_its_hash_is_still_checked(exported, tmp_path):
    folder = tmp_path / "artefact"
    shutil.copytree(exported[1], folder)
    for name, content in (
        ("decision.json", b'{"threshold": 1}'),
        ("model.stablehlo", b"StableHLO of a later jax, with another layout"),
    ):
        manifest = json.loads((folder / "manifest.json").read_text())
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        known = {name: {"bytes": len(content), "sha256": digest}}
        changed = manifest | {"files": manifest["files"] | known, "jax": "9.9"}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ArtefactError, match=f"{name} .*export"):
            serving.Artefact(str(folder))
        (folder / name).write_bytes(before)
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_mistake_is_one_sentence_on_the_command_line(exported, tmp_path):
    done = serve(f"--artefact={exported[1]}", f"--input={tmp_path / 'none'}")
    running.assert_one_sentence(done, "no such file")


def test_what_is_not_exported(exported, tmp_path):
    workdir, folder = exported
    with pytest.raises(export.ExportError, match="choose another --output"):
        export.export_run(workdir, folder)
    with pytest.raises(export.ExportError, match="needs --output"):
        export.export_run(workdir, None)
    config = running.tiny_config(
        **{"model.name": "seq2seq", "loss.cb_weight": 0.0, "loss.name": "bce"}
    )
    meta = models.Meta(1, np.zeros((1, 1)), np.ones(1), 1)
    system = systems.create(config, meta, [16], None)
    predictor = types.SimpleNamespace(
        config=config, kind="sequence", meta=meta, system=system, params={}
    )
    with pytest.raises(export.ExportError, match="seq2seq is not exported: use --mode"):
        export.exported(predictor)
    done = running.main(
        "--mode=export", f"--workdir={tmp_path}/none", f"--output={tmp_path}/a"
    )
    running.assert_one_sentence(done, "none holds no run")


def test_the_card_says_what_has_to_be_known(exported, artefact):
    card = artefact.card
    assert card["decision"] == {"rule": "per_label", "protocol": "corrected_val"}
    text = pathlib.Path(exported[1], "MODEL_CARD.md").read_text()
    for part in (card["fingerprint"], "ncar", "the command", "jax 0.", *export.LIMITS):
        assert part in text
    f1 = f"| {card['metrics']['corrected_val']['miF1']:.4f} |"
    assert f1 in text


def test_latency_is_measured_for_each_size(artefact):
    found = serving.latency(artefact, (1, 8), repeats=3)
    assert [line["batch"] for line in found] == [1, 8]
    assert all(0 < line["median_ms"] <= line["p90_ms"] for line in found)
    assert all(line["tokens"] == artefact.typical_length > 8 for line in found)
