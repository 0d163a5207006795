"""One run of `gdro_playground.py`: an arm is trained on the playground of a seed, evaluated and recorded."""

import json
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from gdro_playground_settings import ADDITION, GENERATIONS, PROMPTS, TRAINING
from studies import PLAIN_CPU_RUN
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer
from hf_delta.evaluation import evaluate, load_rows
from hf_delta.evaluation.rows import natural_key
from hf_delta.playground import build_playground, rewards


@dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Args:
        arm: name of the arm; `None` builds and evaluates the base model only.
        keys: its recipe keys.
        seed: of the playground, of training and of the evaluations, so that arms are paired.
        settings: number of steps, prompts a level and evaluation settings, and what the family changes of `addition`.
        bases: directory of the playgrounds; what is missing is built.
        out: file of the result.
    """

    arm: str | None
    keys: dict
    seed: int
    settings: dict
    bases: Path
    out: Path

    @property
    def family(self) -> dict:
        """Task, reward and training settings of the family."""
        return {key: self.settings.get(key, value) for key, value in ADDITION.items()}

    def described(self) -> dict:
        """What must be equal for a result on disk to be this job's."""
        return {"arm": self.arm, "seed": self.seed, "keys": self.keys, "settings": self.settings}


def prepare_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


def run(job: Job) -> Path:
    """Does a job and writes its result: to the end, or not at all."""
    start = time.process_time()
    playground = build_playground(
        job.bases / str(job.seed),
        seed=job.seed,
        task=job.family["task"],
        pretrain_steps=job.settings["pretrain_steps"],
        progress=False,
    )
    held_out = _held_out(playground / "eval.jsonl", job.settings["problems_a_level"])
    found = _evaluated_base(playground, held_out, job) if job.arm is None else _trained(playground, held_out, job)
    content = {**job.described(), **found, "cpu_seconds": round(time.process_time() - start, 2)}
    beside = job.out.with_suffix(".unfinished")
    beside.write_text(json.dumps(content) + "\n")
    beside.replace(job.out)
    return job.out


def _evaluated_base(playground, held_out, job):
    model, tokenizer = _loaded(playground)
    return {"final": _scores(model, tokenizer, held_out, job, job.settings["samples"])}


