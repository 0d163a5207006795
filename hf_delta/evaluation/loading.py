"""Model and tokenizer for an evaluation, from what a run or anyone else saved."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_delta.adapters.dora import enable_fast_dora
from hf_delta.errors import InputError


def load_model_and_tokenizer(
    model: str | Path, adapter: str | Path | None = None, device: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model, with a PEFT adapter on it if there is one, and the tokenizer that was saved last.

    Code that comes with a model is not run (`trust_remote_code` is off).

    Args:
        model (`str` or `Path`): a model directory or hub name, or a PEFT adapter directory, whose `adapter_config.json`
            then names the base.
        adapter (`str` or `Path`, *optional*): a PEFT adapter directory for `model`.
        device (`str`, *optional*): as in `torch.device`; `cuda` if there is one, else `cpu`, by default.

    Raises:
        InputError: if something is missing, cannot be loaded, or both arguments are adapters.
    """
    base, adapter = base_and_adapter(model, adapter)
    device = device or default_device()
    check_device(device)
    tokenizer = load_tokenizer(base, adapter)
    network, info = _load(AutoModelForCausalLM, base, "model", output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"The weights in {base} lack {missing[0]}, which would be drawn at random. Save or download the model again."
        )
    if adapter is not None:
        if len(tokenizer) > network.get_input_embeddings().num_embeddings:
            # As at the time of training: new tokens came with the adapter.
            network.resize_token_embeddings(len(tokenizer))
        try:
            network = PeftModel.from_pretrained(network, str(adapter))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = next((line for line in lines if "size mismatch" in line), lines[0])
            raise InputError(
                f"The adapter in {adapter} does not load onto {base} ({reason.rstrip('.')}). It is damaged, or of another base "
                "model."
            ) from error
        if any(getattr(config, "use_dora", False) for config in network.peft_config.values()):
            # The same values to rounding; the computation of PEFT itself forms each weight anew for each token.
            enable_fast_dora()
    return network.to(device), tokenizer


def load_tokenizer(model: str | Path, adapter: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that [`load_model_and_tokenizer`] gives, for the same arguments and with the same errors."""
    base, adapter = base_and_adapter(model, adapter)
    has_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    return _load(AutoTokenizer, adapter if has_tokenizer else base, "tokenizer")


def default_device() -> str:
    """Where a model goes if nobody says where."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """
    Raises:
        InputError: there is no such device here.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"The model does not go to device {device!r} ({reason}). Write cpu, cuda or cuda:<number>."
        ) from error


def base_and_adapter(model: str | Path, adapter: str | Path | None = None) -> tuple[str, Path | None]:
    """Directory or hub name of the base model, and directory of the adapter if there is one.

    Raises:
        InputError: if the adapter is none, both arguments are adapters, or an adapter names no base.
    """
    config = Path(model) / "adapter_config.json"
    # A directory of a model and its adapter counts as the model, as in transformers.
    is_adapter = config.is_file() and not (Path(model) / "config.json").is_file()
    if not is_adapter:
        if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
            raise InputError(f"{adapter} is no PEFT adapter: it has no adapter_config.json.")
        return str(model), None if adapter is None else Path(adapter)
    if adapter is not None:
        raise InputError(f"{model} and {adapter} are both adapters; give the base model and one adapter.")
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{config} cannot be read ({error!r}): it is damaged.") from error
    if not isinstance(base, str) or not base:
        raise InputError(f"{config} names no base model: give the base as the model and {model} as its adapter.")
    return base, Path(model)


def _load(auto: Any, path: str | Path, what: str, **kwargs: Any) -> Any:
    local = Path(path).is_dir()
    try:
        return auto.from_pretrained(str(path), trust_remote_code=False, **kwargs)
    except Exception as error:
        where = "the directory" if local else "no such directory here; as a hub name"
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"No {what} could be loaded from {path} ({where}: {reason}). If {path} stands in an adapter_config.json, give "
            "the base as the model and that directory as its adapter."
        ) from error
