"""Runs of a study, each a file: what is missing is done, by several processes, and what is there is not done again."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm


# Of a trainer of TRL.
PLAIN_CPU_RUN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def is_done(job: Any) -> bool:
    """Whether the file `job.out` is there, which must be a run with what `job.described()` says."""
    if not job.out.exists():
        return False
    content = json.loads(job.out.read_text())
    described = json.loads(json.dumps(job.described()))
    if {key: content[key] for key in described} != described:
        raise SystemExit(f"{job.out} is a run with other settings: choose another --out.")
    return True


def conduct(jobs: Sequence[Any], run: Callable, prepare_worker: Callable, workers: int) -> None:
    """Call `run(job)` for every job that is not done, each in one of the workers, with a bar and the time left."""
    missing = [job for job in jobs if not is_done(job)]
    failed = []
    # A fresh interpreter each: threads and random states are nobody else's.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="runs", unit="run", smoothing=0.05) as bar,
    ):
        futures = {pool.submit(run, job): job for job in missing}
        for future in as_completed(futures):
            if error := future.exception():
                failed.append(f"{futures[future].out.stem}: {type(error).__name__}: {error}")
                tqdm.write(failed[-1])
            bar.update()
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed:\n" + "\n".join(failed))
