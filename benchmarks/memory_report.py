"""Table and picture of what `memory_estimate.py` measured."""

from pathlib import Path


# How far an estimate may be off.
TOLERANCE = 0.2
HEADER = (
    "| case | parameters | rows x tokens | estimate, MiB | allocated, MiB | error | resident, MiB | error |\n"
    "|---|---|---|---|---|---|---|---|"
)
COLOURS = {"allocated": "#0072B2", "resident": "#D55E00"}


def error(row: dict, measured: str) -> float:
    """Estimate over measurement, less 1; what a CPU allocates and never gives is part of the first."""
    return (row["estimate"] + row["reserved"] * (measured == "allocated")) / row[measured] - 1


def table(rows: list[dict]) -> str:
    """One line a case; errors beyond the tolerance have a star."""
    return "\n".join([HEADER, *map(_line, rows)])


def _line(row: dict) -> str:
    cells = [row["case"], f"{row['parameters']:,}", f"{row['rows']} x {row['tokens']}", _mib(row["estimate"])]
    for measured in COLOURS:
        if measured not in row:
            cells += ["", ""]
            continue
        off = error(row, measured)
        # Added to 0, a negative one is positive.
        cells += [_mib(row[measured]), f"{round(off, 2) + 0:+.0%}" + r" \*" * (abs(off) > TOLERANCE)]
    return "| " + " | ".join(cells) + " |"


def _mib(number: float) -> str:
    return f"{number / 2**20:.0f}"


def into_page(rows: list[dict], page: Path) -> None:
    """Put the table in the place of the one that a page has."""
    if not page.exists():
        return
    lines = page.read_text().splitlines()
    first = lines.index(HEADER.splitlines()[0])
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    page.write_text("\n".join([*lines[:first], *table(rows).splitlines(), *lines[last:]]) + "\n")


def draw(rows: list[dict], path: Path) -> None:
    """Errors of every case, and how far they may go."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.5), layout="constrained")
    axes.axvspan(-TOLERANCE, TOLERANCE, color="grey", alpha=0.15)
    axes.axvline(0, color="grey", linewidth=0.8)
    for measured, colour in COLOURS.items():
        known = [(place, error(row, measured)) for place, row in enumerate(rows) if measured in row]
        axes.plot([off for _, off in known], [place for place, _ in known], "o", color=colour, label=measured)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:+.0%}")
    axes.set_xlabel("estimate against measured peak")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
