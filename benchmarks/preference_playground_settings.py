"""Seeds, settings, measures, arms and rules of `preference_playground.py`, committed before the final runs.

Studies, each with its own comparisons:

- `weights`: pairs that differ in two decisive characters and in some ten irrelevant ones (`preference_playground_task.py`).
- `weights_beta_2`: the same with one learning rate and beta for all arms, added after the final runs of the others, in which a beta
  of 2 had been chosen for some arms and of 8 for others.
- `lists_4`, `lists_8`: lists of samples of the base model, scored by the share of digits that are right. List losses see whole
  lists; `DPO, best and worst` sees as many prompts in a step, and 2 of their 4 or 8 sequences; `DPO, drawn pairs` as many prompts and
  as many sequences. Both sizes of lists come from the same problems.
- `noise`: the pairs of `weights`, 20 % of them with chosen and rejected exchanged. `feasible` has a bound of `EPSILON` on the loss of
  every pair, the resilient form with slack. `noise_fitted` is the same at the largest learning rate of the grid, where ERM fits
  the wrong labels too; nothing is chosen for it.
- `delta`: pairs of the greedy answers of two weak models, of addition, pre-trained for as many steps as `TEACHERS` says, for a student with
  all 750. DPO normalised by length, and SFT on the same chosen answers as control. `delta_weaker` was added after the final runs
  of the others: in `delta` greedy answers of the strong teacher are as good as the student's, and here they are worse. It goes with
  what was chosen for `delta`.

Choice: learning rate and beta of each arm are those of `GRID` with the highest mean of the primary measure over the tuning seeds; of
equal ones the first. One grid for all arms of a study; SFT, which has no beta, has as many learning rates. Both sizes of lists go
with what was chosen on lists of 4. `choose` applies that and writes `preference_playground_choice.json`, committed before the
final runs.

Comparisons: paired by seed, differences to the reference arms of the study, 95 % intervals (Student's t). The number of final seeds
leaves room for large effects only.
"""

TUNING_SEEDS = (100, 101)
SEEDS = tuple(range(200, 208))

# Pass@1 of greedy answers to held-out problems, mean over levels.
PRIMARY = "greedy"
# What is compared, and under which keys a run has it.
_PASS = {"greedy pass@1": "greedy", "pass@1 at temperature 1": "sampled"}
_PAIRS = {"accuracy on pairs": "held_out/accuracy"}
_KL = {"KL, nats an answer": "held_out/kl", "of it irrelevant": "held_out/filler_kl"}
_FIGURES = {"within the bound": "satisfied", "mean": "loss_mean", "CVaR": "loss_cvar", "max": "loss_max"}
_TAIL = {
    **{f"{figure}, trained on": f"losses/training/{name}" for figure, name in _FIGURES.items()},
    "mean, right labels": "losses/right/loss_mean",
    "mean, exchanged": "losses/exchanged/loss_mean",
    **{f"{figure}, held out": f"losses/held out/{name}" for figure, name in _FIGURES.items()},
}
MEASURES = {
    "weights": {**_PASS, **_PAIRS, **_KL},
    "weights_beta_2": {**_PASS, **_PAIRS, **_KL},
    "lists_4": {**_PASS, **_PAIRS},
    "lists_8": {**_PASS, **_PAIRS},
    "noise": {**_PASS, **_PAIRS, **_TAIL},
    "noise_fitted": {**_PASS, **_PAIRS, **_TAIL},
    "delta": _PASS,
    "delta_weaker": _PASS,
}
MASK_MEASURES = {
    "AUC, decisive against all others": "auc",
    "AUC, decisive against irrelevant": "auc_filler",
    "mean weight, decisive": "mean_decisive",
    "mean weight, irrelevant": "mean_filler",
    "share of zeros": "zero",
}

FILLED = {
    "family": "filled_sums",
    "levels": ["fill2", "fill3", "fill4"],
    "held_out": 128,
    "tokens": 48,
    "pretrain_steps": 500,
}
ADDITION = {
    "family": "addition",
    "levels": [f"add{n}" for n in range(1, 7)],
    "held_out": 96,
    "tokens": 54,
    "pretrain_steps": 750,
}
SAMPLES = 2  # at temperature 1, of each held-out problem
HELD_OUT_PAIRS = 64  # of each level

TRAINING = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "adam_beta2": 0.99,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": None,
    "logps_kernel": "chunked",
}

