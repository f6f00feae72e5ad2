"""The likeliest issues of an audit on one HTML page, the row's text or picture beside.

The page opens from disk and loads nothing: its policy lets no script run, and what the
data say is text to it, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io

import numpy as np

from cbmlc_jax.data.dataset import Dataset, Dense, Inputs, Ragged
from cbmlc_jax.data.images import Images
from cbmlc_jax.issues import Issues

WORDS, NUMBERS = 60, 8  # of a row that are shown
SIDE = 160  # pixels of a picture
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2026; --quiet: #59616d;
  --line: #d5dae1; --head: #f2f4f7; --add: #0b6b3a; --drop: #a02020; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e6e9ed;
  --quiet: #a3abb6; --line: #363d46; --head: #1d2228; --add: #6fd39b;
  --drop: #ff9a90; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { max-width: 48rem; }
.quiet { color: var(--quiet); font-size: .875rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
:focus-visible { outline: 2px solid var(--ink); outline-offset: 1px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .4rem .6rem; color: var(--quiet); }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { background: var(--head); }
td.number, th.number { text-align: right; }
td.row { min-width: 18rem; overflow-wrap: anywhere; }
.add { color: var(--add); } .drop { color: var(--drop); }
img { display: block; max-width: 160px; height: auto; }
"""


def render(dataset: Dataset, issues: Issues, entries: np.ndarray, facts: str) -> str:
    """The page.

    Args:
        dataset: whose training rows were audited.
        issues: of these rows.
        entries: int [n, 2] (row, label) to show, the likeliest first.
        facts: lines of text to stand above the tables.
    """
    title = f"Labels of {dataset.name} that are likely wrong"
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="'
            f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'\">",
            f"<title>{_text(title)}</title>",
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f"<h1>{_text(title)}</h1>",
            *(f"<p>{_text(line)}</p>" for line in facts.splitlines() if line),
            "<h2>Issues, the likeliest first</h2>",
            _entries(dataset, issues, entries),
            "<h2>Labels</h2>",
            _labels(dataset, issues),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(caption: str, heads: list[tuple[str, str]], lines: list[str]) -> str:
    """A table that scrolls by itself; heads are (class, text)."""
    cells = "".join(f'<th scope="col" class="{c}">{_text(t)}</th>' for c, t in heads)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}">'
        f"<table><caption>{_text(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


def _entries(dataset: Dataset, issues: Issues, entries: np.ndarray) -> str:
    names, inputs, lines = dataset.label_names, dataset.train.inputs, []
    shown: dict[int, str] = {}
    for number, (row, label) in enumerate(entries.tolist(), 1):
        given = bool(issues.labels[row, label])
        advice = "remove" if given else "add"
        kind = "drop" if given else "add"
        if row in shown:
            content = f'<span class="quiet">as at number {shown[row]}</span>'
        else:
            content, shown[row] = _row(inputs, row, dataset.feature_names), str(number)
        others = [names[i] for i in np.flatnonzero(issues.labels[row])]
        lines.append(
            f'<tr><td class="number">{number}</td><td class="number">{row}</td>'
            f'<td class="row">{content}</td><td>{_text(", ".join(others) or "none")}'
            f'</td><td class="{kind}">{advice} <strong>{_text(names[label])}</strong>'
            f'</td><td class="number">{issues.wrong[row, label]:.3f}</td></tr>'
        )
    heads = [
        ("number", "number"),
        ("number", "row"),
        ("", "content"),
        ("", "labels given"),
        ("", "suggested"),
        ("number", "P(wrong)"),
    ]
    return _table("Rows are training rows, counted from 0", heads, lines)


def _labels(dataset: Dataset, issues: Issues) -> str:
    expected = issues.wrong.sum(0, dtype=np.float64)
    on = issues.labels != 0
    extra = np.where(on, issues.wrong, 0).sum(0, dtype=np.float64)
    lines = [
        f"<tr><td>{_text(dataset.label_names[i])}</td>"
        f'<td class="number">{int(on[:, i].sum())}</td>'
        f'<td class="number">{extra[i]:.1f}</td>'
        f'<td class="number">{expected[i] - extra[i]:.1f}</td></tr>'
        for i in np.argsort(-expected, kind="stable")[:200]
    ]
    heads = [
        ("", "label"),
        ("number", "given"),
        ("number", "of them wrong"),
        ("number", "missing"),
    ]
    return _table("Expected numbers; at most 200 labels, the worst first", heads, lines)


def _row(inputs: Inputs, row: int, names: tuple[str, ...]) -> str:
    """What a person can look at: words, numbers or a picture."""
    if isinstance(inputs, Ragged):
        here = slice(inputs.offsets[row], inputs.offsets[row + 1])
        values = inputs.values[here]
        if inputs.weights is not None:
            values = values[np.argsort(-inputs.weights[here], kind="stable")]
        more = " …" if len(values) > WORDS else ""
        return _text(" ".join(names[v] for v in values[:WORDS]) + more)
    if isinstance(inputs, Images):
        return _picture(inputs, row)
    if isinstance(inputs, Dense) and inputs.values.ndim == 2:
        values = inputs.values[row]
        far = np.argsort(-np.abs(values), kind="stable")[:NUMBERS]
        return _text(", ".join(f"{names[i]} {values[i]:.4g}" for i in np.sort(far)))
    return '<span class="quiet">not shown</span>'


def _picture(inputs: Images, row: int) -> str:
    from PIL import Image

    pixels = inputs.batch(np.array([row]), 0)["images"][0]
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE)).save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="training row {row}" width="{SIDE}" height="{SIDE}" '
        f'src="data:image/jpeg;base64,{data}">'
    )
