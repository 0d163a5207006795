"""One set of axes of the picture."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes


STEP = "optimizer step"


@dataclass(frozen=True)
class Panel:
    """One set of axes: what it shows and how it is drawn."""

    title: str
    ylabel: str
    draw: Callable[[Axes], None]
    xlabel: str = STEP
    grid: bool = True
