"""Differences between screened variants of `gdro_playground.py`, over the tuning seeds of all reports together.

    python benchmarks/gdro_playground_contrasts.py docs/rl/gdro_playground.json docs/rl/gdro_playground_faulty_table.json

Paired by seed and family; means and halves of 95 % intervals.
"""

import argparse
import json
from pathlib import Path

from gdro_playground_report import interval, scores


CONTRASTS = (
    ("failure, objective, 3, bins", "failure, objective, 0.65, bins"),
    ("failure, mean_one, 3, bins", "failure, objective, 0.65, bins"),
    ("failure, objective, 3, levels", "failure, objective, 3, bins"),
    ("variance, exploration 0.5", "variance, no exploration"),
    ("exp3", "variance, no exploration"),
)
SHOWN = ("pass@1", "pass@8", "worst level pass@1", "worst level pass@8")


def differences(reports: list[dict], one: str, other: str, measure: str) -> list[float]:
    """`one` minus `other`, run by run."""
    found = []
    for report in reports:
        arms = report["screen"]["arms"]
        ours, theirs = (scores(arms[arm]["runs"], measure) for arm in (one, other))
        found += [a - b for a, b in zip(ours, theirs, strict=True)]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="written by the stage report")
    args = parser.parse_args(argv)
    reports = [json.loads(path.read_text()) for path in args.reports]
    print(f"| | minus | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 2) + "|", sep="\n")
    for pair in CONTRASTS:
        cells = ["{:+.3f} ± {:.3f}".format(*interval(differences(reports, *pair, measure))) for measure in SHOWN]
        print(f"| {' | '.join([*pair, *cells])} |")


if __name__ == "__main__":
    main()
