"""Adapters at equal trained parameters, each at its own learning rate: what they learn, forget and cost.

    python benchmarks/adapter_quality.py --out docs/adapters

A playground model that can add, and has seen a few subtractions, is fine-tuned on worked subtractions. Measured are greedy
answers to held-out problems: `new`, the accuracy on subtraction, and `old`, the accuracy on addition that is left. A seed
is a base model, pre-trained from scratch, with its own training data, held-out problems and adapter initialisation.

Learning rates are tuned on seeds of their own: factors of 4 until the best is inside, then factors of 2 around it; once
for `new` alone and once for the mean of `new` and `old`. A third one is where `new` reaches 0.75, so that forgetting is
compared after equal learning. At all three, methods are compared on the final seeds, paired with LoRA. Every run is written
at once, and started again the study goes on where it was.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from adapter_quality_methods import METHODS, adapted, trained
from adapter_quality_report import draw, markdown
from adapter_quality_task import EVALUATED, CarefulAddition, Subtraction, accuracy, held_out, training_batches
from timing import Case, interleaved, spread
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hf_delta.adapters.dora import disable_fast_dora, enable_fast_dora
from hf_delta.playground import build_playground
from hf_delta.playground.pretrain import response_loss


STEPS, WARMUP = 60, 6
LEVEL = 0.75  # of subtraction, at which forgetting is compared
WIDEST = 8  # powers of 2 from where the search starts
PEFT_DORA = "DoRA, PEFT's computation"
GOALS = {"new": lambda run: run["new"], "both": lambda run: (run["new"] + run["old"]) / 2}


class Study:
    """Runs by (method, learning rate, seed), kept in a file.

    Args:
        path: of the JSON file; one that is there is continued.
        playgrounds: where base models are built.
        settings: what must be the same for runs to be comparable.
    """

    def __init__(self, path: Path, playgrounds: Path, settings: dict):
        self.path, self.playgrounds, self.settings = path, playgrounds, settings
        self.content = {"settings": settings, "runs": [], "bases": {}, "costs": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != settings:
                raise SystemExit(
                    f"{path} has runs with {self.content['settings']}, not {settings}: choose another --out."
                )
        self.runs = {(run["method"], run["lr"], run["seed"]): run for run in self.content["runs"]}
        self.loaded = {}

    def run(self, method: str, lr: float, seed: int) -> dict:
        key = (method, lr, seed)
        if key not in self.runs:
            self.runs[key] = self._train(method, lr, seed)
            self.content["runs"].append(self.runs[key])
            self.save()
        return self.runs[key]

    def save(self):
        beside = self.path.with_suffix(".unfinished")
        # One run a line.
        runs = ",\n".join(map(json.dumps, self.content["runs"]))
        rest = json.dumps({**self.content, "runs": []}, indent=1)
        beside.write_text(rest.replace('"runs": []', f'"runs": [\n{runs}\n]') + "\n")
        beside.replace(self.path)

    def base(self, seed: int):
        """Base model, tokenizer, new and old held-out problems of a seed."""
        if seed not in self.loaded:
            folder = build_playground(
                self.playgrounds / f"arithmetic-{seed}",
                seed=seed,
                task="adapter_quality_task.Arithmetic",
                pretrain_steps=self.settings["pretrain_steps"],
                progress=False,
            )
            model = AutoModelForCausalLM.from_pretrained(folder / "model")
            tokenizer = AutoTokenizer.from_pretrained(folder / "model")
            count = self.settings["evaluated"]
            problems = held_out(Subtraction(), seed, count), held_out(CarefulAddition(), seed, count)
            self.loaded[seed] = model, tokenizer, *problems
            new, old = (accuracy(model, tokenizer, part) for part in problems)
            self.content["bases"][str(seed)] = {"new": new, "old": old}
        return self.loaded[seed]

    def _train(self, method, lr, seed):
        base, tokenizer, new, old = self.base(seed)
        torch.manual_seed(seed)
        model = adapted(base, method)
        steps = self.settings["steps"]
        optimizer = torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / steps)
        )
        model.train()
        for batch in training_batches(tokenizer, seed, steps):
            train_step(model, optimizer, batch)
            schedule.step()
        return {
            "method": method,
            "lr": lr,
            "seed": seed,
            "new": accuracy(model, tokenizer, new),
            "old": accuracy(model, tokenizer, old),
        }


def train_step(model, optimizer, batch):
    response_loss(model, *batch).backward()
    clip_grad_norm_(trained(model), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def tune(study: Study, method: str, seeds: list[int], progress=lambda: None) -> dict[str, float]:
    """The learning rate that is best on the tuning seeds, for every goal; neighbours at factors of 2 are no better.

    And the one at which all methods have learnt about as much.
    """
    scores = {}

    def runs(exponent):
        if exponent not in scores:
            scores[exponent] = []
            for seed in seeds:
                scores[exponent].append(study.run(method, METHODS[method].lr * 2.0**exponent, seed))
                progress()
        return scores[exponent]

    def best(goal, exponents):
        return max(exponents, key=lambda e: (statistics.mean(map(GOALS[goal], runs(e))), -abs(e)))

    chosen = {}
    for goal in GOALS:
        tried = [-2, 0, 2]
        while (top := best(goal, tried)) in (tried[0], tried[-1]) and abs(top) < WIDEST:
            tried = sorted([*tried, top + (2 if top > 0 else -2)])
        chosen[goal] = METHODS[method].lr * 2.0 ** best(goal, [top - 1, top, top + 1])
    learnt = [(METHODS[method].lr * 2.0**e, statistics.mean(run["new"] for run in runs(e))) for e in sorted(scores)]
    return {**chosen, "equal": rate_reaching(LEVEL, learnt) or chosen["new"]}


def rate_reaching(level: float, learnt: list[tuple[float, float]]) -> float | None:
    """The lowest learning rate that gives an accuracy, between two that were tried; None if none gives it.

    Args:
        learnt: learning rates from low to high with their accuracies.
    """
    for (low, before), (high, after) in zip(learnt, learnt[1:]):
        if before < level <= after:
            lr = low * (high / low) ** ((level - before) / (after - before))
            return float(f"{lr:.2g}")
    return None


def costs(study: Study, methods: list[str], seed: int, rounds: int) -> dict[str, dict]:
    """Trained parameters, bytes on disk and of the optimizer, and CPU time of a step beside LoRA's."""
    base, tokenizer, *_ = study.base(seed)
    (batch,) = training_batches(tokenizer, seed, 1)
    cases, found = {}, {}
    for name in [*methods, *([PEFT_DORA] if "DoRA" in methods else [])]:
        torch.manual_seed(seed)
        model = adapted(base, "DoRA" if name == PEFT_DORA else name).train()
        optimizer = torch.optim.AdamW(trained(model), lr=1e-4, weight_decay=0.0)
        cases[name] = Case(
            lambda model=model, optimizer=optimizer: train_step(model, optimizer, batch),
            before=enable_fast_dora if name == "DoRA" else disable_fast_dora,
            repeat=5,
        )
        train_step(model, optimizer, batch)
        state = [t for tensors in optimizer.state.values() for t in tensors.values()]
        found[name] = {
            "parameters": sum(p.numel() for p in trained(model)),
            "file_bytes": _file_bytes(model),
            "optimizer_bytes": sum(t.numel() * t.element_size() for t in state),
        }
    seconds = interleaved(cases, rounds, "cpu")
    for name, values in seconds.items():
        relative = spread([ours / lora for ours, lora in zip(values, seconds["LoRA"])])
        found[name]["seconds"] = statistics.median(values)
        found[name]["ratio"] = [relative.q25, relative.median, relative.q75]
    disable_fast_dora()
    return found


