"""Curves of a run and its evaluations, and its token weights, as pictures."""

from hf_delta.plot.figure import CURVES, plot_run, run_figure
from hf_delta.plot.history import History
from hf_delta.plot.pictures import plot_pictures
from hf_delta.plot.tokens import TOKEN_WEIGHTS, plot_token_weights


__all__ = [
    "CURVES",
    "TOKEN_WEIGHTS",
    "History",
    "plot_pictures",
    "plot_run",
    "plot_token_weights",
    "run_figure",
]
