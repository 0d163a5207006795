"""Table and picture of what `adapters.py` measured."""

from pathlib import Path


HEADER = "| what | adapter | measured | peer | target | met | bytes, pivots |\n|---|---|---|---|---|---|---|"
MET = {True: "yes", False: "no", None: ""}
COLOURS = {True: "#0072B2", False: "#D55E00", None: "#999999"}


def markdown(measured: list) -> str:
    """One line a row; quartiles where the number varies from round to round."""
    return "\n".join([HEADER, *map(_line, measured)])


def _line(found) -> str:
    row, value = found.row, found.value
    unit = " s" if row.kind == "seconds" else "x"
    number = f"{value.median:.3f}{unit}"
    if row.kind in ("time", "seconds"):
        number += f" [{value.q25:.3f}, {value.q75:.3f}]"
    target = "" if found.target is None else f"≤ {found.target:.2f}"
    if isinstance(row.target, str):
        target += f" ({row.target}'s)"
    return f"| {row.what} | {row.ours} | {number} | {row.peer} | {target} | {MET[found.met]} | {found.note} |"


def draw(measured: list, path: Path) -> None:
    """Ratios to the peers with their quartiles, and the targets, one panel for training and one for the rest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = [found for found in measured if found.row.kind != "seconds"]
    halves = (
        [found for found in ratios if found.row.what.startswith("train")],
        [found for found in ratios if not found.row.what.startswith("train")],
    )
    halves = [half for half in halves if half]
    figure, panels = plt.subplots(
        1, len(halves), figsize=(6.5 * len(halves), 5.2), layout="constrained", squeeze=False
    )
    for axes, half in zip(panels[0], halves):
        _draw_half(axes, half)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_half(axes, half: list) -> None:
    for place, found in enumerate(half):
        value, colour = found.value, COLOURS[found.met]
        axes.plot([value.q25, value.q75], [place, place], color=colour, linewidth=4, alpha=0.35)
        axes.plot(value.median, place, "o", color=colour)
        if found.target is not None:
            axes.plot(found.target, place, "|", color="black", markersize=14)
    axes.set_yticks(range(len(half)), [f"{f.row.ours}: {f.row.what}\n/ {f.row.peer}" for f in half], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    ticks = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    spans = [edge for f in half for edge in (f.value.q25, f.value.q75, f.target or f.value.median)]
    axes.set_xlim(min(spans) / 1.3, max(spans) * 1.3)
    axes.set_xlabel("ratio to the peer (bar: quartiles, black line: target)")
