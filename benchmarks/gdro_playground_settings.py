"""Seeds, settings, measures, variants and rules of `gdro_playground.py`, committed before the runs they are for.

Families: `addition`, in which a run mostly learns to work problems out instead of guessing, and `faulty_table`, in which it has to
compute better. For the second the learning rate is the one its page measured (docs/playground.md), and the reward is graded: the
share of digits that are right, of which only all count as correct. Everything else, and the evaluation, is the same. The families
are studies of their own: each has its screen, its choice and its comparisons.

Prompts: 8 of 96 problems a step, 16 of each level, so that 60 steps see each five times, as training on a set of problems
with known answers does in practice. The playground's file has 3,072, of which 60 steps would see 480 once, and what a
method learns about a problem could never be used. `prompts` compares the two for GRPO on `PROMPTS_SEEDS`; the 96 are taken
unless GRPO's primary measure with them is more than `PROMPTS_TOLERANCE` lower.

Choice: of the Prompt variants, and of the Rollout variants, the one with the highest mean of the primary measure over the tuning
seeds; of equal ones the first. `choose` applies that and writes the two names to `gdro_playground_choice.json`, or
`gdro_playground_choice_<family>.json`, committed before the final runs. Bin balancing in the final has the groups of the Prompt
variant chosen, eta 0 and the weights `objective`: where the variant has them too, the two differ by the adversary alone; where
it has `mean_one`, that with eta 0 is GRPO. Not screened, for the time it takes: `signal: loss`, which is 0 where one
update follows each generation, so that it is balancing or GRPO by another name; `weights: unnormalised`, which changes the size
of the step; `rollout_weighting: sample`, which changes what a prompt counts; other gammas and bounds.

Comparisons: differences to GRPO and to bin balancing over the final seeds, paired by seed, with 95 % intervals (Student's t).
Five arms are compared with GRPO, so that one star is for a 95 % interval without 0 and two are for a 99 % one, which holds
for all five at once (Bonferroni).

Rollouts to reach GRPO's final score: where the arm's curve of the primary measure, mean over seeds and linear between
evaluations, first reaches GRPO's mean after its last step; intervals from resampled seeds, the same for both. A curve that
stays below is censored: it counts as more than all rollouts of the run, in the resamples too.
"""

TUNING_SEEDS = tuple(range(100, 106))
SEEDS = tuple(range(200, 225))

STEPS, PROMPTS, GENERATIONS = 60, 8, 8
PROMPTS_A_LEVEL = 16
PROMPTS_SEEDS = TUNING_SEEDS[:2]
PROMPTS_TOLERANCE = 0.05

# Over the six levels of held-out problems: the mean, the lowest of each run, and the last, which has the most digits.
MEASURES = {
    "pass@1": ("pass@1", "mean"),
    "pass@8": ("pass@8", "mean"),
    "worst level pass@1": ("pass@1", "lowest"),
    "worst level pass@8": ("pass@8", "lowest"),
    "hardest level pass@1": ("pass@1", "last"),
    "hardest level pass@8": ("pass@8", "last"),
}
PRIMARY = "pass@1"

# Held-out problems: 48 a level, and the 16 that the first level has. During training the same ones, fewer samples.
EVALUATION = {"samples": 8, "samples_during": 2, "every": 15, "problems_a_level": 48}

TRAINING = {
    "loss_type": "dr_grpo",
    "scale_rewards": "group",
    "beta": 0.0,
    "num_generations": GENERATIONS,
    "per_device_train_batch_size": PROMPTS * GENERATIONS,
    "max_completion_length": 54,
    "temperature": 1.0,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}

# What a family changes of `addition`; these settings are recorded with each of its runs.
ADDITION = {"task": "addition", "reward": "playground_reward", "training": {}}
FAMILIES = {
    "addition": {},
    "faulty_table": {
        "task": "faulty_table",
        "reward": "playground_digit_reward",
        "training": {"learning_rate": 5e-4, "correct_threshold": 0.999},
    },
}

# A prompt not seen yet starts at the pass rate of its level.
_DIFFICULTY = {"difficulty_kwargs": {"prior_column": "level"}}


def _prompt(signal, weights, eta, groups="pass_rate"):
    options = {"signal": signal, "weights": weights, "eta": eta}
    return {
        "prompt_weighting": "prompt_gdro",
        "prompt_groups": groups,
        "prompt_weighting_kwargs": options,
        **_DIFFICULTY,
    }


def _rollout(**options):
    return {"rollout_allocation": "rollout_gdro", "rollout_allocation_kwargs": options, **_DIFFICULTY}


PROMPT_VARIANTS = {
    "failure, objective, 0.65, bins": _prompt("failure", "objective", 0.65),
    "failure, objective, 3, bins": _prompt("failure", "objective", 3.0),
    "failure, mean_one, 3, bins": _prompt("failure", "mean_one", 3.0),
    "std, objective, 3, bins": _prompt("std", "objective", 3.0),
    "failure, objective, 3, levels": _prompt("failure", "objective", 3.0, "level"),
}
ROLLOUT_VARIANTS = {
    "variance, no exploration": _rollout(controller="variance", exploration=0.0),
    "variance, exploration 0.5": _rollout(controller="variance", exploration=0.5),
    "exp3": _rollout(controller="exp3"),
}
GRPO = "GRPO"
SCREENED = {GRPO: {}, **PROMPT_VARIANTS, **ROLLOUT_VARIANTS}


def final_arms(choice: dict[str, str]) -> dict[str, dict]:
    """Recipe keys of the arms that are compared, after the choice of variants."""
    prompt, rollout = PROMPT_VARIANTS[choice["prompt"]], ROLLOUT_VARIANTS[choice["rollout"]]
    balancing = {
        **prompt,
        "prompt_weighting_kwargs": {**prompt["prompt_weighting_kwargs"], "weights": "objective", "eta": 0.0},
    }
    return {
        GRPO: {},
        "bin balancing": balancing,
        "Prompt-GDRO": prompt,
        "Rollout-GDRO": rollout,
        "both": {**rollout, **prompt},
        "both and ΔL": {**rollout, **prompt, "loss_type": "delta_l"},
    }
