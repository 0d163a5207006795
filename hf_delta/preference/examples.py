"""Examples of token weights that a run writes down: the same few pairs again and again, so that one sees what is learned."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset

from hf_delta._compat.trl import dropout_off
from hf_delta.preference.scoring import CompletionScoring
from hf_delta.preference.snapshots import SNAPSHOTS, TokenSnapshots, examples_of, prompt_texts


PAIRS = 2
# Of a training; each takes two forward passes over the pairs.
MOST_SNAPSHOTS = 20


class TokenExamples(CompletionScoring):
    """Writes `token_weights.json` to the output directory, for the pairs at the top of the evaluation or training rows.

    Attributes:
        resumed_step (`int`): Step of the checkpoint that the run goes on from.
    """

    resumed_step: int = 0
    _example_inputs: dict[str, Any] | None = None
    _snapshots: TokenSnapshots | None = None
    _next_snapshot: int = 0

    def write_examples(self) -> None:
        """Write the weights of the examples as they are now, if it is time to. Collective: the model may be sharded."""
        step = self.state.global_step
        ended = step >= self.state.max_steps > 0
        # The last log of a training is written in evaluation mode where an evaluation came before it.
        due = ended or (self.model.training and step >= self._next_snapshot)
        if self.rule is None or not due:
            return
        self._next_snapshot = step + max(self.state.max_steps // MOST_SNAPSHOTS, 1)
        if self._example_inputs is None:
            self._example_inputs = self.data_collator(_first_rows(self._example_rows()))
        inputs = {name: value.to(self.accelerator.device) for name, value in self._example_inputs.items()}
        # Nothing of this is seen by the training: no gradient, and no random number.
        with torch.no_grad(), dropout_off(self.model), self.accelerator.autocast():
            scored = self.scored_tokens(self.model, inputs)
            terms = self.token_terms(scored, inputs)
        if not self.is_world_process_zero():
            return
        if self._snapshots is None:
            path = Path(self.args.output_dir) / SNAPSHOTS
            self._snapshots = TokenSnapshots(path, self.args.rule_name, resumed_step=self.resumed_step)
        prompts = prompt_texts(inputs["input_ids"], inputs["completion_mask"], self.text_tokenizer, PAIRS)
        weights = (None if weights is None else weights.float().cpu() for weights in terms)
        found = examples_of(
            inputs["input_ids"][:, 1:].cpu(), scored.mask.cpu(), *weights, self.text_tokenizer, prompts, PAIRS
        )
        self._snapshots.add(step, found)

    def _example_rows(self) -> Any:
        rows = self.eval_dataset
        if isinstance(rows, dict):
            rows = next(iter(rows.values()), None)
        return self.train_dataset if rows is None else rows


def _first_rows(rows: Any) -> list[dict[str, Any]]:
    if isinstance(rows, IterableDataset):
        return list(islice(iter(rows), PAIRS))
    return [rows[place] for place in range(min(PAIRS, len(rows)))]
