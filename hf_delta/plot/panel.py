"""One set of axes of the picture, and the files that it can be drawn to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from hf_delta.errors import InputError
from hf_delta.paths import check_writable


STEP = "optimizer step"


@dataclass(frozen=True)
class Panel:
    """One set of axes: what it shows and how it is drawn."""

    title: str
    ylabel: str
    draw: Callable[[Axes], None]
    xlabel: str = STEP
    grid: bool = True


def check_format(out: Path) -> None:
    """Refuse a name whose suffix is no format that we draw, or that cannot be written.

    Raises:
        InputError: it is none, or cannot.
    """
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"Cannot draw {out}: the name must end in .png, .pdf or .svg.")
    check_writable(out, "--out", directory=False)