def _file_bytes(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def conduct(study: Study, methods: list[str], tuning: list[int], seeds: list[int], rounds: int) -> None:
    """Tunes every method, runs the final seeds, measures the costs; writes all of it into the study."""
    content = study.content
    content.update(tuning_seeds=tuning, final_seeds=seeds, chosen={})
    # As a rule seven learning rates are tried.
    expected = len(methods) * (7 * len(tuning) + 3 * len(seeds))
    with tqdm(total=expected, desc="fine-tuning", unit="run", smoothing=0.05) as bar:
        for method in methods:
            bar.set_postfix_str(f"{method}, learning rate")
            content["chosen"][method] = tune(study, method, tuning, bar.update)
            study.save()
        pairs = list(dict.fromkeys((m, lr) for m in methods for lr in content["chosen"][m].values()))
        bar.total = bar.n + len(pairs) * len(seeds)
        for seed in seeds:
            for method, lr in pairs:
                bar.set_postfix_str(f"{method}, seed {seed}")
                study.run(method, lr, seed)
                bar.update()
    if not set(methods) <= set(content["costs"]):
        content["costs"] = costs(study, methods, seeds[0], rounds)
        study.save()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="LoRA is always among them"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="for the comparison")
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[100, 101, 102], help="for the learning rates")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--quick", action="store_true", help="two steps and hardly any problem, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("docs/adapters"))
    parser.add_argument("--playgrounds", type=Path, default=Path("runs"))
    args = parser.parse_args(argv)
    if set(args.seeds) & set(args.tuning_seeds):
        parser.error("learning rates are to be tuned on seeds that are not compared: change --tuning-seeds.")
    torch.set_num_threads(1)
    # Both would break the progress bar again and again.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": STEPS, "evaluated": EVALUATED, "pretrain_steps": None}
    if args.quick:
        settings = {"steps": 2, "evaluated": 2, "pretrain_steps": 2}
    study = Study(args.out / "adapter_quality.json", args.playgrounds, settings)
    methods = [name for name in METHODS if name in ("LoRA", *args.methods)]
    conduct(study, methods, args.tuning_seeds, args.seeds, args.rounds)
    print(markdown(study.content))
    draw(study.content, args.out / "adapter_quality.png")


if __name__ == "__main__":
    main()
