"""What the figures draw, read off their axes."""

from __future__ import annotations

import numpy as np
import pytest
import rows

from cbmlc_jax import details
from experiments import figures, published

matplotlib = pytest.importorskip("matplotlib", reason="the extra `report` has it")


def drawn(panel: figures.Panel):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    panel.draw(axes)
    return axes


def by_name(panels: list[figures.Panel]) -> dict[str, figures.Panel]:
    found = {panel.name: panel for panel in panels}
    assert len(found) == len(panels)
    return found


def test_curves_are_means_over_seeds(tmp_path):
    some = []
    for seed in (0, 1):
        row = rows.make(noise="combined", seed=seed)
        values = [0.2 + seed / 10, 0.4, 0.3]
        row["curves"] = {
            "epoch": [1, 2, 3],
            "train_mAP": values,
            "test_mAP": values[::-1],
        }
        some.append(row)
    found = by_name(figures.panels(rows.read(tmp_path, *some, rows.make("lamp"))))
    assert set(found) == {"figure1-bibtex-combined"}
    train, test, chosen = drawn(found["figure1-bibtex-combined"]).lines
    np.testing.assert_allclose(train.get_ydata(), [0.25, 0.4, 0.3])
    np.testing.assert_allclose(test.get_ydata(), [0.3, 0.4, 0.25])
    assert list(train.get_xdata()) == [1, 2, 3]
    assert list(chosen.get_xdata()) == [3, 3]


def test_noise_rates_are_lines_of_honest_scores(tmp_path):
    some = [
        rows.make("lr_knn", "delicious", kind, rate, score=s, seed=seed)
        for kind, rate, s in (("none", 0, 0.6), ("nar", 0.3, 0.5), ("nar", 0.1, 0.56))
        for seed in (0, 1)
    ]
    some[-1]["metrics"]["corrected_val"]["miF1"] = 0.58
    lonely = rows.make("lamp", "delicious", "nar", 0.3)
    panels = by_name(figures.panels(rows.read(tmp_path, *some, lonely)))
    assert set(panels) == {f"figure3-delicious-nar-{m}" for m in ("mif1", "maf1")}
    axes = drawn(panels["figure3-delicious-nar-mif1"])
    line = axes.containers[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(orig=False), [0, 0.1, 0.3])
    np.testing.assert_allclose(line.get_ydata(orig=False), [0.6, 0.57, 0.5])
    assert len(axes.containers) == 1
    printed = [x for x in axes.lines if str(x.get_label()).startswith("paper: ")]
    assert [tuple(x.get_ydata()) for x in printed] == [
        published.BY_RATE["delicious", "nar", model]["miF1"]
        for model in ("cbmlc", published.BEST_OTHER)
    ]


def test_distances_stand_beside_the_published_ones(tmp_path):
    with_vectors = rows.make()
    without = rows.make(embeddings__source="random", loss__cb_weight=0.0)
    fixed = rows.make(embeddings__trainable=False)
    noisy = rows.make(noise="nar")
    lines = [
        noisy,
        rows.with_embeddings(noisy, 4),
        with_vectors,
        rows.with_embeddings(with_vectors, 1),
        without,
        rows.with_embeddings(without, 2),
        fixed,
        rows.with_embeddings(fixed, 3),
    ]
    found = rows.read(tmp_path, *lines)
    axes = drawn(by_name(figures.panels(found))["figure4"])
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    at = list(published.DISTANCES).index("bibtex")
    wanted = [
        details.pair_distance(found.label_embeddings(r))
        for r in (with_vectors, without)
    ]
    assert [heights[0][at], heights[1][at]] == list(published.DISTANCES["bibtex"])
    assert [heights[2][at], heights[3][at]] == wanted
    assert np.isnan([h for i, h in enumerate(heights[2]) if i != at]).all()


def test_the_plane_is_the_same_twice(tmp_path):
    row, noisy = rows.make(), rows.make(noise="nar")
    record = rows.with_embeddings(row)
    lines = [noisy, rows.with_embeddings(noisy, 4), row, record]
    [_, panel] = figures.panels(rows.read(tmp_path, *lines))
    assert panel.name == "tsne-bibtex-none-cbmlc"
    vectors = details.read_label_embeddings(record).vectors
    at = figures.plane(vectors)
    assert at.shape == (rows.LABELS, 2) and np.isfinite(at).all()
    assert (at == figures.plane(vectors)).all()
    axes = drawn(panel)
    assert (axes.collections[0].get_offsets() == at).all()
    assert 0 < len(axes.texts) <= rows.LABELS


def test_of_names_that_overlap_the_most_frequent_is_drawn():
    from matplotlib.figure import Figure

    names, counts = ("a", "b", "TAG_c$", "d"), np.array([1, 2, 9, 3])
    found = details.LabelEmbeddings(names, counts, np.empty((0, 2), int), np.eye(4))
    axes = Figure().subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    at = np.array([[0.5, 0.5], [0.5, 0.5], [0.51, 0.5], [0.9, 0.9]])
    figures._name(axes, at, found)
    assert [text.get_text() for text in axes.texts] == [r"c\$", "d"]


def test_images_are_the_same_byte_for_byte(tmp_path):
    row = rows.make()
    row["curves"] = {"epoch": [1], "train_mAP": [0.1], "test_mAP": [0.2]}
    [panel] = figures.panels(rows.read(tmp_path, row))
    svg = panel.image("svg")
    assert svg == panel.image("svg") and b"<svg" in svg
    assert panel.image("png").startswith(b"\x89PNG")


def test_file_names_stay_in_their_folder(tmp_path):
    row = rows.make(data="../../$(x)")
    row["curves"] = {"epoch": [1], "train_mAP": [0.1], "test_mAP": [0.2]}
    [panel] = figures.panels(rows.read(tmp_path, row))
    assert panel.name == "figure1-..-..-x-none"
    assert panel.image("svg")


def test_a_long_name_leaves_the_axes_their_room(tmp_path):
    """matplotlib warns where it gives up, and a warning is an error here."""
    settings = {f"model__{word}": 7 for word in ("width", "num_heads", "ffn_width")}
    settings |= {"optim__learning_rate": 0.002, "train__num_epochs": 6}
    some = [
        rows.make("lamp", "delicious", "nar", rate, **changes)
        for rate in (0.1, 0.3)
        for changes in (settings, dict.fromkeys(settings, 1))
    ]
    panels = by_name(figures.panels(rows.read(tmp_path, *some)))
    panels["figure3-delicious-nar-mif1"].image("png")
    axes = drawn(panels["figure3-delicious-nar-mif1"])
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    [first, second] = [name for name in names if "learning_rate" in name]
    assert max(map(len, f"{first}\n{second}".split("\n"))) <= 44


def test_no_two_lines_look_or_are_called_alike(tmp_path):
    """Also of settings that only one of two noise levels has several of."""
    some = [
        rows.make("lamp", "delicious", kind, rate, model__width=width)
        for width in range(8, 30)
        for kind, rate in (("none", 0), ("nar", 0.3))
    ]
    some.append(rows.make("lamp", "delicious", "nar", 0.1, model__width=8))
    panel = by_name(figures.panels(rows.read(tmp_path, *some)))[
        "figure3-delicious-nar-mif1"
    ]
    axes = drawn(panel)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {f"lamp (model.width={width})" for width in range(8, 30)} <= set(names)
    looks = [c.lines[0] for c in axes.containers]
    looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in looks}
    assert len(looks) == 22
    panel.image("png")
