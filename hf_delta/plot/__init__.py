"""Curves of a run and its evaluations, as one picture."""

from hf_delta.plot.figure import CURVES, plot_run, run_figure
from hf_delta.plot.history import History


__all__ = ["CURVES", "History", "plot_run", "run_figure"]
