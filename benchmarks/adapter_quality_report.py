"""Tables and picture of `adapter_quality.py`."""

import statistics


# Quantiles of Student's t for 1 to 9 degrees of freedom: of 95 % intervals, and of 99.5 % ones, which hold for ten
# comparisons at once (Bonferroni).
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
T_995 = (127.321, 14.089, 7.453, 5.598, 4.773, 4.317, 4.029, 3.833, 3.690)

TITLES = {"new": "Learning rate tuned for subtraction alone", "both": "Learning rate tuned for the mean of both"}
COLOURS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#CC79A7",
    "#0072B2",
    "#D55E00",
    "#8C564B",
    "#7F7F7F",
    "#BCBD22",
)


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.2), layout="constrained")
    colours = dict(zip(content["chosen"], COLOURS * 2))
    _draw_trade(left, content, colours)
    _draw_cost(right, content, colours)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130)


def _draw_trade(axes, content, colours):
    """Learnt against kept: a thin line through the tuned learning rates, points with intervals at the chosen ones."""
    for method, colour in colours.items():
        curve = _curve(content, method)
        axes.plot([new for new, _ in curve], [lost for _, lost in curve], color=colour, linewidth=0.8, alpha=0.5)
        for goal, marker in (("new", "s"), ("both", "o")):
            found = results(content, method, goal)
            (new, new_half), (lost, lost_half) = interval(found["new"]), interval(found["lost"])
            axes.errorbar(
                new, lost, xerr=new_half, yerr=lost_half, color=colour, marker=marker, markersize=6, linewidth=1.2,
                linestyle="none", label=method if goal == "both" else None,
            )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on subtraction, the new task")
    axes.set_ylabel("accuracy lost on addition, the old task (less is up)")
    axes.set_title(
        "Circles: tuned for both, squares: for the new task alone\nlines: other learning rates, tuning seeds"
    )


def _curve(content, method):
    """Mean new accuracy and mean loss of old accuracy at every learning rate that tuning tried, in their order."""
    by_lr = {}
    for run in content["runs"]:
        if run["method"] == method and run["seed"] in content["tuning_seeds"]:
            lost = content["bases"][str(run["seed"])]["old"] - run["old"]
            by_lr.setdefault(run["lr"], []).append((run["new"], lost))
    return [[statistics.mean(column) for column in zip(*by_lr[lr])] for lr in sorted(by_lr)]


def _draw_cost(axes, content, colours):
    for method, colour in colours.items():
        low, middle, high = content["costs"][method]["ratio"]
        for goal, marker in (("new", "s"), ("both", "o")):
            new, half = interval(results(content, method, goal)["new"])
            axes.errorbar(
                middle, new, xerr=[[middle - low], [high - middle]], yerr=half, color=colour, marker=marker,
                markersize=6, linewidth=1.2, linestyle="none",
            )  # fmt: skip
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("CPU time of a training step / LoRA's")
    axes.set_ylabel("accuracy on subtraction")
    axes.set_title("What a step costs in a model this small:\nmostly calls, hardly arithmetic")
