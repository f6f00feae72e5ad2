"""An exported model of images: its network included, its pixels those of the run."""

from __future__ import annotations

import json
import os
import types

import numpy as np
import pytest
import running
from PIL import Image
from test_pictures import CHANGES, Small
from test_serving import FOREIGN, serve, trained

from cbmlc_jax import export, models, serving, systems, task
from cbmlc_jax.data.dataset import DataError
from cbmlc_jax.data.images import Images
from cbmlc_jax.decision import Decision

pytest.importorskip("flatbuffers", reason="jax.export needs the package flatbuffers")
LABELS = 5


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "resnet18", (Small, 18))


def predictor_of(images: Images, changes: dict):
    """A model of images that was not trained, or fitted to random labels."""
    config = running.tiny_config(**CHANGES | changes)
    [inputs] = task.model_inputs(config, images, keep=False)
    example = inputs.batch(np.array([-1, 0]), 8)
    of_rows = {k: (v.shape[1:], str(v.dtype)) for k, v in example.items()}
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(LABELS, 8)).astype(np.float32)
    width = next(iter(of_rows.values()))[0][-1]
    meta = models.Meta(width, vectors, np.arange(LABELS, 0, -1), 3, of_rows)
    system = systems.create(config, meta, [8], None)
    return types.SimpleNamespace(
        config=config,
        meta=meta,
        kind="images",
        system=system,
        params=trained(config.model.name, system, inputs, LABELS, rng),
        widths=[8],
        typical_length=1,
        label_names=tuple("abcde"),
        feature_names=(),
    ), inputs


def written(folder, images: Images, changes: dict) -> tuple[str, np.ndarray]:
    """An artefact, and the scores of the model in it."""
    predictor, inputs = predictor_of(images, changes)
    target = str(folder / "artefact")
    export.write(target, predictor, Decision(0.5), {}, "")
    return target, predictor.system.scores(predictor.params, inputs)


CACHED = {"model.encoder.cache_features": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"model.name": "resnet_bce"},
        {"model.name": "cbmlc", "model.encoder.frozen_stages": 6, **CACHED},
        pytest.param(
            {
                "model.name": "ml_gcn",
                "model.label_graph": "correlation",
                "model.encoder.frozen_stages": 3,
                **CACHED,
            },
            marks=pytest.mark.slow,
        ),
        {"model.name": "logistic_regression"},
    ],
)
def test_an_image_goes_in_and_the_scores_of_the_run_come_out(
    tmp_path, pictures, changes
):
    target, expected = written(tmp_path, pictures, changes)
    artefact = serving.Artefact(target, batch_size=4)
    parser = artefact.parser()
    rows = [parser.row({"image": path}, "") for path in pictures.paths]
    scores = artefact.scores(parser.join(rows))
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert np.ptp(expected, axis=0).max() > 1e-3, "scores that do not differ"
    # Each stage of the network once: before the model, or in it.
    with np.load(os.path.join(target, "weights.npz")) as weights:
        kernels = [name for name in weights if name.endswith("/conv1/kernel")]
    assert len(kernels) == 1 + 4


@pytest.fixture
def artefact(tmp_path, pictures) -> tuple[serving.Artefact, np.ndarray]:
    target, expected = written(tmp_path, pictures, {})
    return serving.Artefact(target, batch_size=4), expected


def test_paths_and_arrays_are_the_same(artefact, pictures):
    artefact, expected = artefact
    pixels = [np.asarray(Image.open(path)) for path in pictures.paths]
    for given in (pixels, pictures.paths):
        said = artefact.predict([{"image": x} for x in given])
        scores = [[row["scores"][name] for name in "abcde"] for row in said]
        np.testing.assert_allclose(scores, expected, atol=2e-6, rtol=0)
    for bad, message in (
        (pixels[0][..., 0], "row 1: an array uint8 .40, 60. is no image"),
        (pixels[0].astype(np.float32), "row 1: an array float32"),
        (pixels[0][:0], "row 1: an image of 60 x 0 pixels"),
        (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "9000 x 9000 pixels: give 1"),
        (3, "row 1: `image` must be the path"),
        ("a\0b", "row 1: `image` must be the path"),
        ("none.png", "row 1: there is no image none.png"),
    ):
        with pytest.raises(DataError, match=message):
            artefact.predict([{"image": pixels[0]}, {"image": bad}])
    [first, _] = serving.latency(artefact, (1, 4), repeats=2)
    assert first["batch"] == 1 and first["median_ms"] > 0


def test_a_stream_of_images_names_the_bad_ones(artefact, pictures, tmp_path):
    folder = artefact[0].folder
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    names = [os.path.basename(path) for path in pictures.paths]
    names[2:2] = ["cut.jpg", "none.jpg"]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    flags = [f"--artefact={folder}", f"--input={source}", "--batch_size=2"]
    target = str(tmp_path / "out.jsonl")
    done = serve(*flags, f"--output={target}")
    running.assert_one_sentence(done, "the package pillow", "pip install pillow")
    with pytest.raises(DataError, match=r"in.jsonl, line 3: .*cut.jpg is no image"):
        serving.predict_stream(artefact[0], str(source), target, batch_size=2)
    foreign = FOREIGN.replace(' "PIL",', "")
    done = serve(*flags, f"--output={target}", "--bad_lines=skip", code=foreign)
    assert done.returncode == 0, done.stderr
    assert "line 3: " in done.stderr and "line 4: there is no image" in done.stderr
    assert "2 bad lines skipped" in done.stderr
    found = [json.loads(line) for line in open(target)]  # noqa: SIM115
    assert [row["line"] for row in found] == [1, 2, *range(5, 10)]
    scores = [[row["scores"][name] for name in "abcde"] for row in found]
    np.testing.assert_allclose(scores, artefact[1], atol=2e-6, rtol=0)
