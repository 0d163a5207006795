"""Bad checkpoints and output directories: cut off, damaged, of another method or format, or of somebody else."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from hf_delta.checkpoint import STATE_FILE, load_state, save_state
from tests.bad_inputs.case import Case, copied, recipe, run, slow
from tests.bad_inputs.data import link
from tests.bad_inputs.models import cut
from tests.bad_inputs.world import RUNS
from tests.running import LORA


LAST = "out/checkpoint-2"


def resumed(id, trainer, given, says, *changes, checkpoint=LAST, keys=None, flags=()):
    """A run resumed from `checkpoint`, or from the newest one, in which something was changed."""

    def change(path, world):
        for each in changes:
            each(path, world)

    content = recipe(
        trainer, **{"save_strategy": "steps", "save_steps": 1, **RUNS[trainer], "max_steps": 4, **(keys or {})}
    )
    return Case(
        f"{trainer}-resumed-{id}",
        f"{trainer}: {given}",
        ("run", "recipe.yaml", "--resume_from_checkpoint", checkpoint, *flags),
        says,
        {"recipe.yaml": content, "out": copied(f"{trainer}_run", change)},
    )


def inside(change, name="checkpoint-2"):
    """A change to one checkpoint of the run."""
    return lambda path, world: change(path / name, world)


def without(*names):
    def change(path, world):
        for name in names:
            (path / name).unlink()

    return inside(change)


def text(name, content):
    return lambda path, world: (path / name).write_text(content)


def state(**changes):
    """Keys of `trainer_state.json`, changed."""

    def change(path, world):
        file = path / "trainer_state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return inside(change)


def header(**changes):
    """The header of our state file, changed; `None` removes a key."""
    from safetensors import safe_open

    def change(path, world):
        with safe_open(path / STATE_FILE, "pt") as file:
            found = {**file.metadata(), **changes}
        save_file(
            load_file(path / STATE_FILE), path / STATE_FILE, metadata={k: v for k, v in found.items() if v is not None}
        )

    return inside(change)


def structure(edit):
    """What our state file says, changed, and saved as another version might: with the right checksum."""

    def change(path, world):
        content = load_state(path / STATE_FILE)
        edit(content)
        save_state(path / STATE_FILE, content)

    return inside(change)


def manifest(**changes):
    def change(path, world):
        content = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps({**content, **changes}))

    return change


def no_manifest(path, world):
    (path / "run.json").unlink()


def saved(name, content):
    """Another content of a file of torch."""
    return inside(lambda path, world: torch.save(content, path / name))


def swapped(path, world):
    shutil.copy(path / "scheduler.pt", path / "optimizer.pt")


def no_rows(path, world):
    file = path / "adapter_model.safetensors"
    save_file({name: tensor[:0].contiguous() for name, tensor in load_file(file).items()}, file)


def no_names(path, world):
    save_file({}, path / "adapter_model.safetensors")


def of_grpo(path, world):
    shutil.copy(world.grpo_run / "checkpoint-2" / STATE_FILE, path / "checkpoint-2")


def one_layer_less(path, world):
    content = load_file(path / "model.safetensors")
    del content[min(content)]
    save_file(content, path / "model.safetensors", metadata={"format": "pt"})


def thesis(path, world):
    path.mkdir()
    (path / "chapter-1").write_text("It was a dark and stormy night.")


RESUMING = [
    resumed(
        "checkpoint-that-is-not-there",
        "sft",
        "`resume_from_checkpoint: out/checkpoint-9`",
        "resume_from_checkpoint: out/checkpoint-9 does not exist; name a checkpoint-<step> of a run, or write true.",
        checkpoint="out/checkpoint-9",
    ),
    resumed(
        "checkpoint-that-is-a-file",
        "sft",
        "a file as checkpoint",
        "resume_from_checkpoint: out/run.json is no directory; name a checkpoint-<step> of a run, or write true.",
        checkpoint="out/run.json",
    ),
    resumed(
        "run-as-checkpoint",
        "sft",
        "the run instead of one of its checkpoints",
        "resume_from_checkpoint: out is a run; name a checkpoint-<step> in it, or write true.",
        checkpoint="out",
    ),
    resumed(
        "model-as-checkpoint",
        "sft",
        "a model as checkpoint",
        "resume_from_checkpoint: playground/model is no checkpoint; name a checkpoint-<step> of a run, or write true.",
        checkpoint="playground/model",
    ),
    resumed(
        "cut-weights",
        "sft",
        "weights that are cut off",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        inside(cut("adapter_model.safetensors", -5)),
    ),
    resumed(
        "cut-weights",
        "dpo",
        "weights that are cut off",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        inside(cut("model.safetensors", -5)),
    ),
    resumed(
        "no-weights",
        "sft",
        "no weights",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        without("adapter_model.safetensors"),
    ),
    resumed(
        "no-weights",
        "dpo",
        "no weights",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        without("model.safetensors"),
    ),
    resumed(
        "cut-optimizer",
        "sft",
        "`optimizer.pt` is cut off",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        inside(cut("optimizer.pt", -50)),
    ),
    resumed(
        "empty-scheduler",
        "dpo",
        "`scheduler.pt` of 0 bytes",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        inside(cut("scheduler.pt", 0)),
    ),
    resumed(
        "no-trainer-state",
        "sft",
        "no `trainer_state.json`",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        without("trainer_state.json"),
    ),
    resumed(
        "cut-trainer-state",
        "grpo",
        "`trainer_state.json` is cut off",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        inside(cut("trainer_state.json", -20)),
    ),
    resumed(
        "trainer-state-list",
        "sft",
        "`trainer_state.json` is a list",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        inside(text("trainer_state.json", "[]")),
    ),
    resumed(
        "trainer-state-empty",
        "sft",
        "`trainer_state.json` is `{}`",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        inside(text("trainer_state.json", "{}")),
    ),
    resumed(
        "step-as-text",
        "sft",
        "`global_step: two` in `trainer_state.json`",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        state(global_step="two"),
    ),
    resumed(
        "negative-step",
        "sft",
        "`global_step: -2` in `trainer_state.json`",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        state(global_step=-2),
    ),
    resumed(
        "unknown-field",
        "sft",
        "a field of a newer transformers in `trainer_state.json`",
        "out/checkpoint-2/trainer_state.json cannot be read (TrainerState.__init__() got an unexpected keyword argument 'quantum_state'): it is damaged, or of another transformers. Resume from an earlier checkpoint.",
        state(quantum_state=1),
    ),
    resumed(
        "optimizer-list",
        "sft",
        "a list as `optimizer.pt`",
        "out/checkpoint-2/optimizer.pt does not hold param_groups, state: it is damaged, or something else. Resume from an earlier checkpoint.",
        saved("optimizer.pt", [1]),
    ),
    resumed(
        "empty-optimizer",
        "sft",
        "an empty dict as `optimizer.pt`",
        "out/checkpoint-2/optimizer.pt does not hold param_groups, state: it is damaged, or something else. Resume from an earlier checkpoint.",
        saved("optimizer.pt", {}),
    ),
    resumed(
        "scheduler-list",
        "sft",
        "a list as `scheduler.pt`",
        "out/checkpoint-2/scheduler.pt does not hold last_epoch: it is damaged, or something else. Resume from an earlier checkpoint.",
        saved("scheduler.pt", [1]),
    ),
    resumed(
        "scheduler-as-optimizer",
        "sft",
        "`scheduler.pt` as `optimizer.pt`",
        "out/checkpoint-2/optimizer.pt does not hold param_groups, state: it is damaged, or something else. Resume from an earlier checkpoint.",
        inside(swapped),
    ),
    resumed(
        "random-state-list",
        "sft",
        "a list as `rng_state.pth`",
        "out/checkpoint-2/rng_state.pth does not hold cpu, numpy, python: it is damaged, or something else. Resume from an earlier checkpoint.",
        saved("rng_state.pth", [1]),
    ),
    resumed(
        "log-as-text",
        "sft",
        "`log_history: none` in `trainer_state.json`",
        "out/checkpoint-2/trainer_state.json cannot be read (log_history is 'none'): it is damaged, or of another transformers. Resume from an earlier checkpoint.",
        state(log_history="none"),
    ),
    resumed(
        "batch-as-text",
        "sft",
        "`train_batch_size: four` in `trainer_state.json`",
        "out/checkpoint-2/trainer_state.json cannot be read (train_batch_size is 'four'): it is damaged, or of another transformers. Resume from an earlier checkpoint.",
        state(train_batch_size="four"),
    ),
    resumed(
        "steps-as-text",
        "sft",
        "`max_steps: all` in `trainer_state.json`",
        "out/checkpoint-2/trainer_state.json cannot be read (max_steps is 'all'): it is damaged, or of another transformers. Resume from an earlier checkpoint.",
        state(max_steps="all"),
    ),
    resumed(
        "callbacks-as-text",
        "sft",
        "`stateful_callbacks: all` in `trainer_state.json`",
        "out/checkpoint-2/trainer_state.json cannot be read (All callbacks passed to be saved must inherit `ExportableState`, but received <class 'str'>): it is damaged, or of another transformers. Resume from an earlier checkpoint.",
        state(stateful_callbacks="all"),
    ),
    resumed(
        "no-rows-of-weights",
        "sft",
        "weights of no rows",
        "out/checkpoint-2/adapter_model.safetensors does not fit the model of this run: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight is [0, 256] there and [4, 256] here. Resume with the recipe that wrote it, or from an earlier checkpoint.",
        inside(no_rows),
    ),
    resumed(
        "no-names-of-weights",
        "sft",
        "weights of no names",
        "out/checkpoint-2/adapter_model.safetensors does not fit the model of this run: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight is not there. Resume with the recipe that wrote it, or from an earlier checkpoint.",
        inside(no_names),
    ),
    resumed(
        "state-of-another-trainer",
        "dpo",
        "our state file of a run of grpo",
        "out/checkpoint-2/hf_delta_state.safetensors belongs to another method (loss_type: 'delta_l' there, ['sigmoid'] here; feasible: None there, True here). Resume with the recipe that wrote it, or start a new run in another output_dir.",
        of_grpo,
    ),
    resumed(
        "no-state",
        "dpo",
        "no state file of ours",
        "out/checkpoint-2/hf_delta_state.safetensors is not there: the checkpoint was written by another loss. Resume with the recipe that wrote it, or start a new run in another output_dir.",
        without(STATE_FILE),
    ),
    resumed(
        "manifest-directory",
        "sft",
        "`run.json` is a directory",
        "out/run.json cannot be read (IsADirectoryError(21, 'Is a directory')): it is damaged. Start in another output_dir.",
        lambda path, world: ((path / "run.json").unlink(), (path / "run.json").mkdir()),
        checkpoint="true",
    ),
    resumed(
        "manifest-deep",
        "sft",
        "`run.json` is 100000 nested lists",
        "out/run.json cannot be read (…): it is damaged. Start in another output_dir.",
        text("run.json", "[" * 100000),
        checkpoint="true",
    ),
    resumed(
        "manifest-in-utf-16",
        "sft",
        "`run.json` in UTF-16",
        "out/run.json cannot be read (UnicodeDecodeError('utf-8', b'\\xff\\xfe{\\x00}\\x00', 0, 1, 'invalid start byte')): it is damaged. Start in another output_dir.",
        lambda path, world: (path / "run.json").write_bytes("{}".encode("utf-16")),
        checkpoint="true",
    ),
    resumed(
        "cut-state",
        "grpo",
        "our state file is cut off",
        "out/checkpoint-2/hf_delta_state.safetensors cannot be read (Error while deserializing header: invalid header length): it is cut short or damaged. Resume from an earlier checkpoint.",
        inside(cut(STATE_FILE, -7)),
    ),
    resumed(
        "cut-state",
        "dpo",
        "our state file is cut off",
        "out/checkpoint-2/hf_delta_state.safetensors cannot be read (Error while deserializing header: invalid header length): it is cut short or damaged. Resume from an earlier checkpoint.",
        inside(cut(STATE_FILE, 100)),
    ),
    resumed(
        "empty-state",
        "grpo",
        "our state file has 0 bytes",
        "out/checkpoint-2/hf_delta_state.safetensors cannot be read (Error while deserializing header: header too small): it is cut short or damaged. Resume from an earlier checkpoint.",
        inside(cut(STATE_FILE, 0)),
    ),
    resumed(
        "newer-state",
        "grpo",
        "our state file is in a newer format",
        "out/checkpoint-2/hf_delta_state.safetensors is in state format 2, and this hf_delta reads format 1: resume with the version of hf_delta that wrote it.",
        header(version="2"),
    ),
    resumed(
        "newer-state",
        "dpo",
        "our state file is in a newer format",
        "out/checkpoint-2/hf_delta_state.safetensors is in state format 2, and this hf_delta reads format 1: resume with the version of hf_delta that wrote it.",
        header(version="2"),
    ),
    resumed(
        "foreign-state",
        "grpo",
        "our state file is not ours",
        "out/checkpoint-2/hf_delta_state.safetensors is not a state file of hf_delta.",
        header(format="mine"),
    ),
    resumed(
        "state-without-structure",
        "grpo",
        "our state file without its structure",
        "out/checkpoint-2/hf_delta_state.safetensors cannot be read ('structure'): it is cut short or damaged. Resume from an earlier checkpoint.",
        header(structure=None),
    ),
    resumed(
        "state-of-no-json",
        "grpo",
        "the structure of our state file is no JSON",
        "out/checkpoint-2/hf_delta_state.safetensors is damaged: its checksum is another. Resume from an earlier checkpoint.",
        header(structure="{"),
    ),
    resumed(
        "state-list",
        "grpo",
        "our state file holds a list",
        "out/checkpoint-2/hf_delta_state.safetensors is damaged: its checksum is another. Resume from an earlier checkpoint.",
        header(structure="[]"),
    ),
    resumed(
        "state-without-method",
        "grpo",
        "our state file without `method`",
        "out/checkpoint-2/hf_delta_state.safetensors is damaged: it does not say which method it is of. Resume from an earlier checkpoint.",
        structure(lambda s: s.pop("method")),
    ),
    resumed(
        "state-without-layout",
        "grpo",
        "our state file without `layout`",
        "out/checkpoint-2/hf_delta_state.safetensors does not hold what this hf_delta reads (KeyError: 'layout'): it is damaged, or of another version. Resume from an earlier checkpoint.",
        structure(lambda s: s.pop("layout")),
    ),
    resumed(
        "state-without-generation",
        "grpo",
        "our state file without `generation`",
        "out/checkpoint-2/hf_delta_state.safetensors does not hold what this hf_delta reads (KeyError: 'generation'): it is damaged, or of another version. Resume from an earlier checkpoint.",
        structure(lambda s: s.pop("generation")),
    ),
    resumed(
        "state-without-multipliers",
        "dpo",
        "our state file without multipliers",
        "out/checkpoint-2/hf_delta_state.safetensors does not hold what this hf_delta reads (KeyError: 'layout'): it is damaged, or of another version. Resume from an earlier checkpoint.",
        structure(lambda s: [s.pop(k) for k in list(s) if k not in ("method", "settings", "hf_delta")]),
    ),
    resumed(
        "layout-of-text",
        "grpo",
        "`num_processes: two` in our state file",
        "out/checkpoint-2 was saved with rollouts still to be trained on, under num_processes two; this run has num_processes 1. Resume with the same values, or from a checkpoint at the end of a generation window.",
        structure(lambda s: s["layout"].update(num_processes="two")),
    ),
    resumed(
        "missing-rank",
        "grpo",
        "a checkpoint of two processes without the random state of the second",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        structure(lambda s: s["layout"].update(num_processes=2)),
        inside(lambda path, world: (path / "rng_state.pth").rename(path / "rng_state_0.pth")),
    ),
    resumed(
        "no-rollouts",
        "grpo",
        "no rollouts inside of a generation window",
        "out/checkpoint-2/hf_delta_rollouts_0.safetensors cannot be read (No such file or directory: out/checkpoint-2/hf_delta_rollouts_0.safetensors): it is cut short or damaged. Resume from an earlier checkpoint.",
        without("hf_delta_rollouts_0.safetensors"),
        checkpoint="out/checkpoint-2",
    ),
    resumed(
        "cut-rollouts",
        "grpo",
        "rollouts that are cut off",
        "resume_from_checkpoint: out/checkpoint-2 was not written to its end; take an earlier one.",
        inside(cut("hf_delta_rollouts_0.safetensors", -9)),
    ),
    resumed(
        "another-window",
        "grpo",
        "another batch inside of a generation window",
        "out/checkpoint-2 was saved with rollouts still to be trained on, under per_device_train_batch_size 4, rows_per_step 4, generation_batch_size 8; this run has per_device_train_batch_size 8, rows_per_step 8, generation_batch_size 16. Resume with the same values, or from a checkpoint at the end of a generation window.",
        keys={"per_device_train_batch_size": 8},
    ),
    resumed(
        "damaged-manifest",
        "sft",
        "`run.json` is no JSON",
        "out/run.json cannot be read (JSONDecodeError('Expecting property name enclosed in double quotes: line 1 column 2 (char 1)')): it is damaged. Start in another output_dir.",
        text("run.json", "{"),
        checkpoint="true",
    ),
    resumed(
        "manifest-without-method",
        "sft",
        "`run.json` without `method`",
        "out/run.json cannot be read (KeyError('method')): it is damaged. Start in another output_dir.",
        text("run.json", '{"format_version": 1}'),
        checkpoint="true",
    ),
    resumed(
        "newer-manifest",
        "sft",
        "`run.json` of a newer hf_delta",
        "out/run.json was written by another version of hf_delta, 9.0. Go on with that, or start in another output_dir.",
        manifest(format_version=2, hf_delta="9.0"),
        checkpoint="true",
    ),
    resumed(
        "manifest-of-no-format",
        "sft",
        "`run.json` is `[]`",
        "out/run.json cannot be read (TypeError('list indices must be integers or slices, not str')): it is damaged. Start in another output_dir.",
        text("run.json", "[]"),
    ),
]

OTHER_METHODS = [
    resumed(
        "another-learning-rate",
        "dpo",
        "another `learning_rate`",
        "out/checkpoint-2: its optimizer has learning_rate 1e-06, which it would keep, and this run has 1e-05. Write learning_rate: 1e-06, or start in another output_dir.",
        keys={"learning_rate": 1e-5},
    ),
    resumed(
        "another-optimizer",
        "dpo",
        "another `optim`",
        "out/checkpoint-2: its optimizer has optim 'adamw_torch', which it would keep, and this run has 'sgd'. Write optim: adamw_torch, or start in another output_dir.",
        keys={"optim": "sgd"},
    ),
    resumed(
        "optimizer-of-another-model",
        "sft",
        "an optimizer state with other parameters",
        "out/checkpoint-2: its optimizer does not fit the model of this run (…). Resume with the recipe that wrote it, or from an earlier checkpoint.",
    ),
    resumed(
        "another-rank",
        "sft",
        "an adapter of another rank",
        "out/run.json belongs to another method: peft_config.r is 4 there and 8 here. Resume with the recipe that wrote it, or start in another output_dir.",
        keys={"peft_config": {**LORA, "r": 8}},
    ),
    resumed(
        "another-adapter",
        "sft",
        "another adapter method",
        "out/run.json belongs to another method: peft_config.method is 'lora' there and 'miss' here. Resume with the recipe that wrote it, or start in another output_dir.",
        keys={"peft_config": {"method": "miss", "r": 4}},
        checkpoint="true",
    ),
    resumed(
        "no-adapter",
        "sft",
        "full fine-tuning of a run with an adapter",
        "out/run.json belongs to another method: peft_config.method is 'lora' there and None here. Resume with the recipe that wrote it, or start in another output_dir.",
        keys={"peft_config": None},
        checkpoint="true",
    ),
    resumed(
        "another-rank-without-manifest",
        "sft",
        "an adapter of another rank, and no `run.json`",
        "out/checkpoint-2/adapter_model.safetensors does not fit the model of this run: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight is [4, 256] there and [8, 256] here. Resume with the recipe that wrote it, or from an earlier checkpoint.",
        no_manifest,
        keys={"peft_config": {**LORA, "r": 8}},
    ),
    resumed(
        "adapter-without-manifest",
        "sft",
        "full fine-tuning of a run with an adapter, and no `run.json`",
        "out/checkpoint-2 holds the weights of an adapter, and this run trains a whole model. Resume with the recipe that wrote it, or start in another output_dir.",
        no_manifest,
        keys={"peft_config": None},
    ),
    resumed(
        "full-without-manifest",
        "dpo",
        "an adapter on a run without one, and no `run.json`",
        "out/checkpoint-2 holds the weights of a whole model, and this run trains an adapter. Resume with the recipe that wrote it, or start in another output_dir.",
        no_manifest,
        keys={"peft_config": LORA},
    ),
    resumed(
        "weights-that-lack-a-layer",
        "dpo",
        "weights that lack a layer",
        "out/checkpoint-2/model.safetensors does not fit the model of this run: lm_head.weight is not there. Resume with the recipe that wrote it, or from an earlier checkpoint.",
        inside(one_layer_less),
    ),
    resumed(
        "another-loss",
        "grpo",
        "another loss",
        "out/run.json belongs to another method: loss_type is 'delta_l' there and 'dapo' here. Resume with the recipe that wrote it, or start in another output_dir.",
        keys={"loss_type": "dapo"},
    ),
    resumed(
        "another-loss-without-manifest",
        "grpo",
        "another loss, and no `run.json`",
        "out/checkpoint-2/hf_delta_state.safetensors belongs to another method (loss_type: 'delta_l' there, 'dapo' here; advantage_transforms: ['hf_delta.rl.weights.delta_l.DeltaLWeights'] there, [] here). Resume with the recipe that wrote it, or start a new run in another output_dir.",
        no_manifest,
        keys={"loss_type": "dapo"},
    ),
    resumed(
        "gdro-without-manifest",
        "grpo",
        "group-DRO on a run without it, and no `run.json`",
        "out/checkpoint-2/hf_delta_state.safetensors belongs to another method (advantage_transforms: ['hf_delta.rl.weights.delta_l.DeltaLWeights'] there, ['hf_delta.rl.weights.delta_l.DeltaLWeights', 'hf_delta.rl.weights.prompt_gdro.PromptGDROWeights'] here; prompt_groups: None there, 'pass_rate' here). Resume with the recipe that wrote it, or start a new run in another output_dir.",
        no_manifest,
        keys={"prompt_weighting": "prompt_gdro"},
    ),
    resumed(
        "another-weighting",
        "grpo",
        "group-DRO on a run without it",
        "out/run.json belongs to another method: prompt_weighting is None there and 'prompt_gdro' here. Resume with the recipe that wrote it, or start in another output_dir.",
        keys={"prompt_weighting": "prompt_gdro"},
        checkpoint="true",
    ),
    resumed(
        "no-multipliers",
        "dpo",
        "`feasible: false` on a run with multipliers",
        "out/checkpoint-2/hf_delta_state.safetensors belongs to another method (feasible: True there, False here). Resume with the recipe that wrote it, or start a new run in another output_dir.",
        keys={"feasible": None, "feasible_kwargs": None},
    ),
    resumed(
        "another-trainer",
        "sft",
        "`trainer: dpo` on a run of sft",
        "out/run.json belongs to another method: trainer is 'sft' there and 'dpo' here. Resume with the recipe that wrote it, or start in another output_dir.",
        keys={"trainer": "dpo", "peft_config": LORA},
        checkpoint="true",
    ),
    resumed(
        "another-model",
        "sft",
        "another base model",
        "out/run.json belongs to another method: model_name_or_path is 'playground/model' there and 'gpt2' here. Resume with the recipe that wrote it, or start in another output_dir.",
        keys={"model_name_or_path": "gpt2"},
        checkpoint="true",
    ),
    resumed(
        "checkpoint-elsewhere",
        "sft",
        "a checkpoint of another run, and an `output_dir` that is not empty",
        "output_dir: mine is not empty, and out/checkpoint-2 lies elsewhere. Choose another output_dir.",
        lambda path, world: thesis(path.parent / "mine", world),
        flags=("--output_dir", "mine"),
    ),
    resumed(
        "steps-that-are-done",
        "sft",
        "a path that does not exist, and `max_steps` that are done",
        "resume_from_checkpoint: checkpoint-2 does not exist; name a checkpoint-<step> of a run, or write true.",
        checkpoint="checkpoint-2",
        keys={"max_steps": 2},
    ),
]

DIRECTORIES = [
    run(
        "output-is-a-file",
        "sft",
        {"output_dir": "recipe.yaml"},
        "output_dir: recipe.yaml cannot be written: recipe.yaml is no directory that you may write to.",
    ),
    run(
        "output-below-a-file",
        "sft",
        {"output_dir": "recipe.yaml/out"},
        "output_dir: recipe.yaml/out cannot be written: recipe.yaml is no directory that you may write to.",
    ),
    run(
        "output-is-not-empty",
        "sft",
        {},
        "output_dir: out is not empty, and what is in it is no run of hf_delta (chapter-1). Choose another output_dir.",
        given="`output_dir` holds something else",
        files={"out": thesis},
    ),
    run(
        "overwriting-what-is-no-run",
        "sft",
        {"overwrite_output_dir": True},
        "output_dir: out is not empty, and what is in it is no run of hf_delta (chapter-1). Choose another output_dir.",
        given="`output_dir` holds something else, and `overwrite_output_dir: true`",
        files={"out": thesis},
    ),
    run(
        "resuming-what-is-no-run",
        "sft",
        {"resume_from_checkpoint": True},
        "output_dir: out holds no run to resume (chapter-1). Choose another output_dir.",
        given="`output_dir` holds something else, and `resume_from_checkpoint: true`",
        files={"out": thesis},
    ),
    run(
        "output-holds-a-run",
        "sft",
        {},
        "output_dir: out holds another run. Go on with it: --resume. Keep it: --output_dir <another directory>. Delete it: --overwrite_output_dir true.",
        given="`output_dir` holds another run",
        files={"out": copied("sft_run")},
    ),
    run(
        "overwriting-with-bad-data",
        "sft",
        {"overwrite_output_dir": True, "train_file": "missing.jsonl"},
        "train_file: missing.jsonl does not exist.",
        given="bad data, and `overwrite_output_dir: true`: the old run stays",
        files={"out": copied("sft_run")},
    ),
    run(
        "overwriting-with-a-bad-model",
        "sft",
        {"overwrite_output_dir": True, "model_name_or_path": "missing"},
        "model_name_or_path: missing is no directory here and no model of the Hub (We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files).",
        given="a bad model, and `overwrite_output_dir: true`: the old run stays",
        files={"out": copied("sft_run")},
    ),
    run(
        "output-is-the-playground",
        "sft",
        {"output_dir": "playground"},
        "output_dir: playground is not empty, and what is in it is no run of hf_delta (eval.jsonl, lists.jsonl, model, …). Choose another output_dir.",
    ),
    run(
        "output-is-a-link-to-itself",
        "sft",
        {"output_dir": "loop"},
        "output_dir: loop cannot be written: it is a link to what is not there.",
        given="`output_dir` is a link to itself",
        files={"loop": link("loop")},
    ),
    run(
        "output-is-a-link-to-nowhere",
        "dpo",
        {"output_dir": "gone"},
        "output_dir: gone cannot be written: it is a link to what is not there.",
        given="`output_dir` is a link to what is not there",
        files={"gone": link("nowhere/at/all")},
    ),
    run(
        "output-below-a-link-to-itself",
        "grpo",
        {"output_dir": "loop/out"},
        "output_dir: loop/out cannot be written: loop is no directory that you may write to.",
        given="`output_dir` lies below a link to itself",
        files={"loop": link("loop")},
    ),
    run(
        "output-of-nobody",
        "sft",
        {"output_dir": "~nobody-here/out"},
        "output_dir: ~nobody-here/out cannot be written: there is no user 'nobody-here' here.",
    ),
    run(
        "output-long-name",
        "sft",
        {"output_dir": "a" * 300},
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…: the name of a file or directory is too long. Write a shorter one.",
        given="a name of 300 letters as `output_dir`",
    ),
    run(
        "output-nul",
        "sft",
        {"output_dir": "a\0b"},
        "recipe.yaml:4: 'a\\x00b' cannot be read as !!str (there is a NUL character in it, which neither names nor texts have).",
        given='`output_dir: "a\\0b"`',
    ),
    run(
        "playground-long-name",
        "sft",
        {"playground": "a" * 300},
        "…: the name of a file or directory is too long. Write a shorter one.",
        given="a name of 300 letters as `playground`",
    ),
    run(
        "resume-long-name",
        "sft",
        {"resume_from_checkpoint": "a" * 300},
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…: the name of a file or directory is too long. Write a shorter one.",
        given="a name of 300 letters as `resume_from_checkpoint`",
    ),
    run(
        "half-a-playground",
        "sft",
        {"playground": "half"},
        "half holds a half-written playground: it has no playground.json. Delete it, or build the playground elsewhere.",
        given="a playground that was written half",
        files={"half": copied("playground", lambda path, world: (path / "playground.json").unlink())},
    ),
    run(
        "playground-that-was-changed",
        "dpo",
        {"playground": "changed"},
        "changed/preference.jsonl is not the file that was built: it was changed or cut short. Delete it, or build the playground elsewhere.",
        given="a playground whose data was changed",
        files={"changed": copied("playground", lambda path, world: (path / "preference.jsonl").write_text("{}\n"))},
    ),
    run(
        "playground-of-somebody-else",
        "grpo",
        {"playground": "mine"},
        "mine holds something other than a playground: it has no playground.json. Delete it, or build the playground elsewhere.",
        given="`playground` holds something else",
        files={"mine": thesis},
    ),
    run(
        "playground-of-another-seed",
        "sft",
        {"playground_seed": 7},
        "playground holds a playground with seed 0, not 7. Delete it, or build the playground elsewhere.",
    ),
    run(
        "playground-of-another-task",
        "sft",
        {"playground_task": "faulty_table"},
        "playground holds a playground with task 'addition', not 'faulty_table'. Delete it, or build the playground elsewhere.",
    ),
]


def half_a_run(path, world):
    """One checkpoint that was not written to its end, and no `run.json`."""
    shutil.copytree(world.sft_run / "checkpoint-2", path / "checkpoint-2")
    (path / "checkpoint-2" / "trainer_state.json").unlink()


RESUMES = [
    *(
        run(
            "resume-of-what-is-no-run",
            trainer,
            {},
            "output_dir: out holds no run to resume (chapter-1). Choose another output_dir.",
            "--resume",
            given="`--resume`, and `output_dir` holds something else",
            files={"out": thesis},
        )
        for trainer in ("sft", "dpo", "grpo")
    ),
    run("resume-typo", "sft", {}, "--resum: unknown key 'resum'; did you mean 'resume'?", "--resum"),
    run(
        "resume-of-two",
        "sft",
        {},
        "--resume_from_checkpoint: resume_from_checkpoint must be true or false or text or null, got the list ['checkpoint-1', 'checkpoint-2'].",
        "--resume",
        "checkpoint-1",
        "checkpoint-2",
    ),
    run(
        "resume-by-number",
        "sft",
        {},
        "resume_from_checkpoint: 2 does not exist; name a checkpoint-<step> of a run, or write true.",
        "--resume",
        "2",
        given="`--resume 2`",
        files={"out": copied("sft_run")},
    ),
    run(
        "resume-of-the-playground",
        "sft",
        {},
        "resume_from_checkpoint: playground is no checkpoint; name a checkpoint-<step> of a run, or write true.",
        "--resume",
        "playground",
    ),
    run(
        "resume-of-a-file",
        "sft",
        {},
        "output_dir: out cannot be written: out is no directory that you may write to.",
        "--resume",
        given="`--resume`, and `output_dir` is a file",
        files={"out": "mine"},
    ),
    run(
        "resume-and-overwrite-flags",
        "sft",
        {},
        "resume_from_checkpoint and overwrite_output_dir exclude each other.",
        "--resume",
        "--overwrite_output_dir",
        given="`--resume --overwrite_output_dir`",
        files={"out": copied("sft_run")},
    ),
    run(
        "resume-false",
        "sft",
        {},
        "output_dir: out holds another run. Go on with it: --resume. Keep it: --output_dir <another directory>. Delete it: --overwrite_output_dir true.",
        "--resume",
        "false",
        given="`--resume false`, and `output_dir` holds a run",
        files={"out": copied("sft_run")},
    ),
    run(
        "resume-of-half-a-checkpoint",
        "sft",
        {},
        "output_dir: out holds no run to resume (checkpoint-2). Choose another output_dir.",
        "--resume",
        given="`--resume`, and `output_dir` holds half a checkpoint and no `run.json`",
        files={"out": half_a_run},
    ),
    run(
        "resume-of-a-finished-run-of-another-trainer",
        "dpo",
        {},
        "out/run.json belongs to another method: trainer is 'sft' there and 'dpo' here. Resume with the recipe that wrote it, or start in another output_dir.",
        "--resume",
        given="`--resume`, and `output_dir` holds a finished run of sft",
        files={"out": copied("finished_run")},
    ),
    run(
        "finished-run-again-with-other-keys",
        "sft",
        {"peft_config": LORA, "learning_rate": 0.5},
        "output_dir: out holds another run. Go on with it: --resume. Keep it: --output_dir <another directory>. Delete it: --overwrite_output_dir true.",
        given="the recipe of a finished run with another `learning_rate`",
        files={"out": copied("finished_run")},
    ),
]

# Those of DPO and GRPO take a run to resume from, and are tried in `test_dpo_resume.py` and `tests/rl/test_resume.py` too.
RESUMING = slow(RESUMING, but=[case.id for case in RESUMING if case.id.startswith("sft-")])
OTHER_METHODS = slow(OTHER_METHODS, but=[case.id for case in OTHER_METHODS if case.id.startswith("sft-")])
