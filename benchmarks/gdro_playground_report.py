"""Figures, tables and picture of `gdro_playground.py`."""

import statistics

import numpy as np
from gdro_playground_settings import GENERATIONS, GRPO, MEASURES, PRIMARY, PROMPTS


# Quantiles of Student's t for 1 to 30 degrees of freedom, of 95 % and of 99 % intervals.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
T_99 = (
    63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169, 3.106, 3.055, 3.012, 2.977, 2.947,
    2.921, 2.898, 2.878, 2.861, 2.845, 2.831, 2.819, 2.807, 2.797, 2.787, 2.779, 2.771, 2.763, 2.756, 2.750,
)  # fmt: skip
BALANCING = "bin balancing"
BOTH = "both"
RESAMPLES = 2000
OVER_LEVELS = {"mean": statistics.mean, "lowest": min, "last": lambda values: values[-1]}
COLOURS = ("#000000", "#999999", "#0072B2", "#009E73", "#D55E00", "#CC79A7")


def scores(runs: list[dict], measure: str) -> list[float]:
    """A measure of the settings after the last step, run by run."""
    metric, over_levels = MEASURES[measure]
    # Levels stand from the easiest to the hardest.
    return [OVER_LEVELS[over_levels](list(run["final"][metric].values())) for run in runs]


