"""Result rows and records -> one HTML file that opens from disk, without a network.

    python -m experiments.report --output=runs/report.html ROWS.jsonl DETAILS.jsonl ...

Tables 1-4 and all runs (sortable), the figures, and for each run how it was made.
What the rows say is text to this page, never markup, and the page's policy lets nothing
run or load but its own script and images.  Needs the package extra `report`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import os

from cbmlc_jax import errors, files, metrics, thresholds
from experiments import bootstrap, figures, records, tables
from experiments.records import Records
from experiments.tables import Cell, Column, Line, Table

HERE = os.path.dirname(os.path.abspath(__file__))
TITLE = "Multi-label classification with noisy labels: results"
# The column that stays in sight, and those that are long.
_NAME, _LONG, _CODE = "model", ("honest − best other", "variant"), "flags"


def render(
    found: Records, sources: list[str], resamples: int = bootstrap.RESAMPLES
) -> str:
    """The page.

    Args:
        found: rows and records.
        sources: the files they are from, to be named.
        resamples: of the bootstrap.

    Raises:
        FigureError: matplotlib is not installed.
    """
    groups = found.groups()
    anchors = {id(g.first): f"runs-{i}" for i, g in enumerate(groups, 1)}
    every = [tables.build(found, key, resamples) for key in tables.KEYS]
    sections = [_table(t, anchors, t.key == "runs") for t in every]
    panels = figures.panels(found)
    sections.append(_figures(panels))
    links = [(f"table-{t.key}", t.title) for t in every] + [("figures", "Figures")]
    style, script = (_read(name) for name in ("report.css", "report.js"))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="'
            f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
            f"script-src '{_hash(script)}'\">",
            f"<title>{_text(TITLE)}</title>",
            f"<style>{style}</style>\n</head>\n<body>",
            _head(found, groups, sources, links),
            "<main>",
            *sections,
            "</main>",
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _read(name: str) -> str:
    with open(os.path.join(HERE, name), encoding="utf8") as file:
        return file.read()


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def _head(found: Records, groups: list, sources: list[str], links: list) -> str:
    data = list(dict.fromkeys(row["dataset"] for row in found.rows))
    names = list(dict.fromkeys(map(os.path.basename, sources)))
    items = "".join(f'<li><a href="#{a}">{_text(t)}</a></li>' for a, t in links)
    return (
        f"<header>\n<h1>{_text(TITLE)}</h1>\n"
        f"<p>{len(found.rows)} runs in {len(groups)} groups that differ in their seeds "
        f"alone, on {_text(', '.join(data)) or 'no data'}.</p>\n"
        "<p>Every F1 needs a threshold. "
        '<span class="key paper">paper</span> and '
        '<span class="key oracle">oracle</span> choose it on the test labels, which '
        "nobody has: they may be compared with each other only. "
        '<span class="key honest">honest</span> chooses it on the noisy validation '
        "labels, corrected for the noise: that is what a user gets.</p>\n"
        f'<p class="note">From {len(sources)} files: {_text(", ".join(names))}.</p>'
        f'\n<nav aria-label="Contents"><ul>{items}</ul></nav>\n</header>'
    )


def _table(table: Table, anchors: dict[int, str], with_runs: bool) -> str:
    """A section: the table, each line a body of its own so that it sorts as one."""
    bodies = []
    for line in table.lines:
        anchor = anchors.get(id(line.rows[0])) if line.rows else None
        bodies.append(_line(line, table.columns, anchor, with_runs))
    return (
        f'<section id="table-{table.key}">\n<h2>{_text(table.title)}</h2>\n'
        f'<p class="note">{_text(table.note)}</p>\n'
        f'<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{_text(table.title)}">\n<table>\n'
        f"<caption>{_text(table.title)}</caption>\n"
        f"<thead>\n{_headings(table.columns)}\n</thead>\n"
        + "\n".join(bodies)
        + "\n</table>\n</div>\n</section>"
    )


def _headings(columns: list[Column]) -> str:
    """A row of headings that sort; above it one of groups, where there are any."""
    above, at = [], 0
    while at < len(columns):
        group = columns[at].group
        span = 1
        while at + span < len(columns) and columns[at + span].group == group:
            span += 1
        if group:
            scope = f'class="group" scope="colgroup" colspan="{span}"'
            above.append(f"<th {scope}>{_text(group)}</th>")
        else:
            above.append(f'<td colspan="{span}"></td>')
        at += span
    below = "".join(
        f'<th scope="col" class="{_class(column)}" aria-sort="none" '
        f'data-column="{i}"><button type="button">{_text(column.name)}</button></th>'
        for i, column in enumerate(columns)
    )
    grouped = any(column.group for column in columns)
    top = f"<tr>{''.join(above)}</tr>\n" if grouped else ""
    return f"{top}<tr>{below}</tr>"


def _class(column: Column) -> str:
    if column.name == _NAME:
        return "name"
    if column.name == _CODE:
        return "code"
    return f"{column.kind} long" if column.name in _LONG else column.kind


def _line(
    line: Line, columns: list[Column], anchor: str | None, with_runs: bool
) -> str:
    cells = []
    for column, cell in zip(columns, line.cells, strict=True):
        content = _text(cell.text.strip("`"))
        if column.name == _NAME:
            content = content.replace("_", "_<wbr>")
        if column.name == "seeds" and anchor:
            content = _opener(anchor, content, with_runs)
        cells.append(_cell(column, cell, content))
    row = f"<tr>{''.join(cells)}</tr>"
    if not (with_runs and anchor):
        return f"<tbody>{row}</tbody>"
    runs = "\n".join(_run(run) for run in line.rows)
    return (
        f'<tbody id="{anchor}">{row}\n<tr class="runs" id="{anchor}-open">'
        f'<td colspan="{len(columns)}">{runs}</td></tr></tbody>'
    )


def _opener(anchor: str, seeds: str, with_runs: bool) -> str:
    """What opens the runs of a line, or leads to where they are."""
    label = f"{seeds} run" + ("" if seeds == "1" else "s")
    if with_runs:
        return (
            f'<button type="button" class="runs" aria-expanded="true" '
            f'aria-controls="{anchor}-open">{label}</button>'
        )
    return f'<a href="#{anchor}">{label}</a>'


def _cell(column: Column, cell: Cell, content: str) -> str:
    classes = _class(column) + (" quiet" if cell.text == tables.NOT_RUN else "")
    value = "" if cell.value is None else f' data-value="{cell.value:.12g}"'
    return f'<td class="{classes.strip()}"{value}>{content}</td>'


def _run(row: dict) -> str:
    """How one run was made, and its scores by every protocol."""
    seeds = {"seed": row["seed"], "noise seed": row["noise"].get("seed")}
    seeds["split seed"] = row["config"].get("data.split_seed", 0)
    items = {
        "command": row["command"],
        "seeds": seeds,
        "noise": {k: v for k, v in row["noise"].items() if not isinstance(v, dict)},
        "realised on train": row["noise"].get("realised"),
        "realised on validation": row["noise"].get("realised_validation"),
        "rates used": row.get("rates"),
        "chosen": {"epoch": row["epoch"], **row["selection"]},
        "ranking": row["ranking"],
        "word vectors": row.get("embeddings"),
        "rows": row.get("rows"),
        "parameters": f"{row['params']:,}",
        "seconds": row["seconds"],
        "settings": row["config"],
        "versions": row["versions"],
        "fingerprint": row["fingerprint"],
        "details": row.get("details"),
    }
    listed = "".join(
        f"<dt>{_text(name)}</dt><dd><code>{_words(_plain(value))}</code></dd>"
        for name, value in items.items()
        if value not in (None, {}, "")
    )
    title = f"{row['model']} on {row['dataset']}, seed {row['seed']}"
    return (
        f'<div class="run"><h3>{_text(title)}</h3>\n{_protocols(row)}\n'
        f"<dl>{listed}</dl></div>"
    )


def _plain(value: object) -> str:
    """A value of a row as text: pairs of a dict beside each other."""
    if isinstance(value, dict):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _words(text: str) -> str:
    """Text whose words stay whole where a line ends, also at their hyphens."""
    return " ".join(f'<span class="word">{_text(w)}</span>' for w in text.split())


def _protocols(row: dict) -> str:
    """F1s and their thresholds."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in metrics.F1_NAMES)
    kinds = {records.ORACLE: "oracle", records.HONEST: "honest"}
    lines = []
    for protocol in thresholds.PROTOCOLS:
        cells = "".join(
            f"<td>{tables.short(row['metrics'][protocol][n], 4)} at "
            f"{tables.short(row['thresholds'][protocol][n], 2)}</td>"
            for n in metrics.F1_NAMES
        )
        lines.append(
            f'<tr><th scope="row" class="{kinds.get(protocol, "")}">{protocol}</th>'
            f"{cells}</tr>"
        )
    return (
        f'<table><thead><tr><th scope="col">threshold by</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _figures(panels: list[figures.Panel]) -> str:
    parts = []
    for panel in panels:
        image = base64.b64encode(panel.image("svg")).decode()
        parts.append(
            f'<figure id="{_text(panel.name)}"><img alt="{_text(panel.title)}" '
            f'src="data:image/svg+xml;base64,{image}">'
            f"<figcaption>{_text(panel.title)}. {_text(panel.caption)}</figcaption>"
            "</figure>"
        )
    content = "\n".join(parts) or (
        '<p class="note">No row has several noise rates, curves or label embeddings: '
        "see experiments/README.md.</p>"
    )
    return (
        '<section id="figures">\n<h2>Figures</h2>\n'
        f'<div class="figures">{content}</div>\n</section>'
    )


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--output", required=True, help="the HTML file to write")
    arguments = parser.parse_args()
    with errors.explained():
        page = render(records.read(arguments.files), arguments.files)
        files.write_atomic(arguments.output, page)
        print(f"{arguments.output}: {len(page) >> 10} kB")


if __name__ == "__main__":
    main()
