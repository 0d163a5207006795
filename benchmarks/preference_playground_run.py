"""One run of `preference_playground.py`: what a seed begins with, or an arm trained on it and measured."""

import json
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import preference_playground_data as data
import preference_playground_measures as measures
import preference_playground_settings as settings
import torch
from datasets import Dataset
from studies import PLAIN_CPU_RUN
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from hf_delta import DeltaDPOConfig, DeltaDPOTrainer
from hf_delta.playground import build_playground, playground_reward
from hf_delta.preference.lists import LIST_LOSSES
from hf_delta.preference.pairs import build_pairs


FILLED_TASK = "preference_playground_task.FilledSums"
PAIR = ("prompt", "chosen", "rejected")
_PLAIN_CPU_RUN = {**PLAIN_CPU_RUN, "logging_strategy": "no"}


@dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Args:
        study: name of the study; those with filled sums share what a seed begins with.
        arm: name of the arm; `None` prepares and evaluates what the seed begins with.
        keys: recipe keys of the arm, with learning rate and beta.
        seed: of the bases, of data, of training and of the evaluations, so that arms are paired.
        settings: of the study.
        bases: directory of the playgrounds of addition; what is missing is built.
        out: file of the result; everything else a seed begins with is beside it.
    """

    study: str
    arm: str | None
    keys: dict
    seed: int
    settings: dict
    bases: Path
    out: Path

    def described(self) -> dict:
        """What must be equal for a result on disk to be this job's."""
        return {"study": self.study, "arm": self.arm, "keys": self.keys, "seed": self.seed, "settings": self.settings}

    @property
    def is_delta(self) -> bool:
        return self.settings["family"] == "addition"

    @property
    def rows(self) -> Path:
        """Lists sampled from the base, or pairs of the two weak models."""
        return self.out.parent / (f"pairs-{self.study}" if self.is_delta else "lists") / f"{self.seed}.jsonl"

    def playground(self, steps: int | None = None) -> Path:
        """Base model of the study, or a teacher after that many steps."""
        if not self.is_delta:
            folder, task = self.out.parent / "filled" / str(self.seed), FILLED_TASK
        else:
            folder, task = self.bases / str(self.seed), "addition"
            folder = folder if steps is None else self.out.parent / f"teachers-{steps}" / str(self.seed)
        steps = steps or self.settings["pretrain_steps"]
        return build_playground(folder, seed=self.seed, task=task, pretrain_steps=steps, progress=False)

    def problems(self, a_level: int, held_out: bool) -> list:
        levels = tuple(self.settings["levels"])
        return data.problems(self.settings["family"], levels, a_level, self.seed, held_out=held_out)

    @cached_property
    def questions(self) -> list[dict]:
        return [data.question(problem) for problem in self.problems(self.settings["held_out"], held_out=True)]

    @cached_property
    def held_out_pairs(self) -> list[dict]:
        return data.planted_pairs(self.problems(self.settings["held_out_pairs"], held_out=True), self.seed)


