"""The model card: how to load this very result, what it was trained on, what was measured, and with which versions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_delta import __version__, private
from hf_delta.run.papers import papers_of_adapter
from hf_delta.run.paths import is_local
from hf_delta.run.result import Result


TRAINED_BY = {
    "sft": "supervised fine-tuning (`DeltaSFTTrainer`)",
    "dpo": "DPO (`DeltaDPOTrainer`)",
    "grpo": "GRPO (`DeltaGRPOTrainer`)",
}
# Keys that say where and how something ran, not what.
_NOT_THE_METHOD = (
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "push_to_hub",
    "push_lora",
    "disable_tqdm",
)


@dataclass(frozen=True)
class Names:
    """What a card calls things.

    Attributes:
        result (`str`): What to load: a directory, or an id of the Hub.
        base (`str`, *optional*): The base model, likewise.
        values (`dict`): The recipe's keys, as they may be shown.
        lora_error (`float`, *optional*): Largest relative error of the LoRA copy in `lora/`; absent without one.
        picture (`bool`, *optional*, defaults to `False`): Whether `curves.png` lies beside the card.
        revision (`str`, *optional*): Revision of the base model on the Hub.
        dataset (`str`, *optional*): Id of the data on the Hub.
    """

    result: str
    base: str | None
    values: dict[str, Any]
    lora_error: float | None = None
    picture: bool = False
    revision: str | None = None
    dataset: str | None = None


def write_card(result: Result) -> Path:
    """Write `README.md` of a directory, for whoever finds it there."""
    path = result.folder / "README.md"
    local_card(result).save(path)
    return path


def local_card(result: Result, folder: str | None = None) -> ModelCard:
    """The card of a result as it lies on a disk: where it is, or in the directory where it was trained."""
    base = None if result.base is None else absolute(result.base)
    name = folder or str(result.folder.resolve())
    # It may be edited, and pushed as it is then.
    values = private.without_secrets(result.values)
    return card_of(result, Names(name, base, values, revision=revision_of(result), dataset=result.dataset))


def revision_of(result: Result) -> str | None:
    """Revision of the base model; `None` for one that is a directory here."""
    return result.values.get("model_revision") or (None if result.base_is_local else "main")


def card_of(result: Result, names: Names) -> ModelCard:
    """The card of a result under the names that it has for its reader."""
    title = Path(names.result).name
    sections = [
        f"# {title}\n\n{_summary(result, names)}",
        how_to_load(result, names),
        result.report or _no_report(result),
        *(["![Curves of the training](curves.png)"] if names.picture else []),
        f"## Training\n\n{_training(result, names)}",
    ]
    card = ModelCard(f"---\n{_metadata(result, names, title).to_yaml()}\n---\n")
    card.text = "\n" + "\n\n".join(sections) + "\n"
    return card


def _metadata(result: Result, names: Names, title: str) -> ModelCardData:
    values = result.values
    tags = ["hf_delta", "trl" if values else None, values.get("trainer"), *_method_tags(result)]
    has_base = names.base is not None and not is_local(names.base)
    return ModelCardData(
        base_model=names.base if has_base else None,
        base_model_relation=("adapter" if result.adapter else "finetune") if has_base else None,
        datasets=[names.dataset] if names.dataset else None,
        library_name="peft" if result.adapter else "transformers",
        model_name=title,
        pipeline_tag="text-generation",
        tags=[tag for tag in dict.fromkeys(tags) if tag],
    )


def _method_tags(result: Result) -> list[str]:
    kind = (result.kind or "").removeprefix("HFD_").lower()
    found = [kind, result.manifest.get("method", {}).get("loss_type")]
    found += [result.values.get(key) for key in ("prompt_weighting", "rollout_allocation")]
    return [tag for tag in found if isinstance(tag, str) and tag]


def _summary(result: Result, names: Names) -> str:
    what = f"A {_method(result)} adapter" if result.adapter else "A model"
    if (trained := _exported_from(result)) is not None:
        what = f"A plain LoRA copy of a {trained.upper()} adapter"
    base = "" if names.base is None else f" of {_linked(names.base)}"
    how = TRAINED_BY.get(result.values.get("trainer"), "")
    return f"{what}{base}{', trained by ' + how if how else ''}, made with hf_delta {_version(result)}."


def _method(result: Result) -> str:
    kind = str(result.kind).removeprefix("HFD_")
    return "DoRA" if kind == "LORA" and result.adapter.get("use_dora") else kind


def _exported_from(result: Result) -> str | None:
    """The method that was trained, if this LoRA is a copy of another adapter."""
    trained = str((result.values.get("peft_config") or {}).get("method", "lora")).lower()
    return trained if result.kind == "LORA" and trained not in ("lora", "dora") else None


def _linked(name: str) -> str:
    return f"`{name}`" if is_local(name) else f"[{name}](https://huggingface.co/{name})"


def how_to_load(result: Result, names: Names) -> str:
    """The section of the card with the code that loads the result."""
    if result.adapter is None:
        imports, cls = ["from transformers import AutoModelForCausalLM"], "AutoModelForCausalLM"
    else:
        imports, cls = ["from peft import AutoPeftModelForCausalLM"], "AutoPeftModelForCausalLM"
        if result.needs_import:
            imports.insert(0, "import hf_delta  # makes the method known to PEFT")
    load = [f'model = {cls}.from_pretrained("{names.result}")']
    if (result.folder / "tokenizer_config.json").is_file():
        imports.append("from transformers import AutoTokenizer")
        load.append(f'tokenizer = AutoTokenizer.from_pretrained("{names.result}")')
    code = "\n".join([*imports, "", *load])
    if result.adapter is None:
        return f"## How to load\n\n```python\n{code}\n```"
    note = f"This is an adapter. Its base model is {_linked(names.base)}." if names.base else "This is an adapter."
    parts = [f"## How to load\n\n{note}", f"```python\n{code}\n```"]
    if result.needs_import:
        parts.append(
            "Its method is not part of PEFT: without `import hf_delta`, loading it ends in "
            f"`KeyError: '{result.kind}'`.{_as_lora(names)}"
        )
    elif names.lora_error is not None:
        parts.append(_as_lora(names).lstrip())
    return "\n\n".join(parts)


def _as_lora(names: Names) -> str:
    """How to have the adapter where only plain LoRA is known."""
    if names.lora_error is not None:
        exact = (
            "exact" if names.lora_error == 0 else f"nearly so: it leaves out up to {names.lora_error:.2e} of a change"
        )
        return (
            f" The folder `lora/` holds it as a plain LoRA ({exact}), which PEFT and vLLM load without hf_delta:\n\n```python\n"
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{names.base}")\n'
            f'model = PeftModel.from_pretrained(base, "{names.result}", subfolder="lora")\n```'
        )
    local = is_local(names.result)
    first = "" if local else f"hf download {names.result} --local-dir adapter\n"
    return (
        " For tools that know plain LoRA only, such as vLLM:\n\n```\n"
        f"{first}hf-delta export --adapter {names.result if local else 'adapter'} --format lora --out lora\n```"
    )


def _no_report(result: Result) -> str:
    missing = "without `evaluate_pass_at`" if result.values else "none is recorded"
    return f"## Evaluation\n\nNo evaluation before and after training: {missing}."


def _training(result: Result, names: Names) -> str:
    papers = [tuple(paper) for paper in result.manifest.get("papers", [])] + papers_of_adapter(result.adapter)
    if (trained := _exported_from(result)) is not None:
        papers += papers_of_adapter({"peft_type": f"HFD_{trained.upper()}"})
    linked = [
        f"[{title}](https://huggingface.co/papers/{number}) (arXiv:{number})"
        for title, number in dict.fromkeys(papers)
    ]
    rows = [
        ("Method", _methods(result)),
        ("Papers" if len(linked) > 1 else "Paper", "; ".join(linked)),
        ("Base model", _base(result, names)),
        ("Data", _data(names)),
        ("Optimizer steps", "" if result.steps is None else str(result.steps)),
        ("Versions", _versions(result)),
    ]
    table = "| | |\n|---|---|\n" + "\n".join(f"| {name} | {said} |" for name, said in rows if said)
    keys = {
        key: value for key, value in names.values.items() if key not in _NOT_THE_METHOD and not key.startswith("hub_")
    }
    if not keys:
        return table
    # No line is broken, so that what stands in a value can be found in the text.
    recipe = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=10**6).strip()
    return f"{table}\n\nThe recipe:\n\n```yaml\n{recipe}\n```"


def _methods(result: Result) -> str:
    method = result.manifest.get("method", {})
    parts = [TRAINED_BY.get(method.get("trainer"), "")]
    for key in ("loss_type", "prompt_weighting", "rollout_allocation", "advantage_transforms"):
        if method.get(key) is not None:
            parts.append(f"`{key}: {method[key]}`")
    if result.adapter is not None:
        parts.append(f"{_method(result)} adapter of rank {result.adapter.get('r')}")
    return ", ".join(part for part in parts if part)


def _base(result: Result, names: Names) -> str:
    if names.base is None:
        return ""
    commit = result.manifest.get("base_commit")
    said = [f"revision `{names.revision}`" if names.revision else "", f"commit `{commit}`" if commit else ""]
    return ", ".join([_linked(names.base), *(text for text in said if text)])


def _data(names: Names) -> str:
    values = names.values
    if name := values.get("dataset_name"):
        details = [values.get("dataset_config"), values.get("dataset_split", "train")]
        where = f"[{name}](https://huggingface.co/datasets/{name})" if names.dataset else f"`{name}`"
        return ", ".join([where, *(f"`{detail}`" for detail in details if detail)])
    files = values.get("train_file") or []
    said = ", ".join(f"`{Path(file).name}`" for file in ([files] if isinstance(files, str) else files))
    if said and values.get("playground"):
        task, seed = values.get("playground_task", "addition"), values.get("playground_seed", 0)
        return f"{said} of hf_delta's playground (task `{task}`, seed {seed})"
    return said


def _versions(result: Result) -> str:
    known = {"hf_delta": _version(result), **result.manifest.get("versions", {})}
    if result.adapter is not None and "peft_version" in result.adapter:
        known.setdefault("peft", result.adapter["peft_version"])
    return ", ".join(f"{name} {number}" for name, number in known.items() if number)


def _version(result: Result) -> str:
    return result.manifest.get("hf_delta", __version__)


def absolute(model: str) -> str:
    """The absolute path of a model directory; the name of a model of the Hub as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
