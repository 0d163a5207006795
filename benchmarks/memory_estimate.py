"""The memory that a dry run promises, against the memory that training takes, on a CPU.

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 python benchmarks/memory_estimate.py --json memory_estimate.json

Each case is planned and then trained for two steps by the trainer that the recipe names, twice, in processes of their own:

- allocated: what torch allocates for tensors at the most, weights among it, by its profiler. The
  estimate is taken with the part of TRL's tile that is never written, which a CPU does not give and a GPU does;
- resident: what the process has resident at the most while it trains (`VmHWM`, set back before) beyond what it had before
  the model was loaded. Some 40 MiB of that are Python's and the data set's. The process is forked from one that has trained
  before, so that what is loaded at the first step is not counted.

Linux only; the variables make glibc give back what is freed.
"""

import argparse
import json
import os
import shutil
import tempfile
import traceback
from pathlib import Path

import torch
import yaml
from timing import peak_of
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hf_delta.data import load_train_rows
from hf_delta.plan.run import dry_run
from hf_delta.playground import build_playground
from hf_delta.recipe import load_recipe
from hf_delta.recipe.load import use_of_rows
from hf_delta.recipe.rewards import resolve_reward


MODELS = {
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 13, "num_attention_heads": 12},
    "270M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22, "num_attention_heads": 16},
}
SHARED = {"vocab_size": 24000, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True}
LORA = {"method": "lora", "r": 16, "target_modules": "all-linear"}
BONE = {"method": "bone", "r": 64, "target_modules": "all-linear"}
PLAYGROUND_BONE = {**BONE, "r": 16}

# Name: model, trainer, adapter, rows at a time, tokens of a row (of a completion, for grpo), other keys.
CASES = {
    "playground sft": ("playground", "sft", None, 32, 0, {}),
    "playground dpo lora": ("playground", "dpo", LORA, 32, 0, {}),
    "playground grpo": ("playground", "grpo", None, 64, 54, {}),
    "playground grpo bone": ("playground", "grpo", PLAYGROUND_BONE, 64, 54, {}),
    "100M sft": ("100M", "sft", None, 2, 128, {}),
    "100M sft, checkpointing": ("100M", "sft", None, 2, 256, {"gradient_checkpointing": True}),
    "100M sft, bf16, accumulating": ("100M", "sft", None, 2, 64, {"bf16": True, "gradient_accumulation_steps": 2}),
    "100M sft lora": ("100M", "sft", LORA, 2, 256, {}),
    "100M sft bone": ("100M", "sft", BONE, 2, 256, {}),
    "100M dpo": ("100M", "dpo", None, 1, 128, {}),
    "100M dpo lora, checkpointing": ("100M", "dpo", LORA, 1, 256, {"gradient_checkpointing": True}),
    "100M grpo": ("100M", "grpo", None, 8, 24, {"num_generations": 4}),
    "100M grpo lora": ("100M", "grpo", LORA, 8, 24, {"num_generations": 4}),
    "270M sft lora, checkpointing": ("270M", "sft", LORA, 1, 256, {"gradient_checkpointing": True}),
    "270M sft, bfloat16 weights": ("270M", "sft", None, 1, 32, {"dtype": "bfloat16", "bf16": True}),
}
WARMING = ["playground sft", "playground dpo lora", "playground grpo"]


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def build_models(folder, playground, names):
    """Random models with the playground's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(playground / "model")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    for name in names:
        out = folder / name
        if name == "playground" or out.exists():
            continue
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**MODELS[name], **SHARED, **special)).save_pretrained(out)
        tokenizer.save_pretrained(out)


def recipe_of(name, folder, playground, steps):
    """The recipe of a case, written to a file and read."""
    model, trainer, adapter, rows, tokens, more = CASES[name]
    keys = {
        "trainer": trainer,
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(playground / "model" if model == "playground" else folder / model),
        "train_file": str(_rows(folder, playground, model, trainer, tokens)),
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if trainer == "grpo":
        keys |= {"reward_funcs": ["memory_estimate.length"], "num_generations": 8, "max_completion_length": tokens}
        # Every completion as long as it may be, which is what the plan is for.
        keys["generation_kwargs"] = {"min_new_tokens": tokens}
    if adapter is not None:
        keys["peft_config"] = adapter
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys | more))
    return load_recipe(str(path))


def _rows(folder, playground, model, trainer, tokens):
    if model == "playground":
        return playground / {"sft": "sft.jsonl", "dpo": "preference.jsonl", "grpo": "train.jsonl"}[trainer]
    answer = "1" * (tokens - 9)
    columns = {
        "sft": {"completion": answer},
        "dpo": {"chosen": answer, "rejected": "2" * (tokens - 9)},
        "grpo": {"answer": "2"},
    }[trainer]
    path = folder / "rows.jsonl"
    path.write_text((json.dumps({"prompt": "1+1+1+1:", **columns}) + "\n") * 64)
    return path


def build_trainer(recipe, folder):
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


def measure(name, measured, folder, playground, steps):
    """Plan and train a case."""
    torch.set_num_threads(1)
    recipe = recipe_of(name, folder, playground, steps)
    plan = dry_run(recipe)
    found = plan.estimates["DDP"]
    return {
        "case": name,
        "parameters": plan.weights.all,
        "trained": plan.weights.trained,
        "rows": plan.batch.sequences,
        "tokens": plan.batch.tokens,
        "estimate": found.peak,
        "reserved": plan.step.head.reserved,
        "moment": found.moment,
        measured: MEASURES[measured](recipe, folder),
    }


def in_a_process(name, measured, folder, playground, steps):
    """[`measure`] in a forked process."""
    own = Path(tempfile.mkdtemp(dir=folder))
    for model in MODELS:
        if (folder / model).exists():
            (own / model).symlink_to(folder / model)
    child = os.fork()
    if child == 0:
        try:
            (own / "found.json").write_text(json.dumps(measure(name, measured, own, playground, steps)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit(f"{name} failed")
    found = json.loads((own / "found.json").read_text())
    shutil.rmtree(own)
    return found


def table(rows):
    lines = [
        "| case | parameters | rows x tokens | estimate, MiB | allocated, MiB | error | resident, MiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["case"], f"{row['parameters']:,}", f"{row['rows']} x {row['tokens']}", _mib(row["estimate"])]
        for measured in MEASURES:
            known = measured in row
            expected = row["estimate"] + row["reserved"] * (measured == "allocated")
            cells += [_mib(row[measured]), f"{expected / row[measured] - 1:+.0%}"] if known else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mib(number):
    return f"{number / 2**20:.0f}"


def run(names, measures, steps, playground, folder):
    build_models(folder, playground, {CASES[name][0] for name in names})
    warming = folder / "warming"
    warming.mkdir()
    for name in WARMING:
        measure(name, "resident", warming, playground, 2)
    rows = []
    for name in names:
        row = {}
        for measured in measures:
            row |= in_a_process(name, measured, folder, playground, steps)
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--playground", type=Path, default=Path("runs/playground"))
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args.cases, args.measures, args.steps, build_playground(args.playground), Path(folder))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
