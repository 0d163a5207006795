"""Runs, adapters and exports on the Hub: `push_to_hub: true` of a recipe, `hf-delta push` and `hf-delta export --push_to_hub`."""

import argparse
import copy
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from hf_delta.adapters.export import export_lora
from hf_delta.adapters.export.lora import check_exportable
from hf_delta.errors import InputError
from hf_delta.recipe import Recipe
from hf_delta.run.console import announce
from hf_delta.run.directory import read_manifest
from hf_delta.run.hub import check_id, check_token, ready_repository, upload
from hf_delta.run.paths import is_local
from hf_delta.run.result import Result, check_weights, read_result
from hf_delta.run.shareable import Files, adapter_config, as_json, check_nothing_private, shareable


LORA = "lora"  # folder of the LoRA copy in a repository


@dataclass(frozen=True)
class Destination:
    """Where a result goes on the Hub, and what of it.

    Attributes:
        repo (`str`): Id of the repository, or its name in the own account.
        token (`str`, *optional*): By default the one of `hf auth login` or `HF_TOKEN`.
        private (`bool`, *optional*): Whether a new repository is private; by default as the account has it.
        revision (`str`, *optional*): Branch, made if it is not there; `main` by default.
        base_model_id (`str`, *optional*): Id of the base model; by default the one that it was trained on.
        lora (`bool`): Whether a plain LoRA goes with an adapter, in the folder `lora/`.
    """

    repo: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    base_model_id: str | None = None
    lora: bool = False


def destination_of(recipe: Recipe) -> Destination | None:
    """Where the recipe says that its result goes; `None` if it stays here. Asks nobody.

    Raises:
        `InputError`: keys do not go together, or the base model has no name on the Hub.
    """
    training, run = recipe.training, recipe.run
    if not training.push_to_hub:
        for key in ("base_model_id", "push_lora"):
            if getattr(run, key):
                raise InputError(f"{recipe.source}: {key} needs push_to_hub: true.")
        return None
    strategy = recipe.values.get("hub_strategy", "end")
    if strategy != "end" or training.hub_always_push:
        key = f"hub_strategy: {strategy}" if strategy != "end" else "hub_always_push"
        raise InputError(
            f"{recipe.source}: {key} would push while training, with optimizer states and training_args.bin. Write hub_strategy: "
            "end, or leave it out; a run that was stopped goes on from its own disk."
        )
    check_base(recipe.model.model_name_or_path, run.base_model_id, "model_name_or_path")
    if run.push_lora:
        _check_lora(recipe.peft, "push_lora")
    repo = training.hub_model_id or recipe.output_dir.resolve().name
    check_id(repo, "hub_model_id" if training.hub_model_id else "output_dir")
    return Destination(
        repo, training.hub_token, training.hub_private_repo, training.hub_revision, run.base_model_id, run.push_lora
    )


def check_base(base: str | None, base_model_id: str | None, where: str) -> None:
    """
    Raises:
        `InputError`: the base model is a local directory and nobody said what it is called on the Hub, or that is no id.
    """
    if base_model_id is not None:
        if base_model_id and is_local(base_model_id) and "://" not in base_model_id:
            raise InputError(
                f"base_model_id: {base_model_id} is a path here; write the id of the base model on the Hub."
            )
        check_id(base_model_id, "base_model_id")
    elif base is not None and is_local(base):
        raise InputError(
            f"{where}: {base} is a local directory, which nobody else can load. Say what the base model is called on the Hub: "
            "--base_model_id <owner>/<name>."
        )


def _check_lora(config: Any, key: str) -> None:
    if config is None:
        raise InputError(f"{key}: there is no adapter that could be written as a LoRA.")
    if config.peft_type == "LORA" and not config.use_dora:
        raise InputError(f"{key}: the adapter is a plain LoRA already; leave it out.")
    try:
        check_exportable(config)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def without_push(training: Any) -> Any:
    """The same configuration for a trainer that uploads nothing: TRL's uploads take everything that lies in `output_dir`."""
    training = copy.copy(training)
    # A token would be written into every training_args.bin.
    training.push_to_hub, training.hub_token = False, None
    return training


def ready(destination: Destination) -> Destination:
    """Make the repository, and return the destination with its full id.

    Raises:
        `InputError`: the token may not write there, or the Hub cannot be reached.
    """
    to = destination
    return replace(to, repo=ready_repository(to.repo, token=to.token, private=to.private, revision=to.revision))


def publish(result: Result, destination: Destination) -> str:
    """Upload a result and its card in one commit; returns the address of the commit.

    Raises:
        `InputError`: the Hub refuses or cannot be reached, or a file holds something private. Nothing there has changed.
    """
    check_weights(result)
    base = destination.base_model_id or (None if result.base_is_local else result.base)
    what = "adapter" if result.adapter is not None else "model"
    try:
        with _lora_copy(result, base, destination.lora) as (copied, error):
            files = {**shareable(result, destination.repo, base, error), **copied}
            check_nothing_private(files, result, destination.token)
            announce(f"Pushing {len(files)} files to {destination.repo}")
            return upload(
                destination.repo,
                files,
                token=destination.token,
                revision=destination.revision,
                message=f"Upload {what} with hf_delta",
            )
    except (OSError, SafetensorError) as error:  # a full disk, a file that went away
        raise InputError(f"{result.folder} cannot be made ready for the Hub ({error}).") from error


