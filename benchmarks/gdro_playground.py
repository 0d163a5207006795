"""Group-DRO on the playground: GRPO, bin balancing, Prompt-GDRO, Rollout-GDRO, both, and both with ΔL, at equal rollouts.

    python benchmarks/gdro_playground.py prompts            # GRPO with two sets of prompts, on the tuning seeds
    python benchmarks/gdro_playground.py screen choose      # all variants on the tuning seeds; writes the choice
    python benchmarks/gdro_playground.py final report       # the chosen ones on fresh seeds; table and picture

All of it again, and apart, with `--family faulty_table`, the playground's other family of problems.

A seed is a base model, pre-trained from scratch, with its own problems, order of prompts and draws; arms are paired by seed.
Measured are problems that neither the base model nor training has seen. Settings, seeds, measures and rules are those of
`gdro_playground_settings.py`. Every run is a file in `--out` that appears when it is complete: started again, the benchmark goes
on where it was.
"""

import argparse
import json
import statistics
from pathlib import Path

import gdro_playground_settings as settings
from gdro_playground_report import draw, markdown, scores, summary
from gdro_playground_run import Job, prepare_worker, run
from studies import conduct, is_done


BASE = "base model"
GRPO_ALL_PROMPTS = "GRPO, all prompts"
NAME = "gdro_playground"
QUICK = {"steps": 2, "pretrain_steps": 2, "samples": 8, "samples_during": 1, "every": 1, "problems_a_level": 1}


class Study:
    """Runs by arm and seed, each a file.

    Args:
        out: directory of the files.
        bases: directory of the playgrounds, which are built as needed.
        options: numbers of steps, prompts and evaluations, and what the family changes; the same for all arms.
        workers: processes; each uses one thread.
    """

    def __init__(self, out: Path, bases: Path, options: dict, workers: int):
        self.out, self.bases, self.options, self.workers = out, bases, options, workers
        out.mkdir(parents=True, exist_ok=True)

    def job(self, arm: str, keys: dict, seed: int) -> Job:
        options = self.options | ({"prompts_a_level": None} if arm == GRPO_ALL_PROMPTS else {})
        name = "".join(c if c.isalnum() else "_" for c in arm)
        return Job(None if arm == BASE else arm, keys, seed, options, self.bases, self.out / f"{name}-{seed}.json")

    def conduct(self, arms: dict[str, dict], seeds: list[int]) -> None:
        """Does what is missing: base models first, then seed by seed all arms, so that a study cut short is balanced."""
        bases = [self.job(BASE, {}, seed) for seed in seeds]
        runs = [self.job(arm, keys, seed) for seed in seeds for arm, keys in arms.items()]
        conduct(bases + runs, run, prepare_worker, self.workers)

    def results(self, arms: dict[str, dict], seeds: list[int]) -> dict[str, list[dict]]:
        """Runs of each arm, seed by seed."""
        found = {}
        for arm, keys in arms.items():
            jobs = [self.job(arm, keys, seed) for seed in seeds]
            if missing := [job.seed for job in jobs if not is_done(job)]:
                raise SystemExit(f"{arm}: no run of seeds {missing} in {self.out}.")
            found[arm] = [json.loads(job.out.read_text()) for job in jobs]
        return found

    def summary(self, arms: dict[str, dict], seeds: list[int]) -> dict:
        return summary(self.results(arms, seeds), self.results({BASE: {}}, seeds)[BASE])


def choose(results: dict[str, list[dict]]) -> dict:
    """The best Prompt and the best Rollout variant by the rule of the settings, and the means it went by."""
    means = {arm: statistics.mean(scores(runs, settings.PRIMARY)) for arm, runs in results.items()}
    best = {
        kind: max(variants, key=means.get)
        for kind, variants in (("prompt", settings.PROMPT_VARIANTS), ("rollout", settings.ROLLOUT_VARIANTS))
    }
    return {**best, "measure": settings.PRIMARY, "means": {arm: round(mean, 4) for arm, mean in means.items()}}


