"""What hf_delta adds to a GRPO step: CPU time in its own functions, forward passes, collectives.

    python benchmarks/overhead.py

Time and forward passes: one process on the playground, TRL's trainer with `loss_type: dr_grpo`, and ours with
`loss_type: delta_l` alone and with both games of group DRO as well, under cProfile on processor time, which counts in our disfavour: it slows Python down and leaves kernels alone. Collectives:
two gloo processes, calls into `torch.distributed` during training, ours against TRL's.
"""

import argparse
import collections
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer
from hf_delta.playground import build_playground, playground_reward


TRAINERS = {
    "trl": (GRPOTrainer, GRPOConfig, {"loss_type": "dr_grpo"}),
    "hf_delta": (DeltaGRPOTrainer, DeltaGRPOConfig, {"loss_type": "delta_l"}),
    # The signal that has work in every micro-step.
    "everything": (
        DeltaGRPOTrainer,
        DeltaGRPOConfig,
        {
            "loss_type": "delta_l",
            "prompt_weighting": "prompt_gdro",
            "prompt_weighting_kwargs": {"signal": "loss"},
            "rollout_allocation": "rollout_gdro",
            "difficulty_kwargs": {"prior_column": "level"},
        },
    ),
}
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast", "barrier")


def build(name, playground, out, steps, rows):
    trainer_class, config_class, changes = TRAINERS[name]
    args = config_class(
        output_dir=str(out / name),
        max_steps=steps,
        per_device_train_batch_size=rows,
        num_generations=8,
        max_completion_length=54,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **changes,
    )
    model = AutoModelForCausalLM.from_pretrained(playground / "model")
    tokenizer = AutoTokenizer.from_pretrained(playground / "model")
    data = load_dataset(
        "json", data_files=str(playground / "train.jsonl"), split="train", cache_dir=str(out / "cache")
    )
    return trainer_class(model, playground_reward, args, data, processing_class=tokenizer)


def profiled(name, playground, out, steps):
    """Forward passes of a run, and CPU seconds by function of ours."""
    trainer = build(name, playground, out, steps, rows=64)
    forwards = collections.Counter()
    trainer.model.register_forward_hook(lambda *_: forwards.update(["model"]))
    profile = cProfile.Profile(time.process_time)
    profile.runcall(trainer.train)
    return forwards["model"], _own_seconds(pstats.Stats(profile).stats)


def _own_seconds(stats):
    """`(total, {function: seconds})`; what our functions call counts as theirs, except TRL's code behind `super()`."""
    cumulative, own = collections.Counter(), collections.Counter()
    for (file, _, function), (_, _, inside, total, _) in stats.items():
        # Functions of the same name elsewhere, `Trainer.train` above all, contain the same seconds again.
        if "/hf_delta/" in file:
            cumulative[function] += total
        if "/hf_delta/_compat/" in file:
            own[f"seams ({function})" if function != "dropout_off" else function] += inside
    seconds = {
        "before_rollouts (posterior, budget)": cumulative["before_rollouts"],
        "on_loss (surrogate losses)": cumulative["on_loss"],
        "on_rollouts (lengths, weights, checks)": cumulative["on_rollouts"],
        # A generator's frames end at `yield`, so this is entering and leaving, without the generation between them.
        "dropout_off": cumulative["dropout_off"],
        "reward check": cumulative["call"] - cumulative["playground_reward"],
        "seams": sum(s for f, s in own.items() if f.startswith("seams")),
    }
    return cumulative["train"], seconds


def timed(name, playground, out, steps):
    """The same without the profiler: processor seconds of the run, and inside the three hooks that have work in them."""
    trainer = build(name, playground, out, steps, rows=64)
    inside = collections.Counter()
    for hook in ("before_rollouts", "on_rollouts", "on_loss"):
        _time(trainer, hook, inside)
    start = time.process_time()
    trainer.train()
    return time.process_time() - start, inside


def _time(trainer, hook, inside):
    original = getattr(trainer, hook)

    def measured(*args):
        start = time.process_time()
        try:
            return original(*args)
        finally:
            inside[hook] += time.process_time() - start

    setattr(trainer, hook, measured)


def count_collectives(name, playground, out, steps):
    """Runs in each of two processes: calls into `torch.distributed` while training."""
    trainer = build(name, Path(playground), Path(out), steps, rows=32)
    calls = collections.Counter()
    for function in COLLECTIVES:
        _count(calls, function)
    trainer.train()
    return dict(calls), trainer.accelerator.num_processes


def _count(calls, function):
    original = getattr(dist, function)

    def counted(*args, **kwargs):
        calls[function] += 1
        return original(*args, **kwargs)

    setattr(dist, function, counted)


def launch_collectives(name, playground, out, steps):
    """One launch a trainer, so that wrapped functions of one do not reach the other."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29611", __file__,
               "--worker", name, "--playground", str(playground), "--out", str(out), "--steps", str(steps)]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = json.loads((out / f"{name}.json").read_text())
    assert found["num_processes"] == 2
    return found["calls"]


def report(playground, steps):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        forwards, ours = {}, {}
        for name in TRAINERS:
            forwards[name], ours[name] = profiled(name, playground, out, steps)
        plain = {name: timed(name, playground, out, steps) for name in list(TRAINERS)[1:]}
        collectives = {name: launch_collectives(name, playground, out, steps) for name in TRAINERS}
    for name in list(TRAINERS)[1:]:
        total, seconds = ours[name]
        print(f"\n{name}: {steps} steps of 64 rollouts; {total / steps * 1e3:.1f} ms a step under the profiler\n")
        print("| function of ours | ms a step | share of the step |\n|---|---|---|")
        for function, value in {**seconds, "all": sum(seconds.values())}.items():
            print(f"| {function} | {value / steps * 1e3:.3f} | {value / total:.2%} |")
    print("\nwithout the profiler:\n\n| | ms a step | in our hooks, ms | share |\n|---|---|---|---|")
    for name, (total, inside) in plain.items():
        own = sum(inside.values())
        print(f"| {name} | {total / steps * 1e3:.1f} | {own / steps * 1e3:.3f} | {own / total:.2%} |")
    print("\nforward passes a step: " + ", ".join(f"{name} {count / steps:.2f}" for name, count in forwards.items()))
    print("\n| calls a step, two processes | " + " | ".join(TRAINERS) + " |\n" + "|---" * (len(TRAINERS) + 1) + "|")
    for function in COLLECTIVES:
        counts = [collectives[name].get(function, 0) / steps for name in TRAINERS]
        if any(counts):
            print(f"| {function} | " + " | ".join(f"{count:.2f}" for count in counts) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--playground", type=Path, default=Path("runs/playground"))
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        calls, processes = count_collectives(args.worker, args.playground, args.out, args.steps)
        (args.out / f"{args.worker}.json").write_text(json.dumps({"calls": calls, "num_processes": processes}))
        return
    report(build_playground(args.playground), args.steps)


if __name__ == "__main__":
    main()
