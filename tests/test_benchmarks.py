"""The benchmarks run, and their figures are consistent; their numbers stand in the docs."""

import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_variance_of_updates_agrees_with_updates_themselves(monkeypatch):
    """The Gram matrix against explicit updates of random gradients, method by method."""
    module = load("delta_l_variance")
    monkeypatch.setattr(module, "PROMPTS", 6)
    monkeypatch.setattr(module, "BATCH_PROMPTS", 2)
    monkeypatch.setattr(module, "BATCHES", 50)
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6 * module.GENERATIONS, 5, generator=generator) + 0.3
    lengths = torch.randint(1, 40, (6 * module.GENERATIONS,), generator=generator).double()
    found, rows = module.measured(gradients, lengths, seed=3)
    for name, coefficients in module.METHODS.items():
        updates = torch.stack([coefficients(lengths[r]) @ gradients[r].double() for r in rows])
        spread = (updates - updates.mean(0)).square().sum(1).mean().sqrt()
        assert found[name]["cv"] == pytest.approx((spread / updates.mean(0).norm()).item(), rel=1e-6)
    assert found["Dr.GRPO"]["scale"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_delta", "everything"])
def test_shares_of_a_step_add_up(playground, tmp_path, name):
    module = load("overhead")
    forwards, (total, seconds) = module.profiled(name, playground, tmp_path, steps=2)
    assert (seconds["on_loss (surrogate losses)"] > 0) == (name == "everything")
    assert forwards > 2 and all(value >= 0 for value in seconds.values())
    plain, inside = module.timed(name, playground, tmp_path / "plain", steps=2)
    assert 0 < sum(inside.values()) < plain and (inside["on_loss"] > 0) == (name == "everything")
    # All of ours together is inside the one call of `train`, which must be counted once.
    assert 0 < sum(seconds.values()) < total
    import cProfile
    import pstats
    import time

    trainer = module.build(name, playground, tmp_path / "again", 2, rows=64)
    profile = cProfile.Profile(time.process_time)
    profile.runcall(trainer.train)
    stats = pstats.Stats(profile)
    assert module._own_seconds(stats.stats)[0] == pytest.approx(stats.total_tt, rel=0.05)


def test_bytes_of_a_linear_layer(monkeypatch):
    """Peak and saved bytes against what a product of known sizes allocates and keeps."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("timing")
    weight, x = torch.randn(300, 200), torch.randn(100, 200)
    assert module.saved_bytes(lambda x: torch.nn.functional.linear(x, weight).sin().sin(), x) == 2 * 4 * 100 * 300
    weight.requires_grad_()
    assert module.saved_bytes(lambda x: torch.nn.functional.linear(x, weight), x) == 4 * 100 * 200
    # The square is let go before the sum is made: of 300 x 200, two exist at the most.
    square_then_double = module.Case(lambda: weight.detach().square().sum(0).expand(300, 200).contiguous().mul(2))
    assert module.peak_bytes(square_then_double, "cpu") == pytest.approx(2 * 4 * 300 * 200, rel=1e-3)


def test_difficulty_costs_less_than_its_bytes(capsys):
    module = load("difficulty")
    module.main(["--prompts", "3000", "--rounds", "3"])
    rows = [
        line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| decay", "| window"))
    ]
    assert len(rows) == len(module.WAYS) and all(16 < float(row[3]) <= 64 for row in rows)


@pytest.mark.slow
def test_table_of_adapters_has_every_row(monkeypatch, tmp_path, capsys):
    """Sizes are tiny and times worth nothing, but bytes and pivots are what they are."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("adapters")
    with_peer = importlib.util.find_spec("scipy") is not None
    groups = [name for name in module.GROUPS if name != "selection" or with_peer]
    module.main(["--quick", "--out", str(tmp_path), "--only", *groups])
    rows = json.loads((tmp_path / "speed.json").read_text())
    assert len(rows) == len([row for row in module.ROWS if row.group in groups])
    assert all(0 < row["q25"] <= row["median"] <= row["q75"] for row in rows)
    saved = {row["ours"]: row["median"] for row in rows if row["kind"] == "saved"}
    assert saved["PMSS"] == 1 < saved["PEFT LoRA"]
    assert not with_peer or "16 of 16 pivots" in next(row["note"] for row in rows if row["group"] == "selection")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("\n|") == len(rows) + 2


@pytest.mark.slow
def test_quality_of_adapters_compares_equal_numbers_of_parameters(monkeypatch, tmp_path, capsys):
    """All of it with two steps: no result, but a complete table, a study that is not run twice, and equal counts."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("adapter_quality")
    arguments = ["--quick", "--out", str(tmp_path), "--playgrounds", str(tmp_path), "--rounds", "1"]
    arguments += ["--seeds", "0", "1", "--tuning-seeds", "2"]
    module.main(arguments)
    content = json.loads((tmp_path / "adapter_quality.json").read_text())
    counts = {name: content["costs"][name]["parameters"] for name in module.METHODS if name != "full"}
    assert all(abs(count / counts["LoRA"] - 1) < 0.04 for count in counts.values()), counts
    assert set(content["chosen"]) == set(module.METHODS)
    keys = [(run["method"], run["lr"], run["seed"]) for run in content["runs"]]
    assert len(keys) == len(set(keys)) and {seed for *_, seed in keys} == {0, 1, 2}
    # Three tables of quality with all methods, and one of costs with PEFT's DoRA besides; each has two lines of head.
    printed = capsys.readouterr().out
    assert printed.count("\n|") == 4 * (len(module.METHODS) + 2) + 1
    assert (tmp_path / "adapter_quality.png").stat().st_size > 10_000
    assert module.rate_reaching(0.5, [(1e-3, 0.1), (4e-3, 0.9)]) == 2e-3
    assert module.rate_reaching(0.5, [(1e-3, 0.1), (4e-3, 0.4)]) is None
    monkeypatch.setattr(module.Study, "_train", lambda *_: pytest.fail("a run that is in the file was started again"))
    module.main(arguments)
    assert json.loads((tmp_path / "adapter_quality.json").read_text())["runs"] == content["runs"]


def test_simulation_of_budgets_has_every_row(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("gdro_sim")
    module.main(["--seeds", "2", "--batches", "40", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "gdro_sim.json").read_text())["seeds"]
    for run in runs:
        assert run["known"]["variance"]["variance"] < -0.15 < 0.1 < run["known"]["variance by position"]["variance"]
        assert run["learnt"]["variance"]["variance"] < 0
    assert capsys.readouterr().out.count("\n|") == sum(len(runs[0][w]) + 2 for w in module.WORLDS) + 4
    assert (tmp_path / "gdro_sim.png").stat().st_size > 10_000


@pytest.mark.slow
def test_merged_rollouts_cost_one_copy_and_no_drift(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("merged_rollouts")
    module.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "merged_rollouts.json").read_text())
    assert all(row["kept_bytes"] == row["adapted_bytes"] for row in found["costs"].values())
    assert all(set(row["kept"].values()) == {0} for row in found["drift"].values())
    assert found["drift"]["LoRA"]["trl"]["100"] > 1e-3 and found["drift"]["Bone"]["trl"]["100"] == 0
    assert capsys.readouterr().out.count("\n|") == len(module.COSTS) + len(module.DRIFTING) + 4


@pytest.mark.slow
def test_group_dro_on_the_playground_compares_equal_budgets(monkeypatch, tmp_path, capsys):
    """All stages with two steps: no result, but every arm and seed, a choice by the rule, and a study that is not run twice."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("gdro_playground")
    import gdro_playground_run as runs

    arguments = ["prompts", "screen", "choose", "final", "report", "--quick", "--workers", "1"]
    arguments += ["--tuning-seeds", "1", "--seeds", "3", "4", "--choice", str(tmp_path / "choice.json")]
    arguments += [
        "--report",
        str(tmp_path / "report"),
        "--out",
        str(tmp_path / "runs"),
        "--bases",
        str(tmp_path / "bases"),
    ]
    module.main(arguments)
    found = json.loads((tmp_path / "report" / "gdro_playground.json").read_text())
    arms = found["final"]["arms"]
    assert len(arms) == 6 and all([run["seed"] for run in arm["runs"]] == [3, 4] for arm in arms.values())
    choice, settings = found["choice"], module.settings
    for kind, variants in (("prompt", settings.PROMPT_VARIANTS), ("rollout", settings.ROLLOUT_VARIANTS)):
        assert choice["means"][choice[kind]] == max(choice["means"][name] for name in variants)
    balancing = arms["bin balancing"]["keys"]["prompt_weighting_kwargs"]
    assert (balancing["weights"], balancing["eta"]) == ("objective", 0.0)
    mean_one = settings.final_arms(choice | {"prompt": "failure, mean_one, 3, bins"})
    expected = {"signal": "failure", "weights": "objective", "eta": 0.0}
    assert mean_one["bin balancing"]["prompt_weighting_kwargs"] == expected
    assert arms["both and ΔL"]["keys"] == {
        **settings.ROLLOUT_VARIANTS[choice["rollout"]],
        **settings.PROMPT_VARIANTS[choice["prompt"]],
        "loss_type": "delta_l",
    }
    assert (tmp_path / "report" / "gdro_playground.png").stat().st_size > 10_000

    curriculum = json.loads((tmp_path / "runs" / "both-3.json").read_text())["curriculum"]
    runs.check_budget(curriculum, steps=2)
    curriculum["rollouts"][1][0] += 1
    with pytest.raises(RuntimeError, match="rollouts"):
        runs.check_budget(curriculum, steps=2)

    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    first, _ = capsys.readouterr()
    module.main(arguments)
    assert capsys.readouterr().out == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == written
    with pytest.raises(SystemExit, match="other settings"):
        module.main([*arguments, "--family", "faulty_table"])

    report = str(tmp_path / "report" / "gdro_playground.json")
    load("gdro_playground_contrasts").main([report, report])
    # The same seed twice: whatever the differences, their intervals are 0 wide.
    rows = [line for line in capsys.readouterr().out.splitlines() if " ± " in line]
    assert len(rows) == 5 and all(row.count(" ± 0.000") == 4 for row in rows)


@pytest.mark.slow
def test_group_dro_on_the_family_with_graded_rewards(monkeypatch, tmp_path):
    """Its task, reward and learning rate are those of the run, and what counts as correct is a right answer."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("gdro_playground")
    import gdro_playground_run as runs

    seen = {}

    class Watched(runs.RecordedTrainer):
        def __init__(self, model, reward, args, *rest, **kwargs):
            super().__init__(model, reward, args, *rest, **kwargs)
            seen.update(reward=reward, args=args)

        def on_rollouts(self, rollouts, rewards_per_func, rows):
            # What a base of two steps cannot: a right answer and one of which half is right.
            rewards_per_func[:, 0] = torch.tensor([1.0, 0.5]).repeat(len(rows) // 2)
            super().on_rollouts(rollouts, rewards_per_func, rows)

    monkeypatch.setattr(runs, "RecordedTrainer", Watched)
    settings = module.settings
    options = {"prompts_a_level": 16} | settings.EVALUATION | settings.FAMILIES["faulty_table"] | module.QUICK
    study = module.Study(tmp_path / "runs", tmp_path / "bases", options, workers=1)
    job = study.job("variance", settings.ROLLOUT_VARIANTS["variance, no exploration"], seed=3)
    content = json.loads(runs.run(job).read_text())
    assert seen["reward"] is runs.rewards.playground_digit_reward
    assert (seen["args"].learning_rate, seen["args"].correct_threshold) == (5e-4, 0.999)
    assert content["curriculum"]["levels"] == [f"sum{digits}" for digits in range(1, 7)]
    assert content["settings"]["task"] == "faulty_table"
    assert [sum(step) for step in content["curriculum"]["correct"]] == [32, 32]


@pytest.mark.slow
def test_table_of_token_kl_has_every_row(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("token_kl")
    module.main(["--rounds", "1", "--vocabularies", "8192", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "token_kl.json").read_text())
    assert len(rows) == 4 * len(module.PEERS) + 2
    peaks = {row["case"]: row["peak"] for row in rows if row["what"] == "log-probabilities, frozen head"}
    # At a vocabulary this small the tile is an eighth of the logits.
    assert peaks["ours"] < 0.25 < peaks["full logits"] == 1 < peaks["TRL's kernels"]
    assert capsys.readouterr().out.count("\n|") == len(rows) + 1


def test_planted_pairs_differ_where_they_say(monkeypatch):
    """Without its irrelevant characters a pair differs in exactly its decisive places, and a list loses a digit per mistake."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module, task = load("preference_playground_data"), load("preference_playground_task")
    drawn = module.problems("filled_sums", ("fill2", "fill4"), 40, seed=1, held_out=False)
    assert len(drawn) == 80 and not any(problem.held_out for problem in drawn)
    assert not {p.expression for p in drawn} & {
        p.expression for p in module.problems("filled_sums", ("fill2", "fill4"), 40, seed=1, held_out=True)
    }
    rows = module.planted_pairs(drawn, seed=1, flipped=0.25)
    assert sum(row["flipped"] for row in rows) == 20
    answers = {problem.prompt: problem.answer for problem in drawn}
    for row in rows:
        right, wrong = (row["rejected"], row["chosen"]) if row["flipped"] else (row["chosen"], row["rejected"])
        assert {i for i, character in enumerate(right) if character in task.FILLER} == set(row["filler"])
        different = {i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b}
        assert different - set(row["filler"]) == set(row["decisive"])
        assert module.playground_digit_reward([right], [answers[row["prompt"]]]) == [1.0]
        assert 0.5 <= module.playground_digit_reward([wrong], [answers[row["prompt"]]])[0] < 1.0


def test_pairs_out_of_lists(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("preference_playground_data")
    lists = [
        {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [0.5, 1.0, 0.0, 0.5]},
        {"prompt": "q", "completions": ["e", "f", "g", "h"], "scores": [0.0, 0.0, 0.0, 1.0]},
    ]
    ends = [(row["chosen"], row["rejected"]) for row in module.best_against_worst(lists)]
    assert ends == [("b", "c"), ("h", "g")]
    score = {text: value for row in lists for text, value in zip(row["completions"], row["scores"])}
    seen = set()
    for seed in range(40):
        pairs = [(row["chosen"], row["rejected"]) for row in module.drawn_pairs(lists, seed)]
        assert len(set(pairs)) == len(pairs) == 4 and all(score[a] > score[b] for a, b in pairs)
        seen |= set(pairs)
    # All pairs with different scores, those of a and d, and of e, f and g, being none.
    assert len(seen) == 5 + 3


def test_area_under_the_curve_is_a_chance(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("preference_playground_measures")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (60,), generator=generator).numpy() / 2
    positive = (torch.rand(60, generator=generator) < 0.3).numpy()
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert module.auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_measures_of_pairs_against_one_at_a_time(monkeypatch, playground):
    """Margins, KL and places of a padded batch against each answer alone."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("preference_playground_measures")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(playground / "model")
    policy, reference = (AutoModelForCausalLM.from_pretrained(playground / "model") for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for weight in policy.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    rows = [
        {"prompt": "12+3:", "chosen": "1#15", "rejected": "7;#4", "filler": [1, 3]},
        {"prompt": "4+5:", "chosen": "45#09", "rejected": "#4", "filler": [0]},
    ]
    found = module.pair_measures(policy, reference, tokenizer, rows)
    margins, kls, fillers = [], [], []
    for side in module.SIDES:
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row[side] + tokenizer.eos_token)["input_ids"]
            with torch.no_grad():
                ours, theirs = (
                    model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                    for model in (policy, reference)
                )
            kl = [sum(q.exp() * (q - p)).item() for p, q in zip(ours, theirs)]
            kls.append(sum(kl))
            fillers.append(sum(kl[place] for place in row["filler"]))
            margins.append(sum((ours[i, t] - theirs[i, t]).item() for i, t in enumerate(answer)))
    assert found["margins"].tolist() == pytest.approx([margins[0] - margins[2], margins[1] - margins[3]], abs=1e-4)
    assert found["kl"].tolist() == pytest.approx(kls, abs=1e-4)
    assert found["filler_kl"].tolist() == pytest.approx(fillers, abs=1e-4)
    assert min(kls) > 0.01

    rows = [{**row, "decisive": [2]} for row in rows]
    inside = module.tokenised(tokenizer, rows)[1][:, 1:]
    mask = module.places(inside, rows, "decisive").float() + 0.5
    told = module.mask_measures(mask, inside, rows)
    assert (told["auc"], told["auc_filler"]) == (1.0, 1.0) and told["mean_decisive"] == 1.5


@pytest.mark.slow
def test_preference_on_the_playground_compares_equal_numbers(monkeypatch, tmp_path, capsys):
    """All stages with two steps: no result, but every arm and seed, a choice by the rule, and a study that is not run twice."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = load("preference_playground")
    settings = module.settings

    class Here(ThreadPoolExecutor):
        """No interpreters of its own, which would import everything again and again."""

        def __init__(self, workers, mp_context, initializer):
            super().__init__(1)

    monkeypatch.setattr(sys.modules["studies"], "ProcessPoolExecutor", Here)
    kept = {"DPO", "MaPO", "SparsePO, independent", "DPO, best and worst", "DPO, drawn pairs", "LiPO-λ", "ERM"}
    kept |= {"feasible, resilient", "DPO, normalised", "SFT on chosen"}
    for name in ("weights_beta_2", "noise_fitted", "delta_weaker"):
        monkeypatch.delitem(settings.STUDIES, name)
    for study in settings.STUDIES.values():
        arms = {arm: keys for arm, keys in study["arms"].items() if arm in kept}
        monkeypatch.setitem(study, "arms", arms)
    grid = settings.grid
    monkeypatch.setattr(settings, "grid", lambda *names: grid(*names)[:2])
    arguments = "tune choose final report --quick --tuning-seeds 1 --seeds 3 4".split()
    for name, path in {"choice": "choice.json", "report": "report", "out": "runs"}.items():
        arguments += [f"--{name}", str(tmp_path / path)]
    module.main(arguments)
    found = json.loads((tmp_path / "report" / "preference_playground.json").read_text())
    for name, study in found["studies"].items():
        arms = settings.STUDIES[name]["arms"]
        assert set(study["runs"]) == set(arms) and set(found["choice"][name]) == set(arms)
        for runs in study["runs"].values():
            assert [run["seed"] for run in runs] == [3, 4]
    for name, choices in found["choice"].items():
        for arm, chosen in choices.items():
            points = settings.grid(name, arm)
            means = found["choice"][settings.TUNED_WITH.get(name, name)][arm]["means"]
            assert len(means) == len(points) and chosen["keys"] == points[means.index(max(means))]
    seen = {arm: costs["sequences"] for arm, costs in found["studies"]["lists_8"]["costs"].items()}
    assert seen["LiPO-λ"] == seen["DPO, drawn pairs"] == 4 * seen["DPO, best and worst"]
    masks = found["studies"]["weights"]["masks"]
    learned = [
        f"SparsePO, independent, {term}{when}" for term in ("reward", "kl") for when in (", before training", "")
    ]
    assert list(masks) == ["mask that knows the places of mistakes", "MaPO", *learned]
    assert masks["mask that knows the places of mistakes"]["AUC, decisive against irrelevant"] == [1.0, 0.0]
    losses = found["studies"]["noise"]["runs"]["feasible, resilient"][0]["losses"]
    assert set(losses) == {"training", "held out", "right", "exchanged"}
    assert (tmp_path / "report" / "preference_playground.png").stat().st_size > 10_000

    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    first, _ = capsys.readouterr()
    module.main(arguments)
    assert capsys.readouterr().out == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == written
    monkeypatch.setitem(module.QUICK, "held_out", 3)
    with pytest.raises(SystemExit, match="other settings"):
        module.main(arguments)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_estimates_of_memory_are_near_what_training_takes(playground, tmp_path):
    """In a process of its own, because it forks; rows of cases that are not measured stay."""
    import subprocess

    out = tmp_path / "out"
    out.mkdir()
    page = (BENCHMARKS.parent / "docs" / "dry_run.md").read_text()
    (out / "dry_run.md").write_text(page)
    old = {
        "case": "100M dpo",
        "parameters": 7,
        "rows": 2,
        "tokens": 3,
        "estimate": 2**21,
        "reserved": 0,
        "resident": 2**20,
    }
    (out / "memory_estimate.json").write_text(json.dumps([old]))
    glibc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, str(BENCHMARKS / "memory_estimate.py"), "--pretrain-steps", "20", "--out", str(out)]
    command += ["--playground", str(playground), "--only", "playground grpo bone", "playground sft edora"]
    found = subprocess.run(command, env={**os.environ, **glibc}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    rows = json.loads((out / "memory_estimate.json").read_text())
    assert [row["case"] for row in rows] == ["playground sft edora", "playground grpo bone", "100M dpo"]
    for row in rows[:2]:
        assert row["estimate"] + row["reserved"] == pytest.approx(row["allocated"], rel=0.02)
        assert row["estimate"] == pytest.approx(row["resident"], rel=0.2)
    assert (out / "memory_estimate.png").stat().st_size > 10_000
    lines = (out / "dry_run.md").read_text().splitlines()
    assert r"| 100M dpo | 7 | 2 x 3 | 2 |  |  | 1 | +100% \* |" in lines
    assert len([line for line in lines if line.startswith(("| playground", "| 100M"))]) == 3
    outside = [[line for line in text if not line.startswith("| ")] for text in (lines, page.splitlines())]
    assert outside[0] == outside[1]
