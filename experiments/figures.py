"""Result rows and records -> the paper's figures 1, 3 and 4, and t-SNE of the labels.

    python -m experiments.figures --output=runs/figures ROWS.jsonl DETAILS.jsonl ...

writes a PNG and an SVG for each panel.  Needs the package extra `report`.

  figure1-*  train and test mAP over the epochs (rows with config.eval.curves=True)
  figure3-*  noise rate against miF1 and maF1, honest thresholds
  figure4    distance of the 100 most co-occurring pairs of labels, normalised
  tsne-*     label embeddings in the plane
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import os
import re
import textwrap

import numpy as np

from cbmlc_jax import details, errors, files
from experiments import published, records
from experiments.records import HONEST, Group, Records
from experiments.tables import is_fixed, is_regularised

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "-.", ":", "--")  # of the lines after as many as there are colours
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.fonttype": "path",
    "svg.hashsalt": "cbmlc_jax",  # the same picture, byte for byte
}
SIZE, WIDE = (5.2, 3.8), (8.6, 3.8)  # inches; the wide ones have a legend beside them
NAMED = 25  # labels with their name in a t-SNE


class FigureError(ValueError):
    """Figures that cannot be drawn; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Attributes: name of its files; title; caption; draw(axes); size in inches."""

    name: str
    title: str
    caption: str
    draw: object
    size: tuple[float, float] = SIZE

    def image(self, kind: str) -> bytes:
        """The panel as "png" or "svg".

        Raises:
            FigureError: matplotlib is not installed.
        """
        try:
            import matplotlib
        except ImportError:
            raise FigureError(
                "figures need matplotlib: pip install -e '.[report]'"
            ) from None
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            axes = figure.subplots()
            axes.set_title(self.title, fontsize=11)
            self.draw(axes)
            buffer = io.BytesIO()
            plain = {"Date": None} if kind == "svg" else {}
            figure.savefig(buffer, format=kind, dpi=150, metadata=plain)
        return buffer.getvalue()


def panels(found: Records) -> list[Panel]:
    """Every panel that the rows have something for."""
    groups = found.groups()
    return [
        *_mean_average_precision(groups),
        *_noise_rates(groups),
        *_distances(found, groups),
        *_planes(found, groups),
    ]


def _slug(*words: object) -> str:
    """A file name of lower-case words."""
    text = "-".join(str(w) for w in words if str(w))
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _legend(name: str) -> str:
    """A name of many settings in lines that leave the axes their room."""
    return textwrap.fill(name, 44, break_on_hyphens=False)


def _legend_beside(axes) -> None:
    """Lines of many systems leave no room for it among them."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=8)


def _by(groups: list[Group], key) -> dict[tuple, list[Group]]:
    found = collections.defaultdict(list)
    for group in groups:
        found[key(group)].append(group)
    return dict(found)


def _mean_average_precision(groups: list[Group]) -> list[Panel]:
    """Figure 1: a panel for each setting; the mean over seeds."""
    groups = [g for g in groups if "curves" in g.first]
    found = []
    for (data, noise, *_), some in _by(
        groups, lambda g: (g.first["dataset"], g.noise, g.setting)
    ).items():

        def draw(axes, some=some):
            for i, group in enumerate(some):
                colour = COLOURS[i % len(COLOURS)]
                curves = [r["curves"] for r in group.rows if "curves" in r]
                epochs = min((c["epoch"] for c in curves), key=len)
                for name, style in (("train", "--"), ("test", "-")):
                    values = [c[f"{name}_mAP"][: len(epochs)] for c in curves]
                    label = _legend(f"{group.name}, {name}")
                    axes.plot(
                        epochs,
                        np.mean(values, 0),
                        style,
                        color=colour,
                        marker=MARKERS[i % len(MARKERS)],
                        label=label,
                    )
                chosen = group.first["epoch"]
                axes.axvline(chosen, color=colour, lw=1, ls=":")
            axes.set_xlabel("epoch (dotted: the one chosen on validation)")
            axes.set_ylabel("mAP")
            axes.xaxis.get_major_locator().set_params(integer=True)
            _legend_beside(axes)

        found.append(
            Panel(
                _slug("figure1", data, noise),
                f"{data}, {noise}",
                "Figure 1: mean average precision over the epochs. Train: against the "
                "noisy labels that are trained on; test: against the clean ones. "
                "Nothing was chosen by these curves.",
                draw,
                WIDE,
            )
        )
    return found


