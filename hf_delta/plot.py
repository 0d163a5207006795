"""Curves of a run and its evaluations, as one picture."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_delta.errors import InputError
from hf_delta.evaluation.comparison import Comparison
from hf_delta.evaluation.report import Report
from hf_delta.evaluation.rows import natural_key


logger = logging.getLogger(__name__)

CURVES = "curves.png"
STEP = "optimizer step"
# Okabe and Ito's colours, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_GREY = "#999999"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _VERMILION, "#CC79A7", "#56B4E9")
# Fewer points than this are drawn as they are.
_SMOOTH_FROM = 20

# Keys that trainers log and that need no drawing of their own: title, y label, {key: label}.
_SIMPLE = (
    ("Preference accuracy", "share of pairs", {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"}),
    ("Preference margin", "implicit reward (nats)", {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}),
    ("Token accuracy", "share of tokens", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "evaluation"}),
    ("Loss", "loss", {"loss": "training", "eval_loss": "evaluation"}),
    ("Entropy", "nats per token", {"entropy": "entropy"}),
    ("Divergence from the reference", "nats per token", {"kl": "KL"}),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}),
)  # fmt: skip


class History:
    """The scalars a trainer logged, by key."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def keys(self, prefix: str) -> list[str]:
        """Keys that begin with a prefix, `add2` before `add10`."""
        return sorted({key for row in self._rows for key in row if key.startswith(prefix)}, key=natural_key)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a key, both `(N,)`, without what is no finite number."""
        points = [(row["step"], row[key]) for row in self._rows if "step" in row and _is_number(row.get(key))]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        return steps, values

    def has(self, key: str) -> bool:
        """Whether there is anything to draw for a key."""
        return len(self.series(key)[0]) > 0


@dataclass(frozen=True)
class Panel:
    """One set of axes: what it shows and how it is drawn."""

    title: str
    ylabel: str
    draw: Callable[[Axes], None]
    xlabel: str = STEP


def plot_run(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Draw whatever a run logged, and its evaluations before and after, see [`run_figure`].

    Args:
        run_dir (`str` or `Path`): output directory of a run.
        out (`str` or `Path`, *optional*): file to write, `curves.png` in `run_dir` by default; an older picture there is
            replaced. The suffix is the format: png, pdf or svg.

    Returns:
        `Path`: the file.

    Raises:
        InputError: if there is nothing to draw, a report is damaged, or the suffix is no format.
    """
    out = Path(run_dir) / CURVES if out is None else Path(out)
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"Cannot draw {out}: the name must end in .png, .pdf or .svg.")
    figure = run_figure(run_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def run_figure(run_dir: str | Path) -> Figure:
    """The figure of [`plot_run`]: one panel per kind of quantity; points are logged values, lines moving averages.

    Raises:
        InputError: if there is nothing to draw, or a report is damaged.
    """
    run_dir = Path(run_dir)
    history = History(_newest_log(run_dir))
    panels = [*_training_panels(history), *_evaluation_panels(run_dir)]
    if not panels:
        raise InputError(
            f"Nothing to plot in {run_dir}: looked for logged values in trainer_state.json there and in its checkpoint-*, "
            "and for eval_before.json and eval_after.json."
        )
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, fontweight="bold")
    for index, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, index)
        panel.draw(axes)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.xlabel == STEP:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    smoothed = any(isinstance(mark, PathCollection) for axes in figure.axes for mark in axes.collections)
    footer = "points: logged values" + "; lines: centred moving averages" * smoothed
    figure.supxlabel(footer if panels[0].xlabel == STEP else "", fontsize="small", color="dimgray")
    return figure


def _newest_log(run_dir: Path) -> list[dict[str, Any]]:
    newest: dict[str, Any] = {}
    for path in [run_dir / "trainer_state.json", *sorted(run_dir.glob("checkpoint-*/trainer_state.json"))]:
        if not path.is_file():
            continue
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if not newest or state["global_step"] > newest["global_step"]:
                newest = state
        except (OSError, ValueError, KeyError, TypeError) as error:
            # A run that was killed while it saved leaves one, and older ones that can be read.
            logger.warning("Left out %s, which cannot be read (%r).", path, error)
    return newest.get("log_history", [])


def _training_panels(history: History) -> list[Panel]:
    panels = []
    if history.has("reward"):
        panels.append(Panel("Reward", "mean ± standard deviation", lambda axes: _draw_reward(axes, history)))
    if levels := history.keys("pass_rate/"):
        panels.append(
            Panel("Pass rate of training rollouts", "share correct", lambda axes: _draw_levels(axes, history, levels))
        )
    if history.has("completions/mean_length"):
        panels.append(Panel("Completion length", "tokens", lambda axes: _draw_length(axes, history)))
    if history.has("weights/mean"):
        panels.append(Panel("Sequence weights", "weight", lambda axes: _draw_weights(axes, history)))
    for title, ylabel, labels in _SIMPLE:
        if title == "Loss" and history.has("reward"):
            # On the policy that sampled, the loss of policy gradients is 0 up to rounding; only its gradient says anything.
            continue
        logged = {key: label for key, label in labels.items() if history.has(key)}
        if logged:
            panels.append(Panel(title, ylabel, lambda axes, logged=logged: _draw_simple(axes, history, logged)))
    return panels


