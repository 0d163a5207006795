"""Colours, moving averages and legends that the panels share."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes


# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY = "#999999"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, "#CC79A7", "#56B4E9")
# Fewer points than this are drawn as they are.
_SMOOTH_FROM = 20


def draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: Any, label: str) -> None:
    """Draw points and their moving average, or a line with marks where there are few."""
    width = window(len(values))
    if width == 1:
        axes.plot(steps, values, color=colour, marker="o", markersize=3, label=label)
        return
    axes.scatter(steps, values, s=6, color=[colour], alpha=0.3, linewidths=0)
    axes.plot(steps, smooth(values, width), color=colour, linewidth=1.8, label=label)


def legend_above(axes: Axes, handles: list[Any], labels: list[str]) -> None:
    """One line of legend, for which room is made over the data."""
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.legend(
        handles, labels, fontsize="small", loc="upper left", ncols=len(labels), frameon=False, columnspacing=1.0
    )


def legend_outside(axes: Axes) -> None:
    """Legend to the right of the axes, for more entries than fit over the data."""
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, frameon=False)


def window(count: int) -> int:
    """Odd number of points to average over: about a sixth of them, 1 if they are few."""
    return 1 if count < _SMOOTH_FROM else 2 * (count // 12) + 1


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average over an odd number of points, over those there are at the ends."""
    ones = np.convolve(np.ones(len(values)), np.ones(width), mode="same")
    return np.convolve(values, np.ones(width), mode="same") / ones
