"""The report: one file, whole HTML, nothing from outside, text that stays text."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
import sys

import pytest
import rows

from experiments import figures, report, tables

pytest.importorskip("matplotlib", reason="the extra `report` has it")

EVIL = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=f()>"
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(html.parser.HTMLParser):
    """Elements, text and what is not closed."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    """A page of a few rows, one of which is hostile, through the command line."""
    folder = tmp_path_factory.mktemp("report")
    ours, other = rows.make(), rows.make("lamp", seed=1)
    ours["curves"] = {"epoch": [1], "train_mAP": [0.1], "test_mAP": [0.2]}
    evil = rows.make(EVIL, noise="combined", loss__name=EVIL, preset=EVIL)
    evil["versions"] = {EVIL: EVIL}
    evil["command"] = f"python -m cbmlc_jax.main '--config={EVIL.replace(chr(39), '')}'"
    path = rows.write(
        folder,
        *(ours, other, evil, rows.make(data=EVIL)),
        rows.with_predictions(ours, 0.9),
        rows.with_predictions(other, 0.7),
    )
    output = str(folder / "report.html")
    before = sys.argv
    sys.argv = ["x", f"--output={output}", path]
    try:
        report.main()
    finally:
        sys.argv = before
    with open(output, encoding="utf8") as file:
        return file.read()


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written)


def test_every_element_is_closed(page):
    assert page.open == []
    assert [len(page.all(tag)) for tag in ("html", "head", "body", "main", "h1")] == [
        1
    ] * 5


def test_nothing_comes_from_outside(page, written):
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/svg+xml;", "#")), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert tag not in ("link", "iframe", "object", "base", "form"), tag
    [style] = re.findall("<style>(.*?)</style>", written, re.S)
    assert "url(" not in style and "@import" not in style


def test_text_of_the_rows_stays_text(page, written):
    assert len(page.all("script")) == 1
    assert EVIL not in written
    text = "".join(page.text)
    assert EVIL in text  # as it was, and as text


def test_the_policy_knows_the_script_and_the_style(page, written):
    [policy] = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", written, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_links_and_openers_lead_somewhere(page):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    openers = [b["aria-controls"] for b in page.all("button") if "aria-controls" in b]
    assert len(openers) == 4  # groups
    assert {link[1:] for link in links} | set(openers) <= set(ids)
    assert {f"table-{key}" for key in tables.KEYS} | {"figures"} <= set(ids)


def test_tables_sort_and_mark_what_is_honest(page, written):
    headings = [th for th in page.all("th") if "aria-sort" in th]
    assert {th["aria-sort"] for th in headings} == {"none"}
    for kind in ("paper", "oracle", "honest"):
        assert any(kind in th["class"].split() for th in headings)
        assert f'<span class="key {kind}">{kind}</span>' in written
    assert len(page.all("caption")) == len(tables.KEYS)
    values = [td["data-value"] for td in page.all("td") if "data-value" in td]
    assert 0.4566 in map(float, values)


def test_provenance_and_comparison_are_shown(page):
    text = " ".join(page.text)
    for part in ("python -m cbmlc_jax.main", "f" * 64, "jax 0.10.2", "p10 0.2"):
        assert part in re.sub(r"\s+", " ", text), part
    assert "not run" in text and "] p " in text and ".4837" in text


def test_figures_are_inside_and_described(page):
    images = page.all("img")
    assert images and all(image["alt"] for image in images)
    for image in images:
        svg = base64.b64decode(image["src"].partition(",")[2])
        assert b"<svg" in svg


def test_the_page_is_the_same_twice(tmp_path):
    found = rows.read(tmp_path, rows.make())
    assert report.render(found, ["a"]) == report.render(found, ["a"])


def test_no_rows_are_a_page_too(tmp_path):
    text = report.render(rows.read(tmp_path), ["empty.jsonl"])
    assert Page(text).open == [] and "0 runs" in text


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    row = rows.make()
    row["curves"] = {"epoch": [1], "train_mAP": [0.1], "test_mAP": [0.2]}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(figures.FigureError, match=r"pip install -e '.\[report\]'"):
        report.render(rows.read(tmp_path, row), ["a"])
