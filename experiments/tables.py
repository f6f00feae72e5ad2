"""Result rows -> Tables 1-4 of the paper with our columns beside them, as Markdown.

    python -m experiments.tables experiments/results/*.jsonl runs/*/details.jsonl
    python -m experiments.tables --table=runs experiments/results/baselines.jsonl

Rows that differ in their seeds alone stand in one line: mean, and +- the standard
deviation over the seeds.  "paper" and "oracle" choose thresholds on the test labels,
"honest" (corrected_val) does not.  The difference to the best other system is taken
between honest scores; its 95 % interval and p come from a paired bootstrap over test
rows (bootstrap.py), where the predictions of both were kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib

import numpy as np

from cbmlc_jax import config as config_lib
from cbmlc_jax import errors, metrics, thresholds
from experiments import bootstrap, published, records
from experiments.records import HONEST, ORACLE, Group, Records

NOT_RUN = "not run"
ESTIMATED = "estimated"  # source of rates in a row
# Key -> title, noise and numbers of a table of the paper.
_PAPER = {
    "1": ("Table 1: clean labels", "none", published.CLEAN),
    "2": (
        "Table 2: one positive a row",
        "single_positive",
        published.SINGLE_POSITIVE,
    ),
    "3": ("Table 3: combined noise", "combined", published.COMBINED),
    "4": ("Table 4: fixed or regularised label vectors", "none", published.ABLATION),
}
KEYS = (*_PAPER, "estimated", "runs")


@dataclasses.dataclass(frozen=True)
class Column:
    """Attributes: name; group, the heading above it; kind, how its numbers were made:
    "paper", "oracle", "honest" or ""."""

    name: str
    group: str = ""
    kind: str = ""

    @property
    def title(self) -> str:
        """The name where there is no heading above it."""
        return f"{self.group} {self.name}".strip()


@dataclasses.dataclass(frozen=True)
class Cell:
    """Attributes: text; value, what the column is sorted by, where that is a number."""

    text: str = ""
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """Attributes: cells; rows, the runs that it sums up."""

    cells: list[Cell]
    rows: list[dict] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Table:
    """Attributes: key for the command line; title; note; columns; lines."""

    key: str
    title: str
    note: str
    columns: list[Column]
    lines: list[Line]


def short(value: float, digits: int = 3) -> str:
    """.470 for 0.47."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def signed(value: float) -> str:
    """+.012 and −.012."""
    return ("+" if value >= 0 else "−") + short(abs(value))


def score(values: list[float]) -> Cell:
    """Mean, and the standard deviation over more than one seed."""
    text = short(np.mean(values))
    if len(values) > 1:
        text += f" ± {short(np.std(values, ddof=1))}"
    return Cell(text, float(np.mean(values)))


class Rivals:
    """Compares a group with the best one of another side, in the same setting.

    Args:
        found: rows and records.
        groups: that are compared with each other.
        side: a group -> what it must not share with its rival.
        resamples: of the bootstrap.
    """

    def __init__(self, found: Records, groups: list[Group], side, resamples: int):
        self._found, self._groups, self.side = found, groups, side
        self._resamples = resamples
        self._drawn: dict[int, tuple[str, dict] | None] = {}

    def cell(self, group: Group, metric: str) -> Cell:
        """The honest score minus that of the best rival by the same F1."""
        others = [
            g
            for g in self._groups
            if g.setting == group.setting and self.side(g) != self.side(group)
        ]
        if not others:
            return Cell("no other")
        other = max(others, key=lambda g: g.mean(HONEST, metric))
        difference = group.mean(HONEST, metric) - other.mean(HONEST, metric)
        ours, theirs = self._draws(group), self._draws(other)
        if ours is None or theirs is None or ours[0] != theirs[0]:
            interval = "(no bootstrap)"
        else:
            c = bootstrap.compare(difference, ours[1][metric], theirs[1][metric])
            interval = f"[{signed(c.low)}, {signed(c.high)}] p {short(c.p, 4)}"
        text = f"{signed(difference)} {interval}\nvs {other.name}"
        return Cell(text, difference)

    def _draws(self, group: Group) -> tuple[str, dict] | None:
        """A digest of the test labels, and the scores on the draws.

        None without predictions.
        """
        if id(group) not in self._drawn:
            runs = [self._found.predictions(row) for row in group.rows]
            drawn = None
            if all(run is not None for run in runs):
                labels = {hashlib.sha256(run.labels).hexdigest() for run in runs}
                if len(labels) == 1:
                    drawn = (labels.pop(), bootstrap.resampled(runs, self._resamples))
            self._drawn[id(group)] = drawn
        return self._drawn[id(group)]


def is_fixed(group: Group) -> bool:
    """Whether the label nodes stayed at their word vectors: the paper's Table 4."""
    return group.first["config"].get("embeddings.trainable") is False


def ablation_side(group: Group) -> str:
    """The line of Table 4 that a group of CbMLC belongs to."""
    return published.FIXED if is_fixed(group) else published.REGULARISED


