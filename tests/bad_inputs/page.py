"""Writes `docs/errors.md` from the table: `python -m tests.bad_inputs.page`."""

from pathlib import Path

from tests.bad_inputs import checkpoints, commands, data, dry_runs, hub, models, recipes, rewards
from tests.bad_inputs.case import Case


PAGE = Path(__file__).parent.parent.parent / "docs" / "errors.md"

TABLE: dict[str, list[Case]] = {
    "The file of a recipe": recipes.FILE,
    "Keys": recipes.KEYS,
    "Types": recipes.TYPES,
    "Numbers": recipes.NUMBERS,
    "Adapters in a recipe": recipes.PEFT,
    "Keys together": recipes.TOGETHER,
    "Flags": recipes.FLAGS,
    "Files of data": data.FILES,
    "Columns and rows": data.COLUMNS_AND_ROWS,
    "What you may not read or write": data.UNREADABLE,
    "Models": models.CASES,
    "Names of reward functions": rewards.NAMES,
    "What reward functions return": rewards.RETURNS,
    "Own rules": rewards.RULES,
    "Damaged checkpoints": checkpoints.RESUMING,
    "Checkpoints of other methods": checkpoints.OTHER_METHODS,
    "Output directories": checkpoints.DIRECTORIES,
    "Runs that go on": checkpoints.RESUMES,
    "Dry runs": dry_runs.PLANS,
    "Launches": dry_runs.LAUNCHES,
    "Keys of the Hub": hub.KEYS,
    "Command lines": commands.WORDS,
    "`hf-delta eval`": commands.EVALUATIONS,
    "`hf-delta plot`": commands.PLOTS,
    "`hf-delta export`": commands.EXPORTS,
    "`hf-delta pairs`": commands.PAIRS_CASES,
    "`hf-delta push`, and `hf-delta export --push_to_hub`": hub.PUSHES,
}

_HEAD = """# What goes wrong, and what is said

Bad input is one line on stderr, `error: ` and what is wrong, where, and what to do; the exit status is 2, and nothing was written,
overwritten or left behind. These are the {count} cases that the tests try, over every trainer and command; `{any}` stands for what
varies: words of other packages, lists of names. Paths are relative to where the command was given.

This page is written by `python -m tests.bad_inputs.page` from the table that the tests run (`tests/bad_inputs`).
"""


def cases() -> list[Case]:
    """All rows."""
    return [case for section in TABLE.values() for case in section]


def page() -> str:
    """The page as Markdown."""
    parts = [_HEAD.format(count=len(cases()), any="…")]
    for title, section in TABLE.items():
        lines = [f"| {_cell(case.given)} | {_cell('`' + case.says + '`', case.says)} |" for case in section]
        parts.append("\n".join([f"## {title}\n", "| given | error |", "| --- | --- |", *lines]) + "\n")
    return "\n".join(parts)


def _cell(text: str, code: str = "") -> str:
    if "`" in code:
        text = f"`` {code} ``"
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
