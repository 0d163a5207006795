"""Things that one process does for all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list

from hf_delta.errors import InputError
from hf_delta.run.console import OneProcessError


T = TypeVar("T")


def on_main(function: Callable[..., T], *args: Any) -> T:
    """Call a function on the main process only; every process gets its result, or its `InputError`.

    Collective. The result travels to the other processes, so keep it small.
    """
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function(*args)
        except InputError as error:
            # Raised everywhere below: a process that waits for a dead one would hang.
            outcome[1] = str(error)
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


def main_first(function: Callable[..., T], *args: Any) -> T:
    """Call a function on every process, on the main one first, so that the others find its files in the cache.

    Collective. An `InputError` of the main process is raised on all.
    """
    result: list[T] = []
    on_main(lambda: result.append(function(*args)))
    return result[0] if result else function(*args)


@contextmanager
def naming_the_process() -> Iterator[None]:
    """Inside, processes work on different rows: an `InputError` of one is reported by that one, with its number."""
    try:
        yield
    except InputError as error:
        state = PartialState()
        if state.num_processes == 1:
            raise
        raise OneProcessError(f"process {state.process_index}: {error}") from error


def parallelism(accelerator: Accelerator) -> str:
    """How a run is spread over its processes: what Accelerate has made of its configuration, and not what that says."""
    state, count = accelerator.state, accelerator.num_processes
    if state.distributed_type == DistributedType.FSDP:
        return f"FSDP{state.fsdp_plugin.fsdp_version}, {count} processes"
    if state.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{state.deepspeed_plugin.zero_stage}, {count} processes"
    return "one process" if count == 1 else f"data parallel, {count} processes"
