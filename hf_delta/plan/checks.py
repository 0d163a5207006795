"""What cannot work, found without loading a model."""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from datasets import Dataset

from hf_delta.adapters.export.limits import check_weight_change, vllm_rank
from hf_delta.data import load_eval_rows, load_train_rows
from hf_delta.errors import InputError
from hf_delta.plan.steps import Batches
from hf_delta.preference.checks import check_contrast
from hf_delta.recipe import Recipe
from hf_delta.recipe.launch import Launch
from hf_delta.recipe.load import use_of_rows


INSTALL_DEEPSPEED = "pip install 'hf_delta[deepspeed]', or take another configuration of accelerate"


def check_launch(recipe: Recipe, launch: Launch) -> None:
    """
    Raises:
        `InputError`: the launch needs a package that is missing, or shards a model that must be whole.
    """
    if launch.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise InputError(f"{launch.source}: deepspeed is not installed: {INSTALL_DEEPSPEED}.")
    if launch.sharded and recipe.training.use_cpu:
        raise InputError(f"{launch.source}: {launch.strategy} is for GPUs, and the recipe says use_cpu: true.")


def check_rule(recipe: Recipe) -> None:
    """
    Raises:
        `InputError`: a model that token weights come from is not there.
    """
    if recipe.trainer == "dpo":
        check_contrast(recipe.training.build_rule())


def lora_rank(recipe: Recipe) -> int | None:
    """`max_lora_rank` of vLLM for what a run can be exported to; `None` where no rank says it.

    TRL sends vLLM merged weights, so that no rank is too large for training itself; a plain LoRA has to fit.

    Raises:
        `InputError`: `push_lora` is to write one and its rank is above vLLM's largest, or the method allows none.
    """
    if recipe.peft is None:
        return None
    asked = getattr(recipe.run, "push_lora", False)
    try:
        check_weight_change(recipe.peft)
        sizes = [getattr(recipe.peft, "r", None), *(getattr(recipe.peft, "rank_pattern", None) or {}).values()]
        known = [size for size in sizes if type(size) is int]
        return vllm_rank(max(known)) if known else None
    except InputError as error:
        if asked:
            raise InputError(f"{recipe.source}: push_lora: {error}") from error
        return None


def check_batches(recipe: Recipe, found: Batches) -> None:
    """
    Raises:
        `InputError`: there are fewer rows than one generation takes, so that an epoch would be empty.
    """
    needed = found.prompts_per_generation
    if needed is not None and found.rows is not None and found.rows < needed:
        raise InputError(
            f"{recipe.source}: the data has {found.rows} rows, and a generation batch takes {needed} prompts "
            f"({found.rollouts_per_generation} rollouts, num_generations {recipe.training.num_generations}): an epoch would "
            "be empty. Lower per_device_train_batch_size or steps_per_generation, or add rows."
        )


@contextmanager
def checked_rows(recipe: Recipe, rewards: list[Callable], judge: Callable | None) -> Iterator[Dataset | None]:
    """Context with the rows of local files, checked as for a run; `None` for a data set of the Hub. Leaves nothing behind.

    Raises:
        `InputError`: what [`~hf_delta.data.load_train_rows`] finds.
    """
    data, training = recipe.data, recipe.training
    with tempfile.TemporaryDirectory() as cache:
        if data.eval_file is not None:
            evaluates = training.eval_strategy != "no"
            uses = [use_of_rows(recipe.trainer, training)] * evaluates + ["evaluation"] * (judge is not None)
            load_eval_rows(data, uses, cache, [*(rewards if evaluates else []), *([judge] if judge else [])])
        if data.train_file is None:
            yield None
            return
        yield load_train_rows(data, use_of_rows(recipe.trainer, training), cache, rewards)
