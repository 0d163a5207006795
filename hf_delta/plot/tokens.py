"""The picture of token weights: completions whose tokens are coloured by weight, at the first and the last snapshot."""

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle

from hf_delta.errors import InputError
from hf_delta.plot.panel import check_format
from hf_delta.plot.style import BLUE, VERMILION
from hf_delta.plot.token_lines import Box, shortened, visible, wrapped
from hf_delta.preference.snapshots import SNAPSHOTS, Example, Snapshot, read_snapshots


TOKEN_WEIGHTS = "token_weights.png"

# Cells of a line of text and of the names to its left; inches of a cell of type of 8 points, and of a line.
_WIDTH, _NAMES = 110, 19
_CELL, _LINE, _SIZE = 0.0705, 0.19, 8
_HEAD, _MARGIN = 0.95, 0.25
# Lines of the heading of a completion, of a strip besides its lines, and between completions.
_HEADING, _STRIP, _GAP = 1.2, 1.4, 0.8
# What is drawn at most: completions of a snapshot, and lines of each.
_MOST_EXAMPLES, _MOST_LINES = 4, 6
# Those of matplotlib, and of the usual ones for other scripts what is installed.
_OTHER_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Devanagari",
    "PingFang SC",
    "Microsoft YaHei",
    "Unifont",
)
_COLOURS, _BLANK = colormaps["Blues"], "#CCCCCC"
# Weights above this share of the largest would all look alike on a scale from 0; closer ones than 1 % of it are alike.
_NARROW, _ALIKE = 0.5, 0.99
# A few tokens of enormous weight would leave all others white.
_HIGHEST, _OUTLIER = 99, 1.5


@dataclass(frozen=True)
class Strip:
    """Tokens of one completion with one kind of weight at one step."""

    name: str
    weights: np.ndarray


@dataclass(frozen=True)
class Text:
    """One completion and its strips."""

    example: Example
    strips: list[Strip]


def plot_token_weights(source: str | Path, out: str | Path | None = None) -> Path:
    """Draw the `token_weights.json` of a run, see [`token_figure`].

    Args:
        source (`str` or `Path`): the file, or the output directory that holds it.
        out (`str` or `Path`, *optional*): file to write, `token_weights.png` beside `source` by default; an older picture
            there is replaced.

    Returns:
        `Path`: the file.

    Raises:
        InputError: if the file cannot be read, is not one of ours, or has no tokens, or the suffix of `out` is no format.
    """
    source = Path(source) / SNAPSHOTS if Path(source).is_dir() else Path(source)
    out = source.with_name(TOKEN_WEIGHTS) if out is None else Path(out)
    check_format(out)
    rule, snapshots = read_snapshots(source)
    texts = texts_of(snapshots)
    if not texts:
        raise InputError(f"{source} holds no tokens yet: nothing to draw.")
    figure = token_figure(texts, f"{source.resolve().parent.name}: token weights of {rule}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Scripts that no installed font has are drawn as empty boxes; their weights can be seen all the same.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        figure.savefig(out, dpi=120)
    return out


def texts_of(snapshots: list[Snapshot]) -> list[Text]:
    """At most four completions of the last snapshot and, above their weights then, those at the first one.

    Completions that only the first snapshot has come after them, at most four too.
    """
    if not snapshots:
        return []
    snapshots = [snapshots[-1], *([snapshots[0]] if len(snapshots) > 1 else [])]
    found: dict[tuple, list[tuple[int, Example]]] = {}
    for snapshot in snapshots:
        for example in [example for example in snapshot.examples if example.tokens][:_MOST_EXAMPLES]:
            found.setdefault((example.prompt, example.side, *example.tokens), []).append((snapshot.step, example))
    texts = []
    for examples in found.values():
        strips = [strip for step, example in reversed(examples) for strip in _strips(step, example)]
        # What a term's weights were and have become stands together.
        texts.append(Text(examples[0][1], sorted(strips, key=lambda strip: strip.name.startswith("KL"))))
    return texts


def token_figure(texts: list[Text], title: str) -> Figure:
    """Each token in a box of its weight's colour; reward and KL weights apart where they differ.

    Spaces are shown as `·`, line breaks as `↵`. All boxes share a scale, from 0 unless all weights lie close together. Grey
    is a weight that is no number.
    """
    laid = [(text, wrapped(text.example.tokens, _WIDTH, _MOST_LINES)) for text in texts]
    lines = sum(_lines(text, boxes) for text, boxes in laid)
    width = (_NAMES + _WIDTH) * _CELL + 2 * _MARGIN
    height = lines * _LINE + _HEAD + _MARGIN
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (_MARGIN / width, _MARGIN / height, 1 - 2 * _MARGIN / width, lines * _LINE / height),
        xlim=(-_NAMES, _WIDTH),
        ylim=(lines, 0),
    )
    axes.set_axis_off()
    weights = np.concatenate([strip.weights for text in texts for strip in text.strips])
    norm = _scale(weights)
    top = 0.0
    for text, boxes in laid:
        _draw_text(axes, top, text, boxes, norm)
        top += _lines(text, boxes)
    figure.text(_MARGIN / width, 1 - 0.3 / height, title, fontweight="bold", parse_math=False, va="center")
    _draw_scale(figure, weights, norm, width, height)
    return figure


