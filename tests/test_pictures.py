"""Runs on images: trained whole, trained on cached features, resumed, predicted."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import running
import test_backbones
from PIL import Image

from cbmlc_jax import (
    backbones,
    config,
    fit,
    losses,
    models,
    parallel,
    predict,
    rngs,
    steps,
    systems,
    thresholds,
    workdirs,
)
from cbmlc_jax import run as run_lib
from cbmlc_jax import task as task_lib
from cbmlc_jax.data import voc
from cbmlc_jax.data.dataset import DataError
from cbmlc_jax.models import ImageEncoder, resnet
from cbmlc_jax.models.baselines.pooled_linear import PooledLinear
from cbmlc_jax.rules import Rule

SIDE = 32
CHANGES = {
    "data.name": "voc",
    "data.side": SIDE,
    "model.name": "resnet_bce",
    "model.encoder.name": "resnet18",
    "model.encoder.weights": "random",
    "loss.name": "bce",
    "loss.cb_weight": 0.0,
    "loss.reduction": "mean",
    "embeddings.source": "random",
    "noise.keep_one": False,
    "optim.learning_rate": 1e-3,
    "train.batch_size": 4,
    "eval.batch_size": 4,
    "train.num_epochs": 2,
}


class Small(resnet.ResNet):
    """The stages of ResNet-18, of one block and 8 channels each: quick to compile."""

    def stages(self):
        def layer(number):
            def run(x, train):
                stride = 1 if number == 1 else 2
                block = resnet.Layer(1, 8, stride, False, name=f"layer{number}")
                return block(x, train)

            return (f"layer{number}",), run

        (names, _), *_, pool = super().stages()

        def stem(x, train):
            x = resnet.conv(8, 3, 4, name="conv1")(x)
            return resnet.Norm(name="bn1")(x, train)

        return [(names, stem), *(layer(i) for i in (1, 2, 3, 4)), pool]


@pytest.fixture(autouse=True)
def small_network(request, monkeypatch):
    if "given_weights" not in request.node.name:
        monkeypatch.setitem(models.BACKBONES, "resnet18", (Small, 18))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A VOCdevkit of 18 small images, of which some classes have a few."""
    root = tmp_path_factory.mktemp("data")
    base = root / "VOCdevkit" / "VOC2007"
    lists, pictures = base / "ImageSets" / "Main", base / "JPEGImages"
    lists.mkdir(parents=True)
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for name, numbers in (("trainval", range(12)), ("test", range(12, 18))):
        ids = [f"{i:06d}" for i in numbers]
        (lists / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
        for number, of_class in enumerate(voc.CLASSES):
            values = [1 if (i + number) % 5 == 0 else -1 for i in numbers]
            lines = [f"{i} {v:2d}\n" for i, v in zip(ids, values, strict=True)]
            (lists / f"{of_class}_{name}.txt").write_text("".join(lines))
        for i in ids:
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"{i}.jpg")
    return root


def settings(folder, **changes):
    here = {"data.dir": str(folder), "data.cache_dir": str(folder / "cache")}
    return running.tiny_config(**{**CHANGES, **here, **changes})


def saved(workdir) -> list[np.ndarray]:
    variables, _, _ = workdirs.chosen_params(str(workdir), None)
    return jax.tree.leaves(variables)


def test_resumes_with_the_same_crops_and_statistics(folder, tmp_path):
    """2 epochs == 1 + restore + 1, augmentation and batch statistics included."""
    keep = {"train.selection": "last", "train.checkpoint_every": 1}
    whole = settings(folder, **keep)
    fit.train_and_evaluate(whole, str(tmp_path / "whole"), "test")
    half = run_lib.Run(settings(folder, **keep), str(tmp_path / "half"))
    workdirs.claim(whole, half.workdir)
    half.config.train.num_epochs = 1
    fit.fit(half)
    after_one = [x.copy() for x in saved(half.workdir)]
    row = fit.train_and_evaluate(whole, half.workdir, "test")
    assert row["epoch"] == 2
    pairs = list(zip(saved(tmp_path / "whole"), saved(half.workdir), strict=True))
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert not all(map(np.array_equal, after_one, saved(half.workdir)))
    # Running averages are no parameters, and they move.
    variables, _, _ = workdirs.chosen_params(half.workdir, half.system.like)
    assert row["params"] == systems.num_params({"params": variables["params"]})
    stats = variables["batch_stats"]["encoder"]["backbone"]
    fresh = half.system.init()["batch_stats"]["encoder"]["backbone"]
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), stats, fresh)
    assert all(jax.tree.leaves(moved))

    # Predict from the workdir alone, whatever the order of the lines.
    pictures = folder / "VOCdevkit" / "VOC2007" / "JPEGImages"
    lines = tmp_path / "in.jsonl"
    names = ["000013.jpg", "000012.jpg"]
    lines.write_text(
        "".join(json.dumps({"image": str(pictures / n)}) + "\n" for n in names)
    )
    target = tmp_path / "out.jsonl"
    predict.predict_file(
        half.workdir, str(lines), str(target), rule=Rule(threshold=0.5)
    )
    rows = [json.loads(x) for x in target.read_text().splitlines()]
    run = run_lib.Run(whole, half.workdir)
    scores = run.system.scores(variables, run.task.test.inputs)
    for row, expected in zip(rows, scores[[1, 0]], strict=True):
        found = [row["scores"][name] for name in voc.CLASSES]
        np.testing.assert_allclose(found, expected, atol=2e-6)
    lines.write_text('{"image": "nowhere.jpg"}\n')
    with pytest.raises(DataError, match="line 1: there is no image .*nowhere.jpg"):
        predict.predict_file(half.workdir, str(lines), None, rule=Rule(threshold=0.5))


