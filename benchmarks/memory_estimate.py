"""The memory that a dry run promises, against the memory that training takes, on a CPU.

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 python benchmarks/memory_estimate.py --out docs

Each case is planned and then trained for two steps by the trainer that the recipe names, twice, in processes of their own:

- allocated: what torch allocates for tensors at the most, weights among it, by its profiler. The
  estimate is taken with the part of TRL's tile that is never written, which a CPU does not give and a GPU does;
- resident: what the process has resident at the most while it trains (`VmHWM`, set back before) beyond what it had before
  the model was loaded. The process has trained the same kind of run before, on the playground's model and then on the model of
  the case where that is the playground's, and has let it go: what Python, the data set and the libraries take is there
  already, and what is counted is what this training takes.

`--out` gets `memory_estimate.json` and `memory_estimate.png`, and the table in its `dry_run.md` is replaced; with `--only` the
other rows stay. Linux only; the variables make glibc give back what is freed.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from memory_cases import CASES, LORA, PLAYGROUND, Case, build_models, write_recipe
from memory_report import TOLERANCE, draw, into_page, table
from timing import peak_of
from torch.profiler import ProfilerActivity, profile

from hf_delta.adapters.dora import fast_dora
from hf_delta.data import load_train_rows
from hf_delta.plan.run import dry_run
from hf_delta.playground import build_playground
from hf_delta.recipe.load import use_of_rows
from hf_delta.recipe.rewards import resolve_reward


# Rows and completions of the training before, which is as short as it can be.
WARM = {"rows": 8, "tokens": 8}


def build_trainer(recipe, folder):
    """The trainer of a recipe, and what was resident before its model was there."""
    rewards = [resolve_reward(entry) for entry in recipe.run.reward_funcs or []]
    rows = load_train_rows(recipe.data, use_of_rows(recipe.trainer, recipe.training), folder / "cache", rewards)
    before = resident("VmRSS")
    recipe.training.model_init_kwargs = {"dtype": recipe.model.dtype}
    trainer = recipe.trainer_class(
        model=recipe.model.model_name_or_path,
        args=recipe.training,
        train_dataset=rows,
        peft_config=recipe.peft,
        **({"reward_funcs": rewards} if rewards else {}),
    )
    return trainer, before


def resident_bytes(recipe, folder):
    """Bytes resident at the most while a recipe trains, beyond those before its model was loaded."""
    trainer, before = build_trainer(recipe, folder)
    Path("/proc/self/clear_refs").write_text("5")
    trainer.train()
    return resident("VmHWM") - before


def allocated_bytes(recipe, folder):
    """Bytes allocated for tensors at the most while a recipe trains, weights among them."""
    trainer, _ = build_trainer(recipe, folder)
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    tensors = {tensor.data_ptr(): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    return sum(tensor.nbytes for tensor in tensors.values()) + peak_of(profiler)


MEASURES = {"allocated": allocated_bytes, "resident": resident_bytes}


def resident(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def let_go():
    """Give back to the system what nobody needs any more."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def warm_up(case: Case, folder, models, playground):
    """Train the same kind of run, and forget it."""
    small = replace(case, model=PLAYGROUND, **WARM)
    for other in [small, case] if case.model == PLAYGROUND else [small]:
        own = Path(tempfile.mkdtemp(dir=folder))
        resident_bytes(write_recipe(other, own, models, playground, 2), own)
        let_go()


def measure(name, measured, folder, models, playground, steps):
    """Plan and train a case."""
    torch.set_num_threads(1)
    case = CASES[name]
    recipe = write_recipe(case, folder, models, playground, steps)
    plan = dry_run(recipe)
    with fast_dora():
        if measured == "resident":
            warm_up(case, folder, models, playground)
        found = MEASURES[measured](recipe, folder)
    return {
        "case": name,
        "parameters": plan.weights.all,
        "rows": plan.batch.sequences,
        "tokens": plan.batch.tokens,
        "estimate": plan.estimates["DDP"].peak,
        "reserved": plan.step.head.reserved,
        "moment": plan.estimates["DDP"].moment,
        measured: found,
    }


def in_a_process(name, measured, models, playground, steps):
    """[`measure`] in a forked process."""
    own = Path(tempfile.mkdtemp(dir=models))
    child = os.fork()
    if child == 0:
        try:
            found = measure(name, measured, own, models, playground, steps)
            (own / "found.json").write_text(json.dumps(found))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit(f"{name} failed")
    found = json.loads((own / "found.json").read_text())
    shutil.rmtree(own)
    return found


def run(names, measures, steps, playground, folder):
    build_models(folder, playground, {CASES[name].model for name in names})
    # What every process would import and set up again.
    for trainer in ("sft", "dpo", "grpo"):
        warm_up(Case("", trainer, LORA, **WARM), folder, folder, playground)
    rows = []
    for name in names:
        row, began = {}, time.monotonic()
        for measured in measures:
            row |= in_a_process(name, measured, folder, playground, steps)
        rows.append(row)
        print(table([row]).splitlines()[-1], f"{time.monotonic() - began:.0f} s", flush=True)
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to measure")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--playground", type=Path, default=Path("runs/playground"))
    parser.add_argument("--pretrain-steps", type=int, help="of the playground; fewer are as good for memory")
    parser.add_argument(
        "--out", type=Path, help="folder for memory_estimate.json and .png, and of the page with the table"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    playground = build_playground(args.playground, pretrain_steps=args.pretrain_steps)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args.only, args.measures, args.steps, playground, Path(folder))
    print(
        f"torch {torch.__version__}, CPU, one thread, {args.steps} steps; * is beyond {TOLERANCE:.0%}\n\n{table(rows)}"
    )
    if args.out is not None:
        write(rows, args.out)


def write(rows, out):
    """Figures, picture and table; those of cases that were not measured now stay as they were."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "memory_estimate.json"
    known = json.loads(path.read_text()) if path.exists() else []
    found = {row["case"]: row for row in [*known, *rows]}
    rows = [found[name] for name in CASES if name in found]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, out / "memory_estimate.png")
    into_page(rows, out / "dry_run.md")


if __name__ == "__main__":
    main()
