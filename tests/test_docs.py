"""README.md and docs/: commands are real, Python blocks run, links lead somewhere."""

from __future__ import annotations

import documents
import pytest


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda p: p.parent.name + p.name)
def test_commands(page):
    for command in documents.commands(page.read_text(encoding="utf8")):
        try:
            documents.check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {command}: {error}") from error