@contextmanager
def _lora_copy(result: Result, base: str | None, wanted: bool) -> Iterator[tuple[Files, float | None]]:
    """Files of the adapter as a plain LoRA, and the largest error of a module."""
    if not wanted:
        yield {}, None
        return
    announce("Writing the adapter as a plain LoRA")
    with TemporaryDirectory() as folder:
        lora = export_lora(result.folder)
        out = lora.save(Path(folder) / LORA)
        shared = adapter_config(read_result(out).adapter, base)
        yield (
            {
                f"{LORA}/adapter_model.safetensors": out / "adapter_model.safetensors",
                f"{LORA}/adapter_config.json": as_json(shared),
            },
            lora.max_error,
        )


def publish_run(folder: Path, destination: Destination, trained_in: Path | None = None) -> None:
    """Upload a finished run, or what was exported from one; what to do if that fails is part of the error.

    Raises:
        `InputError`: as [`publish`].
    """
    try:
        check_token(destination.token)
        url = publish(read_result(folder, trained_in), ready(destination))
    except InputError as error:
        command = _command(folder, destination, trained_in)
        raise InputError(
            f"{error} The result is safe in {folder}. Push it without doing anything again: {command}"
        ) from error
    announce(f"Pushed: {url}")


def _command(folder: Path, to: Destination, trained_in: Path | None) -> str:
    """The command that uploads what could not be uploaded; what a run knows itself is not said again."""
    words = ["hf-delta", "push", str(folder), "--repo", to.repo]
    if to.base_model_id is not None:
        words += ["--base_model_id", to.base_model_id]
    if trained_in is not None:
        words += ["--run", str(trained_in)] if read_manifest(trained_in) else []
        words += ["--private"] if to.private else []
        words += ["--revision", to.revision] if to.revision is not None else []
    return shlex.join(words)


def push(arguments: argparse.Namespace) -> None:
    """The command `hf-delta push`.

    Raises:
        `InputError`: as [`publish`], or the directory holds no result.
    """
    if arguments.run is not None and read_manifest(Path(arguments.run)) is None:
        raise InputError(f"--run: {arguments.run} is no directory of a run: it holds no run.json.")
    result = read_result(arguments.directory, arguments.run)
    check_weights(result)
    destination = destination_of_command(arguments, result)
    if destination.lora:
        _check_lora(_config_of(result), "--lora")
    check_token(None)
    announce(f"Pushed: {publish(result, ready(destination))}")


def destination_of_command(arguments: argparse.Namespace, result: Result) -> Destination:
    """Where `hf-delta push` brings a result; what its flags leave out, the recipe of the run may say.

    Raises:
        `InputError`: that is no repository, or the base model has no name on the Hub.
    """
    values = result.values
    repo = arguments.repo or values.get("hub_model_id") or result.folder.resolve().name
    lora = arguments.lora or bool(values.get("push_lora"))
    return _destination(arguments, result, repo, lora)


def destination_of_export(arguments: argparse.Namespace) -> Destination | None:
    """Where `hf-delta export --push_to_hub` brings what it writes, which is asked before it is computed.

    Raises:
        `InputError`: that is no repository, the base model has no name on the Hub, or the token may not write there.
    """
    if arguments.push_to_hub is None:
        for option in ("base_model_id", "private", "revision"):
            if getattr(arguments, option):
                raise InputError(f"--{option} needs --push_to_hub.")
        return None
    source = read_result(arguments.adapter)
    check_weights(source)
    if arguments.base_model_id is None and arguments.base is not None and not is_local(arguments.base):
        arguments.base_model_id = arguments.base
    destination = _destination(arguments, source, arguments.push_to_hub, lora=False)
    if destination.base_model_id is None:
        destination = replace(destination, base_model_id=source.base)
    check_token(None)
    return ready(destination)


def _destination(arguments: argparse.Namespace, result: Result, repo: str, lora: bool) -> Destination:
    values = result.values
    check_id(repo, "--repo" if hasattr(arguments, "repo") else "--push_to_hub")
    base = arguments.base_model_id or values.get("base_model_id")
    check_base(result.base, base, str(result.folder))
    private = True if arguments.private else values.get("hub_private_repo")
    return Destination(repo, None, private, arguments.revision or values.get("hub_revision"), base, lora)


def _config_of(result: Result) -> Any:
    from peft import PeftConfig

    try:
        return None if result.adapter is None else PeftConfig.from_pretrained(str(result.folder))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{result.folder / 'adapter_config.json'} is no configuration that PEFT or hf_delta knows ({error})."
        ) from error
