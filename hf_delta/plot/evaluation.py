"""Panels of bars: the evaluations before and after a run."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from hf_delta.evaluation.comparison import Comparison
from hf_delta.evaluation.report import Report
from hf_delta.plot.panel import Panel
from hf_delta.plot.style import BLUE, GREY, legend_above


def evaluation_panels(run_dir: Path) -> list[Panel]:
    """Panels of the first and the last k of pass@k, if the run was evaluated.

    Raises:
        InputError: if a report is damaged, or the two are of different problems.
    """
    files = {name: run_dir / f"eval_{name}.json" for name in ("before", "after")}
    reports = {name: Report.load(path) for name, path in files.items() if path.exists()}
    if len(reports) == 2:
        # Refuses bars of different problems side by side.
        Comparison(**reports)
    if not reports:
        return []
    ks = next(iter(reports.values())).settings["ks"]
    return [
        Panel(
            f"Held-out pass@{k}, 95 % intervals", f"pass@{k}", lambda axes, k=k: _draw_bars(axes, reports, k), "level"
        )
        for k in dict.fromkeys((ks[0], ks[-1]))
    ]


def _draw_bars(axes: Axes, reports: dict[str, Report], k: int) -> None:
    width = 0.8 / len(reports)
    for index, (name, report) in enumerate(reports.items()):
        summaries = [*report.levels, report.over_levels] if len(report.levels) > 1 else report.levels
        estimates = [summary.pass_at_k[k] for summary in summaries]
        means = np.array([e.mean for e in estimates])
        errors = [means - [e.low for e in estimates], [e.high for e in estimates] - means]
        places = np.arange(len(means)) + (index - (len(reports) - 1) / 2) * width
        colour = GREY if name == "before" else BLUE
        axes.bar(places, means, width, yerr=errors, color=colour, ecolor="black", capsize=2.5, label=name)
        labels = [summary.name for summary in report.levels] + ["mean"] * (len(summaries) - len(report.levels))
        crowded = sum(map(len, labels)) > 40
        axes.set_xticks(
            np.arange(len(means)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center"
        )
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_ylim(0, 1)
    legend_above(axes, *axes.get_legend_handles_labels())
