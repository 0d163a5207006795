"""The output directory of a run: may it be used, where to resume from, and its manifest `run.json`."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from hf_delta import __version__
from hf_delta.checkpoint import checkpoints, is_complete
from hf_delta.data import CACHE
from hf_delta.errors import InputError
from hf_delta.paths import check_writable
from hf_delta.recipe import Recipe
from hf_delta.resume import check_batches, other_optimizer
from hf_delta.run.paths import local_paths
from hf_delta.run.undo import BEFORE_TRAINING, MANIFEST


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

# What transformers writes last into a checkpoint.
_LAST = "trainer_state.json"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def check_output_dir(recipe: Recipe) -> str | None:
    """The checkpoint to resume from, or `None` to start from the beginning. Changes nothing.

    Raises:
        `InputError`: the directory holds something that this run would overwrite, or what is to be resumed is another
        method or is not complete.
    """
    run, out = recipe.run, recipe.output_dir
    check_writable(out, "output_dir", directory=True)
    if run.resume_from_checkpoint and run.overwrite_output_dir:
        raise InputError("resume_from_checkpoint and overwrite_output_dir exclude each other.")
    if isinstance(run.resume_from_checkpoint, str):
        checkpoint = _checked_checkpoint(recipe, Path(run.resume_from_checkpoint))
        _check_goes_on(checkpoint, recipe)
        return checkpoint
    if run.resume_from_checkpoint:
        checkpoint = _newest_checkpoint(recipe)
        if checkpoint is not None:
            _check_goes_on(checkpoint, recipe)
        return checkpoint
    if not _leftovers(out):
        return None
    if {path.name for path in _leftovers(out)} <= BEFORE_TRAINING:
        logger.info("%s holds a run that ended before its first checkpoint: it starts from the beginning.", out)
        return None
    if not (out / MANIFEST).is_file():
        raise InputError(
            f"output_dir: {out} is not empty, and what is in it is no run of hf_delta ({_some(_leftovers(out))}). "
            "Choose another output_dir."
        )
    if not run.overwrite_output_dir:
        raise InputError(
            f"output_dir: {out} holds another run. Go on with it: --resume. Keep it: --output_dir "
            "<another directory>. Delete it: --overwrite_output_dir true."
        )
    return None


def _check_goes_on(checkpoint: str, recipe: Recipe) -> None:
    if (other := other_optimizer(checkpoint, recipe.training)) is not None:
        # `run.json` and the card would say what was not so.
        raise InputError(other)
    check_batches(checkpoint, recipe.training)


def _leftovers(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.name != CACHE) if out.is_dir() else []


def _some(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")


def _checked_checkpoint(recipe: Recipe, checkpoint: Path) -> str:
    if not checkpoint.is_dir():
        said = "is no directory" if checkpoint.exists() else "does not exist"
        raise InputError(
            f"resume_from_checkpoint: {checkpoint} {said}; name a checkpoint-<step> of a run, or write true."
        )
    if (checkpoint / MANIFEST).is_file():
        raise InputError(
            f"resume_from_checkpoint: {checkpoint} is a run; name a checkpoint-<step> in it, or write true."
        )
    if not (checkpoint / _LAST).exists() and not checkpoint.name.startswith("checkpoint-"):
        raise InputError(
            f"resume_from_checkpoint: {checkpoint} is no checkpoint; name a checkpoint-<step> of a run, or write true."
        )
    if not is_complete(checkpoint, recipe.training.world_size):
        raise InputError(f"resume_from_checkpoint: {checkpoint} was not written to its end; take an earlier one.")
    _check_same_method(recipe, checkpoint.parent)
    out = recipe.output_dir
    if out.resolve() != checkpoint.parent.resolve() and _leftovers(out):
        raise InputError(
            f"output_dir: {out} is not empty, and {checkpoint} lies elsewhere. Choose another output_dir."
        )
    return str(checkpoint)


def _newest_checkpoint(recipe: Recipe) -> str | None:
    out = recipe.output_dir
    newest, cut_off = None, []
    for checkpoint in checkpoints(out):
        if not is_complete(checkpoint, recipe.training.world_size):
            cut_off.append(checkpoint)
        elif _is_superseded(checkpoint):
            logger.warning("%s is of before the run went on from an earlier checkpoint: it is skipped.", checkpoint)
        else:
            newest = checkpoint
            break
    if newest is None and _leftovers(out) and not (out / MANIFEST).is_file():
        raise InputError(
            f"output_dir: {out} holds no run to resume ({_some(_leftovers(out))}). Choose another output_dir."
        )
    _check_same_method(recipe, out)
    for checkpoint in cut_off:
        logger.warning("%s was cut off while it was written: it is skipped.", checkpoint)
    if newest is None:
        logger.warning("%s holds no complete checkpoint: training starts from the beginning.", out)
        return None
    return str(newest)


def _later_ones(out: Path, resumed_from: str | None) -> dict[str, int]:
    """Checkpoints that a run leaves behind which goes on from an earlier one of its own, and when they were written.

    Until it has written them anew, the newest checkpoint is one of those that it was told not to take.
    """
    if resumed_from is None or Path(resumed_from).parent.resolve() != out.resolve():
        return {}
    there, names = checkpoints(out), [path.name for path in checkpoints(out)]
    later = there[: names.index(Path(resumed_from).name)] if Path(resumed_from).name in names else []
    return {path.name: _written(path) for path in later if (path / _LAST).is_file()}


def _is_superseded(checkpoint: Path) -> bool:
    left_behind = (read_manifest(checkpoint.parent) or {}).get("superseded", {})
    return checkpoint.name in left_behind and left_behind[checkpoint.name] == _written(checkpoint)


def _written(checkpoint: Path) -> int:
    # Not the content, which a second try with the same settings writes bit for bit.
    return (checkpoint / _LAST).stat().st_mtime_ns


def _check_same_method(recipe: Recipe, run_dir: Path) -> None:
    there = read_manifest(run_dir)
    if there is None:
        return
    here = json.loads(json.dumps(_method(recipe)))
    for key in dict.fromkeys([*here, *there["method"]]):
        if there["method"].get(key) != here.get(key):
            raise InputError(
                f"{run_dir / MANIFEST} belongs to another method: {key} is {there['method'].get(key)!r} there and "
                f"{here.get(key)!r} here. Resume with the recipe that wrote it, or start in another output_dir."
            )


def _method(recipe: Recipe) -> dict[str, Any]:
    """What must be the same for a checkpoint to make sense."""
    model = Path(recipe.model.model_name_or_path)
    method = {
        "trainer": recipe.trainer,
        "loss_type": getattr(recipe.training, "loss_type", None),
        "model_name_or_path": str(model.resolve()) if model.is_dir() else str(model),
    }
    keys = ("delta_l_alpha", "delta_l_scope", "beta", "advantage_transforms", "advantage_transform_kwargs")
    for key in (*keys, "prompt_weighting", "rollout_allocation", "prompt_groups"):
        method[key] = getattr(recipe.training, key, None)
    for key, value in (recipe.values.get("peft_config") or {"method": None}).items():
        method[f"peft_config.{key}"] = value
    return method


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """The manifest of a run, or `None` if the directory has none.

    Raises:
        `InputError`: it cannot be read, or was written in a newer format.
    """
    path = run_dir / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format_version"] == FORMAT_VERSION
        if not isinstance(manifest["method"], dict) or not isinstance(manifest.get("values", {}), dict):
            raise TypeError("method and values are no blocks of keys")
        known = known and isinstance(manifest.get("superseded", {}), dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error!r}): it is damaged. Start in another output_dir.") from error
    if not known:
        raise InputError(
            f"{path} was written by another version of hf_delta, {manifest.get('hf_delta')}. Go on with that, or start in another "
            "output_dir."
        )
    return manifest


def write_manifest(recipe: Recipe, resumed_from: str | None, papers: Sequence[tuple[str, str]] = ()) -> None:
    """Write `run.json`: the recipe with flags applied, the method and its papers, versions and the number of processes."""
    secret = {"hub_token"}
    manifest = {
        "format_version": FORMAT_VERSION,
        "hf_delta": __version__,
        "recipe": recipe.source,
        "values": {key: "***" if key in secret else value for key, value in recipe.values.items()},
        "method": _method(recipe),
        "papers": list(papers),
        "base_commit": _commit(recipe),
        # For uploads: what is a path where the run was may look like an id of the Hub elsewhere.
        "output_dir": str(recipe.output_dir.resolve()),
        "local_paths": local_paths(recipe.values),
        "world_size": recipe.training.world_size,
        "resumed_from": resumed_from,
        "superseded": _later_ones(recipe.output_dir, resumed_from),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    _write(recipe.output_dir / MANIFEST, manifest)


def finish_manifest(out: Path) -> None:
    """Note in `run.json` that the run came to its end and its result is saved."""
    _write(out / MANIFEST, {**read_manifest(out), "finished": True})


def is_finished(recipe: Recipe) -> bool:
    """Whether the output directory holds this very run, trained to its end and saved; where it is uploaded may differ."""
    manifest = None if recipe.run.overwrite_output_dir else read_manifest(recipe.output_dir)
    if manifest is None or not manifest.get("finished") or not any(recipe.output_dir.glob("*model*.safetensors")):
        return False
    return _of_training(manifest["values"]) == _of_training(json.loads(json.dumps(recipe.values, default=str)))


def _of_training(values: dict[str, Any]) -> dict[str, Any]:
    others = ("push_to_hub", "push_lora", "base_model_id", "resume_from_checkpoint", "overwrite_output_dir")
    return {key: value for key, value in values.items() if key not in others and not key.startswith("hub_")}


def _commit(recipe: Recipe) -> str | None:
    """The commit of the base model in the cache of the Hub, where it comes from there."""
    model = recipe.model
    if Path(model.model_name_or_path).is_dir():
        return None
    try:
        found = try_to_load_from_cache(model.model_name_or_path, "config.json", revision=model.model_revision)
    except ValueError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def _write(path: Path, manifest: dict[str, Any]) -> None:
    partial = path.with_name(f"{MANIFEST}.partial")
    partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clear(out: Path) -> None:
    """Delete an earlier run, and only a run: a directory without `run.json` is left alone."""
    if not (out / MANIFEST).is_file():
        return
    # The manifest last: a directory without it would be nobody's.
    for path in sorted(_leftovers(out), key=lambda path: path.name == MANIFEST):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
