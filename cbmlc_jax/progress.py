"""Progress of a run: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time

import tqdm


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

    def epoch(self, line: dict) -> None:
        """An epoch is done; `line` is its line of metrics.jsonl."""
        if not self._shown:
            return
        self._last_line = time.perf_counter()
        score = line["selection"]["score"]
        text = f"epoch {line['epoch']}/{self._epochs} loss {line['loss']:.4f}"
        if score is not None:
            text += f" {line['selection']['rule']} miF1 {score:.4f}"
        text += f" {line['examples_per_second']:.0f} examples/s {line['seconds']:.1f} s"
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
