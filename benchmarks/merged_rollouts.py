"""Merged rollouts: decoding steps, what entering and leaving costs, memory, and drift of the base weights.

    python benchmarks/merged_rollouts.py --out docs/rl

Decoding: a Llama with a cache of keys and values, batch 8, one token a step, float32, every linear layer of its blocks
adapted; CPU time of one thread in interleaved rounds, as ratios to the same model with its adapter merged for good.
Drift: the relative change of the frozen weights in bfloat16 after some transfers of weights, with an adapter that moves
between them: as TRL does it with `merge_adapter` and `unmerge_adapter`, and streamed with `merged_weights`.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import peft
import torch
from adapters_cases import FULL, QUICK
from models import Sizes, adapted, llama, switched, trained
from peft.tuners.tuners_utils import BaseTunerLayer
from timing import Case, inside, interleaved, peak_bytes, ratio, spread
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from hf_delta.adapters.dora import reuse_dora_norms
from hf_delta.adapters.stream import merged_weights
from hf_delta.rl.merged import merged_rollouts


COSTS = ("LoRA", "DoRA of PEFT", "fast DoRA", "Bone", "PMSS")
DRIFTING = (*COSTS, "MiSS of PEFT", "MiSS bat of PEFT")
SYNCS = (1, 10, 100)


# -- time and memory -----------------------------------------------------------------------------------------------------
def decoding(
    model: nn.Module, sizes: Sizes, method: str, around: Callable[[nn.Module], AbstractContextManager]
) -> Case:
    """Tokens one after the other, in the middle of one `generate`; `around` is entered before and left after them."""
    batch, vocabulary = sizes.decoded[0], sizes.llama[-1]
    prompt = torch.randint(vocabulary, (batch, 16))
    stack, state = ExitStack(), {}

    def before():
        for context in (switched(method), torch.no_grad(), reuse_dora_norms(), around(model)):
            stack.enter_context(context)
        state["cache"] = model(prompt, past_key_values=DynamicCache(config=model.config)).past_key_values

    return Case(lambda: model(prompt[:, :1], past_key_values=state["cache"]), before, stack.close, sizes.decode_steps)


def exchange(model: nn.Module, method: str) -> Case:
    """Entering and leaving a rollout."""

    def run():
        with merged_rollouts(model):
            pass

    return inside(Case(run), lambda: switched(method))


def costs(method: str, sizes: Sizes, rounds: int) -> dict[str, float | list[float]]:
    model = adapted(llama(sizes), method, sizes)
    with switched(method):
        merged = deepcopy(model).merge_and_unload()
    cases = {
        "unmerged": decoding(model, sizes, method, lambda _: nullcontext()),
        "merged_rollouts": decoding(model, sizes, method, merged_rollouts),
        "merged": decoding(merged, sizes, method, lambda _: nullcontext()),
        "exchange": exchange(model, method),
    }
    seconds = interleaved(cases, rounds, "cpu", passes=2)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    found = {
        name: [*vars(ratio(seconds, name, "merged")).values()] for name in ("unmerged", "merged_rollouts", "exchange")
    }
    saved = spread([slow - fast for slow, fast in zip(seconds["unmerged"], seconds["merged_rollouts"])]).median
    found["exchange_ms"] = 1e3 * spread(seconds["exchange"]).median
    found["step_ms"] = 1e3 * spread(seconds["merged"]).median
    found["pays_after"] = found["exchange_ms"] / (1e3 * saved) if saved > 0 else float("inf")
    found["adapted_bytes"] = sum(p.nbytes for layer in layers for p in layer.get_base_layer().parameters())
    found["kept_bytes"] = kept_bytes(model, method)
    found["peak_bytes"] = peak_bytes(cases["exchange"], "cpu")
    return found


def kept_bytes(model: nn.Module, method: str) -> int:
    """What parameters of the base take inside of a rollout, beyond what they take outside: originals are still there."""
    outside = {p.data_ptr(): p.nbytes for p in model.parameters()}
    with switched(method), merged_rollouts(model):
        inside = {p.data_ptr(): p.nbytes for p in model.parameters()}
    return sum(size for pointer, size in inside.items() if pointer not in outside)


# -- drift -----------------------------------------------------------------------------------------------------------
def drift(method: str, sizes: Sizes, transfer: Callable[[nn.Module], None]) -> dict[int, float]:
    """Largest relative change of a frozen weight, in the Frobenius norm, after so many transfers of weights."""
    with switched(method):
        model = adapted(llama(sizes).bfloat16(), method, sizes)
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        weights = [layer.get_base_layer().weight.float().clone() for layer in layers]
        found = {}
        for sync in range(1, max(SYNCS) + 1):
            trained(model)
            transfer(model)
            if sync in SYNCS:
                changes = [(layer.get_base_layer().weight.float() - w).norm() / w.norm() for layer, w in zip(layers, weights)]  # fmt: skip
                found[sync] = max(changes).item()
        return found


def in_place(model: nn.Module) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def streamed(model: nn.Module) -> None:
    for _ in merged_weights(model):
        pass


# -- report ------------------------------------------------------------------------------------------------------------
def with_quartiles(values: list[float]) -> str:
    median, q25, q75 = values
    return f"{median:.2f} [{q25:.2f}, {q75:.2f}]"


def report(measured: dict[str, dict], drifts: dict[str, dict]) -> str:
    lines = [
        "| | unmerged / merged | merged_rollouts / merged | in and out, ms | in decoding steps | pays after, steps | "
        "extra MiB | adapted weights, MiB | peak MiB |",
        "|---" * 9 + "|",
    ]
    for name, row in measured.items():
        extra, weights, peak = (f"{row[key] / 2**20:.1f}" for key in ("kept_bytes", "adapted_bytes", "peak_bytes"))
        lines.append(
            f"| {name} | {with_quartiles(row['unmerged'])} | {with_quartiles(row['merged_rollouts'])} "
            f"| {row['exchange_ms']:.0f} | {row['exchange'][0]:.1f} | {row['pays_after']:.0f} "
            f"| {extra} | {weights} | {peak} |"
        )
    lines += ["", "| drift after | " + " | ".join(f"{n}, TRL" for n in SYNCS) + f" | {SYNCS[-1]}, streamed |"]
    lines.append("|---" * (len(SYNCS) + 2) + "|")
    for name, row in drifts.items():
        values = " | ".join(f"{row['trl'][n]:.1e}" if row["trl"][n] else "0" for n in SYNCS)
        kept = row["kept"][SYNCS[-1]]
        lines.append(f"| {name} | {values} | {kept if kept else 0} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: does it run?")
    parser.add_argument("--out", type=Path, help="folder for merged_rollouts.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes, rounds = (QUICK, 1) if args.quick else (FULL, args.rounds)
    # Rounding does not depend on the depth.
    shallow = replace(sizes, llama=(1, *sizes.llama[1:]))
    measured = {name: costs(name, sizes, rounds) for name in tqdm(COSTS, desc="time")}
    drifts = {
        name: {"trl": drift(name, shallow, in_place), "kept": drift(name, shallow, streamed)}
        for name in tqdm(DRIFTING, desc="drift")
    }
    print(f"torch {torch.__version__}, peft {peft.__version__}, {rounds} rounds\n\n{report(measured, drifts)}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"costs": measured, "drift": drifts, "rounds": rounds}
        (args.out / "merged_rollouts.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
