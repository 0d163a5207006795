"""The command `hf-delta pairs`."""

import argparse
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from hf_delta.evaluation.rows import json_rows
from hf_delta.preference.pairs.build import Built, build_pairs, dropped_text
from hf_delta.recipe.rewards import columns_needed, resolve_reward


def pairs(arguments: argparse.Namespace) -> None:
    """Write the pairs, and say what was dropped and what the delta is.

    Raises:
        `InputError`: see [`build_pairs`], or there is no such reward function.
    """
    reward, needed = None, ()
    if arguments.reward is not None:
        reward = resolve_reward(arguments.reward, key="--reward")
        needed = _columns(reward, arguments.prompts)
    built = build_pairs(
        arguments.strong,
        arguments.weak,
        arguments.prompts,
        arguments.out,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        reward=reward,
        reward_columns=needed,
        student=arguments.student,
        device=arguments.device,
    )
    _report(built)
    if reward is None:
        Console(highlight=False, soft_wrap=True).print("Accuracy was not measured: no --reward.")


def _columns(reward: Callable, prompts: str) -> tuple[str, ...]:
    rows = json_rows(prompts, "The file of prompts")
    there = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    # Without any column there is something worse to say about the file.
    return tuple(columns_needed(reward, list(there))) if there else ()


def _report(built: Built) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(built.delta.table())
    console.print(f"{built.pairs} pairs of {built.prompts} prompts; dropped: {dropped_text(built.dropped)}.")
    for warning in built.delta.warnings():
        console.print(f"[bold]warning:[/bold] {escape(warning)}")
    console.print(f"Pairs in {built.path}, provenance in {built.provenance}")
