"""Panels of heat maps: what group-DRO gave to each group of prompts over the steps."""

import re
from functools import partial

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from hf_delta.evaluation.rows import natural_key
from hf_delta.plot.history import History
from hf_delta.plot.panel import Panel


# More columns than this are thinner than the eye wants, more names of groups touch one another.
_MOST_COLUMNS, _MOST_NAMES = 60, 16
# Longer names would leave no room for the map.
_LONGEST_NAME = 18
# Colours of less than this factor above and below the centre would be those of rounding.
_LEAST_RATIO = 1.1
# Not the colour of the centre, which is nearly white.
_BLANK = "#CCCCCC"
_NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"
_RANGE = re.compile(rf"({_NUMBER})-({_NUMBER})")


def curriculum_panels(history: History) -> list[Panel]:
    """Weights and rollouts of each group, if a run of group-DRO logged them."""
    panels = []
    for prefix, title, label, centre in (
        ("gdro/weight/", "Curriculum: weights", "weight (white: 1)", 1.0),
        ("gdro/rollouts/", "Curriculum: rollouts", "rollouts per prompt (white: mean)", None),
    ):
        names = _ordered([key.removeprefix(prefix) for key in history.keys(prefix) if history.has(key)])
        if names:
            draw = partial(_draw_heat, history=history, prefix=prefix, names=names, label=label, centre=centre)
            panels.append(Panel(title, "group", draw, grid=False))
    return panels


def windows(history: History, keys: list[str]) -> tuple[np.ndarray, np.ma.MaskedArray]:
    """Means of keys over windows of steps.

    All windows have one width, a whole number of logging intervals, such that there are at most 60 of them.

    Returns:
        Edges of the windows between steps `(C + 1,)`, and means `(K, C)`, masked where a key was not logged.
    """
    series = [history.series(key) for key in keys]
    steps = np.unique(np.concatenate([steps for steps, _ in series]))
    interval = max(1, int(np.median(np.diff(steps)))) if len(steps) > 1 else 1
    # What is logged at a step is of the interval that ends there.
    start = (steps[0] - 1) // interval * interval
    width = interval * int(np.ceil((steps[-1] - start) / interval / _MOST_COLUMNS))
    columns = int((steps[-1] - 1 - start) // width) + 1
    sums, counts = np.zeros((2, len(keys), columns))
    for row, (at, values) in enumerate(series):
        places = ((at - 1 - start) // width).astype(int)
        np.add.at(sums[row], places, values)
        np.add.at(counts[row], places, 1)
    means = np.ma.masked_array(sums / np.maximum(counts, 1), mask=counts == 0)
    return start + 0.5 + width * np.arange(columns + 1), means


def _draw_heat(axes: Axes, history: History, prefix: str, names: list[str], label: str, centre: float | None) -> None:
    edges, means = windows(history, [prefix + name for name in names])
    norm, ticks = _scale(means, means.mean() if centre is None else centre)
    axes.set_facecolor(_BLANK)
    image = axes.imshow(
        means,
        norm=norm,
        cmap=colormaps["RdBu_r"],
        aspect="auto",
        interpolation="none",
        extent=(edges[0], edges[-1], len(names) - 0.5, -0.5),
    )
    shown = range(0, len(names), -(-len(names) // _MOST_NAMES))
    axes.set_yticks(shown, [_short(names[row]) for row in shown], fontsize="small")
    # Inside these axes, so that it keeps to them where a column of panels leaves room for a legend.
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)))
    bar.set_label(label, fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" if tick < 10 else f"{tick:.0f}" for tick in ticks])
    bar.minorticks_off()


def _scale(values: np.ma.MaskedArray, centre: float) -> tuple[LogNorm, np.ndarray]:
    """Logarithmic scale that reaches as far below the centre as above it, and its ticks."""
    positive = values.compressed()[values.compressed() > 0]
    ratio = np.exp(np.abs(np.log(positive / centre)).max(initial=np.log(_LEAST_RATIO)))
    # Clipped, for a weight of 0 is the lowest one and not a blank.
    return LogNorm(centre / ratio, centre * ratio, clip=True), centre * ratio ** np.linspace(-1, 1, 5)


def _ordered(names: list[str]) -> list[str]:
    """Names of groups, `add2` before `add10` and the bin `0.25-0.5` before `0.5-1.0`."""
    ranges = [_RANGE.fullmatch(name) for name in names]
    if all(ranges):
        return sorted(names, key=lambda name: [float(bound) for bound in _RANGE.fullmatch(name).groups()])
    return sorted(names, key=natural_key)


def _short(name: str) -> str:
    """A name without its middle if it is long: names of a kind differ at either end."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
