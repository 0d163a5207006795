"""The model card: TRL's, with how to load this very result and what was measured."""

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import Trainer

from hf_delta.recipe import Recipe


def write_card(trainer: Trainer, recipe: Recipe, results: str | None = None) -> ModelCard:
    """Write `README.md` of the output directory, on the main process.

    Args:
        trainer (`Trainer`): A trainer of TRL, after training.
        recipe ([`Recipe`]): What was run.
        results (`str`, *optional*): Markdown of the evaluation before and after.
    """
    base = recipe.model.model_name_or_path
    trainer.create_model_card(model_name=recipe.output_dir.name, dataset_name=recipe.data.dataset_name)
    path = recipe.output_dir / "README.md"
    card = ModelCard.load(path)
    text = card.text.replace("[None](https://huggingface.co/None)", f"`{base}`")
    # TRL's example loads `hub_model_id`, which most runs do not have, and sends a chat to models that may have none.
    before, _, rest = text.partition("## Quick start")
    _, _, after = rest.partition("## Training procedure")
    sections = [before.rstrip(), how_to_load(recipe)]
    if results:
        sections.append(results.strip())
    card.text = "\n\n".join([*sections, f"## Training procedure\n{after}"])
    if recipe.peft is not None:
        card.data.library_name = "peft"
    card.save(path)
    return card


def how_to_load(recipe: Recipe) -> str:
    """The section of the card with code that loads the result, as an adapter or as a model."""
    name = recipe.training.hub_model_id or str(recipe.output_dir.resolve())
    if recipe.peft is None:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        load = f'model = AutoModelForCausalLM.from_pretrained("{name}")'
        note = ""
    else:
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        if is_own_method(recipe):
            imports = f"import hf_delta  # makes the method known to PEFT\n{imports}"
        load = f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")'
        note = f"\nThis is an adapter. Its base model is `{absolute(recipe.model.model_name_or_path)}`.\n"
        if is_own_method(recipe):
            note += (
                "Its method is not part of PEFT: without `import hf_delta`, loading it ends in "
                f"`KeyError: '{recipe.peft.peft_type.value}'`. "
                f"For tools that know plain LoRA only, such as vLLM:\n\n```\n"
                f"hf-delta export --adapter {name} --format lora --out lora\n```\n"
            )
    return (
        f"## How to load\n{note}\n```python\n{imports}\n\n{load}\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )


def is_own_method(recipe: Recipe) -> bool:
    """Whether an adapter is of a method that PEFT itself does not have."""
    return recipe.peft is not None and recipe.peft.peft_type.value.startswith("HFD_")


def absolute(model: str) -> str:
    """The absolute path of a model directory; the name of a model of the Hub as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
