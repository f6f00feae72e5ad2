"""`--mode=audit`: which labels of the training rows are likely wrong."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator

import numpy as np

from cbmlc_jax import config as config_lib
from cbmlc_jax import files, fit, issues, page, repair, task, workdirs
from cbmlc_jax import run as run_lib
from cbmlc_jax.data.dataset import Dataset

SHOWN = 10  # labels and rows that the summary names


def run_audit(
    config, workdir: str, command: str, *, top: int, apply: str
) -> issues.Issues:
    """Finds likely wrong labels and writes issues.csv and issues.html to the workdir.

    A workdir without a finished run is trained first: the scores are those that its
    cross-fitting left.  The rates are always estimated from these scores.

    Args:
        config: validated, with train.crossfit.
        workdir: of the run.
        command: for the row of a run that is not finished.
        top: issues on the page; the CSV has at least all doubtful entries.
        apply: one of repair.WAYS to write labels_repaired.npz, or "none".

    Raises:
        ConfigError: no cross-fitting, so that there are no out-of-fold scores.
        RunError, DataError: see `fit.train_and_evaluate`.
    """
    if not config.train.crossfit:
        raise config_lib.ConfigError(
            "--mode=audit needs scores of models that did not see the row: set "
            "config.train.crossfit=5, with a cheap model such as "
            "config.model.name=lr_knn"
        )
    fit.train_and_evaluate(config, workdir, command)
    scores = run_lib.saved_out_of_fold(config, workdir).scores
    dataset = task.load(config)
    noisy = task.noisy_labels(config, dataset)
    if scores.shape != noisy.shape:
        raise workdirs.RunError(
            f"{workdirs.out_of_fold_path(workdir)} has scores {scores.shape} for "
            f"labels {noisy.shape}: the data are not those of the run"
        )
    found = issues.find_label_issues(
        noisy, np.clip(scores, 0, 1), ignored=dataset.train.ignored
    )
    listed = found.ranked(max(top, int(found.doubtful.sum())))
    path = os.path.join(workdir, "issues.csv")
    files.write_atomic(path, _csv(found, listed, dataset.label_names))
    text = "\n".join(summary(found, dataset))
    if config.noise.kind != "none":
        text += "\n" + planted(found, dataset.train.labels)
    target = os.path.join(workdir, "issues.html")
    files.write_atomic(target, page.render(dataset, found, listed[:top], text))
    print(f"{text}\n{path}: {len(listed)} issues; {target}: the first {top}")
    if apply != "none":
        target = repair.default_path(workdir)
        changed = repair.write(target, found, apply)
        print(
            f"{target}: {changed} targets differ ({apply}); train on them with "
            f"--config.noise.repaired={target} and another --workdir"
        )
    return found


def _csv(
    found: issues.Issues, listed: np.ndarray, names: tuple[str, ...]
) -> Iterator[str]:
    """Lines of rank, row, label, given, suggested, score and the row's issues."""
    per_row = found.doubtful.sum(1)
    yield "rank,row,label,given,suggested,score,issues_in_row\n"
    for rank, (row, label) in enumerate(listed.tolist(), 1):
        given = int(found.labels[row, label])
        score = f"{found.wrong[row, label]:.6f}"
        line = io.StringIO()
        cells = [rank, row, _cell(names[label]), given, 1 - given, score, per_row[row]]
        csv.writer(line, lineterminator="\n").writerow(cells)
        yield line.getvalue()


def _cell(name: str) -> str:
    """A label's name; a spreadsheet must not run one as a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def summary(found: issues.Issues, dataset: Dataset) -> Iterator[str]:
    """What the audit says of all entries, lines of text."""
    on, rates = found.labels != 0, found.rates
    doubtful = found.doubtful
    yield (
        f"{dataset.name}: {len(on)} training rows, {on.shape[1]} labels, "
        f"{int(on.sum())} given"
    )
    yield (
        f"noise rates, {rates.source}: P(0->1) {rates.r0:.4f}, P(1->0) {rates.r1:.3f}"
        + (f" (doubtful: {rates.doubt})" if rates.doubt else "")
    )
    yield (
        f"expected wrong entries: {found.expected:.0f}; more likely wrong than right: "
        f"{int(doubtful.sum())}, of them {int((doubtful & on).sum())} to remove and "
        f"{int((doubtful & ~on).sum())} to add, in {int(doubtful.any(1).sum())} rows"
    )
    if not found.related:
        yield (
            "rows have too few pairs of labels for their labels to be evidence for "
            "each other: scores alone were read"
        )
    expected, names = found.wrong.sum(0, dtype=np.float64), dataset.label_names
    worst = np.argsort(-expected, kind="stable")[:SHOWN]
    yield (
        "labels with the most expected (in brackets: likelier wrong than right): "
        + ", ".join(
            f"{names[i]} {expected[i]:.1f} ({int(doubtful[:, i].sum())})" for i in worst
        )
    )
    rows = np.argsort(-found.wrong.sum(1, dtype=np.float64), kind="stable")[:SHOWN]
    yield "rows with the most expected: " + ", ".join(
        f"{i} {found.wrong[i].sum():.1f} ({int(doubtful[i].sum())})" for i in rows
    )


def planted(found: issues.Issues, clean: np.ndarray) -> str:
    """How well the flips that the config planted are found, one line of text."""
    wrong = found.labels != clean
    precision, average = issues.precision(found.wrong, wrong)
    return (
        f"the clean labels are at hand (the noise was planted): {int(wrong.sum())} "
        f"flips, precision at their number {precision:.3f}, average precision "
        f"{average:.3f}"
    )
