import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from hf_delta.errors import InputError
from hf_delta.evaluation import Comparison, Report, comparison_report
from hf_delta.evaluation.estimates import difference_estimate, mean_estimate, weighted_estimate
from hf_delta.evaluation.report import Example, Problem


SETTINGS = {
    "ks": [1, 4],
    "samples": 8,
    "temperature": 1.0,
    "max_new_tokens": 64,
    "reward": "playground_reward",
    "batch_size": 256,
    "seed": 0,
}


def make(correct, **fields):
    """A report with `correct[level]` as the counts of its problems, out of 8."""
    problems = [
        Problem(f"{level}/{i}", level, 8, c, truncated=c % 2, mean_length=10.0 + c)
        for level, counts in correct.items()
        for i, c in enumerate(counts)
    ]
    examples = [
        Example(p.prompt_id, p.level, f"{p.prompt_id}=", "7", "#7" * p.correct, p.correct > 4) for p in problems
    ]
    return Report(**{"settings": SETTINGS, "fingerprint": "f", "problems": problems, "examples": examples, **fields})


BEFORE = {"l1": [8, 6, 7], "l2": [2, 0, 1, 1], "l3": [0, 0]}
AFTER = {"l1": [8, 8, 7], "l2": [6, 3, 5, 7], "l3": [0, 1]}


