"""The command `hf-delta export`."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from hf_delta.adapters.export import (
    LoraExport,
    Quantization,
    check_new,
    export_lora,
    export_merged,
    recorded_quantization,
)
from hf_delta.errors import InputError
from hf_delta.run.publish import Destination, destination_of_export, publish_run


def export(arguments: argparse.Namespace) -> None:
    """Write an adapter as a LoRA or merged, and say first what that leaves out.

    Raises:
        `InputError`: the options do not go together, an input is missing or broken, the error is above `--max-error`, or
            there is something in `--out`. Nothing was written.
    """
    check_new(arguments.out)
    destination = destination_of_export(arguments)
    asked = {"base": arguments.base, "quantization": _quantization(arguments), "progress": True}
    if asked["quantization"] is None and Quantization(**recorded_quantization(Path(arguments.adapter))):
        sys.stderr.write("The base model was quantised for training (run.json): its dequantised weights are used.\n")
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    if arguments.format == "lora":
        _export_lora(arguments, asked, dtype or torch.float32)
        _publish(arguments, destination)
        return
    for option in ("rank", "max_error", "dora"):
        if getattr(arguments, option) not in (None, False):
            raise InputError(f"--{option.replace('_', '-')} goes with --format lora; merging leaves nothing out.")
    path = export_merged(arguments.adapter, arguments.out, dtype=dtype, **asked)
    Console(highlight=False, soft_wrap=True).print(f"Merged model in {path}")
    _publish(arguments, destination)


def _publish(arguments: argparse.Namespace, destination: Destination | None) -> None:
    if destination is not None:
        publish_run(Path(arguments.out), destination, trained_in=Path(arguments.adapter))


def _export_lora(arguments: argparse.Namespace, asked: dict, dtype: torch.dtype) -> None:
    console = Console(highlight=False, soft_wrap=True)
    lora = export_lora(arguments.adapter, rank=arguments.rank, dora=arguments.dora, dtype=dtype, **asked)
    console.print(lora.table())
    console.print(_summary(lora))
    lora.check(arguments.max_error)
    path = lora.save(arguments.out)
    if lora.config.use_dora:
        console.print(f"DoRA adapter in {path}, for PEFT; vLLM takes no DoRA.")
    else:
        console.print(f"LoRA adapter in {path}; vLLM: --enable-lora --max-lora-rank {lora.config.r}")


def _summary(lora: LoraExport) -> str:
    if all(error.exact for error in lora.errors):
        return f"All {len(lora.errors)} modules are exact."
    worst = max(lora.errors, key=lambda error: error.frobenius)
    others = "--format merged is exact" + (", and so is --dora, for PEFT alone" if lora.exact_as_dora else "")
    return f"Largest error: {worst.frobenius:.2e} of the change of {worst.name}. {others}."


def _quantization(arguments: argparse.Namespace) -> Quantization | None:
    """What the flags say; None if they say nothing."""
    given = (arguments.load_in_4bit, arguments.load_in_8bit)
    if given == (None, None):
        if arguments.use_bnb_nested_quant or arguments.bnb_4bit_quant_type != "nf4":
            raise InputError("--bnb-4bit-quant-type and --use-bnb-nested-quant go with --load-in-4bit.")
        return None
    return Quantization(
        load_in_4bit=bool(arguments.load_in_4bit),
        load_in_8bit=bool(arguments.load_in_8bit),
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        use_bnb_nested_quant=arguments.use_bnb_nested_quant,
    )
