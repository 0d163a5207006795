"""Figures, tables and picture of `preference_playground.py`."""

import statistics

import preference_playground_settings as settings
from gdro_playground_report import interval


COLOURS = ("#000000", "#0072B2", "#D55E00")
TITLES = {
    "weights": "token weights",
    "weights_beta_2": "token weights, equal settings",
    "lists_4": "lists of 4",
    "lists_8": "lists of 8",
    "noise": "pairs with noise",
    "noise_fitted": "pairs with noise, fitted",
    "delta": "pairs of two weak models",
    "delta_weaker": "pairs of two weaker models",
}
WIDTH = 7  # most measures in a table


def value(run: dict, path: str) -> float:
    """What a run has under `one/two/three`; of values by level the mean."""
    for key in path.split("/"):
        run = run[key]
    return statistics.mean(run.values()) if isinstance(run, dict) else float(run)


def summary(study: str, results: dict[str, list[dict]], begun: list[dict]) -> dict:
    """Everything the tables and the picture show.

    Args:
        study: its name.
        results: runs of each arm, seed by seed.
        begun: what each seed began with, in the same order.
    """
    others = {settings.BASE: [run["base"] for run in begun]}
    if study.startswith("delta"):
        others |= {f"{name} teacher": [run[name] for run in begun] for name in settings.TEACHERS}
    content, measures = settings.STUDIES[study], settings.MEASURES[study]
    arms = {}
    for arm, runs in [*others.items(), *results.items()]:
        # Base models have answers only.
        own = {title: path for title, path in measures.items() if path.split("/")[0] in runs[0]}
        arms[arm] = {title: {"mean": interval([value(run, path) for run in runs])} for title, path in own.items()}
        for reference in content["references"]:
            theirs = others.get(reference) or results[reference]
            for title, path in own.items():
                if reference != arm and path.split("/")[0] in theirs[0]:
                    differences = [value(a, path) - value(b, path) for a, b in zip(runs, theirs, strict=True)]
                    arms[arm][title][f"minus {reference}"] = interval(differences)
    costs = {arm: {key: statistics.mean(run[key] for run in runs) for key in ("sequences", "cpu_seconds")} for arm, runs in results.items()}  # fmt: skip
    return {
        "arms": arms,
        "costs": costs,
        "masks": _masks(results, begun) if study.startswith("weights") else {},
        "runs": results,
    }


def _masks(results, begun):
    """By arm and term (`reward`, `kl`): means and halves of intervals of what masks tell, those that are learned before training
    too; and of a mask that knows where mistakes can be. Masks of ones tell nothing and are left out."""

    def figures(measured):
        return {title: interval([each[key] for each in measured]) for title, key in settings.MASK_MEASURES.items()}

    found = {"mask that knows the places of mistakes": figures([run["slots"] for run in begun])}
    for arm, runs in results.items():
        terms = list(runs[0].get("masks", ()))
        # One mask for both terms is shown once.
        same = len(terms) == 2 and all(run["masks"]["reward"] == run["masks"]["kl"] for run in runs)
        learned = any(run["masks"] != run["masks before"] for run in runs) if terms else False
        for term in terms[:1] if same else terms:
            for key in ("masks before", "masks") if learned else ("masks",):
                measured = [run[key][term] for run in runs]
                if any(each["auc"] != 0.5 for each in measured):
                    words = [arm, *([] if same else [term]), *(["before training"] if key == "masks before" else [])]
                    found[", ".join(words)] = figures(measured)
    return found


def markdown(study: str, found: dict) -> str:
    tables = [f"## {TITLES[study]}"]
    names = list(settings.MEASURES[study])
    for start in range(0, len(names), WIDTH):
        some = names[start : start + WIDTH]
        tables += [_comparison(found["arms"], some, key) for key in ("mean", *(f"minus {r}" for r in settings.STUDIES[study]["references"]))]  # fmt: skip
    if found["masks"]:
        rows = {name: [_cell(figure) for figure in figures.values()] for name, figures in found["masks"].items()}
        tables.append(table(["mask", *settings.MASK_MEASURES], rows))
    rows = {arm: [f"{costs['sequences']:.0f}", f"{costs['cpu_seconds']:.1f}"] for arm, costs in found["costs"].items()}
    tables.append(table(["", "sequences seen", "CPU seconds a run"], rows))
    return "\n\n".join(tables)


def _comparison(arms, names, key):
    """Table of measures under `mean` or `minus <reference>`, without arms that have none."""
    sign = "" if key == "mean" else "+"
    rows = {arm: [_cell(figures.get(name, {}).get(key), sign) for name in names] for arm, figures in arms.items()}
    head = "" if key == "mean" else key
    return table([head, *names], {arm: cells for arm, cells in rows.items() if any(cells)})


def table(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def _cell(figure, sign=""):
    """Mean with half of its 95 % interval; with a sign, a star where that leaves 0 out."""
    if figure is None:
        return ""
    mean, half = figure
    if half is None:
        return f"{mean:{sign}.3f}"
    return f"{mean:{sign}.3f} ± {half:.3f}" + (r" \*" if sign and abs(mean) > half else "")


def draw(found: dict, path) -> None:
    """Paired differences of every study, and what masks tell of the planted tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, 3, figsize=(17, 13), layout="constrained")
    for axes, study in zip(panels.flat, found):
        _draw_forest(axes, study, found[study])
    _draw_masks(panels.flat[-1], found["weights"]["masks"])
    figure.savefig(path, dpi=100)


def _draw_forest(axes, study, found):
    """Greedy pass@1 minus that of each reference."""
    (measure, *_), references = settings.MEASURES[study], settings.STUDIES[study]["references"]
    arms = list(found["arms"])
    for number, (reference, colour) in enumerate(zip(references, COLOURS)):
        label = f"minus {reference}"
        for place, arm in enumerate(arms):
            if figure := found["arms"][arm].get(measure, {}).get(f"minus {reference}"):
                axes.errorbar(
                    figure[0], place + 0.18 * (number - (len(references) - 1) / 2), xerr=figure[1], fmt="o", capsize=2.5,
                    markersize=4, color=colour, label=label,
                )  # fmt: skip
                label = None
    axes.axvline(0, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_title(TITLES[study], fontsize="medium")
    axes.set_xlabel(measure)
    _legend_below(axes)


def _draw_masks(axes, masks):
    names, titles = list(masks), list(settings.MASK_MEASURES)[:2]
    for title, offset, colour in zip(titles, (-0.12, 0.12), COLOURS[1:]):
        means, halves = zip(*(masks[name][title] for name in names))
        places = [place + offset for place in range(len(names))]
        errors = None if None in halves else halves
        axes.errorbar(means, places, xerr=errors, fmt="o", capsize=2.5, markersize=4, color=colour, label=title)
    axes.axvline(0.5, color="grey", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title("token weights: masks", fontsize="medium")
    axes.set_xlabel("AUC; 0.5 is chance")
    _legend_below(axes)


def _legend_below(axes):
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13))