def _strips(step: int, example: Example) -> list[Strip]:
    reward, kl = (None if found is None else np.array(found, dtype=float) for found in (example.reward, example.kl))
    if kl is None:
        return [Strip(f"step {step}", reward)]
    if np.array_equal(reward, kl, equal_nan=True):
        return [Strip(f"both, step {step}", reward)]
    return [Strip(f"reward, step {step}", reward), Strip(f"KL, step {step}", kl)]


def _scale(weights: np.ndarray) -> Normalize:
    weights = weights[np.isfinite(weights)]
    if not len(weights):
        return Normalize(0.0, 1.0)
    low, high, highest = (float(bound) for bound in np.percentile(weights, [0, _HIGHEST, 100]))
    if highest < _OUTLIER * high:
        high = highest
    if high <= 0:
        return Normalize(min(low, 0.0), 1.0)
    narrow = _NARROW * high < low < _ALIKE * high
    return Normalize(low if narrow else min(low, 0.0), high)


def _lines(text: Text, boxes: list[Box]) -> float:
    """Lines that a completion takes, with those that keep it from the next."""
    cut = len(boxes) < len(text.example.tokens)
    return _HEADING + len(text.strips) * (boxes[-1].line + _STRIP) + 1.0 * cut + _GAP


def _draw_text(axes: Axes, top: float, text: Text, boxes: list[Box], norm: Normalize) -> None:
    example = text.example
    colour = BLUE if example.side == "chosen" else VERMILION
    _write(axes, -_NAMES, top + 0.5, f"pair {example.pair + 1}, {example.side}", color=colour, fontweight="bold")
    if example.prompt:
        _write(axes, 0, top + 0.5, shortened(visible(example.prompt), _WIDTH, keep_end=True), color="dimgray")
    top += _HEADING
    for strip in text.strips:
        _write(axes, -_NAMES, top + 0.5, strip.name, color="dimgray")
        for box in boxes:
            _draw_box(axes, top + box.line, box, strip.weights[box.index], norm)
        top += boxes[-1].line + _STRIP
    if left := len(example.tokens) - len(boxes):
        _write(axes, 0, top + 0.3, f"… and {left} more tokens", color="dimgray")


def _draw_box(axes: Axes, top: float, box: Box, weight: float, norm: Normalize) -> None:
    known = np.isfinite(weight)
    colour = _COLOURS(float(norm(weight))) if known else _BLANK
    patch = Rectangle((box.start, top), box.width, 1, facecolor=colour, edgecolor="white", linewidth=0.8)
    axes.add_patch(patch)
    ink = "white" if known and norm(weight) > 0.6 else "black"
    text = _write(axes, box.start + box.width / 2, top + 0.5, box.text, ha="center", color=ink)
    # Letters of scripts that the fonts lack are wider than their cells.
    text.set(clip_path=patch, clip_on=True)


def _write(axes: Axes, x: float, y: float, text: str, ha: str = "left", **style: Any) -> Artist:
    fixed = {"va": "center_baseline", "fontsize": _SIZE, "family": _fonts(), "parse_math": False, "usetex": False}
    return axes.text(x, y, text, ha=ha, **fixed, **style)


@cache
def _fonts() -> list[str]:
    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans Mono", "DejaVu Sans", *(name for name in _OTHER_FONTS if name in installed)]


def _draw_scale(figure: Figure, weights: np.ndarray, norm: Normalize, width: float, height: float) -> None:
    axes = figure.add_axes((_MARGIN / width, 1 - 0.62 / height, 3.0 / width, 0.12 / height))
    beyond = "max" if np.nanmax(weights, initial=norm.vmax) > norm.vmax else "neither"
    bar = figure.colorbar(ScalarMappable(norm, _COLOURS), cax=axes, orientation="horizontal", extend=beyond)
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)
    grey = "" if np.isfinite(weights).all() else "; grey is no number"
    figure.text(
        (_MARGIN + 3.2) / width,
        1 - 0.56 / height,
        f"weight of a token{grey}; · is a space, ↵ a line break",
        fontsize="small",
        color="dimgray",
        va="center",
    )
