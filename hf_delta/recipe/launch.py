"""How many processes a run has and what they share, for a plan: by flags, or as this process was launched."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_delta.errors import InputError
from hf_delta.recipe.find import shipped
from hf_delta.recipe.source import Node


_TYPES = {"NO": "DDP", "MULTI_GPU": "DDP", "MULTI_CPU": "DDP", "FSDP": "FSDP2", "DEEPSPEED": "ZeRO"}


@dataclass(frozen=True)
class Launch:
    """
    Args:
        processes (`int`): Processes, one for each GPU.
        strategy (`str`): `DDP`, `ZeRO-2`, `ZeRO-3` or `FSDP2`.
        source (`str`): Where this was said.
    """

    processes: int = 1
    strategy: str = "DDP"
    source: str = "this launch"

    @property
    def sharded(self) -> bool:
        """Whether evaluation finds no whole model in a process."""
        return self.strategy != "DDP"

    @property
    def deepspeed(self) -> bool:
        return self.strategy.startswith("ZeRO")


def planned_launch(nodes: dict[str, Node]) -> Launch | None:
    """The launch that `dry_run: true` plans for; `None` without it.

    Raises:
        `InputError`: `accelerate_config` is no configuration of accelerate, or `num_processes` is below 1.
    """
    if nodes.get("dry_run") is None or nodes["dry_run"].value is not True:
        return None
    config, number = (nodes.get(key) for key in ("accelerate_config", "num_processes"))
    launch = current_launch()
    name = config and (config.text or config.value)
    if isinstance(name, str):
        launch = read_launch(name, config.where)
    # Another type than a whole number is refused with all other keys.
    if number is not None and type(number.value) is int:
        if number.value < 1:
            raise InputError(f"{number.where}: num_processes must be at least 1, got {number.value}.")
        launch = Launch(number.value, launch.strategy, f"{launch.source}, num_processes {number.value}")
    return launch


def current_launch() -> Launch:
    """As `accelerate launch` or `torchrun` started this process."""
    strategy = "DDP"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        strategy = "FSDP2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        strategy = _zero(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return Launch(int(os.environ.get("WORLD_SIZE", "1")), strategy)


def read_launch(name: str, where: str = "accelerate_config") -> Launch:
    """A configuration file for `accelerate launch`, by path, or by name out of those that are shipped.

    Raises:
        `InputError`: there is no such file, or it is none.
    """
    path = _find(name, where)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {path} is not UTF-8 text ({error.reason}).") from error
    except (OSError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}: {path}{f':{mark.line + 1}' if mark else ''} is not YAML: {reason}.") from error
    kind = content.get("distributed_type") if isinstance(content, dict) else None
    # YAML 1.1 reads NO as false.
    kind = "NO" if kind is False else str(kind)
    if kind not in _TYPES:
        known = ", ".join(_TYPES)
        raise InputError(f"{where}: {path} has distributed_type {kind}; a plan can be made for {known}.")
    processes = content.get("num_processes", 1)
    if type(processes) is not int or processes < 1:
        raise InputError(f"{where}: {path} has num_processes {processes!r}; write a whole number from 1 up.")
    if not isinstance(content.get("deepspeed_config") or {}, dict):
        raise InputError(
            f"{where}: {path} has deepspeed_config {content['deepspeed_config']!r}; write a block of keys."
        )
    strategy = _zero(_stage(content)) if kind == "DEEPSPEED" else _TYPES[kind]
    return Launch(processes, strategy, str(path))


def _find(name: str, where: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    root = shipped("accelerate_configs")
    stem = name.removeprefix("accelerate_configs/").removesuffix(".yaml")
    if (root / f"{stem}.yaml").is_file():
        return root / f"{stem}.yaml"
    known = ", ".join(sorted(found.stem for found in root.glob("*.yaml")))
    raise InputError(f"{where}: {name} is no file and none of {known}.")


def of_launches(said: str) -> str:
    """What torch or transformers says of a setting, and what to do if that is for several processes and there is one."""
    if any(words in said for words in ("distributed training", "torch.distributed", "process group")):
        return (
            f"{said.rstrip('.')}. That takes several processes: start them with `accelerate launch`, or leave it out."
        )
    return said


def _stage(content: dict[str, Any]) -> Any:
    return (content.get("deepspeed_config") or {}).get("zero_stage", 2)


def _zero(stage: Any) -> str:
    # Stage 1 shards the states alone, and 0 nothing.
    return {"3": "ZeRO-3", "0": "DDP"}.get(str(stage), "ZeRO-2")