def interval(values: list[float], quantiles=T_95) -> tuple[float, float | None]:
    """Mean and half of its interval, None where one value has none."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, None
    return mean, quantiles[min(len(values) - 2, len(quantiles) - 1)] * statistics.stdev(values) / len(values) ** 0.5


def summary(results: dict[str, list[dict]], bases: list[dict]) -> dict:
    """Everything the tables and the picture show, and the scores of every run."""
    curves = {arm: _curves(runs, bases) for arm, runs in results.items()}
    target = scores(results[GRPO], PRIMARY)
    references = [arm for arm in (GRPO, BALANCING) if arm in results]
    arms = {}
    for arm, runs in results.items():
        figures = {name: {"mean": interval(scores(runs, name))} for name in MEASURES}
        for name in MEASURES:
            for reference in references:
                if reference != arm:
                    pairs = zip(scores(runs, name), scores(results[reference], name))
                    differences = [ours - theirs for ours, theirs in pairs]
                    figures[name][f"minus {reference}"] = [*interval(differences), interval(differences, T_99)[1]]
        arms[arm] = {
            "keys": runs[0]["keys"],
            "measures": figures,
            "levels minus GRPO": _by_level(runs, results[GRPO]),
            "curve": [[int(rollouts), float(mean)] for rollouts, mean in zip(curves[arm][0], curves[arm][1].mean(0))],
            "rollouts to GRPO's final score": reached_with_interval(*curves[arm], np.array(target)),
            "silent prompts": _silent(runs),
            "cpu_seconds": statistics.mean(run["cpu_seconds"] for run in runs),
            "cpu_seconds_evaluating": statistics.mean(run["cpu_seconds_evaluating"] for run in runs),
            "curriculum": _mean_curriculum(runs),
            "runs": [{key: run[key] for key in ("seed", "final", "during", "cpu_seconds")} for run in runs],
        }
    base = {name: {"mean": interval(scores(bases, name))} for name in MEASURES}
    hardest = list(bases[0]["final"]["pass@1"])[-1]
    return {"seeds": [run["seed"] for run in bases], "hardest level": hardest, "base": base, "arms": arms}


def _by_level(runs, references):
    """pass@1 of each level minus that of other runs of the same seeds: mean and halves of 95 % and 99 % intervals."""
    found = {}
    for level in runs[0]["final"]["pass@1"]:
        ours, theirs = ([run["final"]["pass@1"][level] for run in side] for side in (runs, references))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        found[level] = [*interval(differences), interval(differences, T_99)[1]]
    return found


def _curves(runs, bases):
    """Rollouts `(P,)` at which there is a score, and the primary measure there, `(S, P)`."""
    steps = list(map(int, runs[0]["during"]))
    last = len(runs[0]["curriculum"]["rollouts"])
    rollouts = np.array([0, *steps, last]) * PROMPTS * GENERATIONS
    during = [[statistics.mean(e["pass@1"].values()) for e in run["during"].values()] for run in runs]
    ends = zip(scores(bases, PRIMARY), during, scores(runs, PRIMARY))
    return rollouts, np.array([[first, *middle, last] for first, middle, last in ends])


def reached(rollouts: np.ndarray, curve: np.ndarray, target: float) -> float:
    """Rollouts at which a curve, linear between its points, first reaches a score; infinite if it does not."""
    # GRPO reaches its own score, however its mean was rounded.
    above = np.flatnonzero(curve >= target - 1e-9)
    if not len(above):
        return float("inf")
    i = above[0]
    if i == 0:
        return float(rollouts[0])
    share = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(rollouts[i - 1] + share * (rollouts[i] - rollouts[i - 1]))


def reached_with_interval(rollouts: np.ndarray, curves: np.ndarray, target: np.ndarray) -> list[float | None]:
    """Rollouts at which the mean curve reaches the mean target, and its 95 % interval over resampled seeds; None: never.

    Args:
        rollouts (`(P,)`): where the curves have points.
        curves (`(S, P)`): a row for each seed.
        target (`(S,)`): the score to reach, seed by seed.
    """
    generator = np.random.default_rng(0)
    draws = generator.integers(len(curves), size=(RESAMPLES, len(curves)))
    found = [reached(rollouts, curves[draw].mean(0), target[draw].mean()) for draw in draws]
    # Not interpolated between order statistics, some of which may be infinite.
    low, high = np.quantile(found, [0.025, 0.975], method="inverted_cdf")
    values = (reached(rollouts, curves.mean(0), target.mean()), low, high)
    return [float(value) if np.isfinite(value) else None for value in values]


def _silent(runs):
    """Share of the prompts whose rollouts all got the same reward."""
    silent, prompts = (np.array([run["curriculum"][key] for run in runs]).sum() for key in ("silent", "prompts"))
    return float(silent / prompts)


def _mean_curriculum(runs):
    """Over seeds, by level and step: mean weight of a prompt, rollouts a prompt, and share of correct rollouts."""
    totals = {key: np.array([run["curriculum"][key] for run in runs], dtype=float) for key in ("prompts", "rollouts", "correct", "weight")}  # fmt: skip
    prompts, rollouts = totals["prompts"].sum(0), totals["rollouts"].sum(0)
    with np.errstate(invalid="ignore"):
        found = {
            "weight": np.nansum(totals["weight"] * totals["prompts"], 0) / prompts,
            "rollouts": rollouts / prompts,
            "pass rate": totals["correct"].sum(0) / rollouts,
        }
    levels = runs[0]["curriculum"]["levels"]
    return {"levels": levels} | {
        name: [[None if np.isnan(x) else round(float(x), 4) for x in level] for level in values.T]
        for name, values in found.items()
    }


def markdown(found: dict) -> str:
    names = list(MEASURES)
    tables = [_scores_table(found, pair) for pair in (names[:2], names[2:4], names[4:])]
    return "\n\n".join([*tables, _levels_table(found), _cost_table(found)])


def _scores_table(found, names):
    references = [f"minus {arm}" for arm in (GRPO, BALANCING) if arm in found["arms"]]
    titles = [name.replace("hardest level", found["hardest level"]) for name in names]
    head = [cell for title in titles for cell in (title, *references)]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for arm, figures in [("base model", {"measures": found["base"]}), *found["arms"].items()]:
        cells = []
        for name in names:
            measured = figures["measures"][name]
            cells.append(_number(measured["mean"]))
            cells += [_number(measured[r], sign="+") if r in measured else "" for r in references]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _levels_table(found):
    levels = list(found["arms"][GRPO]["levels minus GRPO"])
    lines = [f"| pass@1 minus GRPO | {' | '.join(levels)} |", "|---" * (len(levels) + 1) + "|"]
    for arm, figures in found["arms"].items():
        if arm != GRPO:
            cells = [_number(figure, sign="+") for figure in figures["levels minus GRPO"].values()]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(figure, sign=""):
    """Mean with half of its 95 % interval; a star where that leaves 0 out, two where the 99 % one does."""
    mean, half, *wider = figure
    if half is None:
        return f"{mean:{sign}.3f}"
    stars = (abs(mean) > half) + (abs(mean) > wider[0]) if wider else 0
    return f"{mean:{sign}.3f} ± {half:.3f}" + (" " + r"\*" * stars if stars else "")


def _cost_table(found):
    lines = [
        "| | rollouts to GRPO's final score | prompts without a signal | CPU seconds a run | of them evaluating |",
        "|---|---|---|---|---|",
    ]
    for arm, figures in found["arms"].items():
        last = figures["curve"][-1][0]
        point, low, high = (
            f"{value:.0f}" if value is not None else f"> {last:.0f}"
            for value in figures["rollouts to GRPO's final score"]
        )
        lines.append(
            f"| {arm} | {point} ({low} to {high}) | {figures['silent prompts']:.3f} | {figures['cpu_seconds']:.1f} | "
            f"{figures['cpu_seconds_evaluating']:.1f} |"
        )
    return "\n".join(lines)


def draw(found: dict, path) -> None:
    """Paired differences, curves, and what the arm with both games gave to each level at each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 10.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    forests = top.subplots(1, 4, sharey=True)
    for axes, name in zip(forests, list(MEASURES)):
        _draw_forest(axes, found, name)
    top.legend(*forests[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    left, right = bottom.subfigures(1, 2)
    _draw_curves(*left.subplots(2, 1, sharex=True, height_ratios=(2, 1)), found)
    curriculum = found["arms"][BOTH]["curriculum"]
    for axes, (key, neutral) in zip(right.subplots(2, 1), (("weight", 1.0), ("rollouts", float(GENERATIONS)))):
        _draw_heat(right, axes, curriculum, key, neutral)
    figure.savefig(path, dpi=100)


def _draw_forest(axes, found, name):
    arms = [arm for arm in found["arms"] if arm != GRPO]
    for reference, offset, style in ((GRPO, -0.12, "o"), (BALANCING, 0.12, "s")):
        for place, arm in enumerate(arms):
            difference = found["arms"][arm]["measures"][name].get(f"minus {reference}")
            if difference:
                mean, half, _ = difference
                axes.errorbar(
                    mean, place + offset, xerr=half, fmt=style, capsize=2.5, markersize=5,
                    color=COLOURS[0] if reference == GRPO else COLOURS[4],
                    label=f"minus {reference}, 95 % interval" if arm == arms[-1] else None,
                )  # fmt: skip
    axes.axvline(0, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(name if name.startswith("worst") else f"mean over levels, {name}", fontsize="medium")


def _draw_curves(above, below, found):
    theirs = np.array(found["arms"][GRPO]["curve"])[:, 1]
    for (arm, figures), colour in zip(found["arms"].items(), COLOURS):
        rollouts, means = zip(*figures["curve"])
        above.plot(rollouts, means, color=colour, marker="o", markersize=3, label=arm)
        below.plot(rollouts, np.array(means) - theirs, color=colour, marker="o", markersize=3)
    above.axhline(theirs[-1], color="grey", linewidth=0.8, linestyle="--", label="GRPO's final score")
    above.set(ylabel=f"held-out {PRIMARY}, mean over levels", title="Learning curves, mean over seeds")
    above.legend(frameon=False, loc="lower right")
    below.set(xlabel="rollouts", ylabel="minus GRPO")
    for axes in (above, below):
        axes.grid(alpha=0.25)


def _draw_heat(figure, axes, curriculum, key, neutral):
    values = np.array([[np.nan if x is None else x for x in level] for level in curriculum[key]])
    # As far below as above the neutral value, on a logarithmic scale, as colours go.
    logs = np.log2(values / neutral)
    limit = max(np.nanmax(np.abs(logs)), 0.1)
    image = axes.imshow(logs, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none")  # fmt: skip
    axes.set_yticks(range(len(curriculum["levels"])), curriculum["levels"])
    axes.set_xlabel("step")
    what = "weight of a prompt" if key == "weight" else "rollouts of a prompt"
    axes.set_title(f"{BOTH}: {what}, mean over seeds", fontsize="medium")
    bar = figure.colorbar(image, ax=axes)
    ticks = np.linspace(-limit, limit, 5)
    bar.set_ticks(ticks, labels=[f"{neutral * 2**tick:.2g}" for tick in ticks])
