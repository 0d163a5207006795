"""A LoRA that was made from another adapter, and what it leaves out of it."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from rich.table import Table
from safetensors.torch import save_file

from hf_delta.adapters.export.files import new_directory
from hf_delta.errors import InputError


@dataclass(frozen=True)
class ModuleError:
    """How well one module was written as factors.

    Attributes:
        name (`str`): The module, by its name in the base model.
        rank (`int`): Rank before zeros were added.
        exact (`bool`): Whether the factors are the adapter itself and no approximation.
        frobenius (`float`): Norm of what is missing by the norm of the whole change, in the Frobenius norm.
        spectral (`float`): The same in the spectral norm.
    """

    name: str
    rank: int
    exact: bool
    frobenius: float
    spectral: float


@dataclass(frozen=True)
class LoraExport:
    """A LoRA adapter in memory, with what it leaves out of the adapter that it was made from.

    Attributes:
        config (`LoraConfig`): One rank for all modules, and `lora_alpha` equal to it.
        state_dict (`dict[str, torch.Tensor]`): Named as PEFT saves them.
        errors (`list[ModuleError]`): One for each module.
        exact_as_dora (`bool`): Whether the adapter would be exact with `dora`.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor] = field(repr=False)
    errors: list[ModuleError] = field(repr=False)
    exact_as_dora: bool = False

    @property
    def max_error(self) -> float:
        """The largest relative Frobenius error of a module; 0 where all are exact."""
        return max(error.frobenius for error in self.errors)

    def check(self, max_error: float | None) -> None:
        """
        Raises:
            `InputError`: a module leaves out more than `max_error` of its change.
        """
        if max_error is None:
            return
        if not max_error >= 0:
            raise InputError(f"max_error is {max_error!r}: write a number from 0 up.")
        worst = max(self.errors, key=lambda error: error.frobenius)
        over = sum(error.frobenius > max_error for error in self.errors)
        if over:
            raise InputError(
                f"rank {self.config.r} leaves out more than {max_error:g} of the change in {over} of {len(self.errors)} modules, "
                f"most in {worst.name} ({worst.frobenius:.3g}): give a larger rank, or use the format merged, which is exact."
            )

    def table(self) -> Table:
        """The errors, module by module, for a console."""
        table = Table(title=f"LoRA of rank {self.config.r}: what it leaves out, relative to the change of each module")
        for name, justify in (("module", "left"), ("rank", "right"), ("Frobenius", "right"), ("spectral", "right")):
            table.add_column(name, justify=justify)
        for error in self.errors:
            shown = ["exact", ""] if error.exact else [f"{error.frobenius:.2e}", f"{error.spectral:.2e}"]
            table.add_row(error.name, str(error.rank), *shown)
        return table

    def save(self, out: str | Path) -> Path:
        """Write `adapter_config.json` and `adapter_model.safetensors` to a new or empty directory.

        Raises:
            `InputError`: there is something in `out`, or it cannot be written.
        """
        with new_directory(out) as folder:
            save_file(self.state_dict, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            self.config.save_pretrained(folder)
        return Path(out)
