"""Values of trainer keys that upstream would refuse only in the middle of training, or not at all."""

import importlib.util
import math
from collections.abc import Mapping

from hf_delta.errors import InputError
from hf_delta.recipe.fields import suggest
from hf_delta.recipe.source import Node


_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "num_generations": 2,
    "max_completion_length": 1,
    "steps_per_generation": 1,
    "learning_rate": 0,
    "seed": 0,
    "data_seed": 0,
    "epsilon": 0,
    "epsilon_high": 0,
    "beta": 0,
    "max_steps": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "save_total_limit": 1,
    "max_length": 1,
    "dataloader_num_workers": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "label_smoothing_factor": 0,
    "neftune_noise_alpha": 0,
    "top_k": 0,
    "min_p": 0,
}
_ABOVE = {
    "temperature": 0,
    "top_p": 0,
    "repetition_penalty": 0,
    "num_train_epochs": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "eval_steps": 0,
}
_AT_MOST = {
    "top_p": 1,
    "min_p": 1,
    "label_smoothing_factor": 1,
    "adam_beta1": 1,
    "adam_beta2": 1,
    "seed": 2**32 - 1,
    "data_seed": 2**32 - 1,
}
# What stands for none.
_OR = {"max_steps": -1, "top_k": -1}
# Whatever counts something in a tensor.
_LARGEST = 2**63 - 1
_WORDS = {
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
}

# Where the package has another name than the integration.
_PACKAGES = {"azure_ml": "azureml-core"}
# Not listed by their packages: flyte never is, kubeflow by where the process runs.
_UNLISTED = ("flyte", "kubeflow")


def check_limits(nodes: Mapping[str, Node]) -> None:
    """Check numbers against their range and words against those there are; other types are left to their own check.

    Raises:
        `InputError`: a value is out of range, not finite, or not one of the words.
    """
    for key, node in nodes.items():
        value = node.value
        _check_numbers(key, node)
        if isinstance(value, str) and key in _WORDS and value not in _WORDS[key]:
            raise InputError(f"{node.where}: {key} is {value!r}, which it does not take{suggest(value, _WORDS[key])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_within(key, value):
            limits = _range(key) if math.isfinite(value) else "finite"
            raise InputError(f"{node.where}: {key} must be {limits}, got {value}.")


def _check_numbers(key: str, node: Node) -> None:
    """No number in a value, however deep in a block or a list, is NaN or larger than what anything can count."""
    if isinstance(node.value, (dict, list)):
        for inner in node.value.values() if isinstance(node.value, dict) else node.value:
            _check_numbers(key, inner)
    elif isinstance(node.value, float) and math.isnan(node.value):
        raise InputError(f"{node.where}: {key} must be finite, got nan.")
    elif isinstance(node.value, int) and abs(node.value) > _LARGEST:
        raise InputError(f"{node.where}: {key} must be less than 2**63, got {node.value}.")


def _is_within(key: str, value: float) -> bool:
    if (key not in _AT_LEAST and key not in _ABOVE) or value == _OR.get(key, math.nan):
        return True
    low, high = _AT_LEAST.get(key, -math.inf), _AT_MOST.get(key, math.inf)
    return math.isfinite(value) and low <= value <= high and value > _ABOVE.get(key, -math.inf)


def _range(key: str) -> str:
    low = f"at least {_AT_LEAST[key]}" if key in _AT_LEAST else f"above {_ABOVE[key]}"
    low += f", or {_OR[key]}" if key in _OR else ""
    return f"{low} and at most {_AT_MOST[key]}" if key in _AT_MOST else low


def check_deepspeed(node: Node | None) -> None:
    """
    Raises:
        `InputError`: DeepSpeed is asked for and not installed, which transformers says in other words.
    """
    if node is not None and node.value and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"{node.where}: deepspeed is not installed: pip install 'hf_delta[deepspeed]', or leave it out."
        )


def check_report_to(node: Node | None) -> None:
    """Check that what `report_to:` names exists and is installed.

    Raises:
        `InputError`: an integration that transformers does not have, or whose package is not installed.
    """
    if node is None or node.plain() in ("all", ["all"], "none", ["none"]):
        return
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    names = node.plain() if isinstance(node.value, list) else [node.value]
    installed = get_available_reporting_integrations()
    for name in names:
        if not isinstance(name, str):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
            raise InputError(f"{node.where}: report_to has no integration {name!r}{suggest(name, known)}")
        if name not in (*installed, *_UNLISTED):
            there = f" Installed: {', '.join(installed)}." if installed else ""
            raise InputError(
                f"{node.where}: report_to: {name} is not installed: pip install {_PACKAGES.get(name, name)}, or write "
                f"report_to: none.{there}"
            )
