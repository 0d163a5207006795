"""Fields of EDoRA."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_delta.adapters.base import DeltaAdapterConfig
from hf_delta.errors import InputError


SVDS = ("full", "lowrank")

_LORA_XS = ("LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", "2405.17604")


@dataclass
class EdoraConfig(DeltaAdapterConfig):
    """Configuration of EDoRA (https://huggingface.co/papers/2501.12067): DoRA whose factors are frozen singular vectors
    of the weight, with a trained `r x r` core between them and a trained magnitude.

    Without the magnitude it is LoRA-XS (https://huggingface.co/papers/2405.17604).

    Parameters:
        r (`int`, *optional*, defaults to `16`):
            Number of singular vectors; the core is `r x r`. At most the smaller side of each layer.
        alpha (`float`, *optional*, defaults to `16`):
            The change is scaled by `alpha / r`.
        sigma (`float`, *optional*, defaults to `0.0`):
            Standard deviation of the core at the start. With 0 the model starts as the base model, exactly; the paper
            has 1e-5.
        svd (`str`, *optional*, defaults to `"lowrank"`):
            How the singular vectors are found: `"full"`, or `"lowrank"`, a randomised SVD.
        svd_niter (`int`, *optional*, defaults to `10`):
            Power iterations of the randomised SVD.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the randomised SVD.
        magnitude (`bool`, *optional*, defaults to `True`):
            Whether rows are normalised and a magnitude is trained. `False` is LoRA-XS.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout on the input of the low-rank path.

    Raises:
        `InputError`: a value that cannot be used, with what to write instead.
    """

    method: ClassVar[str] = "edora"
    paper = ("EDoRA: Efficient Weight-Decomposed Low-Rank Adaptation via Singular Value Decomposition", "2501.12067")

    alpha: float = field(default=16, metadata={"help": "The change is scaled by alpha / r."})
    sigma: float = field(default=0.0, metadata={"help": "Standard deviation of the core at the start."})
    svd: str = field(default="lowrank", metadata={"help": "How singular vectors are found: full or lowrank."})
    svd_niter: int = field(default=10, metadata={"help": "Power iterations of the lowrank SVD."})
    seed: int = field(default=0, metadata={"help": "Seed of the lowrank SVD."})
    magnitude: bool = field(default=True, metadata={"help": "Train a magnitude of each row; False is LoRA-XS."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the low-rank path."})

    @classmethod
    def paper_of(cls, values: Mapping[str, Any]) -> tuple[str, str] | None:
        return _LORA_XS if values.get("magnitude") is False else cls.paper

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("svd", SVDS)
        self.check_fraction("dropout")
        if not _is_number(self.alpha) or self.alpha <= 0:
            raise InputError(f"alpha is {self.alpha!r}: write a number above 0; the change is scaled by alpha / r.")
        if not _is_number(self.sigma) or self.sigma < 0:
            raise InputError(f"sigma is {self.sigma!r}: write 0 for an exact start, or a small number such as 1e-5.")
        for name, least in (("svd_niter", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}: write a whole number from {least} up.")
        if not isinstance(self.magnitude, bool):
            raise InputError(f"magnitude is {self.magnitude!r}: write true, or false for LoRA-XS.")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
