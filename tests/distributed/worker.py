"""What both processes of a launch run: every case of a module's `CASES`, results and errors into files.

accelerate launch ... -m tests.distributed.worker MODULE OUT WORLD [STAGE]

A case is a function `(world, folder) -> dict`; with a stage of ZeRO, or 0 for DDP, it gets that as its third argument.
DeepSpeed has launches of its own, because it changes a process for good.
"""

import importlib
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState


def main(module: str, out: str, world: str, *stage: str) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")
    torch.set_num_threads(1)
    from tests.distributed.deepspeed_on_cpu import deepspeed_on_cpu

    sharded = any(map(int, stage))
    with deepspeed_on_cpu() if sharded else nullcontext():
        # With `cpu=True`, Accelerate would leave DeepSpeed out.
        state = PartialState(cpu=not sharded)
        run(importlib.import_module(module).CASES, state, Path(out), world, *map(int, stage))
    # Trainers of the cases may still hold DDP, which is not to be freed after its process group: leave everything as it is.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(cases, state, out, *arguments):
    world, *stage = arguments
    for name, case in cases.items():
        folder = out / name
        if state.is_main_process:
            folder.mkdir(parents=True)
        state.wait_for_everyone()
        try:
            result = {"num_processes": PartialState().num_processes, **case(world, folder, *stage)}
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"result_{state.process_index}.pt")
        state.wait_for_everyone()
        if "error" in result:
            # The other process may be waiting in a collective of the same case: end here, with what was found.
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
