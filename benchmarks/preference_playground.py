"""Preference optimisation on the playground: token weights, lists, bounds on losses, and pairs of two weak models.

    python benchmarks/preference_playground.py tune choose      # each arm over the grid, on the tuning seeds; writes the choice
    python benchmarks/preference_playground.py final report     # each arm with its choice, on fresh seeds; tables and picture

A seed is a base model, pre-trained from scratch, with its own problems, order and draws; arms are paired by seed. Measured are
problems and pairs that neither the base model nor training has seen. Studies, settings, seeds, measures and rules are those of
`preference_playground_settings.py`. Every run is a file in `--out` that appears when it is complete: started again, the benchmark
goes on where it was.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import preference_playground_settings as settings
from preference_playground_report import draw, markdown, summary, value
from preference_playground_run import Job, prepare_worker, run
from studies import conduct, is_done


NAME = "preference_playground"
QUICK = {
    "steps": 2, "pretrain_steps": 2, "held_out": 2, "held_out_pairs": 2, "samples": 1, "rows_a_level": 6, "tokens": 8, "prompts": 2,
    "teachers": {"strong": 2, "weak": 1},
}  # fmt: skip


class Study:
    """Runs by study, arm, keys and seed, each a file.

    Args:
        out: directory of the files.
        bases: directory of the playgrounds of addition, which are built as needed.
        changes: to the settings of all studies.
        workers: processes; each uses one thread.
    """

    def __init__(self, out: Path, bases: Path, changes: dict, workers: int):
        self.out, self.bases, self.changes, self.workers = out, bases, changes, workers
        out.mkdir(parents=True, exist_ok=True)

    def settings_of(self, study: str) -> dict:
        common = {"samples": settings.SAMPLES, "held_out_pairs": settings.HELD_OUT_PAIRS}
        common |= {"teachers": settings.TEACHERS}
        own = {key: value for key, value in settings.STUDIES[study].items() if key not in ("arms", "references")}
        return {**common, **own, **self.changes}

    def job(self, study: str, arm: str | None, keys: dict, seed: int) -> Job:
        parts = [study, arm or "begin", *keys_text(keys), str(seed)]
        name = "-".join("".join(c if c.isalnum() or c == "." else "_" for c in part) for part in parts)
        own = settings.STUDIES[study]["arms"].get(arm, {})
        return Job(study, arm, {**own, **keys}, seed, self.settings_of(study), self.bases, self.out / f"{name}.json")

    def beginnings(self, studies: Iterable[str], seeds: Iterable[int]) -> dict[str, list[Job]]:
        """What the seeds of studies begin with, by the study that has it of its own."""
        names = dict.fromkeys(settings.BEGINS_WITH.get(study, study) for study in studies)
        return {name: [self.job(name, None, {}, seed) for seed in seeds] for name in names}

    def conduct(self, jobs: list[Job]) -> None:
        """Does what is missing; what the seeds begin with first."""
        begun = self.beginnings([job.study for job in jobs], sorted({job.seed for job in jobs}))
        for part in ([job for jobs in begun.values() for job in jobs], jobs):
            conduct(part, run, prepare_worker, self.workers)

    def results(self, jobs: list[Job]) -> list[dict]:
        if missing := [job.out.stem for job in jobs if not is_done(job)]:
            raise SystemExit(f"{len(missing)} runs are missing in {self.out}, {missing[0]} the first.")
        return [json.loads(job.out.read_text()) for job in jobs]


def keys_text(keys: dict) -> list[str]:
    return [f"{key}={value}" for key, value in keys.items()]


def tuning_jobs(study: Study, seeds: list[int]) -> dict[tuple[str, str], list[list[Job]]]:
    """For each study and arm that is tuned: jobs of all seeds, for each point of the grid."""
    return {
        (name, arm): [[study.job(name, arm, keys, seed) for seed in seeds] for keys in settings.grid(name, arm)]
        for name, content in settings.STUDIES.items()
        if name not in settings.TUNED_WITH
        for arm in content["arms"]
        if len(settings.grid(name, arm)) > 1
    }


def choose(study: Study, seeds: list[int]) -> dict[str, dict[str, dict]]:
    """By study and arm: the chosen `keys`, by the rule of the settings, and the `means` of all points of the grid."""
    choice = {
        name: {arm: {"keys": settings.grid(name, arm)[0]} for arm in content["arms"]}
        for name, content in settings.STUDIES.items()
    }
    for (name, arm), points in tuning_jobs(study, seeds).items():
        means = [statistics.mean(value(run, settings.PRIMARY) for run in study.results(jobs)) for jobs in points]
        best = max(range(len(points)), key=means.__getitem__)
        choice[name][arm] = {"keys": settings.grid(name, arm)[best], "means": [round(mean, 4) for mean in means]}
    for name in settings.TUNED_WITH.keys() & choice.keys():
        choice[name] = {arm: {"keys": chosen["keys"]} for arm, chosen in choice[settings.TUNED_WITH[name]].items()}
    return choice


def write_choice(path: Path, choice: dict) -> None:
    if path.exists() and json.loads(path.read_text()) != choice:
        raise SystemExit(f"{path} has another choice. Final runs go with it: delete it only to begin anew.")
    path.write_text(json.dumps(choice, indent=2, ensure_ascii=False) + "\n")


def final_jobs(study: Study, choice: dict, seeds: list[int]) -> dict[str, dict[str, list[Job]]]:
    return {
        name: {
            arm: [study.job(name, arm, choice[name][arm]["keys"], seed) for seed in seeds] for arm in content["arms"]
        }
        for name, content in settings.STUDIES.items()
    }


def main(argv=None):
    stages = ("tune", "choose", "final", "report")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=stages)
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=list(settings.TUNING_SEEDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(settings.SEEDS), help="of the final runs")
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME, help="one file a run")
    parser.add_argument("--bases", type=Path, help="playgrounds of addition, by seed; default: bases in --out")
    parser.add_argument("--choice", type=Path, default=Path(__file__).parent / f"{NAME}_choice.json")
    parser.add_argument("--report", type=Path, default=Path("docs/preference"), help="where figures and picture go")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two steps and hardly any problem, to see that it runs")
    args = parser.parse_args(argv)
    if set(args.seeds) & set(args.tuning_seeds):
        parser.error("settings are to be chosen on seeds that are not compared: change --tuning-seeds.")
    study = Study(args.out, args.bases or args.out / "bases", QUICK if args.quick else {}, args.workers)
    for stage in [stage for stage in stages if stage in args.stages]:
        STAGES[stage](study, args)


def _tune(study, args):
    points = [point for points in tuning_jobs(study, args.tuning_seeds).values() for point in points]
    study.conduct([job for point in points for job in point])


def _choose(study, args):
    write_choice(args.choice, choose(study, args.tuning_seeds))
    print(args.choice.read_text())


def _final(study, args):
    arms = [jobs for arms in final_jobs(study, _choice(args), args.seeds).values() for jobs in arms.values()]
    # Seed by seed all arms, so that a study cut short is balanced.
    study.conduct([job for jobs in zip(*arms) for job in jobs])


def _report(study, args):
    choice = _choice(args)
    begun = {name: study.results(jobs) for name, jobs in study.beginnings(settings.STUDIES, args.seeds).items()}
    found = {}
    for name, arms in final_jobs(study, choice, args.seeds).items():
        results = {arm: study.results(jobs) for arm, jobs in arms.items()}
        found[name] = summary(name, results, begun[settings.BEGINS_WITH.get(name, name)])
    content = {"seeds": args.seeds, "choice": choice, "begun": begun, "studies": found}
    args.report.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False).replace('{"study"', '\n{"study"')
    (args.report / f"{NAME}.json").write_text(text + "\n")
    print("\n\n".join(markdown(name, figures) for name, figures in found.items()))
    draw(found, args.report / f"{NAME}.png")


def _choice(args):
    return json.loads(args.choice.read_text())


STAGES = {"tune": _tune, "choose": _choose, "final": _final, "report": _report}


if __name__ == "__main__":
    main()
