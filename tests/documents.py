"""Blocks and commands of the Markdown pages, and what checks them without a process."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import pathlib
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from unittest import mock

import running
from absl import app, flags
from absl.testing import flagsaver

from cbmlc_jax import config as config_lib
from cbmlc_jax import errors

# docs/experiments.md is experiments/README.md.
PAGES = [
    running.ROOT / "README.md",
    running.ROOT / "experiments" / "README.md",
    *sorted((running.ROOT / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
_COMMAND = ("python -m ", "make ", "pip install ")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: python, sh, text or nothing.
        text: without the fences.
        line: of the page, of its first line.
        run: whether a comment before it says that the test is to run it.
    """

    language: str
    text: str
    line: int
    run: bool


def blocks(page: pathlib.Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf8")
    for found in _FENCE.finditer(text):
        mark, language, body = found.groups()
        line = text.count("\n", 0, found.start(3)) + 1
        yield Block(language, body, line, run=bool(mark))


def commands(text: str) -> Iterator[str]:
    """Commands in fenced or indented blocks and in running text; also flags of main
    that stand alone, as in tables."""
    lines = text.replace("\\\n", " ").splitlines()
    for line in lines:
        if line.removeprefix("    ").startswith(_COMMAND):
            yield line.strip()
    for code in re.findall(r"`([^`\n]+)`", text):
        if code.startswith(_COMMAND):
            yield code
        elif re.match(r"--config=configs/\w+\.py", code):
            yield f"python -m cbmlc_jax.main {code}"


def without_run(page: pathlib.Path) -> str:
    """The text of a page without the blocks that the test runs."""
    text = page.read_text(encoding="utf8")
    return _FENCE.sub(lambda found: "" if found[1] else found[0], text)


def links(page: pathlib.Path) -> Iterator[str]:
    """The targets of a page's links to files of ours."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if not re.match(r"\w+:", target):
            yield target


def anchors(page: pathlib.Path) -> set[str]:
    """Names of a page's headings, as both GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.*)$", _prose(page), re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", h.lower())) for h in headings}


def _prose(page: pathlib.Path) -> str:
    """The text without its fenced blocks, with what it includes."""
    text = _FENCE.sub("", page.read_text(encoding="utf8"))
    for included in re.findall(r'^--8<-- "(.*)"$', text, re.M):
        text += (running.ROOT / included).read_text(encoding="utf8")
    return text


def check(command: str) -> None:
    """Raises where a command names what is not there: a module, a target, an extra, a
    config file, a flag or a key; or where its settings contradict each other."""
    words = [w for w in shlex.split(command, comments=True) if w != "--help"]
    if words[0] == "make":
        makefile = (running.ROOT / "Makefile").read_text()
        targets = re.findall(r"^([\w-]+):", makefile, re.M)
        names = [w for w in words[1:] if "=" not in w]
        assert names and set(names) <= set(targets), command
    elif words[0] == "pip":
        setup = (running.ROOT / "setup.py").read_text()
        for extra in re.findall(r"\[([\w,]+)\]", command)[0].split(","):
            assert f'"{extra}": [' in setup, command
    else:
        with _parsed(words[2:]):
            if words[2] == "cbmlc_jax.main":
                _check_main(flags.FLAGS)
            elif words[2] == "experiments.sweep":
                _check_sweep(flags.FLAGS)


def _check_main(values) -> None:
    config = values.config
    config_lib.settle(config, set(values["config"].override_values))
    if values.mode in ("predict", "export"):
        from cbmlc_jax import predict

        predict.rule_of(values).check()
    assert values.mode != "audit" or config.train.crossfit


def _check_sweep(values) -> None:
    from cbmlc_jax import grids
    from experiments import sweep

    for name in values.grid:
        assert grids.expand(name, *grids.load(name), None, sweep.changes(values.set))


class _Parsed(BaseException):
    """The flags were read; nothing is to run."""


@contextlib.contextmanager
def _parsed(words: list[str]) -> Iterator[None]:
    """Within, `flags.FLAGS` is what `python -m` of these words reads."""

    def stop(main, flags_parser=flags.FLAGS, **_):
        flags_parser(sys.argv)
        raise _Parsed

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments):
        parse(self, *arguments)
        raise _Parsed

    module = importlib.import_module(words[0])
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(flagsaver.flagsaver())
        enter(contextlib.chdir(running.ROOT))
        enter(mock.patch.object(sys, "argv", words))
        enter(mock.patch.object(app, "run", stop))
        enter(mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop))
        enter(mock.patch.object(errors, "explained", contextlib.nullcontext))
        enter(mock.patch.object(signal, "signal"))
        try:
            (getattr(module, "run", None) or module.main)()
        except _Parsed:
            yield
        else:
            raise AssertionError(f"{words[0]} has read no flags")
