"""What a directory of weights is, read from its own files: an adapter or a model, of which base, trained how."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_delta.errors import InputError
from hf_delta.run.directory import read_manifest
from hf_delta.run.evaluation import REPORT
from hf_delta.run.paths import is_local


@dataclass(frozen=True)
class Result:
    """A trained model or adapter in a directory.

    Attributes:
        folder (`Path`): Where it lies.
        manifest (`dict`): `run.json` of the run that trained it; empty without one.
        adapter (`dict` or `None`): Its `adapter_config.json`; `None` for a model.
        report (`str`, *optional*): Markdown of the evaluation before and after training.
        steps (`int`, *optional*): Optimizer steps behind it.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    adapter: dict[str, Any] | None = field(repr=False)
    report: str | None = field(default=None, repr=False)
    steps: int | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The recipe's keys; empty without a run."""
        return self.manifest.get("values", {})

    @property
    def base(self) -> str | None:
        """Directory or Hub id of the base model, if the files name one."""
        trained_on = self.manifest.get("method", {}).get("model_name_or_path")
        return (self.adapter or {}).get("base_model_name_or_path") or trained_on

    @property
    def base_is_local(self) -> bool:
        return self.base is not None and is_local(self.base)

    @property
    def dataset(self) -> str | None:
        """Id of the data on the Hub, if it came from there."""
        name = self.values.get("dataset_name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            return None
        return None if is_local(name) or name in self.manifest.get("local_paths", []) else name

    @property
    def kind(self) -> str | None:
        """PEFT's name of the method of an adapter."""
        return None if self.adapter is None else self.adapter.get("peft_type")

    @property
    def needs_import(self) -> bool:
        """Whether PEFT loads it only where `hf_delta` has been imported."""
        return str(self.kind).startswith("HFD_")


def read_result(folder: str | Path, run: str | Path | None = None) -> Result:
    """Read what a run, `save_pretrained` or `hf-delta export` wrote.

    Args:
        folder (`str` or `Path`): Directory with the weights.
        run (`str` or `Path`, *optional*): Directory of the run behind them, if that is another one.

    Raises:
        `InputError`: a file cannot be read.
    """
    folder = Path(folder)
    run = folder if run is None else Path(run)
    adapter = _read_json(folder / "adapter_config.json")
    for key in ("base_model_name_or_path", "peft_type"):
        if not isinstance((adapter or {}).get(key), (str, type(None))):
            raise InputError(
                f"{folder / 'adapter_config.json'} is damaged: {key} is {adapter[key]!r}, and must be text."
            )
    manifest, report = read_manifest(run) or {}, run / REPORT
    # A run that was resumed without an evaluation keeps the report of the one before.
    evaluated = report.is_file() and manifest.get("values", {}).get("evaluate_pass_at") is not None
    return Result(
        folder=folder,
        manifest=manifest,
        adapter=adapter,
        report=report.read_text(encoding="utf-8").strip() if evaluated else None,
        steps=(_read_json(run / "trainer_state.json") or {}).get("global_step"),
    )


def check_weights(result: Result) -> None:
    """
    Raises:
        `InputError`: the directory has no weights in safetensors files, or one is cut short.
    """
    folder = result.folder
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory here; give that of a run, an adapter or a model.")
    if result.adapter is None and not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no adapter_config.json and no config.json: there is no result in it.")
    pattern = "model*.safetensors" if result.adapter is None else "adapter_model*.safetensors"
    files = sorted(folder.glob(pattern))
    if not files:
        raise InputError(f"{folder} holds no {pattern}: there are no weights in it that could be shared.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}): it is cut short or damaged.") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): it is damaged.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read: it holds no JSON object.")
    return content
