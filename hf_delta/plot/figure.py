"""The picture: every panel there is something for."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from hf_delta.errors import InputError
from hf_delta.plot.curriculum import curriculum_panels
from hf_delta.plot.evaluation import evaluation_panels
from hf_delta.plot.history import History, newest_log
from hf_delta.plot.panel import STEP, check_format
from hf_delta.plot.training import training_panels


CURVES = "curves.png"


class NothingToPlot(InputError):
    """A directory without a single logged value and without an evaluation."""


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
    if not Path(run_dir).is_dir():
        raise NothingToPlot(f"Nothing to plot in {run_dir}: it is no directory. Give the output_dir of a run.")
    check_format(out)
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
    history = History(newest_log(run_dir))
    panels = [*training_panels(history), *curriculum_panels(history), *evaluation_panels(run_dir)]
    if not panels:
        raise NothingToPlot(
            f"Nothing to plot in {run_dir}: looked for logged values in trainer_state.json there and in its checkpoint-*, "
            "and for eval_before.json and eval_after.json."
        )
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows + 0.5), layout="constrained")
    # Labels on the right of a panel keep away from those on the left of the next.
    figure.get_layout_engine().set(w_pad=0.08)
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, fontweight="bold")
    for index, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, index)
        panel.draw(axes)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.xlabel == STEP:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if panel.grid:
            axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    figure.supxlabel(_footer(figure) if panels[0].xlabel == STEP else "", fontsize="small", color="dimgray")
    return figure


def _footer(figure: Figure) -> str:
    smoothed = any(isinstance(mark, PathCollection) for axes in figure.axes for mark in axes.collections)
    heat = any(isinstance(mark, AxesImage) for axes in figure.axes for mark in axes.images)
    notes = [
        "points: logged values",
        "lines: centred moving averages" * smoothed,
        "grey cells: no prompt of that group" * heat,
    ]
    return "; ".join(filter(None, notes))
