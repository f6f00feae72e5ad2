"""Scores rows with an exported artefact: jax and numpy alone, for images Pillow too.

    python -m cbmlc_jax.serving --artefact=FOLDER --input=rows.jsonl --output=out.jsonl

Rows are the JSON lines that `--mode=predict` reads; each output line is
{"line": number in the input, "labels": [...], "scores": {label: score}}.  The output
grows batch by batch, and the same command goes on where it was stopped.  `--bench`
prints the latency of batches instead.  (jax.export reads its artefacts with the package
flatbuffers.)

`artefact.py` says what lies in the folder, `export.py` writes it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO

import jax
import numpy as np
from jax import export

from cbmlc_jax import artefact as artefact_lib
from cbmlc_jax.artefact import ArtefactError
from cbmlc_jax.data import parsers, tables
from cbmlc_jax.data.dataset import DataError, Dense, Inputs, Pixels, Ragged
from cbmlc_jax.decision import Decision


class ServingError(ValueError):
    """A request that cannot be served; the message says what to do."""


class Artefact:
    """An exported model.

    Args:
        folder: of the artefact.
        batch_size: of the largest batch; smaller ones are padded to a power of two, so
            that few shapes are compiled.

    Attributes:
        label_names, feature_names: L and F names.
        kind: of rows: "images" or one of `parsers.KINDS`.
        side: of the square that images are resized to; None for other rows.
        decision: which labels are said.
        card: the model card.
        digest: sha256 of the manifest, which has those of the other files.

    Raises:
        ArtefactError: it is damaged, or of another version.
    """

    def __init__(self, folder: str, batch_size: int = 64):
        self.folder, self._batch_size = folder, batch_size
        manifest, self.digest = artefact_lib.read_manifest(folder)
        names = artefact_lib.read_json(folder, manifest, "vocabulary.json")
        self.label_names, self.feature_names = names["labels"], names["features"]
        self.kind, self._widths = manifest["kind"], manifest["widths"]
        self.side = manifest.get("side")
        self.typical_length = manifest["typical_length"]
        self.card = artefact_lib.read_json(folder, manifest, "card.json")
        try:
            fields = artefact_lib.read_json(folder, manifest, "decision.json")
            self.decision = Decision.from_json(fields, len(self.label_names))
        except ValueError as error:
            raise ArtefactError(
                f"{folder}/decision.json cannot be used: {error}: export the model "
                "again"
            ) from error
        self._weights = jax.device_put(artefact_lib.read_weights(folder, manifest))
        self._call = jax.jit(_exported(folder, manifest).call)

    def parser(self, folder: str = ""):
        """Of rows of this artefact; see `parsers`.

        Args:
            folder: that paths of images are relative to.

        Raises:
            ServingError: rows are images, and Pillow is not installed.
        """
        if self.kind != "images":
            return parsers.KINDS[self.kind](self.feature_names)
        try:
            importlib.import_module("PIL.Image")
        except ImportError as error:
            raise ServingError(
                f"this model reads images with the package pillow ({error}): pip "
                "install pillow"
            ) from error
        return parsers.Squares(folder, self.side)

    def scores(self, inputs: Inputs) -> np.ndarray:
        """float32 [N, L] probabilities, as the training's own system gives them."""
        found = [
            self._batch(inputs, np.arange(start, min(start + self._batch_size, n)))
            for n in [len(inputs)]
            for start in range(0, n, self._batch_size)
        ]
        return np.concatenate(found or [np.empty((0, len(self.label_names)), "f4")])

    def _batch(self, inputs: Inputs, rows: np.ndarray) -> np.ndarray:
        width, longest = self._widths[-1], int(inputs.lengths[rows].max())
        while width < longest:
            width *= 2
        width = next((w for w in self._widths if w >= longest), width)
        size = min(1 << (len(rows) - 1).bit_length(), self._batch_size)
        padded = np.concatenate([rows, np.full(size - len(rows), -1)])
        scores = self._call(self._weights, inputs.batch(padded, width))
        return np.asarray(scores)[: len(rows)]

    def predict(self, rows: Sequence[dict], top_k: int | None = None) -> list[dict]:
        """{"labels": [...], "scores": {label: score}} of rows such as JSON lines have.

        An image is {"image": its path, or uint8 [height, width, 3]}.

        Raises:
            DataError: a row is not of this artefact's kind.
            ServingError: see `parser`.
        """
        parser, said = self.parser(), []
        for start in range(0, len(rows), self._batch_size):  # images are large
            some = enumerate(rows[start : start + self._batch_size], start)
            found = [parser.row(row, f"row {i}") for i, row in some]
            scores = self.scores(parser.join(found))
            said += self.decision.lines(self.label_names, scores, top_k)
        return said


