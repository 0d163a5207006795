"""Do the parts of a run belong together? Asked before the first step."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import Trainer, TrainerState

from hf_delta.errors import InputError
from hf_delta.recipe.fields import suggest


NO_TEMPLATE = (
    "the rows are messages, and the tokenizer of the model has no chat template: write chat_template_path, or take rows of text "
    "and leave prompt_style out."
)

# Torch files of a checkpoint without sharding, and some of what is in each.
_STATES = {
    "optimizer.pt": {"state", "param_groups"},
    "scheduler.pt": {"last_epoch"},
    "rng_state*.pth": {"python", "numpy", "cpu"},
}
_ADAPTER, _MODEL, _SETTINGS = "adapter_model.safetensors", "model.safetensors", "adapter_config.json"


def check_vocabulary(trainer: Trainer, rows: Dataset) -> None:
    """
    Raises:
        `InputError`: the tokenizer, or a row of token ids, has tokens for which the model has no embedding.
    """
    tokenizer = trainer.processing_class
    embeddings = trainer.model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None) or getattr(embeddings, "weight", None)
    size = size if isinstance(size, int) or size is None else len(size)
    if not size or not hasattr(tokenizer, "get_vocab"):
        return
    last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last[1] >= size:
        raise InputError(
            f"model_name_or_path: the model has embeddings for {size} tokens, and its tokenizer gives {last[0]!r} the number "
            f"{last[1]}. Take the tokenizer of this model, or resize the embeddings (resize_token_embeddings) and save it."
        )
    if "input_ids" in rows.column_names:
        ids = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        largest = pc.max(pc.list_flatten(ids)).as_py()
        if largest is not None and largest >= size:
            raise InputError(
                f"input_ids: there is the token {largest} in the rows, and the model has {size} tokens: the rows were made with "
                "another tokenizer."
            )


def check_template(trainer: Trainer, rows: Dataset) -> None:
    """See that the prompt of the first row can be rendered, which some trainers do only when they generate.

    Raises:
        `InputError`: it is a list of messages, and the tokenizer has no chat template, or one that does not take it.
    """
    prompt = rows[0].get("prompt")
    if not isinstance(prompt, list) or not hasattr(trainer.processing_class, "apply_chat_template"):
        return
    if prompt[-1].get("role") == "assistant":
        # It is to be continued, and templates differ in how they take that.
        return
    if getattr(trainer.processing_class, "chat_template", None) is None:
        raise InputError(NO_TEMPLATE)
    try:
        text = trainer.processing_class.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise InputError(f"The chat template cannot render the prompt {prompt!r:.200}: {error}") from error
    if not text:
        raise InputError(f"The chat template makes an empty text of the prompt {prompt!r:.200}.")


def check_finite(trainer: Trainer) -> None:
    """
    Raises:
        `InputError`: a weight of the model is NaN or infinite; sharded ones are not looked at.
    """
    for name, parameter in trainer.model.named_parameters():
        # What is stored in one byte has no isfinite.
        if not parameter.is_floating_point() or parameter.element_size() == 1 or parameter.is_meta:
            continue
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"model_name_or_path: {name} holds NaN or infinite values: the file is broken, or its training diverged."
            )


def check_modules_to_save(trainer: Trainer) -> None:
    """
    Raises:
        `InputError`: `modules_to_save` names a module that is not there, which PEFT passes over.
    """
    if not isinstance(trainer.model, PeftModel):
        return
    there = {name.rpartition(".")[2] for name, _ in trainer.model.get_base_model().named_modules()}
    for name in getattr(trainer.model.active_peft_config, "modules_to_save", None) or ():
        if name.rpartition(".")[2] not in there:
            raise InputError(f"modules_to_save: the model has no module {name!r}{suggest(name, there, most=3)}")


def check_batches_are_full(trainer: Trainer, source: str) -> None:
    """
    Raises:
        `InputError`: incomplete batches are left out, as GRPO always does, and there is no complete one: nothing would be trained.
    """
    args, rows = trainer.args, len(trainer.train_dataset)
    if getattr(args, "generation_batch_size", None) is not None:
        prompts = args.generation_batch_size // args.num_generations
        if rows < prompts:
            raise InputError(
                f"{source}: the data has {rows} rows, and a generation batch takes {prompts} prompts: an epoch would be empty. Lower "
                "per_device_train_batch_size or steps_per_generation, or add rows."
            )
        return
    needed = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < needed:
        raise InputError(
            f"{source}: there are {rows} rows to train on, and a batch of all processes takes {needed}: with dataloader_drop_last "
            "nothing would be trained. Lower per_device_train_batch_size, or write dataloader_drop_last: false."
        )


def check_checkpoint(trainer: Trainer, checkpoint: str | Path) -> None:
    """See that the state and the weights of a checkpoint are those of this trainer. Sharded weights are not looked at.

    Raises:
        `InputError`: the state cannot be read, or names or shapes of the weights are others.
    """
    checkpoint = Path(checkpoint)
    state = checkpoint / "trainer_state.json"
    try:
        _check_state(TrainerState.load_from_json(str(state)))
    except (TypeError, ValueError, LookupError, OSError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{state} cannot be read ({error}): it is damaged, or of another transformers. Resume from an earlier checkpoint."
        ) from error
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    is_adapter = isinstance(trainer.model, PeftModel)
    file, other = (_ADAPTER, _MODEL) if is_adapter else (_MODEL, _ADAPTER)
    _check_states(checkpoint)
    if (checkpoint / file).is_file():
        _compare(checkpoint / file, _of_adapter(trainer.model) if is_adapter else _parameters(trainer.model))
        if is_adapter:
            _compare_settings(checkpoint / _SETTINGS, trainer.model)
    elif (checkpoint / other).is_file():
        there, here = ("a whole model", "an adapter")[:: 1 if is_adapter else -1]
        raise InputError(
            f"{checkpoint} holds the weights of {there}, and this run trains {here}. Resume with the recipe that wrote it, or "
            "start in another output_dir."
        )


def _check_state(state: TrainerState) -> None:
    """What transformers takes for granted."""
    for key, kind in (("log_history", list), ("train_batch_size", int), ("epoch", (int, float)), ("max_steps", int)):
        value = getattr(state, key)
        if not isinstance(value, kind):
            raise TypeError(f"{key} is {value!r:.40}")


def _check_states(checkpoint: Path) -> None:
    """Files of torch hold what they are called; those that only their own classes can read are left to these."""
    for pattern, keys in _STATES.items():
        for path in sorted(checkpoint.glob(pattern)):
            try:
                content = torch.load(path, map_location="meta", weights_only=True)
            except Exception:  # noqa: S112
                continue
            if not isinstance(content, dict) or not keys <= content.keys():
                raise InputError(
                    f"{path} does not hold {', '.join(sorted(keys))}: it is damaged, or something else. Resume from an earlier "
                    "checkpoint."
                )


def _compare(file: Path, tensors: dict[str, Any]) -> None:
    here, tied = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, defaultdict(set)
    for name, tensor in tensors.items():
        tied[id(tensor)].add(name)
    tied = {name: tied[id(tensor)] for name, tensor in tensors.items()}
    with safe_open(file, framework="pt") as content:
        there = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    differing = [name for name in there if name in here and there[name] != here[name]]
    # Tied weights are stored once; and where names are translated on loading, nothing can be said of those that are missing.
    missing = sorted(name for name in here.keys() - there.keys() if not tied[name] & there.keys())
    missing = missing if there.keys() <= here.keys() else []
    if not differing and not missing and here.keys() & there.keys():
        return
    if differing:
        name = differing[0]
        said = f"{name} is {list(there[name])} there and {list(here[name])} here"
    else:
        said = f"{(missing or sorted(here))[0]} is not there"
    raise InputError(
        f"{file} does not fit the model of this run: {said}. Resume with the recipe that wrote it, or from an earlier checkpoint."
    )


def _compare_settings(file: Path, model: PeftModel) -> None:
    """Numbers of an adapter that no shape shows, such as `lora_alpha`: one that was copied from elsewhere has no `run.json`."""
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        there["peft_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file} cannot be read ({error!r}): it is damaged. Resume from an earlier checkpoint."
        ) from error
    for key, value in model.active_peft_config.to_dict().items():
        # Of training the mode is another than of what is saved.
        compared = (
            key != "inference_mode"
            and isinstance(value, (bool, int, float))
            and isinstance(there.get(key), (bool, int, float))
        )
        if compared and there[key] != value:
            raise InputError(
                f"{file} does not fit the adapter of this run: {key} is {there[key]} there and {value} here. Resume with the recipe "
                "that wrote it, or start in another output_dir."
            )


def _parameters(model: nn.Module) -> dict[str, Any]:
    # Without buffers, of which some are not saved.
    return dict(model.named_parameters(remove_duplicate=False))


def _of_adapter(model: PeftModel) -> dict[str, Any]:
    return get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