def test_frozen_features_are_computed_once_and_change_nothing(folder, tmp_path, capsys):
    """Cached at any cut, the model scores as the whole network does."""
    frozen = {"model.encoder.frozen_stages": 4, "data.augment": False}
    cached = settings(folder, **frozen, **{"model.encoder.cache_features": True})
    row = fit.train_and_evaluate(cached, str(tmp_path / "cached"), "test")
    assert row["model"] == "resnet_bce"
    assert capsys.readouterr().out.count("computing the features") == 2
    run = run_lib.Run(cached, str(tmp_path / "cached"))
    assert "computing" not in capsys.readouterr().out  # from the cache
    variables, _, _ = workdirs.chosen_params(str(tmp_path / "cached"), run.system.like)
    assert run.task.test.inputs.values.ndim == 4
    scores = run.system.scores(variables, run.task.test.inputs)

    # The whole network: the frozen stages as they were, the trained ones on top.
    whole = settings(folder, **frozen)
    task = task_lib.build(whole)
    system = systems.create(whole, task.meta, task.widths, task.graph)
    everything = system.init()
    for kind in everything:
        everything[kind]["encoder"]["backbone"] |= variables[kind]["encoder"][
            "backbone"
        ]
    everything["params"]["readout"] = variables["params"]["readout"]
    backbone = models.create_backbone(cached.model.encoder)
    network = jax.jit(backbone.init)(
        jax.random.key(cached.seed), np.zeros((1, SIDE, SIDE, 3), np.uint8)
    )
    for kind in everything:
        for stage in backbone.frozen_modules:
            if stage in network[kind]:
                everything[kind]["encoder"]["backbone"][stage] = network[kind][stage]
    np.testing.assert_allclose(
        system.scores(everything, task.test.inputs), scores, atol=1e-5
    )

    # A frozen stage stays as it was, also where it is not cached.
    state = fit.train_and_evaluate(whole, str(tmp_path / "whole"), "test")
    assert state["epoch"] >= 1
    trained, _, _ = workdirs.chosen_params(str(tmp_path / "whole"), system.like)
    start = system.init()
    for kind in start:
        for name, before in start[kind]["encoder"]["backbone"].items():
            after = trained[kind]["encoder"]["backbone"][name]
            same = all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
            assert same == (name in backbone.frozen_modules), (kind, name)


def test_estimators_read_the_pooled_features(folder, tmp_path):
    changes = {"model.name": "logistic_regression", "logistic_regression.cost": 1.0}
    row = fit.train_and_evaluate(settings(folder, **changes), str(tmp_path), "test")
    assert row["params"] == 8 * 20 + 20 + 2 * 8
    inputs = task_lib.build(settings(folder, **changes)).train.inputs
    assert inputs.values.shape[1:] == (8,)


def test_given_weights_go_to_the_stages_that_are_there(folder, tmp_path):
    from safetensors.numpy import save_file

    state = {
        name: np.full(shape, 0.25, np.float32)
        for name, shape in test_backbones.torch_names(
            test_backbones.like(models.create_backbone(settings(folder).model.encoder))
        ).items()
    }
    save_file(state, tmp_path / "w.safetensors")
    given = {"model.encoder.weights": str(tmp_path / "w.safetensors")}
    inputs = {0: {"images": ((SIDE, SIDE, 3), "uint8")}}
    inputs |= {4: {"features": ((2, 2, 256), "float32")}}
    inputs |= {99: {"features": ((512,), "float32")}}
    for stages, shapes in inputs.items():
        config_ = settings(folder, **given, **{"model.encoder.frozen_stages": stages})
        meta = running.meta(0, np.zeros((20, 1), np.float32))
        meta = dataclasses.replace(meta, inputs=shapes)
        system = systems.create(config_, meta, [8], None)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), system.like)
        variables = backbones.into(zeros, config_.model.encoder)
        network = variables["params"].get("encoder", {}).get("backbone", {})
        layers = {n for n in network if n.startswith("layer")}
        assert len(layers) == {0: 4, 4: 1, 99: 0}[stages]
        assert all((x == 0.25).all() for x in jax.tree.leaves(network))
        assert not np.any(variables["params"]["readout"]["kernel"])