def write_choice(path: Path, choice: dict) -> None:
    if path.exists() and json.loads(path.read_text()) != choice:
        raise SystemExit(f"{path} has another choice. Final runs go with it: delete it only to begin anew.")
    path.write_text(json.dumps(choice, indent=2, ensure_ascii=False) + "\n")


def main(argv=None):
    stages = ("prompts", "screen", "choose", "final", "report")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=stages)
    parser.add_argument("--family", choices=list(settings.FAMILIES), default="addition")
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=list(settings.TUNING_SEEDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(settings.SEEDS), help="of the final runs")
    parser.add_argument("--out", type=Path, help="one file a run; default: runs/gdro_playground[_family]")
    parser.add_argument("--bases", type=Path, help="playgrounds, by seed; default: bases in --out")
    parser.add_argument("--choice", type=Path, help="default: gdro_playground_choice[_family].json beside this file")
    parser.add_argument("--report", type=Path, default=Path("docs/rl"), help="where runs and picture go")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two steps and hardly any problem, to see that it runs")
    args = parser.parse_args(argv)
    if set(args.seeds) & set(args.tuning_seeds):
        parser.error("variants are to be chosen on seeds that are not compared: change --tuning-seeds.")
    options = {"steps": settings.STEPS, "pretrain_steps": None, "prompts_a_level": settings.PROMPTS_A_LEVEL}
    options |= settings.EVALUATION | settings.FAMILIES[args.family] | (QUICK if args.quick else {})
    suffix = "" if args.family == "addition" else f"_{args.family}"
    args.report_name = NAME + suffix
    args.choice = args.choice or Path(__file__).parent / f"{NAME}_choice{suffix}.json"
    args.out = args.out or Path("runs") / args.report_name
    study = Study(args.out, args.bases or args.out / "bases", options, args.workers)
    for stage in [stage for stage in stages if stage in args.stages]:
        STAGES[stage](study, args)


def _prompts(study, args):
    arms = {settings.GRPO: {}, GRPO_ALL_PROMPTS: {}}
    seeds = args.tuning_seeds[: len(settings.PROMPTS_SEEDS)]
    study.conduct(arms, seeds)
    found = study.summary(arms, seeds)
    print(markdown(found))
    lost = found["arms"][GRPO_ALL_PROMPTS]["measures"][settings.PRIMARY]["minus GRPO"][0]
    if lost > settings.PROMPTS_TOLERANCE:
        raise SystemExit(f"GRPO loses {lost:.3f} with {settings.PROMPTS_A_LEVEL} prompts a level: take all of them.")


def _screen(study, args):
    study.conduct(settings.SCREENED, args.tuning_seeds)
    print(markdown(study.summary(settings.SCREENED, args.tuning_seeds)))


def _choose(study, args):
    write_choice(args.choice, choose(study.results(settings.SCREENED, args.tuning_seeds)))
    print(args.choice.read_text())


def _final(study, args):
    study.conduct(settings.final_arms(json.loads(args.choice.read_text())), args.seeds)


def _report(study, args):
    choice = json.loads(args.choice.read_text())
    found = {
        "settings": study.options,
        "choice": choice,
        "screen": study.summary(settings.SCREENED, args.tuning_seeds),
        "final": study.summary(settings.final_arms(choice), args.seeds),
    }
    args.report.mkdir(parents=True, exist_ok=True)
    print(markdown(found["final"]), "Screen:", markdown(found["screen"]), sep="\n\n")
    lines = json.dumps(found, ensure_ascii=False).replace('{"seed"', '\n{"seed"')
    (args.report / f"{args.report_name}.json").write_text(lines + "\n")
    draw(found["final"], args.report / f"{args.report_name}.png")


STAGES = {"prompts": _prompts, "screen": _screen, "choose": _choose, "final": _final, "report": _report}


if __name__ == "__main__":
    main()
