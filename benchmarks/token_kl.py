"""Log-probabilities and exact token KL from hidden states: time and peak bytes of ours, of all logits, and of TRL's kernels.

    python benchmarks/token_kl.py --out docs/preference

512 completion rows of width 256, float32, forward and backward passes, and one step of DPO with LoRA on a small Qwen3
whose rows are half prompt. Both steps compute what TRL's trainer logs: entropy, mean logit, top-1. CPU time of one thread in interleaved rounds; peaks as the allocator sees them. Everything is
a ratio to all logits at once, or for the step to TRL's `DPOTrainer`.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from models import word_tokenizer
from peft import LoraConfig
from timing import Case, interleaved, peak_bytes, ratio
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer

from hf_delta._compat.kernels import head_arguments, trl_logps_and_kl
from hf_delta.ops.token_kl import TokenScores, masked_token_scores, token_logps_and_kl


ROWS, WIDTH = 512, 256
VOCABULARIES = (32_768, 131_072)
# Sequences (chosen, then rejected) and tokens of each, of which one half is the prompt.
SEQUENCES, TOKENS = 8, 65
BETA = 0.1


def full_logits(hidden, head_weight, targets, *, ref_hidden=None) -> TokenScores:
    """All logits at once, as one writes it down."""
    policy = (hidden @ head_weight.T).float().log_softmax(-1)
    logps = policy.gather(1, targets[:, None]).squeeze(1)
    if ref_hidden is None:
        return TokenScores(logps)
    with torch.no_grad():
        reference = (ref_hidden @ head_weight.T).float().log_softmax(-1)
        ref_logps = reference.gather(1, targets[:, None]).squeeze(1)
    return TokenScores(logps, ref_logps, (reference.exp() * (reference - policy)).sum(1))


PEERS: dict[str, Callable[..., TokenScores]] = {
    "full logits": full_logits,
    "TRL's kernels": trl_logps_and_kl,
    "ours": token_logps_and_kl,
    "ours, with statistics": partial(token_logps_and_kl, statistics=True),
}


@dataclass(frozen=True)
class Inputs:
    """What all ways of computing get: hidden states of `(N, d)`, a head of `(V, d)`, and `(N,)` targets."""

    hidden: torch.Tensor
    head: torch.Tensor
    reference: torch.Tensor
    targets: torch.Tensor


def inputs(
    vocabulary: int,
    trained: bool,
    shape: tuple[int, int] = (ROWS, WIDTH),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    torch.manual_seed(0)
    hidden, head = torch.randn(*shape, device=device), 0.05 * torch.randn(vocabulary, shape[1], device=device)
    reference = hidden + 0.1 * torch.randn_like(hidden)
    targets = torch.randint(vocabulary, shape[:1], device=device)
    hidden, head, reference = (each.to(dtype) for each in (hidden, head, reference))
    return Inputs(hidden.requires_grad_(), head.requires_grad_(trained), reference, targets)


def kernel_case(compute, given: Inputs, kl: bool) -> Case:
    def run():
        found = compute(given.hidden, given.head, given.targets, ref_hidden=given.reference if kl else None)
        (found.logps.sum() + (found.kl.square().sum() if kl else 0)).backward()

    def clear():
        given.hidden.grad = given.head.grad = None

    return Case(run, clear, clear)


# -- a step of DPO -------------------------------------------------------------------------------------------------------
def dpo_trainer(vocabulary: int, folder: str) -> DPOTrainer:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    arguments = DPOConfig(
        folder, beta=BETA, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True
    )
    return DPOTrainer(
        Qwen3ForCausalLM(config),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " a b", "rejected": " b a"}] * 2),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def rows_of_dpo(vocabulary: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(vocabulary, (SEQUENCES, TOKENS))
    completion = (torch.arange(TOKENS) > TOKENS // 2).long().expand_as(tokens)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "completion_mask": completion}


def chunked_loss(model, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of `DPOTrainer`, from hidden states of the same model, by our function."""
    head, mask, targets = head_arguments(model), rows["completion_mask"][:, 1:], rows["input_ids"][:, 1:]

    def scores(statistics: bool):
        arguments = {name: rows[name] for name in ("input_ids", "attention_mask")}
        hidden = model.get_base_model().base_model(**arguments, use_cache=False).last_hidden_state
        found = masked_token_scores(hidden[:, :-1], targets=targets, mask=mask, statistics=statistics, **head)
        return found.logps.sum(1)

    with torch.no_grad(), model.disable_adapter():
        reference = scores(statistics=False)
    chosen, rejected = (scores(statistics=True) - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def step_cases(vocabulary: int, folder: str) -> dict[str, Case]:
    trainer, rows = dpo_trainer(vocabulary, folder), rows_of_dpo(vocabulary)
    trainer.model.train()
    with torch.no_grad():
        # An adapter at its start is the reference.
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    losses = {
        "TRL's DPOTrainer": lambda: trainer.compute_loss(trainer.model, rows),
        "ours": lambda: chunked_loss(trainer.model, rows),
    }
    found = [loss().item() for loss in losses.values()]
    if abs(found[0] - found[1]) > 1e-5:
        raise SystemExit(f"the two losses are not the same: {found}")
    return {name: Case(lambda loss=loss: loss().backward(), trainer.model.zero_grad) for name, loss in losses.items()}


# -- the table -----------------------------------------------------------------------------------------------------------
def compared(cases: dict[str, Case], rounds: int, what: str, vocabulary: int) -> list[dict]:
    """One row for each case; the first is what the others are compared with."""
    base = next(iter(cases))
    peaks = {name: peak_bytes(case, "cpu") for name, case in cases.items()}
    seconds = interleaved(cases, rounds, "cpu")
    return [
        {"what": what, "vocabulary": vocabulary, "case": name, "peak": peaks[name] / peaks[base]}
        | {"peak_mib": peaks[name] / 2**20}
        | vars(ratio(seconds, name, base))
        for name in cases
    ]


def printed(rows: list[dict]) -> None:
    print("| what | vocabulary | how | time | quartiles | peak | MiB |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['what']} | {row['vocabulary']} | {row['case']} | {row['median']:.2f} "
            f"| {row['q25']:.2f} to {row['q75']:.2f} | {row['peak']:.3f} | {row['peak_mib']:.1f} |"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for token_kl.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    kinds = [(v, kl, trained) for v in arguments.vocabularies for kl in (False, True) for trained in (False, True)]
    for vocabulary, kl, trained in tqdm(kinds):
        what = (
            f"{'log-probabilities and KL' if kl else 'log-probabilities'}, {'trained' if trained else 'frozen'} head"
        )
        given = inputs(vocabulary, trained)
        cases = {name: kernel_case(compute, given, kl) for name, compute in PEERS.items()}
        rows += compared(cases, arguments.rounds, what, vocabulary)
    for vocabulary in tqdm(arguments.vocabularies):
        with tempfile.TemporaryDirectory() as folder:
            rows += compared(step_cases(vocabulary, folder), arguments.rounds, "step of DPO, LoRA", vocabulary)
    printed(rows)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "token_kl.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