def test_difficult_objects_can_be_ignored(folder):
    path = folder / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "cat_trainval.txt"
    before = path.read_text()
    path.write_text(before.replace("000001 -1", "000001  0"))
    try:
        task = task_lib.build(settings(folder, **{"data.difficult": "ignore"}))
        assert sum(s.ignored.sum() for s in (task.train, task.validation)) == 1
    finally:
        path.write_text(before)


def test_encoder_and_data_must_go_together():
    with pytest.raises(config.ConfigError, match="encoder.name=set does not read voc"):
        running.tiny_config(**{**CHANGES, "model.encoder.name": "set"})
    with pytest.raises(config.ConfigError, match="weights is not set"):
        running.tiny_config(**{**CHANGES, "model.encoder.weights": ""})
    with pytest.raises(config.ConfigError, match="seq2seq does not read voc"):
        running.tiny_config(**{**CHANGES, "model.name": "seq2seq"})
    with pytest.raises(config.ConfigError, match="resnet_asl is for images"):
        running.tiny_config(**{"model.name": "resnet_asl", "loss.cb_weight": 0.0})


def test_learns_what_a_picture_shows():
    """Label l holds where channel l is bright, under noise of the pixels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (96, 3)).astype(np.float32)
    pixels = 60 + 120 * labels[:, None, None, :] + rng.normal(0, 30, (96, 32, 32, 3))
    pictures = np.clip(pixels, 0, 255).astype(np.uint8)
    encoder = ImageEncoder(Small(18), width=None)
    model = PooledLinear(encoder, 3)
    variables = jax.jit(model.init)(rngs.stream(0, "params"), {"images": pictures[:2]})
    tx = optax.adam(1e-2)

    @jax.jit
    def step(variables, state):
        def objective(params):
            out, changed = model.apply(
                {**variables, "params": params},
                {"images": pictures[:64]},
                rows=jnp.arange(64, dtype=jnp.uint32),
                mutable=["batch_stats"],
            )
            return losses.bce(out.logits, labels[:64]).mean(), changed

        slopes, changed = jax.grad(objective, has_aux=True)(variables["params"])
        updates, state = tx.update(slopes, state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **changed}, state

    state = tx.init(variables["params"])
    for _ in range(60):
        variables, state = step(variables, state)
    logits = jax.jit(model.apply)(variables, {"images": pictures[64:]}).logits
    assert np.mean((np.asarray(logits) > 0) == labels[64:]) > 0.97


def test_running_averages_are_the_mean_over_devices(folder):
    """Each device normalises its share of the batch; all keep the mean of both."""
    config_ = settings(folder)
    meta = running.meta(0, np.zeros((20, 1), np.float32))
    meta = dataclasses.replace(meta, inputs={"images": ((SIDE, SIDE, 3), "uint8")})
    model = models.create_model(config_, meta)
    variables = systems.init_variables(model, 0, meta)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8),
        "labels": rng.integers(0, 2, (4, 20)).astype(np.uint8),
        "mask": np.ones(4, bool),
        "rows": np.arange(4, dtype=np.uint32),
    }
    batch["images"][2:] //= 4  # the second device's share is another one
    tx = steps.make_tx(config_, steps_per_epoch=1)
    devices = parallel.Devices(tuple(jax.devices()[:2]))
    step = devices.compile(
        steps.make_train_step(model, config_, tx, devices.axis, steps_per_epoch=1)
    )
    params, stats = variables["params"], variables["batch_stats"]
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params))
    vectors, none = np.zeros((20, 1), np.float32), thresholds.Rates(0.0, 0.0)
    constants = steps.step_constants(config_, None, vectors, none)
    after, _ = step(devices.replicate(state), devices.shard(batch), constants)

    @jax.jit
    def seen(images):
        rows = jnp.arange(2, dtype=jnp.uint32)
        inputs = {"images": images}
        return model.apply(variables, inputs, rows=rows, mutable=["batch_stats"])[1]

    first, second = (seen(batch["images"][i : i + 2])["batch_stats"] for i in (0, 2))
    expected = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    for device in (0, 1):
        found = jax.tree.map(lambda x, d=device: np.asarray(x[d]), after.stats)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            found,
            expected,
        )
    differ = jax.tree.map(lambda a, b: not np.allclose(a, b), first, second)
    assert any(jax.tree.leaves(differ))