def _exported(folder: str, manifest: dict) -> export.Exported:
    content = artefact_lib.content(folder, manifest, "model.stablehlo")
    try:
        found = export.deserialize(bytearray(content))
    except ImportError as error:
        raise ArtefactError(f"{error}: pip install flatbuffers") from error
    except Exception as error:  # of another layout: whatever its reader runs into
        raise ArtefactError(
            f"{folder}/model.stablehlo was written by jax {manifest.get('jax')}, and "
            f"jax {jax.__version__} cannot read it: install that version, or export "
            "the model again"
        ) from error
    here = jax.default_backend()
    names = {"gpu": {"cuda", "rocm", "gpu"}}.get(here, {here})
    if not names & set(found.platforms):
        raise ArtefactError(
            f"{folder}/model.stablehlo is for {', '.join(found.platforms)}, and this "
            f"machine is {here}: set JAX_PLATFORMS=cpu"
        )
    return found


def predict_stream(
    artefact: Artefact,
    source: str,
    target: str | None,
    *,
    batch_size: int = 64,
    skip_bad: bool = False,
    top_k: int | None = None,
) -> dict[str, int]:
    """Scores JSON lines batch by batch, in memory that does not grow with the file.

    `target` grows by whole batches; an interrupted one is cut to its last whole line
    and gone on with.  Beside it lies TARGET.from, which says of what it is.

    Args:
        artefact: the model.
        source, target: files; target None is standard output.
        batch_size: rows at once.
        skip_bad: tell of a bad line on standard error and go on.
        top_k: write only so many best scores of a row.

    Returns:
        {"rows": written now, "before": input lines done before, "bad": lines skipped}.

    Raises:
        DataError: names the first bad line.
        ServingError: target is of something else; or see `Artefact.parser`.
    """
    if not os.path.isfile(source):
        raise DataError(f"no such file: {source}")
    if target is None:
        return _stream(artefact, source, sys.stdout, 0, batch_size, skip_bad, top_k)
    about = {"artefact": artefact.digest, "input": os.path.abspath(source)}
    done = _resumed(target, about | {"top_k": top_k})
    with open(target, "a", encoding="utf8") as file:
        counts = _stream(artefact, source, file, done, batch_size, skip_bad, top_k)
        file.flush()
        os.fsync(file.fileno())
    return counts


def _resumed(target: str, about: dict) -> int:
    """The input line up to which `target` is done; 0 where it is new."""
    beside = f"{target}.from"
    if not os.path.exists(target):
        with open(beside, "w", encoding="utf8") as file:
            json.dump(about, file)
        return 0
    before = None
    if os.path.exists(beside):
        try:
            before = json.loads(
                artefact_lib.bounded(beside, artefact_lib.MOST_MANIFEST)
            )
        except ValueError:
            pass
    if before != about:
        raise ServingError(
            f"{target} exists and is not of this artefact, input and --top_k: choose "
            "another --output, or remove it"
        )
    last = _cut(target)
    if not last:
        return 0
    try:
        return int(json.loads(last)["line"])
    except (ValueError, KeyError, TypeError):
        raise ServingError(f"{target} is damaged: remove it to start anew") from None


