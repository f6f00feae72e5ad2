"""README.md and docs/: commands are real, marked blocks run, links lead somewhere."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from unittest import mock

import documents
import pytest
import running

from cbmlc_jax import config as config_lib
from cbmlc_jax import limits, models
from cbmlc_jax.data import pipeline
from cbmlc_jax.models import baselines

# What a page may add to.
REGISTRIES = (
    baselines.ESTIMATORS,
    limits.CHOICES,
    limits.ENCODERS_OF,
    limits.PUBLISHED,
    models.MODELS,
    pipeline.READERS,
)
RUN = [page for page in documents.PAGES if any(b.run for b in documents.blocks(page))]


def name(page):
    return page.relative_to(running.ROOT).as_posix()


@pytest.mark.parametrize("page", documents.PAGES, ids=name)
def test_commands(page):
    for command in documents.commands(documents.without_run(page)):
        try:
            documents.check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {command}: {error}") from error


@pytest.mark.parametrize("page", documents.PAGES, ids=name)
def test_keys(page):
    """Also where a flag stands alone in the text."""
    known = {*config_lib.flatten(config_lib.base()), "KEY"}
    text = page.read_text(encoding="utf8")
    assert {k.rstrip(".") for k in re.findall(r"--config\.([\w.]+)", text)} <= known


def test_every_page_is_looked_at():
    """The commands are found at all, and Python is run or marked as not to be."""
    texts = [page.read_text(encoding="utf8") for page in documents.PAGES]
    found = [command for text in texts for command in documents.commands(text)]
    assert {"make demo", "make test"} <= set(found) and len(found) > 100
    assert {"docs/own_data.md", "docs/add_model.md"} <= set(map(name, RUN))
    for page in documents.PAGES:
        for block in documents.blocks(page):
            ours = page.parent.name == "docs"
            assert block.run or not ours or block.language != "python", (page, block)


@pytest.mark.parametrize("page", RUN, ids=name)
def test_blocks_run(page, tmp_path, monkeypatch):
    """In their order and in one folder: Python in this process, with the names of the
    blocks before, commands in processes of their own."""
    monkeypatch.chdir(tmp_path)
    os.symlink(running.ROOT / "configs", "configs")
    scope = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        for registry in REGISTRIES:
            stack.enter_context(mock.patch.dict(registry))
        for block in [b for b in documents.blocks(page) if b.run]:
            if block.language == "python":
                # Line numbers of a failure are those of the page.
                code = "\n" * (block.line - 1) + block.text
                exec(compile(code, page, "exec", dont_inherit=True), scope)  # noqa: S102
                continue
            for command in documents.commands(block.text):
                done = running.forks().run(*shlex.split(command)[2:], cwd=tmp_path)
                assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.parametrize("page", documents.PAGES, ids=name)
def test_links(page):
    for link in documents.links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {link}: no such file"
        if anchor:
            assert anchor in documents.anchors(path), f"{page.name}: {link}: no heading"
