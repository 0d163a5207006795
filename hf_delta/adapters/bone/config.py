"""Configuration of Bone."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_delta.adapters.base import DeltaAdapterConfig
from hf_delta.errors import InputError


MODES = ("bone", "row", "mini", "bat_row", "bat_col")


@dataclass
class BoneConfig(DeltaAdapterConfig):
    """Block affine adaptation: blocks of the weight share one small trained block. Also known as DiSHA and MiSS.

    The weight `(o, i)` is cut into blocks `W_ab` of `(r, r)`, output block `a` and input block `b`:

    | mode      | change of the weight                                 | trained `D`     | needs                   |
    |-----------|------------------------------------------------------|-----------------|-------------------------|
    | `bone`    | `D^T` in every piece of `r` columns                  | `(r, o)`        | `r <= i`                |
    | `row`     | row `n` of `D` in each of the `n`-th `o / r` rows    | `(r, i)`        | `r` divides `o`         |
    | `mini`    | `D^T` repeated along the rows too                    | `(r, mini_r)`   | `mini_r` divides `o`    |
    | `bat_row` | `W_ab D_b + D_b`                                     | `(i / r, r, r)` | `r` divides `i` and `o` |
    | `bat_col` | `W_ab D_a + D_a`; slower                             | `(o / r, r, r)` | `r` divides `i` and `o` |

    `D` starts at zero. There is no scaling factor. Paper: arXiv:2409.15371.

    Parameters:
        r (`int`, *optional*, defaults to `64`):
            Size of a block; the rank of the change in `bone`, `row` and `mini`. In `bone` it has `r o` parameters,
            LoRA of rank `r` has `r (i + o)`.
        mode (`str`, *optional*, defaults to `"bone"`):
            `"bone"`, `"row"`, `"mini"`, `"bat_row"` or `"bat_col"`. PEFT's `MissConfig` has three of them:
            `init_weights=True` is `bone`, `"mini"` is `mini` and `"bat"` is `bat_col`.
        mini_r (`int`, *optional*):
            Number of columns of `D` in mode `mini`, which repeat along the outputs; only there.
        dropout (`float`, *optional*, defaults to `0.0`):
            Probability with which an input of the adapter, not of the frozen layer, is dropped in training. The fast
            paths need 0.

    Raises:
        `InputError`: a value that cannot be used, with what to write instead.
    """

    method: ClassVar[str] = "bone"
    paper = ("MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", "2409.15371")

    r: int = field(default=64, metadata={"help": "Size of a block."})
    mode: str = field(default="bone", metadata={"help": f"Which change of the weight: {', '.join(MODES)}."})
    mini_r: int | None = field(default=None, metadata={"help": "Columns of the trained block in mode mini."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("mode", MODES)
        self.check_fraction("dropout")
        if self.mode != "mini":
            if self.mini_r is not None:
                raise InputError(f"mini_r goes with mode: mini, and mode is {self.mode}: leave one of the two out.")
        elif isinstance(self.mini_r, bool) or not isinstance(self.mini_r, int) or self.mini_r < 1:
            raise InputError(
                f"mode: mini needs mini_r, and it is {self.mini_r!r}: write a whole number that divides the output sizes "
                "of the adapted layers."
            )