def _method(group: Group) -> tuple:
    """Model and settings, whatever the noise; what a line of figure 3 is."""
    delta = group.first["config"]
    left_out = (*records.SEED_KEYS, "noise.kind", "noise.rate")
    rest = sorted((k, v) for k, v in delta.items() if k not in left_out)
    return group.first["fingerprint"], group.model, str(rest)


def _noise_rates(groups: list[Group]) -> list[Panel]:
    """Figure 3: a panel for each data set, kind of noise and F1."""
    found = []
    for data in dict.fromkeys(g.first["dataset"] for g in groups):
        for kind in ("ncar", "nar"):
            mine = [g for g in groups if g.first["dataset"] == data]
            mine = [g for g in mine if g.first["noise"]["kind"] in ("none", kind)]
            lines = [
                sorted(some, key=lambda g: g.first["noise"]["rate"])
                for some in _by(mine, _method).values()
                if len({g.first["noise"]["rate"] for g in some}) > 1
            ]
            lines.sort(key=lambda some: (some[0].model != "cbmlc", some[0].model))
            if lines:
                found += [_rate_panel(data, kind, m, lines) for m in ("miF1", "maF1")]
    return found


def _line_name(line: list[Group], lines: list[list[Group]]) -> str:
    """The model, and the settings in which its lines differ."""
    model = line[0].model
    alike = [other[0] for other in lines if other[0].model == model]
    differing = records.variant(line[0], alike)
    return _legend(f"{model} ({differing})" if differing else model)


def _rate_panel(data: str, kind: str, metric: str, lines: list[list[Group]]) -> Panel:
    def draw(axes):
        for i, some in enumerate(lines):
            axes.errorbar(
                [g.first["noise"]["rate"] for g in some],
                [g.mean(HONEST, metric) for g in some],
                [np.std(g.scores(HONEST, metric), ddof=len(g.rows) > 1) for g in some],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
                capsize=3,
                label=_line_name(some, lines),
            )
        for name, style in (("cbmlc", "--"), (published.BEST_OTHER, ":")):
            scores = published.BY_RATE.get((data, kind, name), {}).get(metric)
            if scores:
                axes.plot(
                    published.RATES[kind],
                    scores,
                    style,
                    color="#777777",
                    label=f"paper: {name} (test thresholds)",
                )
        what = {"ncar": "of a label to be flipped", "nar": "of a positive to be lost"}
        axes.set_xlabel(f"nominal probability {what[kind]}")
        axes.set_ylabel(metric)
        _legend_beside(axes)

    return Panel(
        _slug("figure3", data, kind, metric),
        f"{data}, {kind}: {metric}",
        "Figure 3: noise level against F1, thresholds chosen honestly "
        "(corrected_val); bars: standard deviation over seeds.",
        draw,
        WIDE,
    )


def _distances(found: Records, groups: list[Group]) -> list[Panel]:
    """Figure 4: CbMLC on clean labels, regularised and without word vectors."""
    bars: dict[str, dict[str, list[float]]] = {
        data: {"paper": list(both)} for data, both in published.DISTANCES.items()
    }
    seeds = collections.Counter()  # of several groups, the first with most seeds
    for group in groups:
        if group.model != "cbmlc" or group.first["noise"]["kind"] != "none":
            continue
        vectors = [found.label_embeddings(row) for row in group.rows]
        distances = [
            details.pair_distance(v) for v in vectors if v is not None and len(v.pairs)
        ]
        kind = label_vectors(group)
        if not distances or kind == published.FIXED:
            continue
        row = bars.setdefault(group.first["dataset"], {})
        row.setdefault("ours", [np.nan, np.nan])
        if len(distances) > seeds[kind, group.first["dataset"]]:
            seeds[kind, group.first["dataset"]] = len(distances)
            row["ours"][kind == "random"] = float(np.mean(distances))
    if not any("ours" in some for some in bars.values()):
        return []

    def draw(axes):
        looks = [
            ("paper", 0, "paper, regularised", COLOURS[0], 0.35, ""),
            ("paper", 1, "paper, no word vectors", COLOURS[1], 0.35, ""),
            ("ours", 0, "ours, regularised", COLOURS[0], 1, ""),
            ("ours", 1, "ours, no word vectors", COLOURS[1], 1, "//"),
        ]
        at = np.arange(len(bars))
        for i, (whose, side, label, colour, alpha, hatch) in enumerate(looks):
            heights = [b.get(whose, [np.nan] * 2)[side] for b in bars.values()]
            axes.bar(
                at + 0.2 * (i - 1.5),
                heights,
                0.2,
                color=colour,
                alpha=alpha,
                hatch=hatch,
                edgecolor="white",
                label=label,
            )
        axes.set_xticks(at, bars, rotation=20, ha="right")
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("normalised distance")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
        axes.legend(ncols=2, fontsize=8, loc="upper center")

    caption = (
        "Figure 4: mean distance of the embeddings of the 100 pairs of labels that "
        "occur together most often in training, over the norm of the element-wise "
        "maximum of all embeddings; clean labels. Smaller: nearer together. A bar that "
        "is missing was not run."
    )
    title = "Distance of co-occurring labels"
    return [Panel("figure4", title, caption, draw)]