def _cut(path: str, block: int = 1 << 16) -> bytes:
    """Cuts a file after its last line end; returns the line before it."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail, start = b"", end
        while start and tail.count(b"\n") < 2:
            size = min(block, start)
            start = file.seek(start - size)
            tail = file.read(size) + tail
            block *= 2
        whole = tail.rpartition(b"\n")
        file.truncate(end - len(whole[2]))
        return whole[0].rpartition(b"\n")[2]


def _stream(
    artefact: Artefact,
    source: str,
    target: IO[str],
    done: int,
    batch_size: int,
    skip_bad: bool,
    top_k: int | None,
) -> dict[str, int]:
    counts = {"rows": 0, "before": done, "bad": 0}
    parser = artefact.parser(os.path.dirname(source))

    def bad(error: DataError) -> None:
        if not skip_bad:
            raise error
        counts["bad"] += 1
        print(f"skipped: {error}", file=sys.stderr)

    def write(numbers: list[int], rows: list) -> None:
        scores = artefact.scores(parser.join(rows))
        found = artefact.decision.lines(artefact.label_names, scores, top_k)
        target.write(
            "".join(
                json.dumps({"line": n} | line) + "\n"
                for n, line in zip(numbers, found, strict=True)
            )
        )
        target.flush()
        counts["rows"] += len(rows)

    numbers, rows = [], []
    for number, row in _parsed(source, parser, done, bad):
        numbers.append(number)
        rows.append(row)
        if len(rows) == batch_size:
            write(numbers, rows)
            numbers, rows = [], []
    if rows:
        write(numbers, rows)
    parser.close()
    return counts


def _parsed(source: str, parser, done: int, bad) -> Iterator[tuple[int, object]]:
    """Line numbers and parsed rows after line `done`; blank lines are no rows."""
    for number, content in tables.byte_lines(source):
        if number <= done:
            continue
        where = f"{source}, line {number}"
        try:
            text = tables.decoded(source, number, content)
            if not text.strip():
                continue
            row = parser.row(tables.json_object(text, where), where)
        except DataError as error:
            bad(error)
        else:
            yield number, row


def latency(artefact: Artefact, sizes: Sequence[int], repeats: int = 50) -> list[dict]:
    """Time of a batch from parsed rows (decoded images) to labels, compiled before.

    Rows have the median length of the training's, random features; the time does not
    depend on the weights.

    Returns:
        [{"batch", "tokens", "median_ms", "least_ms", "p90_ms", "cpu_ms" (of all
        threads, median), "rows_per_second"}].
    """
    rng, found = np.random.default_rng(0), []
    for batch in sizes:
        inputs = _random(artefact, batch, rng)
        seconds, processor = [], []
        for _ in range(repeats + 2):  # two to compile and to warm up
            start, before = time.perf_counter(), time.process_time()
            scores = artefact.scores(inputs)
            for _ in artefact.decision.lines(artefact.label_names, scores):
                pass
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - before)
        times = 1e3 * np.array(seconds[2:])
        found.append(
            {
                "batch": batch,
                "tokens": artefact.typical_length,
                "median_ms": round(float(np.median(times)), 3),
                "least_ms": round(float(times.min()), 3),
                "p90_ms": round(float(np.quantile(times, 0.9)), 3),
                "cpu_ms": round(1e3 * float(np.median(processor[2:])), 3),
                "rows_per_second": round(1e3 * batch / float(np.median(times)), 1),
            }
        )
    return found


def _random(artefact: Artefact, rows: int, rng: np.random.Generator) -> Inputs:
    size, length = len(artefact.feature_names), artefact.typical_length
    if artefact.kind == "images":
        shape = (rows, artefact.side, artefact.side, 3)
        return Pixels(rng.integers(0, 256, shape, np.uint8))
    if artefact.kind == "numbers":
        return Dense(rng.normal(size=(rows, size)).astype(np.float32))
    inputs = Ragged.from_rows([rng.integers(0, size, length) for _ in range(rows)])
    if artefact.kind == "weighted":
        weights = rng.random(rows * length, np.float32)
        inputs = Ragged(inputs.values, inputs.offsets, weights)
    return inputs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cbmlc_jax.serving", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--artefact", required=True, help="folder of --mode=export")
    parser.add_argument("--input", help="JSON lines")
    parser.add_argument("--output", help="JSON lines; default stdout")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--top_k", type=int, help="write only the best scores")
    parser.add_argument("--bad_lines", choices=("fail", "skip"), default="fail")
    parser.add_argument(
        "--bench", action="store_true", help="print the latency of batches of 1 and 64"
    )
    found = parser.parse_args()
    if found.batch_size < 1 or (found.top_k is not None and found.top_k < 1):
        parser.error("--batch_size and --top_k are at least 1")
    if not found.bench and not found.input:
        parser.error("--input is needed: the rows to score")
    return found


def main() -> None:
    """The command of the module's docstring."""
    arguments = _arguments()
    try:
        artefact = Artefact(arguments.artefact, arguments.batch_size)
        if arguments.bench:
            for line in latency(artefact, (1, 64)):
                print(json.dumps(line), flush=True)
            return
        counts = predict_stream(
            artefact,
            arguments.input,
            arguments.output,
            batch_size=arguments.batch_size,
            skip_bad=arguments.bad_lines == "skip",
            top_k=arguments.top_k,
        )
    except (ArtefactError, ServingError, DataError, OSError) as error:
        text = " ".join(str(error).split())
        hint = ""
        if isinstance(error, DataError) and ", line " in text:
            hint = " (or go on without such lines: --bad_lines=skip)"
        sys.exit(f"error: {text}{hint}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    before = f", after {counts['before']} lines before" if counts["before"] else ""
    bad = f", {counts['bad']} bad lines skipped" if counts["bad"] else ""
    print(f"{counts['rows']} rows scored{before}{bad}", file=sys.stderr)


if __name__ == "__main__":
    main()