def is_regularised(group: Group) -> bool:
    """CbMLC as the paper describes it: word vectors, trained, held near to them."""
    delta = group.first["config"]
    return not is_fixed(group) and (
        delta.get("embeddings.source") != "random" and delta.get("loss.cb_weight") != 0
    )


def build(found: Records, key: str, resamples: int = bootstrap.RESAMPLES) -> Table:
    """One of KEYS: a table of the paper, that of runs with estimated rates, or all."""
    if key == "runs":
        return runs_table(found)
    if key == "estimated":
        return estimated_table(found, resamples)
    title, noise, numbers = _PAPER[key]
    groups = [g for g in found.groups() if g.first["noise"]["kind"] == noise]
    if key == "4":
        side = ablation_side
        groups = [g for g in groups if g.model == "cbmlc"]
        groups = [g for g in groups if is_fixed(g) or is_regularised(g)]
    else:
        side = _model
        groups = [g for g in groups if not (g.model == "cbmlc" and is_fixed(g))]
    rivals = Rivals(found, groups, side, resamples)
    return _paper_table(key, title, numbers, groups, rivals)


def _model(group: Group) -> str:
    return group.model


def _paper_table(key, title, numbers, groups, rivals: Rivals) -> Table:
    """A line for each group on the paper's data sets, and for what was not run."""
    printed = [
        (i, name)
        for i, name in enumerate(metrics.F1_NAMES)
        if any(v[i] is not None for models in numbers.values() for v in models.values())
    ]
    columns = [Column("data"), Column("model"), Column("variant"), Column("seeds")]
    for _, name in printed:
        columns += [
            Column("paper", name, "paper"),
            Column("oracle", name, "oracle"),
            Column("honest", name, "honest"),
            Column("honest − best other", name, "honest"),
        ]
    lines = []
    for data, models in numbers.items():
        ours = [g for g in groups if g.first["dataset"] == data]
        for name in dict.fromkeys([*models, *map(rivals.side, ours)]):
            theirs = models.get(name, (None,) * len(metrics.F1_NAMES))
            runs = [g for g in ours if rivals.side(g) == name]
            missing = "" if name == published.BEST_OTHER else NOT_RUN
            for group in runs or [None]:
                cells = _described(data, name, group)
                for i, metric in printed:
                    cells += _compared(theirs[i], group, metric, rivals, missing)
                lines.append(Line(cells, group.rows if group else []))
    note = (
        "paper and oracle: thresholds chosen on the test labels. honest: "
        "corrected_val, no clean label used. ± is the standard deviation over seeds. "
        "The difference is to the best other line of the same data by the honest "
        "score, with the 95 % interval and p of a paired bootstrap over test rows; "
        "“no bootstrap” where a run kept no predictions."
    )
    return Table(key, title, note, columns, lines)


def _described(data: str, name: str, group: Group | None) -> list[Cell]:
    variant, seeds = (group.variant, len(group.rows)) if group else ("", 0)
    return [Cell(data), Cell(name), Cell(variant), Cell(str(seeds or ""), seeds)]


def _compared(theirs, group, metric: str, rivals: Rivals, missing: str) -> list[Cell]:
    paper = Cell("" if theirs is None else short(theirs, 4), theirs)
    if group is None:
        return [paper, Cell(missing), Cell(missing), Cell()]
    ours = [score(group.scores(protocol, metric)) for protocol in (ORACLE, HONEST)]
    return [paper, *ours, rivals.cell(group, metric)]


def estimated_table(found: Records, resamples: int = bootstrap.RESAMPLES) -> Table:
    """Groups of rows whose noise rates were estimated, by data set and noise.

    maF1 also with a threshold for each label, where the runs chose these.
    """
    groups = [
        g for g in found.groups() if g.first.get("rates", {}).get("source") == ESTIMATED
    ]
    rivals = Rivals(found, groups, _model, resamples)
    columns = [Column(n) for n in ("data", "noise", "model", "variant", "seeds")]
    columns += [Column(n, "", "honest") for n in metrics.F1_NAMES]
    columns += [Column(n, "expected", "honest") for n in ("ebF1", "maF1")]
    columns += [Column("− best other", n, "honest") for n in metrics.F1_NAMES]
    kinds = config_lib.CHOICES["noise.kind"]
    noises = [(g.first["dataset"], g.first["noise"]) for g in groups]
    places = [(data, kinds.index(n["kind"]), n["rate"] or 0) for data, n in noises]
    groups = [
        g for _, g in sorted(zip(places, groups, strict=True), key=lambda x: x[0])
    ]
    lines = []
    for group in groups:
        data, *described = _described(group.first["dataset"], group.model, group)
        cells = [data, Cell(group.noise), *described]
        cells += [score(group.scores(HONEST, n)) for n in metrics.F1_NAMES]
        cells += _by_expected_f1(group.rows)
        cells += [rivals.cell(group, n) for n in metrics.F1_NAMES]
        lines.append(Line(cells, group.rows))
    title = "No clean label: rates estimated"
    note = (
        "By corrected_val, with noise rates that were estimated from the noisy labels. "
        "Expected: ebF1 by the expected F1 of each row, maF1 by that of each label. "
        "± is the standard deviation over seeds; differences as in Table 1."
    )
    return Table("estimated", title, note, columns, lines)