def _trained(playground, held_out, job):
    model, tokenizer = _loaded(playground)
    steps = job.settings["steps"]
    rows = training_rows(playground / "train.jsonl", job.settings["prompts_a_level"])
    during = Evaluations(tokenizer, held_out, job)
    reward = getattr(rewards, job.family["reward"])
    keys = {**TRAINING, **job.family["training"], **job.keys, **_PLAIN_CPU_RUN}
    with tempfile.TemporaryDirectory() as folder:
        args = DeltaGRPOConfig(output_dir=folder, max_steps=steps, seed=job.seed, **keys)
        trainer = RecordedTrainer(
            model, reward, args, Dataset.from_list(rows), processing_class=tokenizer, callbacks=[during]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    curriculum = trainer.recorded(sorted({row["level"] for row in rows}, key=natural_key))
    check_budget(curriculum, steps)
    start = time.process_time()
    final = _scores(model, tokenizer, held_out, job, job.settings["samples"])
    return {
        "final": final,
        "during": during.found,
        "curriculum": curriculum,
        "cpu_seconds_evaluating": round(during.seconds + time.process_time() - start, 2),
    }


_PLAIN_CPU_RUN = {**PLAIN_CPU_RUN, "logging_steps": 1}


def _loaded(playground):
    folder = playground / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def training_rows(path: Path, a_level: int | None) -> list[dict]:
    """The first `a_level` different problems of each level in the order of the file, or all rows."""
    rows = load_rows_of_training(path)
    if a_level is None:
        return rows
    levels = defaultdict(dict)
    for row in rows:
        levels[row["level"]].setdefault(row["prompt_id"], row)
    chosen = {identifier for level in levels.values() for identifier in islice(level, a_level)}
    different = {row["prompt_id"]: row for row in rows}
    return [row for identifier, row in different.items() if identifier in chosen]


def load_rows_of_training(path: Path) -> list[dict]:
    # The checks of evaluation rows would refuse the repeated problems of the first level.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _held_out(path, a_level):
    levels = defaultdict(list)
    for row in load_rows(path):
        levels[row["level"]].append(row)
    return [row for level in levels.values() for row in level[:a_level]]


def _scores(model, tokenizer, held_out, job, samples):
    """pass@k by level."""
    report = evaluate(
        model,
        tokenizer,
        held_out,
        ks=sorted({1, samples}),
        samples=samples,
        max_new_tokens=TRAINING["max_completion_length"],
        seed=job.seed,
        progress=False,
    )
    return {
        f"pass@{k}": {level.name: round(level.pass_at_k[k].mean, 6) for level in report.levels}
        for k in report.settings["ks"]
    }


class Evaluations(TrainerCallback):
    """Held-out scores while training, and the CPU seconds they took."""

    def __init__(self, tokenizer, held_out, job):
        self.tokenizer, self.held_out, self.job = tokenizer, held_out, job
        self.found, self.seconds = {}, 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.job.settings["every"] or state.global_step == state.max_steps:
            return
        start = time.process_time()
        scores = _scores(model, self.tokenizer, self.held_out, self.job, self.job.settings["samples_during"])
        self.found[str(state.global_step)] = scores
        self.seconds += time.process_time() - start


class RecordedTrainer(DeltaGRPOTrainer):
    """Keeps what each step gave to each level: numbers of prompts and rollouts, what came of them, and weights."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, dict[str, list]]] = []
        self._weights = None

    def log_completion_column(self, name, values):
        super().log_completion_column(name, values)
        if name == "weight":
            self._weights = values

    def on_rollouts(self, rollouts, rewards_per_func, rows):
        super().on_rollouts(rollouts, rewards_per_func, rows)
        weights = self._weights or [1.0] * len(rows)
        levels = defaultdict(lambda: defaultdict(list))
        for row, reward, weight in zip(rows, rewards_per_func[:, 0].tolist(), weights, strict=True):
            levels[row["level"]][row["prompt_id"]].append((reward, weight))
        self.batches.append(levels)

    def recorded(self, names: list[str]) -> dict[str, list]:
        """By step and level: `prompts`, `rollouts`, `correct` rollouts, `silent` prompts, whose rewards are all equal, and
        the mean `weight` of a prompt's rollouts together, in those of a prompt of GRPO; None where the step had no prompt of the
        level."""
        found = {"levels": names, "prompts": [], "rollouts": [], "correct": [], "silent": [], "weight": []}
        for levels in self.batches:
            prompts = [list(levels[name].values()) for name in names]
            found["prompts"].append([len(level) for level in prompts])
            found["rollouts"].append([sum(map(len, level)) for level in prompts])
            # Graded or not, a reward of 1 is a right answer.
            found["correct"].append([sum(int(reward) for p in level for reward, _ in p) for level in prompts])
            found["silent"].append([sum(len({reward for reward, _ in p}) == 1 for p in level) for level in prompts])
            found["weight"].append([_mean_weight(level) for level in prompts])
        return found


def _mean_weight(prompts):
    if not prompts:
        return None
    total = sum(weight for prompt in prompts for _, weight in prompt)
    return round(total / (GENERATIONS * len(prompts)), 4)


def check_budget(curriculum: dict[str, list], steps: int) -> None:
    """Every arm has the same number of steps and of rollouts in each, or its run does not count."""
    totals = [sum(step) for step in curriculum["rollouts"]]
    if totals != [PROMPTS * GENERATIONS] * steps:
        raise RuntimeError(f"The run had {totals} rollouts, not {PROMPTS * GENERATIONS} in each of {steps} steps.")
