"""Progress of a run: a bar on a terminal, plain lines elsewhere, or nothing; and what
stays of it: metrics.jsonl and TensorBoard's events."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator

import tqdm

from cbmlc_jax import files


class Waited:
    """Goes through items, and counts the seconds that it waits for them.

    Attributes:
        seconds: so far.
    """

    def __init__(self, items: Iterable):
        self._items, self.seconds = iter(items), 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - start


class Progress:
    """Shows steps and epochs.

    Args:
        epochs: of the whole run.
        steps_per_epoch: optimizer steps.
        done: epochs that were done before (a resumed run).
        shown: False shows nothing.
    """

    LINE_EVERY = 30.0  # seconds between plain lines within an epoch

    def __init__(self, epochs: int, steps_per_epoch: int, done: int, shown: bool):
        self._epochs, self._per_epoch, self._shown = epochs, steps_per_epoch, shown
        self._step = done * steps_per_epoch
        self._first, self._start = self._step, time.perf_counter()
        self._last_line = self._start
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=epochs * steps_per_epoch,
                initial=self._step,
                unit="step",
                dynamic_ncols=True,
            )

    def steps(self, number: int, loss: float, batch_size: int) -> None:
        """`number` more steps are done; `loss` is the epoch's mean so far."""
        self._step += number
        now = time.perf_counter()
        rate = (self._step - self._first) / max(now - self._start, 1e-9)
        epoch = -(-self._step // self._per_epoch)
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}/{self._epochs}")
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {rate * batch_size:.0f} examples/s"
            )
            self._bar.update(number)
        elif self._shown and now - self._last_line > self.LINE_EVERY:
            self._last_line = now
            left = (self._epochs * self._per_epoch - self._step) / rate
            print(
                f"epoch {epoch}/{self._epochs} step {self._step} loss {loss:.4f} "
                f"{rate * batch_size:.0f} examples/s, {_duration(left)} left",
                flush=True,
            )

    def epoch(self, line: dict, title: str = "") -> None:
        """An epoch is done; `line` is its line of metrics.jsonl, `title` whose."""
        if not self._shown:
            return
        self._last_line = time.perf_counter()
        score = line["selection"]["score"]
        text = f"{title}epoch {line['epoch']}/{self._epochs} loss {line['loss']:.4f}"
        if score is not None:
            text += f" {line['selection']['rule']} miF1 {score:.4f}"
        text += f" {line['examples_per_second']:.0f} examples/s {line['seconds']:.1f} s"
        if line["data_share"] > 0.05:
            text += f", {line['data_share']:.0%} of training waits for data"
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


class Log:
    """Tells of epochs, as they are done, in a workdir and to the eye.

    Args:
        workdir: None writes nothing.
        history: of the epochs that were done before.
        progress: is closed with the log.
        title: stands before the lines of this one of several.
    """

    def __init__(
        self,
        workdir: str | None,
        history: list[dict],
        progress: Progress,
        title: str = "",
    ):
        self._progress, self._path, self._events = progress, None, None
        self._title = title
        if workdir is None:
            return
        from tensorboardX import SummaryWriter

        self._path = os.path.join(workdir, "metrics.jsonl")
        files.write_jsonl(self._path, history)
        done = len(history)
        self._events = SummaryWriter(workdir, purge_step=done + 1 if done else None)

    def epoch(self, history: list[dict]) -> None:
        """The last line of the history is new."""
        if self._path is None:
            return
        line, write = history[-1], self._events.add_scalar
        files.write_jsonl(self._path, history)
        write("train/loss", line["loss"], line["epoch"])
        selection = line["selection"]
        if selection["score"] is not None:
            name = f"validation/{selection['rule']}_miF1"
            write(name, selection["score"], line["epoch"])
        for name, value in line.get("mAP", {}).items():
            write(f"mAP/{name}", value, line["epoch"])
        self._events.flush()
        self._progress.epoch(line, self._title)

    def close(self) -> None:
        """Ends the bar and the events' file."""
        self._progress.close()
        if self._events is not None:
            self._events.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
