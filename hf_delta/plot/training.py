"""Panels of curves: what a trainer logged over its steps."""

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from hf_delta.plot.history import History, together
from hf_delta.plot.panel import Panel
from hf_delta.plot.style import (
    BLUE,
    COLOURS,
    GREEN,
    ORANGE,
    VERMILION,
    draw_curve,
    legend_above,
    legend_outside,
    smooth,
    window,
)


# Keys that trainers log and that need no drawing of their own: title, y label, {key: label}.
_SIMPLE = (
    ("Preference accuracy", "share of pairs", {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"}),
    ("Preference margin", "implicit reward (nats)", {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/best": "best", "rewards/worst": "worst", "rewards/margins": "margin"}),
    ("Token weights", "mean over tokens", {"weights/reward_mean": "reward", "weights/kl_mean": "KL"}),
    ("Samples that keep the bound", "share of those seen", {"feasible/satisfied": "training", "eval_feasible/satisfied": "evaluation"}),
    ("Loss of samples", "before multipliers", {"feasible/loss_max": "largest", "feasible/loss_cvar": "worst tenth", "feasible/loss_mean": "mean"}),
    ("Token accuracy", "share of tokens", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "evaluation"}),
    ("Loss", "loss", {"loss": "training", "eval_loss": "evaluation"}),
    ("Entropy", "nats per token", {"entropy": "entropy"}),
    ("Divergence from the reference", "nats per token", {"kl": "KL"}),
    ("Divergence of completions", "nats per completion", {"kl/chosen": "chosen", "kl/rejected": "rejected"}),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}),
)  # fmt: skip


def training_panels(history: History) -> list[Panel]:
    """One panel for each kind of quantity that was logged."""
    panels = []
    if history.has("reward"):
        panels.append(Panel("Reward", "mean ± standard deviation", lambda axes: _draw_reward(axes, history)))
    if levels := history.keys("pass_rate/"):
        panels.append(
            Panel("Pass rate of training rollouts", "share correct", lambda axes: _draw_levels(axes, history, levels))
        )
    if history.has("completions/mean_length"):
        panels.append(Panel("Completion length", "tokens", lambda axes: _draw_length(axes, history)))
    if history.has("weights/mean"):
        panels.append(Panel("Sequence weights", "weight", lambda axes: _draw_weights(axes, history)))
    for title, ylabel, labels in _SIMPLE:
        if title == "Loss" and history.has("reward"):
            # On the policy that sampled, the loss of policy gradients is 0 up to rounding; only its gradient says anything.
            continue
        logged = {key: label for key, label in labels.items() if history.has(key)}
        if logged:
            panels.append(Panel(title, ylabel, lambda axes, logged=logged: _draw_simple(axes, history, logged)))
    return panels


def _draw_reward(axes: Axes, history: History) -> None:
    draw_curve(axes, *history.series("reward"), BLUE, "reward")
    steps, mean, std = together(history, "reward", "reward_std")
    if len(steps):
        width = window(len(steps))
        mean, std = smooth(mean, width), smooth(std, width)
        axes.fill_between(steps, mean - std, mean + std, color=BLUE, alpha=0.15, linewidth=0)


def _draw_levels(axes: Axes, history: History, keys: list[str]) -> None:
    for key, place in zip(keys, np.linspace(0, 0.9, len(keys))):
        draw_curve(axes, *history.series(key), colormaps["viridis"](place), key.removeprefix("pass_rate/"))
    axes.set_ylim(-0.03, 1.03)
    legend_outside(axes)


def _draw_length(axes: Axes, history: History) -> None:
    draw_curve(axes, *history.series("completions/mean_length"), BLUE, "mean")
    steps, low, high = together(history, "completions/min_length", "completions/max_length")
    if len(steps):
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.12, linewidth=0, label="min to max")
    handles, labels = axes.get_legend_handles_labels()
    steps, clipped = history.series("completions/clipped_ratio")
    if clipped.any():
        twin = axes.twinx()
        twin.plot(steps, smooth(clipped, window(len(steps))), color=VERMILION, linestyle="--", label="cut (right)")
        twin.set(ylabel="share cut at the limit", ylim=(0, 1))
        twin.spines[["top"]].set_visible(False)
        more = twin.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    legend_above(axes, handles, labels)


def _draw_weights(axes: Axes, history: History) -> None:
    steps, low, high = together(history, "weights/min", "weights/max")
    if len(steps):
        axes.fill_between(steps, low, high, color=ORANGE, alpha=0.2, linewidth=0, label="min to max")
    draw_curve(axes, *history.series("weights/mean"), BLUE, "mean")
    if history.has("weights/std"):
        draw_curve(axes, *history.series("weights/std"), GREEN, "std")
    legend_above(axes, *axes.get_legend_handles_labels())


def _draw_simple(axes: Axes, history: History, labels: dict[str, str]) -> None:
    for (key, label), colour in zip(labels.items(), COLOURS):
        draw_curve(axes, *history.series(key), colour, label)
    if len(labels) > 1:
        axes.legend(fontsize="small", framealpha=0.8)
