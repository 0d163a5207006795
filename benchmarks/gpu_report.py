"""Tables and picture of what `gpu.py` measured."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path


SECTIONS = {"adapters": "Adapters", "token_kl": "Token KL", "grpo": "GRPO", "rollout": "Rollouts"}
COLUMNS = ("", "peak, MiB", "peak / peer", "ms", "time / peer", "tokens/s", "")
TIME, PEAK = "#0072B2", "#D55E00"


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

    compared = [row for row in report["rows"] if row["case"] != row["peer"]]
    panels = [list(rows) for _, rows in groupby(compared, lambda row: row["section"])]
    longest = max(map(len, panels), default=1)
    figure, axes = plt.subplots(
        1,
        max(len(panels), 1),
        figsize=(6.5 * max(len(panels), 1), 1.5 + 0.3 * longest),
        layout="constrained",
        squeeze=False,
    )
    gpu = report["gpu"]
    figure.suptitle(gpu["name"] if gpu else report["warning"], color="black" if gpu else "red", weight="bold")
    for panel, rows in zip(axes[0], panels):
        _draw_section(panel, rows)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_section(axes, rows: list[dict]) -> None:
    for place, row in enumerate(rows):
        if time := row["time_ratio"]:
            axes.plot([time["q25"], time["q75"]], [place, place], color=TIME, linewidth=4, alpha=0.35)
            axes.plot(time["median"], place, "o", color=TIME)
        if row["peak_ratio"]:
            axes.plot(row["peak_ratio"], place, "D", color=PEAK, markersize=4)
        if row["status"] != "measured":
            axes.text(
                0.5, place, row["status"], transform=axes.get_yaxis_transform(), ha="center", va="center", color="grey"
            )
    axes.set_title(SECTIONS[rows[0]["section"]])
    axes.set_yticks(range(len(rows)), [f"{row['case']}: {row['what'].split(',')[0]}" for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.plot([], [], "o", color=TIME, label="time / peer")
    axes.plot([], [], "D", color=PEAK, markersize=4, label="peak memory / peer")
    axes.legend(fontsize=8)