BASE = "base model"
DPO = "DPO"
GRID = [
    {"learning_rate": 1e-4, "beta": 0.1},
    {"learning_rate": 1e-4, "beta": 0.5},
    {"learning_rate": 3e-4, "beta": 0.5},
    {"learning_rate": 3e-4, "beta": 2.0},
    {"learning_rate": 3e-4, "beta": 8.0},
]
# One beta: losses, which this study reports, are of different sizes at different ones.
GRID_NOISE = [{"learning_rate": rate, "beta": 0.5} for rate in (5e-5, 1e-4, 3e-4)]
GRID_FITTED = GRID_NOISE[-1:]
GRID_BETA_2 = GRID[3:4]
GRID_DELTA = [
    {"learning_rate": 1e-4, "beta": 5.0},
    {"learning_rate": 3e-4, "beta": 5.0},
    {"learning_rate": 3e-4, "beta": 10.0},
    {"learning_rate": 1e-3, "beta": 10.0},
]
GRID_SFT = [{"learning_rate": rate} for rate in (3e-5, 1e-4, 3e-4, 1e-3)]

_MASKS = {"l1_reward": 0.001, "l1_kl": 0.001}
WEIGHTS_ARMS = {
    DPO: {"loss_type": ["sigmoid"]},
    "TDPO1": {"loss_type": ["tdpo1"]},
    "TDPO2": {"loss_type": ["tdpo2"]},
    "MaPO": {"loss_type": ["mapo"]},
    "SparsePO, common": {"loss_type": ["sparse_po"], "token_weights_kwargs": {"sharing": "common", **_MASKS}},
    "SparsePO, independent": {
        "loss_type": ["sparse_po"],
        "token_weights_kwargs": {"sharing": "independent", **_MASKS},
    },
}

# DPO on pairs out of the lists, see `best_against_worst` and `drawn_pairs`.
BEST_AND_WORST, DRAWN_PAIRS = "DPO, best and worst", "DPO, drawn pairs"
LISTS_ARMS = {
    BEST_AND_WORST: {"loss_type": ["sigmoid"]},
    DRAWN_PAIRS: {"loss_type": ["sigmoid"]},
    "LiPO-λ": {"loss_type": ["lipo_lambda"]},
    "list softmax": {"loss_type": ["list_softmax"]},
    "Plackett-Luce": {"loss_type": ["plackett_luce"]},
}

EPSILON = 0.3
_FEASIBLE = {"loss_type": ["sigmoid"], "feasible": True, "sample_id_column": "sample_id"}
ERM = "ERM"
NOISE_ARMS = {
    ERM: {"loss_type": ["sigmoid"]},
    "feasible": {**_FEASIBLE, "feasible_kwargs": {"epsilon": EPSILON, "eta": 1.0}},
    "feasible, resilient": {**_FEASIBLE, "feasible_kwargs": {"epsilon": EPSILON, "eta": 1.0, "alpha": 1.0}},
}

TEACHERS = {"strong": 350, "weak": 200}
WEAKER_TEACHERS = {"strong": 250, "weak": 150}
DELTA_DPO, SFT = "DPO, normalised", "SFT on chosen"
DELTA_ARMS = {DELTA_DPO: {"loss_type": ["sigmoid_norm"]}, SFT: {}}

_WEIGHTS = {**FILLED, "references": [DPO], "arms": WEIGHTS_ARMS, "rows_a_level": 32, "prompts": 16, "steps": 40}
_LISTS = {**FILLED, "references": [BEST_AND_WORST, DRAWN_PAIRS], "arms": LISTS_ARMS, "prompts": 8, "steps": 40}
_NOISE = {**FILLED, "references": [ERM], "arms": NOISE_ARMS, "flipped": 0.2, "rows_a_level": 32, "prompts": 16, "steps": 60}  # fmt: skip
_DELTA = {**ADDITION, "references": [BASE, "strong teacher", SFT], "arms": DELTA_ARMS, "rows_a_level": 80, "prompts": 16, "steps": 40}  # fmt: skip
STUDIES = {
    "weights": _WEIGHTS,
    "weights_beta_2": _WEIGHTS,
    "lists_4": {**_LISTS, "size": 4, "rows_a_level": 32},
    "lists_8": {**_LISTS, "size": 8, "rows_a_level": 32},
    "noise": _NOISE,
    "noise_fitted": _NOISE,
    "delta": _DELTA,
    "delta_weaker": {**_DELTA, "teachers": WEAKER_TEACHERS},
}
# Studies that begin with the bases and lists of another.
BEGINS_WITH = dict.fromkeys(("weights_beta_2", "lists_4", "lists_8", "noise", "noise_fitted"), "weights")
LARGEST_LIST = 8
# Studies whose choice is another's.
TUNED_WITH = {"lists_8": "lists_4", "delta_weaker": "delta"}


def grid(study: str, arm: str) -> list[dict]:
    """Settings among which an arm's are chosen; where there is one, nothing is."""
    if arm == SFT:
        return GRID_SFT
    grids = {"noise": GRID_NOISE, "noise_fitted": GRID_FITTED, "weights_beta_2": GRID_BETA_2}
    return grids.get(study, GRID_DELTA if study.startswith("delta") else GRID)
