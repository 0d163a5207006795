"""Measures of `preference_playground.py` on held-out pairs and problems."""

import numpy as np
import torch
from torch.nn.functional import logsigmoid, pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_delta.evaluation import evaluate
from hf_delta.preference.feasible import tail_report


SIDES = ("chosen", "rejected")


def pass_rates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], samples: int, tokens: int, seed: int
) -> dict[str, dict[str, float]]:
    """By level: `greedy`, whether the most likely answer is right, and `sampled`, pass@1 at temperature 1."""
    found = {}
    for name, temperature, count in (("greedy", 0.0, 1), ("sampled", 1.0, samples)):
        report = evaluate(
            model, tokenizer, rows, ks=(1,), samples=count, temperature=temperature, max_new_tokens=tokens, seed=seed, progress=False
        )  # fmt: skip
        found[name] = {level.name: round(level.pass_at_k[1].mean, 6) for level in report.levels}
    return found


def tokenised(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(2B, T)` of prompt and answer, all chosen and then all rejected, padded on the right, and where the answer is, with its
    end, as TRL's trainer has them."""
    sequences, answers = [], []
    for side in SIDES:
        for row in rows:
            prompt, answer = (
                tokenizer(text)["input_ids"] for text in (row["prompt"], row[side] + tokenizer.eos_token)
            )
            sequences.append(torch.tensor(prompt + answer))
            answers.append(torch.tensor([False] * len(prompt) + [True] * len(answer)))
    longest = max(map(len, sequences))
    return (
        torch.stack([pad(s, (0, longest - len(s)), value=tokenizer.pad_token_id) for s in sequences]),
        torch.stack([pad(a, (0, longest - len(a)), value=False) for a in answers]),
    )


@torch.no_grad()
def log_distributions(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(N, T - 1, V)` of what follows each token."""
    model.eval()
    return model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def pair_measures(
    policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> dict[str, torch.Tensor]:
    """On pairs: `margins` `(B,)`, DPO's without beta, nats; `kl` and `filler_kl` `(2B,)`, KL(reference || policy) in nats summed over an
    answer and over its irrelevant characters."""
    tokens, inside = tokenised(tokenizer, rows)
    ours, theirs = (log_distributions(model, tokens) for model in (policy, reference))
    inside, targets = inside[:, 1:], tokens[:, 1:, None]
    ratios = (ours - theirs).gather(-1, targets).squeeze(-1).masked_fill(~inside, 0.0)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).masked_fill(~inside, 0.0)
    chosen, rejected = ratios.sum(1).chunk(2)
    found = {"margins": chosen - rejected, "kl": kl.sum(1)}
    if "filler" in rows[0]:
        found["filler_kl"] = (kl * places(inside, rows, "filler")).sum(1)
    return found


def places(inside: torch.Tensor, rows: list[dict], key: str) -> torch.Tensor:
    """Which tokens `(2B, T)` are at the places of the answers that the rows have under `key`."""
    found = torch.zeros_like(inside)
    for i, row in enumerate([*rows, *rows]):
        # Answers are without gaps: one place after the other from the first token inside.
        found[i, int(inside[i].long().argmax()) + torch.tensor(row[key])] = True
    return found


def summarised(measured: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over pairs: `accuracy`, the share with a positive margin, `kl` and `filler_kl` of an answer."""
    found = {"accuracy": (measured["margins"] > 0).double().mean().item()}
    return found | {key: measured[key].double().mean().item() for key in ("kl", "filler_kl") if key in measured}


def loss_tail(margins: torch.Tensor, beta: float, epsilon: float) -> dict[str, float]:
    """DPO's losses of pairs: share within the bound, mean, maximum and mean of the worst tenth, nats."""
    return tail_report(-logsigmoid(beta * margins), epsilon)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive has a higher score than a negative, ties counting half: the area under the ROC curve.

    Args:
        scores (`(N,)`): finite.
        positive (`(N,)`, bool): both kinds must be there.
    """
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def mask_measures(mask: torch.Tensor, inside: torch.Tensor, rows: list[dict]) -> dict[str, float]:
    """How well a mask `(2B, T)` tells the planted decisive tokens from all other tokens of the answers (`auc`) and from the irrelevant
    ones (`auc_filler`), and its mean over each kind."""
    decisive, filler = (places(inside, rows, key) for key in ("decisive", "filler"))
    mask = mask.double()
    return {
        "auc": auc(mask[inside].numpy(), decisive[inside].numpy()),
        "auc_filler": auc(mask[decisive | filler].numpy(), decisive[decisive | filler].numpy()),
        "mean": mask[inside].mean().item(),
        "zero": (mask[inside] == 0).double().mean().item(),
        "mean_decisive": mask[decisive].mean().item(),
        "mean_filler": mask[filler].mean().item(),
    }