def _evaluation_panels(run_dir: Path) -> list[Panel]:
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


def _draw_reward(axes: Axes, history: History) -> None:
    _draw_curve(axes, *history.series("reward"), _BLUE, "reward")
    steps, mean, std = _together(history, "reward", "reward_std")
    if len(steps):
        width = _window(len(steps))
        mean, std = _smooth(mean, width), _smooth(std, width)
        axes.fill_between(steps, mean - std, mean + std, color=_BLUE, alpha=0.15, linewidth=0)


def _draw_levels(axes: Axes, history: History, keys: list[str]) -> None:
    for key, place in zip(keys, np.linspace(0, 0.9, len(keys))):
        _draw_curve(axes, *history.series(key), colormaps["viridis"](place), key.removeprefix("pass_rate/"))
    axes.set_ylim(-0.03, 1.03)
    _legend_outside(axes)


def _draw_length(axes: Axes, history: History) -> None:
    _draw_curve(axes, *history.series("completions/mean_length"), _BLUE, "mean")
    steps, low, high = _together(history, "completions/min_length", "completions/max_length")
    if len(steps):
        axes.fill_between(steps, low, high, color=_BLUE, alpha=0.12, linewidth=0, label="min to max")
    handles, labels = axes.get_legend_handles_labels()
    steps, clipped = history.series("completions/clipped_ratio")
    if clipped.any():
        twin = axes.twinx()
        twin.plot(steps, _smooth(clipped, _window(len(steps))), color=_VERMILION, linestyle="--", label="cut (right)")
        twin.set(ylabel="share cut at the limit", ylim=(0, 1))
        twin.spines[["top"]].set_visible(False)
        more = twin.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    _legend_above(axes, handles, labels)


def _draw_weights(axes: Axes, history: History) -> None:
    steps, low, high = _together(history, "weights/min", "weights/max")
    if len(steps):
        axes.fill_between(steps, low, high, color=_ORANGE, alpha=0.2, linewidth=0, label="min to max")
    _draw_curve(axes, *history.series("weights/mean"), _BLUE, "mean")
    if history.has("weights/std"):
        _draw_curve(axes, *history.series("weights/std"), _GREEN, "std")
    _legend_above(axes, *axes.get_legend_handles_labels())


def _draw_simple(axes: Axes, history: History, labels: dict[str, str]) -> None:
    for (key, label), colour in zip(labels.items(), _COLOURS):
        _draw_curve(axes, *history.series(key), colour, label)
    if len(labels) > 1:
        axes.legend(fontsize="small", framealpha=0.8)


def _draw_bars(axes: Axes, reports: dict[str, Report], k: int) -> None:
    width = 0.8 / len(reports)
    for index, (name, report) in enumerate(reports.items()):
        summaries = [*report.levels, report.over_levels] if len(report.levels) > 1 else report.levels
        estimates = [summary.pass_at_k[k] for summary in summaries]
        means = np.array([e.mean for e in estimates])
        errors = [means - [e.low for e in estimates], [e.high for e in estimates] - means]
        places = np.arange(len(means)) + (index - (len(reports) - 1) / 2) * width
        colour = _GREY if name == "before" else _BLUE
        axes.bar(places, means, width, yerr=errors, color=colour, ecolor="black", capsize=2.5, label=name)
        labels = [summary.name for summary in report.levels] + ["mean"] * (len(summaries) - len(report.levels))
        crowded = sum(map(len, labels)) > 40
        axes.set_xticks(
            np.arange(len(means)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center"
        )
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_ylim(0, 1)
    _legend_above(axes, *axes.get_legend_handles_labels())


def _draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: Any, label: str) -> None:
    width = _window(len(values))
    if width == 1:
        axes.plot(steps, values, color=colour, marker="o", markersize=3, label=label)
        return
    axes.scatter(steps, values, s=6, color=[colour], alpha=0.3, linewidths=0)
    axes.plot(steps, _smooth(values, width), color=colour, linewidth=1.8, label=label)


def _legend_above(axes: Axes, handles: list[Any], labels: list[str]) -> None:
    # Room for one line of legend over the data.
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.legend(
        handles, labels, fontsize="small", loc="upper left", ncols=len(labels), frameon=False, columnspacing=1.0
    )


def _legend_outside(axes: Axes) -> None:
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, frameon=False)


def _window(count: int) -> int:
    return 1 if count < _SMOOTH_FROM else 2 * (count // 12) + 1


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average over an odd number of points, over those there are at the ends."""
    ones = np.convolve(np.ones(len(values)), np.ones(width), mode="same")
    return np.convolve(values, np.ones(width), mode="same") / ones


def _together(history: History, first: str, second: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which two keys were both logged, and their values."""
    a, b = (dict(zip(*history.series(key))) for key in (first, second))
    steps = np.array(sorted(a.keys() & b.keys()))
    return steps, np.array([a[step] for step in steps]), np.array([b[step] for step in steps])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
