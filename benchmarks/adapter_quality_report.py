"""Tables and picture of `adapter_quality.py`."""

import statistics


# Quantiles of Student's t for 1 to 9 degrees of freedom: of 95 % intervals, and of 99.5 % ones, which hold for ten
# comparisons at once (Bonferroni).
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
T_995 = (127.321, 14.089, 7.453, 5.598, 4.773, 4.317, 4.029, 3.833, 3.690)

TITLES = {
    "new": "Learning rate tuned for subtraction alone",
    "both": "Learning rate tuned for the mean of both",
    "equal": "Learning rate for 0.75 on subtraction (tuning seeds)",
}
COLOURS = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#8C564B", "#7F7F7F", "#BCBD22", "#E41A1C"
)  # fmt: skip
MARKERS = "osD^vPXphd*"


def interval(values, quantiles=T_95):
    """Mean and half of its interval, None where one value has none."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, None
    return mean, quantiles[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def results(content, method, goal):
    """New accuracy, lost old accuracy and mean of both accuracies of a method, seed by seed."""
    lr = content["chosen"][method][goal]
    seeds = content["final_seeds"]
    runs = {(r["method"], r["lr"], r["seed"]): r for r in content["runs"]}
    found = [runs[method, lr, seed] for seed in seeds]
    before = [content["bases"][str(seed)]["old"] for seed in seeds]
    return {
        "new": [run["new"] for run in found],
        "lost": [old - run["old"] for old, run in zip(before, found)],
        "both": [(run["new"] + run["old"]) / 2 for run in found],
    }


def markdown(content):
    methods = list(content["chosen"])
    parts = [_quality(content, methods, goal) for goal in TITLES]
    return "\n\n".join([*parts, _costs(content, methods)])


def _quality(content, methods, goal):
    lines = [
        f"{TITLES[goal]}:",
        "",
        "| | learning rate | subtraction | minus LoRA's | addition lost | minus LoRA's | mean of both | minus LoRA's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = results(content, "LoRA", goal)
    for method in methods:
        found = results(content, method, goal)
        cells = [f"{content['chosen'][method][goal]:.2g}"]
        for measure in ("new", "lost", "both"):
            cells.append(_spread(found[measure]))
            cells.append("" if method == "LoRA" else _difference(found[measure], reference[measure]))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values):
    mean, half = interval(values)
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def _difference(ours, theirs):
    """Mean paired difference with its 95 % interval; a star where that leaves 0 out, two where the 99.5 % one does."""
    differences = [a - b for a, b in zip(ours, theirs)]
    mean, half = interval(differences)
    if half is None:
        return f"{mean:+.3f}"
    stars = (abs(mean) > half) + (abs(mean) > interval(differences, T_995)[1])
    return f"{mean:+.3f} ± {half:.3f}" + (" " + r"\*" * stars if stars else "")


def _costs(content, methods):
    lines = [
        "| | trained parameters | file, bytes | optimizer state, bytes | step, ms | step / LoRA's (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    for name, cost in content["costs"].items():
        low, middle, high = cost["ratio"]
        sizes = [f"{cost[key]:,}" if key in cost else "" for key in ("parameters", "file_bytes", "optimizer_bytes")]
        lines.append(
            f"| {name} | {' | '.join(sizes)} | {cost['seconds'] * 1e3:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def draw(content, path):
    """Differences to LoRA with their paired intervals: what is learnt against what is lost, and against step time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12.5, 9), layout="constrained")
    for place, goal in zip(axes.flat, TITLES):
        _draw_trade(place, content, goal)
    _draw_cost(axes.flat[3], content)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=100)


def _styles(content):
    return {
        method: {
            "color": colour,
            "marker": marker,
            "label": method,
            "linewidth": 1,
            "markersize": 7,
            "linestyle": "none",
        }
        for method, colour, marker in zip(content["chosen"], COLOURS, MARKERS)
    }


def _relative(content, method, goal, measure):
    """Mean paired difference to LoRA and half of its interval; LoRA itself is at 0."""
    pairs = zip(results(content, method, goal)[measure], results(content, "LoRA", goal)[measure])
    return interval([ours - theirs for ours, theirs in pairs])


def _draw_trade(axes, content, goal):
    for method, style in _styles(content).items():
        (new, new_half), (lost, lost_half) = (_relative(content, method, goal, m) for m in ("new", "lost"))
        axes.errorbar(new, lost, xerr=new_half, yerr=lost_half, **style)
    for line in (axes.axhline, axes.axvline):
        line(0, color="grey", linewidth=0.8, zorder=0)
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("accuracy on subtraction minus LoRA's (new task)")
    axes.set_ylabel("accuracy lost on addition minus LoRA's (up: forgets less)")
    axes.set_title(TITLES[goal])


def _draw_cost(axes, content):
    for method, style in _styles(content).items():
        low, middle, high = content["costs"][method]["ratio"]
        new, half = _relative(content, method, "both", "new")
        axes.errorbar(middle, new, xerr=[[middle - low], [high - middle]], yerr=half, **style)
    axes.axhline(0, color="grey", linewidth=0.8, zorder=0)
    axes.axvline(1, color="grey", linewidth=0.8, zorder=0)
    axes.set_xlabel("CPU time of a training step / LoRA's (this model)")
    axes.set_ylabel("accuracy on subtraction minus LoRA's (new task)")
    axes.set_title("Step time; learning rate tuned for the mean of both")
