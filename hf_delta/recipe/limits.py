"""Values of trainer keys that upstream would refuse only in the middle of training, or not at all."""

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
}
_ABOVE = {"temperature": 0, "top_p": 0}
_AT_MOST = {"top_p": 1}
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
        if isinstance(value, str) and key in _WORDS and value not in _WORDS[key]:
            raise InputError(f"{node.where}: {key} is {value!r}, which it does not take{suggest(value, _WORDS[key])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_within(key, value):
            limits = _range(key) if math.isfinite(value) else "finite"
            raise InputError(f"{node.where}: {key} must be {limits}, got {value}.")


def _is_within(key: str, value: float) -> bool:
    if key not in _AT_LEAST and key not in _ABOVE:
        return True
    low, high = _AT_LEAST.get(key, -math.inf), _AT_MOST.get(key, math.inf)
    return math.isfinite(value) and low <= value <= high and value > _ABOVE.get(key, -math.inf)


def _range(key: str) -> str:
    low = f"at least {_AT_LEAST[key]}" if key in _AT_LEAST else f"above {_ABOVE[key]}"
    return f"{low} and at most {_AT_MOST[key]}" if key in _AT_MOST else low


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