def prepare_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def run(job: Job) -> Path:
    """Does a job and writes its result: to the end, or not at all."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = _begun(job) if job.arm is None else _trained(job)
    seconds = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    content = {**job.described(), **found, **{key: round(value, 2) for key, value in seconds.items()}}
    beside = job.out.with_suffix(".unfinished")
    beside.write_text(json.dumps(content) + "\n")
    beside.replace(job.out)
    return job.out


def loaded(playground: Path):
    folder = playground / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _begun(job):
    """Base models, what they answer, and the rows that come of them."""
    found = {"base": _pass_rates(job, *loaded(job.playground()))}
    training = job.problems(job.settings["rows_a_level"], held_out=False)
    if not job.is_delta:
        model, tokenizer = loaded(job.playground())
        size, tokens = settings.LARGEST_LIST, job.settings["tokens"]
        lists = data.sampled_lists(model, tokenizer, training, size, job.seed, tokens)
        data.write_lines(job.rows, lists)
        return found | {"lists": len(lists), "lists_of": len(training), "slots": _slots(job, tokenizer)}
    teachers = {name: job.playground(steps) for name, steps in job.settings["teachers"].items()}
    found |= {name: _pass_rates(job, *loaded(folder)) for name, folder in teachers.items()}
    prompts = data.write_lines(job.rows.with_name(f"prompts-{job.seed}.jsonl"), [data.question(p) for p in training])
    # What a run that was stopped left: pairs are made anew.
    job.rows.unlink(missing_ok=True)
    built = build_pairs(
        teachers["strong"] / "model",
        teachers["weak"] / "model",
        prompts,
        job.rows,
        max_new_tokens=job.settings["tokens"],
        reward=playground_reward,
        student=job.playground() / "model",
        device="cpu",
        progress=False,
    )
    return found | {"pairs": built.pairs, "dropped": built.dropped, "delta": built.delta.to_dict()}


def _slots(job, tokenizer):
    """The measures of a mask that knows where a mistake can be, and not in which column it is."""
    rows = job.held_out_pairs
    inside = measures.tokenised(tokenizer, rows)[1][:, 1:]
    return measures.mask_measures(measures.places(inside, rows, "slots"), inside, rows)


def training_rows(job: Job) -> list[dict]:
    """What an arm is trained on."""
    if job.is_delta:
        return data.read_lines(job.rows)
    if "size" not in job.settings:
        drawn = job.problems(job.settings["rows_a_level"], held_out=False)
        return data.planted_pairs(drawn, job.seed, job.settings.get("flipped", 0.0))
    lists = data.shortened(data.read_lines(job.rows), job.settings["size"])
    if job.arm == settings.BEST_AND_WORST:
        return data.best_against_worst(lists)
    return data.drawn_pairs(lists, job.seed) if job.arm == settings.DRAWN_PAIRS else lists


def batch_rows(job: Job) -> int:
    """Rows in a step: as many prompts in each arm of a study."""
    pairs = job.settings["size"] // 2 if job.arm == settings.DRAWN_PAIRS else 1
    return job.settings["prompts"] * pairs


def sequences(job: Job) -> int:
    """Sequences that an arm sees in all."""
    listwise = set(job.keys.get("loss_type", ())) & set(LIST_LOSSES)
    size = job.settings["size"] if listwise else 1 if job.arm == settings.SFT else 2
    return job.settings["steps"] * batch_rows(job) * size


def _trained(job):
    playground = job.playground()
    model, tokenizer = loaded(playground)
    rows = training_rows(job)
    with tempfile.TemporaryDirectory() as folder:
        trainer = (_sft if job.arm == settings.SFT else _preference)(job, model, tokenizer, rows, folder)
        trainer.remove_callback(PrinterCallback)
        masked = job.settings["family"] == "filled_sums" and trainer.rule is not None
        before = _masks(job, trainer, tokenizer) if masked else {}
        trainer.train()
        found = {"rows": len(rows), "sequences": sequences(job), **_pass_rates(job, model, tokenizer)}
        if not job.is_delta:
            found |= _on_pairs(job, trainer.model, loaded(playground)[0], tokenizer, rows)
        if masked:
            found |= {"masks": _masks(job, trainer, tokenizer), "masks before": before}
    return found


def _arguments(job, folder):
    return {
        **settings.TRAINING,
        **job.keys,
        **_PLAIN_CPU_RUN,
        "output_dir": folder,
        "max_steps": job.settings["steps"],
        "per_device_train_batch_size": batch_rows(job),
        "seed": job.seed,
    }


def _preference(job, model, tokenizer, rows, folder):
    args = DeltaDPOConfig(**_arguments(job, folder))
    columns = ("prompt", "completions", "scores") if args.uses_lists else PAIR
    columns += ("sample_id",) if args.feasible else ()
    dataset = Dataset.from_list([{key: row[key] for key in columns} for row in rows])
    return DeltaDPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)


def _sft(job, model, tokenizer, rows, folder):
    arguments = {key: value for key, value in _arguments(job, folder).items() if key != "logps_kernel"}
    dataset = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    args = SFTConfig(**arguments, completion_only_loss=True)
    return SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)


def _pass_rates(job, model, tokenizer):
    wanted = job.settings
    return measures.pass_rates(model, tokenizer, job.questions, wanted["samples"], wanted["tokens"], job.seed)


def _on_pairs(job, policy, reference, tokenizer, rows):
    measured = measures.pair_measures(policy, reference, tokenizer, job.held_out_pairs)
    found = {"held_out": measures.summarised(measured)}
    if "flipped" in job.settings:
        training = measures.pair_measures(policy, reference, tokenizer, rows)["margins"]
        exchanged = torch.tensor([row["flipped"] for row in rows])
        margins = {"training": training, "held out": measured["margins"]}
        margins |= {"right": training[~exchanged], "exchanged": training[exchanged]}
        beta, epsilon = job.keys["beta"], settings.EPSILON
        found["losses"] = {name: measures.loss_tail(values, beta, epsilon) for name, values in margins.items()}
    return found


@torch.no_grad()
def _masks(job, trainer, tokenizer):
    """What the weights of the held-out pairs' tokens tell of the planted ones: those of the reward, and of the KL."""
    rows = job.held_out_pairs
    tokens, inside = measures.tokenised(tokenizer, rows)
    inputs = {"input_ids": tokens, "attention_mask": (tokens != tokenizer.pad_token_id).long(), "completion_mask": inside.long()}  # fmt: skip
    trainer.model.eval()
    # The order of random numbers of the training that may follow is not ours to change.
    with torch.random.fork_rng(devices=[]):
        terms = trainer.token_terms(trainer.scored_tokens(trainer.model, inputs), inputs)
    return {
        name: measures.mask_measures(mask, inside[:, 1:], rows)
        for name, mask in (("reward", terms.reward), ("kl", terms.kl))
        if mask is not None
    }