def text(table, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_summaries_by_hand():
    report = make(BEFORE)
    assert [(s.name, s.problems, s.samples) for s in report.levels] == [("l1", 3, 24), ("l2", 4, 32), ("l3", 2, 16)]
    assert report.levels[0].pass_at_k[1] == mean_estimate([1, 0.75, 0.875])
    # 1 - C(6, 4) / C(8, 4) = 55/70 with 2 of 8 right, 1 - C(7, 4) / C(8, 4) = 35/70 with 1.
    assert report.levels[1].pass_at_k[4].mean == pytest.approx((55 / 70 + 0 + 0.5 + 0.5) / 4)
    assert (report.levels[1].mean_length, report.levels[1].truncated) == (11.0, 2 / 32)
    assert report.over_levels.pass_at_k[1].mean == pytest.approx((0.875 + 0.125 + 0) / 3)
    assert report.over_problems.pass_at_k[1].mean == pytest.approx(25 / 72)
    assert report.over_levels.pass_at_k[1] == weighted_estimate([s.pass_at_k[1] for s in report.levels], [1, 1, 1])
    assert report.over_problems.mean_length == pytest.approx(10 + 25 / 9)


def test_a_file_holds_everything_and_is_not_overwritten(tmp_path):
    report = make(BEFORE, source={"data": "eval.jsonl"})
    path = report.save(tmp_path / "new" / "eval_before.json")
    assert Report.load(path) == report
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("hf_delta.evaluation", 1)
    assert content["levels"][1]["pass_at_k"]["1"]["mean"] == 0.125
    assert content["over_levels"]["name"] == "level mean" and content["over_problems"]["problems"] == 9
    with pytest.raises(InputError, match="eval_before.json exists"):
        make(AFTER).save(path)
    assert Report.load(path) == report
    make(AFTER).save(path, overwrite=True)
    assert Report.load(path) == make(AFTER)
    assert [p.name for p in path.parent.iterdir()] == ["eval_before.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: "{", "cannot be read"),
        (lambda content: "[]", "is not an evaluation report"),
        (lambda content: {**content, "format": "other"}, "is not an evaluation report"),
        (lambda content: {**content, "version": 2}, "in report format 2, and this hf_delta reads format 1"),
        (lambda content: {key: content[key] for key in content if key != "problems"}, "damaged .*problems"),
        (lambda content: {**content, "problems": []}, "damaged"),
        (lambda content: {**content, "problems": [{"level": 1}]}, "damaged"),
        (lambda content: {**content, "problems": [{**content["problems"][0], "correct": 9}]}, "damaged .*between 0"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = make(BEFORE).save(tmp_path / "report.json")
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        Report.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="none.json cannot be read"):
        Report.load(tmp_path / "none.json")


def test_the_table_fits_a_terminal():
    lines = text(make(BEFORE).table()).splitlines()
    (row,) = [line for line in lines if line.strip().startswith("l2")]
    estimate = mean_estimate(np.array([2, 0, 1, 1]) / 8)
    assert f"0.12 [{estimate.low:.2f}, {estimate.high:.2f}]" in row
    assert row.split()[1] == "4" and row.split()[-2:] == ["11.0", "6%"]
    assert sum("mean" in line for line in lines) == 2
    assert not any("mean" in line for line in text(make({"all": [1, 2]}).table()).splitlines())


def test_differences_are_paired_over_problems():
    comparison = Comparison(make(BEFORE), make(AFTER))
    rows = {(row.k, row.name): row for row in comparison.rows}
    assert len(rows) == 2 * 5
    paired = difference_estimate(np.array(BEFORE["l2"]) / 8, np.array(AFTER["l2"]) / 8)
    assert rows[1, "l2"].difference == paired
    assert (rows[1, "l2"].before, rows[1, "l2"].after) == (0.125, 21 / 32)
    levels = [rows[1, name].difference for name in ("l1", "l2", "l3")]
    assert rows[1, "level mean"].difference == weighted_estimate(levels, [1, 1, 1])
    assert rows[1, "problem mean"].difference == weighted_estimate(levels, [3, 4, 2])
    for row in comparison.rows:
        assert row.difference.mean == pytest.approx(row.after - row.before)
        assert row.difference.low <= row.difference.mean <= row.difference.high


def test_table_and_markdown_say_the_same():
    table, markdown = comparison_report(make(BEFORE), make(AFTER))
    printed = text(table)
    assert "…" not in printed
    assert "| pass@1 | l2 | 0.12 | 0.66 | +0.53 [" in markdown
    assert "11.0 → 15.2 |" in markdown
    cells = [line for line in markdown.splitlines() if line.startswith("| pass@")]
    assert len(cells) == 10 and {line.count("|") for line in cells} == {7}
    for line in cells:
        assert line.split("|")[5].strip() in printed
    assert "8 samples each at temperature 1.0" in markdown


def test_examples_are_chosen_by_position():
    chosen = [(old.prompt_id, new.prompt_id) for old, new in Comparison(make(BEFORE), make(AFTER)).examples]
    assert chosen == [("l1/1", "l1/1"), ("l2/1", "l2/1"), ("l3/0", "l3/0")]
    swapped = Comparison(make(AFTER), make(BEFORE))
    assert [old.prompt_id for old, _ in swapped.examples] == ["l1/1", "l2/1", "l3/0"]
    assert len(Comparison(make({"all": [1]}), make({"all": [2]})).examples) == 1


def test_examples_show_both_answers():
    comparison = Comparison(make({"l1": [1]}), make({"l1": [5]}))
    for shown in (text(comparison.examples_table()), comparison.markdown()):
        assert "#7  (wrong)" in shown and "#7#7#7#7#7  (correct)" in shown


def test_markdown_holds_up_against_what_models_write():
    wild = Example("l1/0", "l1", "[b]1=", "7", "```\nx\n````" + "y" * 1000 + "#7", True)
    reports = [make({"l1": [1]}, examples=[wild])] * 2
    markdown = Comparison(*reports).markdown()
    (start,) = [i for i, line in enumerate(markdown.splitlines()) if line == "`````text"]
    assert markdown.splitlines()[start:].count("`````") == 1
    assert "y" * 1000 not in markdown and "y" * 150 + " … " + "y" * 150 in markdown and "y#7  (correct)" in markdown
    assert "chosen by position" in markdown
    # Square brackets are text, not markup.
    assert "[b]1=" in text(Comparison(*reports).examples_table())


def test_what_cannot_be_compared():
    with pytest.raises(InputError, match="of different problems .eval.jsonl with fingerprint f, data with g"):
        Comparison(make(BEFORE, source={"data": "eval.jsonl"}), make(AFTER, fingerprint="g"))
    with pytest.raises(InputError, match="different temperature .1.0 and 0.5"):
        Comparison(make(BEFORE), make(AFTER, settings={**SETTINGS, "temperature": 0.5}))
    other_draws = replace(make(AFTER), settings={**SETTINGS, "seed": 1, "batch_size": 8})
    assert Comparison(make(BEFORE), other_draws).rows
