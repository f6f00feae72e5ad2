"""What a look at a data set finds before anything is trained: `--mode=data`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import scipy.sparse

from cbmlc_jax import config as config_lib
from cbmlc_jax import embeddings, files, run, task
from cbmlc_jax.data.dataset import UNKNOWN, Dataset, Dense, Inputs, Ragged

NEAR_EMPTY = 2  # a row of at most so many features tells little
SHOWN = 10  # labels, pairs and conflicts that the report names
# Stored numbers x labels up to which the noise rates are estimated: five fits of
# logistic regression, a minute or two for 1e9.
MOST_WORK = 2e9


def describe(config) -> dict:
    """Reads the data set of the config and counts.  Labels have the config's noise.

    Args:
        config: validated.

    Returns:
        What the report says, in full, as JSON has it.

    Raises:
        DataError, ConfigError: see `task.load`.
    """
    dataset = task.load(config)
    config = config_lib.settled(config, dataset.kind)
    noisy = task.noisy_labels(config, dataset)
    train, validation = task.rows(config, dataset, noisy)
    sides = {"train": noisy[train], "test": dataset.test.labels}
    if not config.train.crossfit:
        sides["validation"] = noisy[validation]
    names = dataset.label_names
    digests = _digests(dataset.train.inputs)
    return {
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "inputs": dataset.kind,
        "noise": config.noise.kind,
        "split": task.split_from(config, dataset),
        "features": len(dataset.feature_names),
        "labels": len(names),
        "sides": {side: _side(labels, names) for side, labels in sides.items()},
        "duplicates": _duplicates(digests, noisy, dataset),
        "near_empty": _near_empty(dataset.train.inputs, dataset.feature_names),
        "pairs": _pairs(noisy, names),
        "vectors": _vectors(config, dataset),
        "rates": _rates(config, dataset, noisy),
    }


def _side(labels: np.ndarray, names: tuple[str, ...]) -> dict:
    positives, sizes = labels.sum(0, dtype=np.int64), labels.sum(1, dtype=np.int64)

    def named(which: np.ndarray) -> list[str]:
        return [names[i] for i in np.flatnonzero(which)]

    return {
        "rows": len(labels),
        "cardinality": round(float(sizes.mean()), 4),
        "most_labels": int(sizes.max()),
        "rows_without_labels": int((sizes == 0).sum()),
        "labels_without_positives": named(positives == 0),
        "labels_without_negatives": named(positives == len(labels)),
        "labels_with_fewer_than_5_positives": int((positives < 5).sum()),
    }


def _digests(inputs: Inputs) -> np.ndarray:
    """uint64 [N, 2], equal where rows are."""

    def content() -> Iterator[bytes]:
        if isinstance(inputs, Ragged):
            for start, end in zip(inputs.offsets[:-1], inputs.offsets[1:], strict=True):
                row = inputs.values[start:end].tobytes()
                if inputs.weights is not None:
                    row += b"/" + inputs.weights[start:end].tobytes()
                yield row
        elif isinstance(inputs, Dense):
            for values in inputs.values:
                yield values.tobytes()
        else:
            yield from inputs.content()

    hashes = b"".join(
        hashlib.blake2b(row, digest_size=16).digest() for row in content()
    )
    return np.frombuffer(hashes, np.uint64).reshape(-1, 2)


def _duplicates(digests: np.ndarray, labels: np.ndarray, dataset: Dataset) -> dict:
    """Equal rows: how many, with what labels, and how many of them are test rows."""
    _, group = np.unique(digests, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    first = np.flatnonzero(np.diff(group.ravel()[order], prepend=-1))
    sizes = np.diff(np.append(first, len(order)))
    conflicts, rows = [], 0
    for start, size in zip(first[sizes > 1], sizes[sizes > 1], strict=True):
        mine = order[start : start + size]
        different = np.unique(labels[mine], axis=0)
        if len(different) > 1:
            rows += len(mine)
            other = mine[(labels[mine] != labels[mine[0]]).any(1)][0]
            conflicts.append([int(mine[0]), int(other)])
    known = {tuple(row) for row in digests.tolist()}
    test = _digests(dataset.test.inputs).tolist()
    return {
        "groups": int((sizes > 1).sum()),
        "rows": int(sizes[sizes > 1].sum()),
        "groups_with_different_labels": len(conflicts),
        "rows_with_different_labels": rows,
        "examples": [
            {
                "rows": pair,
                "labels": [
                    [dataset.label_names[i] for i in np.flatnonzero(labels[row])]
                    for row in pair
                ],
            }
            for pair in conflicts[:SHOWN]
        ],
        "test_rows_that_are_in_train": sum(tuple(row) in known for row in test),
    }


def _near_empty(inputs: Inputs, feature_names: tuple[str, ...]) -> dict:
    """Training rows with few features: known words, or numbers that are not 0."""
    if isinstance(inputs, Ragged):
        present = np.ones(len(inputs.values), bool)
        if inputs.weights is not None:
            present = inputs.weights != 0
        elif feature_names[:1] == (UNKNOWN,):
            present = inputs.values != 0
        before = np.concatenate([[0], np.cumsum(present)])
        counts = np.diff(before[inputs.offsets])
    elif isinstance(inputs, Dense):
        counts = np.count_nonzero(inputs.values, axis=1)
    else:
        return {}
    few = np.flatnonzero(counts <= NEAR_EMPTY)
    return {
        "at_most": NEAR_EMPTY,
        "rows": len(few),
        "empty": int((counts == 0).sum()),
        "examples": few[:SHOWN].tolist(),
    }


def _pairs(labels: np.ndarray, names: tuple[str, ...]) -> list[dict]:
    """The pairs of labels that are on together most often; sparse, for many labels."""
    matrix = scipy.sparse.csr_array(labels.astype(np.int32))
    together = scipy.sparse.triu(matrix.T @ matrix, k=1).tocoo()
    positives = labels.sum(0, dtype=np.int64)
    order = np.lexsort((together.col, together.row, -together.data))[:SHOWN]
    return [
        {
            "labels": [names[i], names[j]],
            "rows": int(count),
            "share_of_rarer": round(float(count / min(positives[i], positives[j])), 4),
        }
        for i, j, count in zip(
            together.row[order], together.col[order], together.data[order], strict=True
        )
    ]


def _vectors(config, dataset: Dataset) -> dict:
    """Which labels have word vectors, or why there are none."""
    try:
        known = task.vocabulary(config, dataset)
        _, coverage = embeddings.label_vectors(dataset.label_texts, known)
    except embeddings.EmbeddingError as error:
        return {"problem": str(error)}
    lacking = [
        name
        for name, text in zip(dataset.label_names, dataset.label_texts, strict=True)
        if not any(word in known.vectors for word in embeddings.tokens(text))
    ]
    return {
        "source": known.source,
        "dim": known.width,
        "coverage": coverage,
        "labels_without_vector": lacking,
    }


def _rates(config, dataset: Dataset, noisy: np.ndarray) -> dict:
    """Noise rates as `run.estimated_rates` finds them, or why they were not looked for.

    Images have no numbers of their own here: their network is not run.
    """
    if dataset.kind == "images":
        return {"skipped": "images are no rows of numbers before a network has run"}
    stored = dataset.train.inputs.values.size
    if stored * noisy.shape[1] > MOST_WORK:
        return {
            "skipped": f"{stored} numbers x {noisy.shape[1]} labels would take long; "
            "training with config.noise.known=False estimates them"
        }
    matrix = dataset.train.inputs.matrix(len(dataset.feature_names))
    found = run.estimated_rates(matrix, noisy, config.data.split_seed)
    return {
        "r0": round(found.r0, 5),
        "r1": round(found.r1, 5),
        "positives": round(found.positives, 1),
        "positives_spread": _rounded(found.positives_spread),
        "r0_spread": _rounded(found.r0_spread),
        "r1_spread": _rounded(found.r1_spread),
        "reliable": found.reliable,
        "partial": found.partial,
        "doubt": found.reason,
    }


def _rounded(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None  # JSON has no NaN


def report(found: dict) -> str:
    """What `describe` found, for eyes."""
    kind, split = found["inputs"], found["split"]
    lines = [
        f"{found['dataset']}: rows are {kind}, {found['features']} features, "
        f"{found['labels']} labels",
        f"test rows {split['test']}, validation {split['validation']}; noise "
        f"{found['noise']}",
        "",
        f"{'':<12}{'rows':>9}{'labels a row':>14}{'most':>6}{'without':>9}"
        f"{'labels without positives':>26}",
    ]
    for side, counts in found["sides"].items():
        lines.append(
            f"{side:<12}{counts['rows']:>9}{counts['cardinality']:>14.3f}"
            f"{counts['most_labels']:>6}{counts['rows_without_labels']:>9}"
            f"{len(counts['labels_without_positives']):>26}"
        )
    train = found["sides"]["train"]
    if train["labels_without_positives"]:
        lines.append(
            "warning: no training row has "
            + _some(train["labels_without_positives"])
            + ": a model cannot learn them; training goes on without"
        )
    if train["labels_without_negatives"]:
        lines.append(
            "warning: every training row has "
            + _some(train["labels_without_negatives"])
        )
    lines += ["", *_report_rows(found), "", *_report_labels(found)]
    return "\n".join(lines) + "\n"


def _report_rows(found: dict) -> Iterator[str]:
    same = found["duplicates"]
    yield (
        f"equal training rows: {same['rows']} in {same['groups']} groups; "
        f"{same['groups_with_different_labels']} groups "
        f"({same['rows_with_different_labels']} rows) with different labels"
        + (", such as (rows from 0)" if same["examples"] else "")
    )
    for example in same["examples"][:3]:
        one, other = (", ".join(labels) or "none" for labels in example["labels"])
        yield f"  rows {example['rows'][0]}: {one} | {example['rows'][1]}: {other}"
    both = same["test_rows_that_are_in_train"]
    yield f"test rows that are training rows, too: {both}"
    if few := found["near_empty"]:
        yield (
            f"near-empty training rows (at most {few['at_most']} features): "
            f"{few['rows']}, of them empty: {few['empty']}"
        )


def _report_labels(found: dict) -> Iterator[str]:
    yield "labels that are on together most often (rows, share of the rarer one's)"
    for pair in found["pairs"]:
        names = " + ".join(pair["labels"])
        yield f"  {pair['rows']:>7} {pair['share_of_rarer']:>6.1%}  {names}"
    vectors, rates = found["vectors"], found["rates"]
    if "problem" in vectors:
        yield f"word vectors: {vectors['problem']}"
    else:
        coverage = vectors["coverage"]
        yield (
            f"word vectors: {vectors['source']}, {vectors['dim']}-d; labels found "
            f"whole {coverage['whole']}, in part {coverage['partial']}, not at all "
            f"{coverage['none']}"
        )
        if vectors["labels_without_vector"]:
            yield f"  without: {_some(vectors['labels_without_vector'])}"
    if "skipped" in rates:
        yield f"noise rates: not estimated: {rates['skipped']}"
    elif rates["partial"]:
        yield f"noise rates: P(1->0) counts as {rates['r1']:.3f}: {rates['doubt']}"
    elif not rates["reliable"]:
        yield f"noise rates: no estimate that could be relied on: {rates['doubt']}"
    else:
        yield (
            f"noise rates, estimated: P(0->1) {rates['r0']:.4f} +- "
            f"{rates['r0_spread']:.4f}, P(1->0) {rates['r1']:.3f} +- "
            f"{rates['r1_spread']:.3f}"
        )
        yield (
            "  right if the entries that a linear model scores highest are truly "
            "positive; if they are not, P(1->0) comes out too high"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def run_description(config, target: str | None) -> None:
    """Prints the report; writes everything that was found to `target`, one JSON.

    Raises:
        DataError, ConfigError: see `describe`.
    """
    found = describe(config)
    print(report(found), end="")
    if target:
        files.write_atomic(target, json.dumps(found, indent=2) + "\n")
