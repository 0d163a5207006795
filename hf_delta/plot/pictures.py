"""Every picture that a run directory has something for."""

from pathlib import Path

from hf_delta.plot.figure import NothingToPlot, plot_run
from hf_delta.plot.tokens import TOKEN_WEIGHTS, plot_token_weights
from hf_delta.preference.snapshots import SNAPSHOTS, read_snapshots


def plot_pictures(run_dir: str | Path, out: str | Path | None = None) -> dict[str, Path]:
    """Draw the curves of a run, and its token weights if it has a `token_weights.json`.

    Args:
        run_dir (`str` or `Path`): output directory of a run.
        out (`str` or `Path`, *optional*): file for the curves; token weights then go to a file beside it,
            `<name>_token_weights` with its suffix, instead of `token_weights.png` in `run_dir`.

    Returns:
        `dict[str, Path]`: what was drawn, `Curves` and `Token weights`, and the files.

    Raises:
        InputError: as [`plot_run`] and [`plot_token_weights`]; token weights alone are enough.
    """
    weights = Path(run_dir) / SNAPSHOTS
    if weights.is_file():
        # Before anything is drawn, so that nothing is if this cannot be.
        read_snapshots(weights)
    pictures: dict[str, Path] = {}
    try:
        pictures["Curves"] = plot_run(run_dir, out)
    except NothingToPlot:
        # A training that has not come to its first checkpoint.
        if not weights.is_file():
            raise
    if weights.is_file():
        beside = (
            None
            if out is None
            else Path(out).with_name(f"{Path(out).stem}_{Path(TOKEN_WEIGHTS).stem}{Path(out).suffix}")
        )
        pictures["Token weights"] = plot_token_weights(weights, beside)
    return pictures
