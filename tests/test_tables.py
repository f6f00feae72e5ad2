"""Rows, groups and the tables made of them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import rows
import running

from cbmlc_jax import metrics
from experiments import bootstrap, published, records, tables

RESULTS = running.ROOT / "experiments" / "results" / "baselines.jsonl"
ALL_RESULTS = sorted(RESULTS.parent.glob("*.jsonl"))


def lines_of(table: tables.Table, data: str, model: str) -> list[dict[str, str]]:
    """Lines of a table as {title of the column: text}."""
    titles = [column.title for column in table.columns]
    found = [
        dict(zip(titles, (cell.text for cell in line.cells), strict=True))
        for line in table.lines
    ]
    return [x for x in found if (x["data"], x["model"]) == (data, model)]


def test_rows_that_differ_in_seeds_alone_are_one_line(tmp_path):
    some = [rows.make(seed=s, score=v) for s, v in enumerate((0.4, 0.5, 0.6))]
    other = rows.make(score=0.3, loss__name="hill")
    found = rows.read(tmp_path, *some, other)
    assert [len(g.rows) for g in found.groups()] == [3, 1]
    assert [g.variant for g in found.groups()] == ["", "loss.name=hill"]
    first, second = lines_of(tables.build(found, "1"), "bibtex", "cbmlc")
    assert first["miF1 honest"] == ".500 ± .100" and first["seeds"] == "3"
    assert first["miF1 oracle"] == ".510 ± .100"
    assert first["miF1 paper"] == second["miF1 paper"] == ".4837"
    assert second["miF1 honest"] == ".300"


def test_every_published_line_is_there_and_says_what_was_not_run(tmp_path):
    found = rows.read(tmp_path, rows.make("lamp", score=0.4))
    for key, numbers in (
        ("1", published.CLEAN),
        ("2", published.SINGLE_POSITIVE),
        ("3", published.COMBINED),
        ("4", published.ABLATION),
    ):
        table = tables.build(found, key)
        for data, models in numbers.items():
            for model, f1s in models.items():
                [line] = lines_of(table, data, model)
                assert line["miF1 paper"] == tables.short(f1s[1], 4)
                ran = (key, data, model) == ("1", "bibtex", "lamp")
                wanted = "" if model == published.BEST_OTHER else tables.NOT_RUN
                assert line["miF1 honest"] == (".400" if ran else wanted)
        assert ("ebF1 paper" in line) == (key in "14")


def test_models_and_noise_beyond_the_paper_have_their_place(tmp_path):
    found = rows.read(
        tmp_path,
        rows.make("lr_knn"),
        rows.make("lr_knn", noise="combined", score=0.45),
        rows.make("lr_knn", "emotions"),
        rows.make("cbmlc", "bibtex", "ncar", 0.05),
    )
    assert lines_of(tables.build(found, "1"), "bibtex", "lr_knn")
    assert not lines_of(tables.build(found, "1"), "emotions", "lr_knn")
    [line] = lines_of(tables.build(found, "3"), "bibtex", "lr_knn")
    assert line["miF1 honest"] == ".450"
    assert len(tables.build(found, "runs").lines) == 4


def test_fixed_vectors_stand_in_table_4_alone(tmp_path):
    found = rows.read(
        tmp_path,
        rows.make(score=0.4),
        rows.make(score=0.3, embeddings__trainable=False),
        rows.make(score=0.2, embeddings__source="random", loss__cb_weight=0.0),
    )
    table = tables.build(found, "4")
    [fixed] = lines_of(table, "bibtex", published.FIXED)
    [regularised] = lines_of(table, "bibtex", published.REGULARISED)
    assert fixed["miF1 paper"] == ".4814" and fixed["miF1 honest"] == ".300"
    assert regularised["miF1 honest"] == ".400"
    assert regularised["miF1 honest − best other"].startswith("+.100")
    clean = lines_of(tables.build(found, "1"), "bibtex", "cbmlc")
    assert [line["miF1 honest"] for line in clean] == [".400", ".200"]


def test_the_difference_is_to_the_best_other_and_has_its_interval(tmp_path):
    ours, weak, best = rows.make(), rows.make("lamp"), rows.make("sleec")
    more = rows.make("sleec", seed=1)
    found = rows.read(
        tmp_path,
        *(ours, weak, best, more),
        rows.with_predictions(ours, 0.85),
        rows.with_predictions(weak, 0.6, seed=1),
        rows.with_predictions(best, 0.8, seed=2),
        rows.with_predictions(more, 0.75, seed=3),
    )
    table = tables.build(found, "1", resamples=300)
    drawn = [
        bootstrap.resampled([found.predictions(r) for r in some], 300)["maF1"]
        for some in ([ours], [best, more])
    ]
    f1s = [
        np.mean([r["metrics"]["corrected_val"]["maF1"] for r in some])
        for some in ([ours], [best, more])
    ]
    c = bootstrap.compare(f1s[0] - f1s[1], *drawn)
    [line] = lines_of(table, "bibtex", "cbmlc")
    text = line["maF1 honest − best other"]
    assert text.split("\n") == [
        f"{tables.signed(c.difference)} [{tables.signed(c.low)}, "
        f"{tables.signed(c.high)}] p {tables.short(c.p, 4)}",
        "vs sleec",
    ]
    [line] = lines_of(table, "bibtex", "sleec")
    assert line["maF1 honest − best other"].endswith("vs cbmlc")
    assert tables.signed(-c.difference) in line["maF1 honest − best other"]


def test_without_predictions_there_is_no_interval(tmp_path):
    ours, other, alone = rows.make(), rows.make("lamp", score=0.3), rows.make(noise="x")
    found = rows.read(tmp_path, ours, other, alone, rows.with_predictions(ours, 0.9))
    [line] = lines_of(tables.build(found, "1"), "bibtex", "cbmlc")
    assert "(no bootstrap)\nvs lamp" in line["miF1 honest − best other"]
    one = rows.read(tmp_path, ours)
    [line] = lines_of(tables.build(one, "1"), "bibtex", "cbmlc")
    assert line["miF1 honest − best other"] == "no other"


def test_other_noise_settings_and_other_data_are_no_rivals(tmp_path):
    ours = rows.make(noise="combined")
    uniform = rows.make("lamp", noise="combined", noise__rates="uniform")
    changed = rows.make("sleec", noise="combined") | {"fingerprint": "0" * 64}
    found = rows.read(tmp_path, ours, uniform, changed)
    for line in tables.build(found, "3").lines:
        assert line.cells[-1].text in ("", "no other")


def test_of_equal_runs_the_last_stands(tmp_path, capsys):
    found = rows.read(tmp_path, rows.make(score=0.4), rows.make(score=0.6))
    assert [g.mean("corrected_val", "miF1") for g in found.groups()] == [0.6]
    assert "line 2 stands over an earlier run" in capsys.readouterr().err


def test_predictions_of_another_run_are_refused(tmp_path):
    row = rows.make()
    record = rows.with_predictions(row, 0.9)
    row["metrics"]["corrected_val"]["maF1"] += 0.001
    with pytest.raises(records.RecordError, match="give maF1"):
        rows.read(tmp_path, row, record).predictions(row)


@pytest.mark.parametrize(
    "line, reason",
    [("{", "is no JSON"), ("[1]", "no result row and no"), ('{"model": 1}', "dataset")],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(records.RecordError, match=f"x.jsonl, line 2 .*{reason}"):
        records.read([str(path)])


@pytest.mark.parametrize("name", ["tables", "figures", "report"])
def test_a_missing_file_is_one_sentence(tmp_path, name):
    words = [] if name == "tables" else [f"--output={tmp_path / 'out'}"]
    done = running.forks().run(f"experiments.{name}", "no-such.jsonl", *words)
    running.assert_one_sentence(done, "no-such.jsonl: No such file")
    assert not list(tmp_path.iterdir())


def test_markdown_has_a_line_a_group_and_no_stray_bars(tmp_path):
    found = rows.read(tmp_path, rows.make("a|b"), rows.make("lamp"))
    text = tables.markdown(tables.build(found, "1"))
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines()}
    assert len(widths) == 1 and "a\\|b" in text


def test_the_readme_has_the_table_of_the_rows(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--table=runs", str(RESULTS)])
    tables.main()
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 50
    assert printed in (running.ROOT / "experiments" / "README.md").read_text()


def means_of(data: str, model: str, noise: str) -> dict[str, str]:
    """What README.md says of a system, from the rows; of `stack` as it comes."""
    ablated = ("embeddings.source", "stack.members", "kernel_ridge.rounds")
    graph = "self" if (data, model) == ("delicious", "stack") else None
    rate = {"ncar": 0.05, "nar": 0.5}.get(noise, 0.0)
    honest = {"noise.known": False, "noise.by_row": True, "model.label_graph": graph}
    if model == "stack":
        epochs = 4 if data == "delicious" else 8
        honest |= {"loss.lost_labels": True, "train.num_epochs": epochs}
    some = [
        row
        for row in records.read([str(path) for path in ALL_RESULTS]).rows
        if (row["dataset"], row["model"]) == (data, model)
        and (row["noise"]["kind"], row["noise"]["rate"]) == (noise, rate)
        and all(row["config"].get(k) == v for k, v in honest.items())
        and not any(key in row["config"] for key in ablated)
    ]
    assert len(some) == {"bibtex": 5, "reuters": 2, "delicious": 1}[data]

    def text(name: str, *path: str) -> str:
        values = []
        for row in some:
            for key in path:
                row = row[key]
            values.append(row[name])
        return f"{np.mean(values):.3f}".lstrip("0")

    def three(protocol: str) -> str:
        return "/".join(text(n, "metrics", protocol) for n in metrics.F1_NAMES)

    expected = ("expected_f1_metrics", "corrected_val")
    by_row, by_label = (expected + (k,) for k in ("per_row", "per_label"))
    return {
        "honest": three("corrected_val"),
        "oracle": three("oracle"),
        "expected": f"{text('ebF1', *by_row)}, {text('maF1', *by_label)}",
    }


def test_the_results_of_the_front_page_are_those_of_the_rows():
    text = (running.ROOT / "README.md").read_text()
    text = text[text.index("## Results") : text.index("## Where to go on")]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "/" in line
    ]
    assert [len(cells) for cells in lines] == 5 * [6] + 6 * [7]
    for noise, linear, ridge, stack, expected, _ in lines[:5]:
        found = means_of("bibtex", "stack", noise)
        assert (stack, expected) == (found["honest"], found["expected"])
        assert linear == means_of("bibtex", "lr_knn", noise)["honest"]
        assert ridge == means_of("bibtex", "kernel_ridge", noise)["honest"]
    data = ""
    for name, noise, ridge, stack, expected, oracle, _ in lines[5:]:
        data = name or data
        found = means_of(data, "stack", noise)
        assert [stack, expected, oracle] == [
            found[key] for key in ("honest", "expected", "oracle")
        ]
        assert ridge == means_of(data, "kernel_ridge", noise)["honest"]


def estimated(model: str, noise: str, seed: int, score: float, each=None) -> dict:
    row = rows.make(model, noise=noise, seed=seed, score=score, noise__known=False)
    row["rates"] = {"source": "estimated", "r0": 0.01, "r1": 0.2, "doubt": ""}
    if each is not None:
        found = {"per_row": {"ebF1": each + 0.1}, "per_label": {"maF1": each}}
        row["expected_f1_metrics"] = {"corrected_val": found}
    return row


def test_noise_rates_are_told_apart_and_stand_in_order(tmp_path):
    some = [estimated("stack", "ncar", 0, 0.5) for _ in range(2)]
    some[0]["noise"]["rate"], some[1]["noise"]["rate"] = 0.05, 0.01
    found = rows.read(tmp_path, *some, estimated("stack", "none", 0, 0.7))
    table = tables.build(found, "estimated", resamples=10)
    names = [line.cells[1].text for line in table.lines]
    assert names == ["none", "ncar 0.01", "ncar 0.05"]


def test_runs_with_estimated_rates_have_a_table(tmp_path):
    added = {"eval.per_label_thresholds": True}  # of 0.2: no other group for it
    first = estimated("stack", "combined", 0, 0.5, 0.3)
    found = rows.read(
        tmp_path,
        first | {"config": first["config"] | added},
        estimated("stack", "combined", 1, 0.6, 0.4),
        estimated("lr_knn", "combined", 0, 0.4),
        estimated("stack", "none", 0, 0.7),
        rows.make("mlknn", noise="combined", score=0.9),  # its rates are known
    )
    table = tables.build(found, "estimated", resamples=10)
    lines = [[cell.text for cell in line.cells] for line in table.lines]
    assert [x[1:3] for x in lines] == [
        ["none", "stack"],
        ["combined", "stack"],
        ["combined", "lr_knn"],
    ]
    stack = lines[1]
    assert stack[3] == ""
    assert stack[4:10] == [
        "2",
        ".450 ± .071",
        ".550 ± .071",
        ".275 ± .035",
        ".450 ± .071",
        ".350 ± .071",
    ]
    assert stack[11].split("\n") == ["+.150 (no bootstrap)", "vs lr_knn"]
    assert lines[2][8:10] == ["", ""] and lines[0][10] == "no other"


def test_published_numbers_are_whole():
    for numbers in (published.CLEAN, published.ABLATION):
        for models in numbers.values():
            for f1s in models.values():
                assert len(f1s) == len(metrics.F1_NAMES)
                assert all(0 < x < 1 for x in f1s)
    for (_, kind, _), by_metric in published.BY_RATE.items():
        for scores in by_metric.values():
            assert len(scores) == len(published.RATES[kind])


def test_a_preset_names_its_settings(tmp_path):
    """They are told apart from those of other presets by its name alone."""
    some = rows.make(preset="fast", model__width=64), rows.make(model__width=300)
    same = rows.make(preset="fast", model__width=32)
    found = rows.read(tmp_path, *some).groups()
    assert [g.variant for g in found] == ["fast", ""]
    found = rows.read(tmp_path, *some, same).groups()
    assert found[0].variant == "fast, model.width=64" and found[1].variant == ""
