"""Tables and picture of what `gpu.py` measured."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path


SECTIONS = {"adapters": "Adapters", "token_kl": "Token KL", "grpo": "GRPO", "rollout": "Rollouts"}
COLUMNS = ("", "peak, MiB", "peak / peer", "ms", "time / peer", "tokens/s", "")
TIME, PEAK = "#0072B2", "#D55E00"
TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)


def markdown(report: dict) -> str:
    """One table a comparison, bytes first, under a head that says on what it ran; on a CPU every table says so."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict) -> Iterator[str]:
    settings, gpu = report["settings"], report["gpu"]
    yield f"# GPU benchmark: {gpu['name']}" if gpu else f"# {report['warning']}"
    versions = [f"{name} {version}" for name, version in report["versions"].items() if version]
    small = ", tiny sizes (`--quick`): no figures to quote" if settings["quick"] else ""
    yield f"\n{', '.join(versions)}; {settings['dtype']}{small}; at most {settings['rounds']} rounds; {report['seconds']:.0f} s in all."
    if gpu:
        yield f"{gpu['bytes'] / 2**30:.0f} GiB, compute capability {gpu['capability']}."
    for section, rows in groupby(report["rows"], lambda row: row["section"]):
        yield f"\n## {SECTIONS[section]}"
        for (what, peer), group in groupby(rows, lambda row: (row["what"], row["peer"])):
            yield f"\n{what}; the peer is: {peer}" + ("" if gpu else f" (**{report['warning']}**)")
            yield "\n" + _line(COLUMNS) + "\n" + "|---" * len(COLUMNS) + "|"
            for row in group:
                yield _line(_cells(row))


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: dict) -> list[str]:
    time, peak = row["time_ratio"], row["peak_bytes"]
    note = row["note"] if row["status"] == "measured" else f"**{row['status']}**: {row['reason']}".replace("|", "\\|")
    return [
        row["case"],
        "" if peak is None else f"{peak / 2**20:.2f}",
        "" if row["peak_ratio"] is None else f"{row['peak_ratio']:.3f}",
        "" if row["ms"] is None else f"{row['ms']:.2f}",
        "" if time is None else f"{time['median']:.3f} [{time['q25']:.3f}, {time['q75']:.3f}]",
        "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}",
        note,
    ]


def draw(report: dict, path: Path) -> None:
    """Ratios of time and of peaks to the peers, with the quartiles of time, one panel a section."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sections = groupby(report["rows"], lambda row: row["section"])
    panels = {section: _entries(list(rows)) for section, rows in sections}
    longest = max(map(len, panels.values()))
    size = (5.5 * len(panels), 1.5 + 0.22 * longest)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    gpu = report["gpu"]
    figure.suptitle(gpu["name"] if gpu else report["warning"], color="black" if gpu else "red", weight="bold")
    for panel, (section, entries) in zip(axes[0], panels.items()):
        _draw_section(panel, entries)
        panel.set_title(SECTIONS[section])
        panel.set_ylim(longest - 0.5, -0.5)
    marks = [figure.gca().plot([], [], shape, color=colour)[0] for shape, colour in (("o", TIME), ("D", PEAK))]
    figure.legend(marks, ["time / peer", "peak memory / peer"], loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _entries(rows: list[dict]) -> list[str | dict]:
    """The lines of a panel: what is compared, and below it all but the peer, unless it is that which is not there."""
    groups = groupby(rows, lambda row: (row["what"], row["peer"]))
    return [
        entry
        for (what, peer), group in groups
        for entry in (
            f"{what}; peer: {peer}",
            *(row for row in group if row["case"] != peer or row["status"] != "measured"),
        )
    ]


def _draw_section(axes, entries: list[str | dict]) -> None:
    places = {place: row for place, row in enumerate(entries) if isinstance(row, dict)}
    inside = axes.get_yaxis_transform()
    for place, what in enumerate(entries):
        if place not in places:
            axes.text(0.01, place, what, transform=inside, va="center", fontsize=6, style="italic")
    for place, row in places.items():
        if time := row["time_ratio"]:
            axes.plot([time["q25"], time["q75"]], [place, place], color=TIME, linewidth=4, alpha=0.35)
            axes.plot(time["median"], place, "o", color=TIME)
        if row["peak_ratio"]:
            axes.plot(row["peak_ratio"], place, "D", color=PEAK, markersize=4)
        if row["status"] != "measured":
            axes.text(0.5, place, row["status"], transform=inside, ha="center", va="center", color="grey")
    axes.set_yticks(list(places), [row["case"] for row in places.values()], fontsize=7)
    found = [r for row in places.values() for r in (row["peak_ratio"], (row["time_ratio"] or {}).get("median")) if r]
    low, high = min([0.8, *found]) / 1.2, max([1.25, *found]) * 1.2
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.axvline(1, color="grey", linewidth=0.8)
