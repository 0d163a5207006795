"""The model that a recipe starts from: built if it is the playground's, and looked at before its weights are loaded."""

from pathlib import Path

from transformers import AutoConfig

from hf_delta.errors import InputError
from hf_delta.playground import build_playground
from hf_delta.recipe import Recipe
from hf_delta.recipe.peft import check_virtual_tokens
from hf_delta.run.console import announce
from hf_delta.run.extras import check_packages
from hf_delta.run.model import check_model_files
from hf_delta.run.processes import main_first, on_main


def ready_model(recipe: Recipe) -> None:
    """Collective: build the playground if there is to be one, and see that the model is there; loads no weights."""
    run = recipe.run
    if run.playground is not None:
        announce(f"Playground in {run.playground}: checking, or building if it is not there")
        on_main(_build_playground, recipe)
    main_first(_check_model, recipe)


def _check_model(recipe: Recipe) -> None:
    """
    Raises:
        `InputError`: there is no model of that name, or a package that it would be loaded with is missing.
    """
    check_packages(recipe)
    check_virtual_tokens(recipe.peft, recipe.source)
    name, model, training = recipe.model.model_name_or_path, recipe.model, recipe.training
    template = getattr(training, "chat_template_path", None)
    if template is not None and Path(template).suffix in (".jinja", ".j2") and not Path(template).is_file():
        raise InputError(f"{recipe.source}: chat_template_path: {template} does not exist.")
    trust = getattr(training, "trust_remote_code", False)
    try:
        config = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=trust)
    except Exception as error:
        # Besides what is missing, whatever a class of configurations trips over.
        where = "has no usable config.json" if Path(name).is_dir() else "is no directory here and no model of the Hub"
        raise InputError(f"model_name_or_path: {name} {where} ({_first_lines(error)}).") from error
    if Path(name).is_dir() and not trust:
        check_model_files(Path(name), config)


def _first_lines(error: Exception) -> str:
    """The first line, and the next if that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


def _build_playground(recipe: Recipe) -> None:
    run = recipe.run
    build_playground(
        run.playground,
        seed=run.playground_seed,
        task=run.playground_task,
        pretrain_steps=run.playground_pretrain_steps,
        progress=not recipe.training.disable_tqdm,
    )
