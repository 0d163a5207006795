"""Fields of a PMSS adapter."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from hf_delta.adapters.base import DeltaAdapterConfig
from hf_delta.adapters.pmss.selection import SELECTIONS
from hf_delta.errors import InputError


@dataclass
class PmssConfig(DeltaAdapterConfig):
    """Configuration of PMSS: `W' = W + s C U R` with selected columns `C` and rows `R` of `W`, and a trained core `U`.

    The text of the paper could not be read; everything beyond its abstract is a reconstruction. The other fields are
    those of [`DeltaAdapterConfig`]. (Pre-trained Matrices Skeleton Selection, https://huggingface.co/papers/2409.16722)

    Parameters:
        r (`int`, *optional*, defaults to `256`):
            Number of selected rows and of selected columns; `r * r` values are trained for each layer. 256 trains as
            many on a 4096x4096 weight as LoRA of rank 8 does. No more than the smaller side of any adapted layer.
        alpha (`float`, *optional*, defaults to `1.0`):
            The scaling `s` itself; it is not divided by `r`.
        selection (`str`, *optional*, defaults to `"pivoted_qr"`):
            How rows and columns are chosen: `"pivoted_qr"` (the first pivots of QR with column pivoting),
            `"sketched_qr"` (those of a random sketch), `"norm"`, `"leverage"` or `"uniform"`.
        sketch_oversample (`int`, *optional*, defaults to `16`):
            Size of random sketches beyond `r`, for `"sketched_qr"` and `"leverage"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `"sketched_qr"`, `"leverage"` and `"uniform"`.
        dropout (`float`, *optional*, defaults to `0.0`):
            Probability with which each of the `r` values `R x` is dropped in training; not the inputs, because `R x` is
            read from the output of the layer.
        normalize (`bool`, *optional*, defaults to `False`):
            Divide `C` by the mean norm of its columns and `R` by that of its rows, so that one learning rate suits
            weights of different sizes.
        cache_dir (`str`, *optional*, defaults to `"~/.cache/hf_delta/pmss"`):
            Folder for selections of large weights, by the hash of the weight; None to keep none.

    Raises:
        `InputError`: a value that cannot be used, with what to write instead.
    """

    method: ClassVar[str] = "pmss"
    paper = ("PMSS: Pretrained Matrices Skeleton Selection for LLM Fine-tuning", "2409.16722")

    r: int = field(default=256, metadata={"help": "Number of selected rows and columns."})
    alpha: float = field(default=1.0, metadata={"help": "The scaling of C U R; not divided by r."})
    selection: str = field(default="pivoted_qr", metadata={"help": f"One of {', '.join(SELECTIONS)}."})
    sketch_oversample: int = field(default=16, metadata={"help": "Size of random sketches beyond r."})
    seed: int = field(default=0, metadata={"help": "Seed of selections that use random numbers."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the r values R x."})
    normalize: bool = field(default=False, metadata={"help": "Divide C and R by their mean norms."})
    cache_dir: str | None = field(
        default="~/.cache/hf_delta/pmss", metadata={"help": "Folder for selections of large weights; None for none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("selection", SELECTIONS)
        self.check_fraction("dropout")
        for name in ("sketch_oversample", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name} is {value!r}: write a whole number from 0 up.")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < math.inf:
            raise InputError(f"alpha is {self.alpha!r}: write a number above 0; 1.0 adds C U R as it is.")
        if not isinstance(self.normalize, bool):
            raise InputError(f"normalize is {self.normalize!r}: write true or false.")
        if not (self.cache_dir is None or (isinstance(self.cache_dir, str) and self.cache_dir)):
            raise InputError(f"cache_dir is {self.cache_dir!r}: write a folder, or null to keep nothing.")