def _by_expected_f1(rows: list[dict]) -> list[Cell]:
    """ebF1 of labels chosen for each row, maF1 of a threshold for each label."""
    each = [row.get("expected_f1_metrics") for row in rows]  # since 0.3.0
    if None in each:
        return [Cell(), Cell()]
    return [
        score([found[HONEST][way][name] for found in each])
        for way, name in (("per_row", "ebF1"), ("per_label", "maF1"))
    ]


def runs_table(found: Records) -> Table:
    """Every group of rows, by every protocol."""
    names = ["data", "noise", "model"]
    kinds = {"oracle": "oracle", "corrected_val": "honest"}
    columns = [Column(n) for n in names]
    columns += [Column(p, "", kinds.get(p, "")) for p in thresholds.PROTOCOLS]
    columns += [Column("own rule"), Column("paper", "", "paper")]
    names = ["P@1", "seeds", "seconds", "chosen", "parameters", "flags"]
    columns += [Column(n) for n in names]
    lines = [Line(_run_cells(group), group.rows) for group in found.groups()]
    note = (
        "ebF1/miF1/maF1 by four ways to choose the threshold; ± is over seeds. own "
        "rule: what the model decodes by itself."
    )
    return Table("runs", "All runs", note, columns, lines)


def _run_cells(group: Group) -> list[Cell]:
    rows, first = group.rows, group.first
    noise, rate = first["noise"]["kind"], first["noise"]["rate"]
    if "noise.rate" in first["config"]:
        noise += f" {rate:g}"
    protocols = [
        _three(rows, lambda r, p=p: r["metrics"][p]) for p in thresholds.PROTOCOLS
    ]
    if len(rows) > 1:
        spread = np.std(group.scores(HONEST, "miF1"), ddof=1)
        last = protocols[-1]
        protocols[-1] = Cell(f"{last.text} (miF1 ± {spread:.3f})", last.value)
    own = [r for r in rows if "decoded_metrics" in r]
    precision = float(np.mean([r["ranking"]["P@1"] for r in rows]))
    seconds = float(np.mean([sum(r["seconds"].values()) for r in rows]))
    settings = first["selection"].get("settings", {})
    chosen = ", ".join(f"{k} {v:g}" for k, v in settings.items())
    return [
        Cell(first["dataset"]),
        Cell(noise),
        Cell(group.model),
        *protocols,
        _three(own, lambda r: r["decoded_metrics"]) if own else Cell(),
        _printed(first["dataset"], noise, group),
        Cell(short(precision), precision),
        Cell(str(len(rows)), len(rows)),
        Cell(f"{seconds:.0f}", seconds),
        Cell(chosen or f"epoch {first['epoch']}"),
        Cell(f"{first['params']:,}", first["params"]),
        Cell(f"`{records.flags(first)}`"),
    ]


def _three(rows: list[dict], values) -> Cell:
    """Means of the three F1s; `values` takes a row to {name: value}."""
    means = {n: float(np.mean([values(r)[n] for r in rows])) for n in metrics.F1_NAMES}
    return Cell("/".join(short(m) for m in means.values()), means["miF1"])


def _printed(data: str, noise: str, group: Group) -> Cell:
    """What the paper prints for a model as it stands in Tables 1-3."""
    printed = (_PAPER[key][1:] for key in "123")
    numbers = dict(printed).get(noise, {}).get(data, {}).get(group.model)
    if numbers is None or (group.model == "cbmlc" and is_fixed(group)):
        return Cell()
    text = "/".join("-" if x is None else short(x) for x in numbers)
    return Cell(text, numbers[1])


def markdown(table: Table) -> str:
    """A table as Markdown; a cell is one line, `|` in it is escaped."""
    header = [column.title for column in table.columns]
    lines = [header, ["---"] * len(header)]
    for line in table.lines:
        texts = (" ".join(cell.text.split()) for cell in line.cells)
        lines.append([text.replace("|", "\\|") for text in texts])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Prints the tables of the rows in the given JSON lines files."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", metavar="ROWS.jsonl")
    parser.add_argument("--table", choices=KEYS, help="this one, without its title")
    arguments = parser.parse_args()
    with errors.explained():
        found = records.read(arguments.files)
        for key in [arguments.table] if arguments.table else KEYS:
            table = build(found, key)
            if not arguments.table:
                print(f"## {table.title}\n\n{table.note}\n")
            print(markdown(table) + ("" if arguments.table else "\n"))


if __name__ == "__main__":
    main()