def label_vectors(group: Group) -> str:
    """What the label nodes of a group start from: regularised, random or fixed."""
    if is_fixed(group):
        return published.FIXED
    return published.REGULARISED if is_regularised(group) else "random"


def _planes(found: Records, groups: list[Group]) -> list[Panel]:
    """t-SNE: a panel for the first run of each data set, model and kind of vectors."""
    planes, seen = [], set()
    # Clean labels before noisy ones, whatever the order of the files.
    for group in sorted(groups, key=lambda g: g.first["noise"]["kind"] != "none"):
        row = group.first
        key = (row["dataset"], row["model"], label_vectors(group))
        embeddings = None if key in seen else found.label_embeddings(row)
        if embeddings is None or len(embeddings.names) < 5:
            continue
        seen.add(key)
        planes.append(
            Panel(
                _slug("tsne", row["dataset"], group.noise, group.name),
                f"{row['dataset']}, {group.noise}: {group.name}",
                f"t-SNE of the label embeddings, seed {row['seed']}. Size: how often a "
                f"label occurs in training; {NAMED} frequent ones are named; lines "
                "join the pairs that occur together most often.",
                lambda axes, e=embeddings: _plane(axes, e),
            )
        )
    return planes


def plane(vectors: np.ndarray) -> np.ndarray:
    """[L, 2] t-SNE of [L, P], from the principal components, with a seed of its own."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
    with threadpool_limits(1):  # its threads wait for each other on a busy machine
        return tsne.fit_transform(vectors.astype(np.float64))


def _plane(axes, embeddings: details.LabelEmbeddings) -> None:
    at = plane(embeddings.vectors)
    for i, j in embeddings.pairs:
        axes.plot(*at[[i, j]].T, color="#999999", lw=0.5, alpha=0.4, zorder=1)
    share = embeddings.counts / max(embeddings.counts.max(), 1)
    axes.scatter(*at.T, s=6 + 60 * share, color=COLOURS[0], alpha=0.7, zorder=2)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    _name(axes, at, embeddings)


def _name(axes, at: np.ndarray, embeddings: details.LabelEmbeddings) -> None:
    """Names the most frequent labels, but those whose name would lie on another."""
    axes.figure.draw_without_rendering()  # so that extents are known
    taken = []
    for i in np.argsort(-embeddings.counts, kind="stable"):
        name = embeddings.names[i].removeprefix("TAG_").replace("$", r"\$")
        text = axes.annotate(
            name, at[i], fontsize=8, xytext=(2, 2), textcoords="offset points"
        )
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            text.remove()
            continue
        taken.append(box)
        if len(taken) == NAMED:
            break


def main() -> None:
    """Writes the panels of the given files."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.figures", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--output", required=True, help="folder for PNG and SVG files")
    arguments = parser.parse_args()
    with errors.explained():
        found = panels(records.read(arguments.files))
        if not found:
            raise FigureError(
                "nothing to draw: figures need rows at several noise rates, rows with "
                "config.eval.curves=True, or the details.jsonl of runs"
            )
        os.makedirs(arguments.output, exist_ok=True)
        for panel in found:
            for kind in ("png", "svg"):
                path = os.path.join(arguments.output, f"{panel.name}.{kind}")
                files.write_atomic(path, panel.image(kind))
            print(path)


if __name__ == "__main__":
    main()
