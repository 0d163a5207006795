"""What a plan rests on, and what it leaves out, in sentences."""

from hf_delta.plan.batch import MicroBatch
from hf_delta.plan.memory import Estimate
from hf_delta.recipe import Recipe
from hf_delta.recipe.launch import Launch


# What CUDA takes for itself, and how much of a GPU tensors can fill before fragmentation is in the way.
CUDA_BYTES, USABLE = 2**29, 0.9


def notes_on_data(recipe: Recipe, batch: MicroBatch, unbuilt: bool) -> list[str]:
    """What was not looked at.

    Args:
        unbuilt (`bool`): Whether the playground is not there yet.
    """
    notes = []
    if recipe.data.train_file is None:
        notes.append(f"{recipe.data.dataset_name} was not looked at: it is on the Hub. Its rows are not known here.")
    elif unbuilt:
        notes.append("The playground would be built first; tokens are the most that its rows can have.")
    if not batch.counted:
        taken = "rows are taken to be full"
        if recipe.trainer == "grpo":
            taken = f"prompts are taken to have {batch.prompt} tokens, completions to be full"
        notes.append(f"Rows or tokenizer are not here: {taken}.")
    return notes


def notes_on_memory(recipe: Recipe, launch: Launch, estimates: dict[str, Estimate], whole: bool) -> list[str]:
    """What comes on top of the table, and how large a GPU must be.

    Args:
        whole (`bool`): Whether the activations are those with the adapter.
    """
    notes = []
    if not whole:
        notes.append("Activations are those of the model without its adapter, whose layers need weights to run.")
    if recipe.trainer == "grpo" and recipe.training.use_vllm and recipe.peft is not None:
        notes.append("TRL sends vLLM merged weights: max_lora_rank does not limit the rank that is trained.")
    if recipe.training.use_cpu:
        return notes
    notes.append(_least(recipe, estimates[launch.strategy if launch.processes > 1 else "DDP"].peak))
    if launch.processes == 1:
        notes.append("For several GPUs, with and without sharding: --num_processes 8, or --accelerate_config fsdp2.")
    return notes


def _least(recipe: Recipe, peak: int) -> str:
    share = vllm_share(recipe)
    beside = "half a GiB of CUDA itself and a tenth for fragmentation"
    if share:
        beside = f"vLLM's {share:.0%}, {beside}"
    if share >= USABLE:
        return f"With {beside}, nothing is left for training: lower vllm_gpu_memory_utilization."
    return f"With {beside}, a GPU needs {(peak + CUDA_BYTES) / (USABLE - share) / 2**30:.3g} GiB."


def vllm_share(recipe: Recipe) -> float:
    """Part of each GPU that vLLM takes while the model trains."""
    training = recipe.training
    if recipe.trainer != "grpo" or not training.use_vllm or training.vllm_mode == "server":
        return 0.0
    # Asleep, it gives back nearly all of it.
    return 0.0 if training.vllm_enable_sleep_mode else training.vllm_gpu_memory_utilization
