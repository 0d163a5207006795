"""Keys and weights beside a batch's tokens: weights must stand where the tokens do that they are of."""

import pickle
import random
from dataclasses import dataclass

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_delta.errors import InputError
from hf_delta.preference.collate import DataCollatorWithColumns
from hf_delta.preference.list_data import DataCollatorForLists


PROMPT = 100


def pairs(draw, size):
    """Examples in which a token of a completion says its own weight, times 4."""
    examples = []
    for index in range(size):
        chosen, rejected = (draw.sample(range(1, 90), draw.randrange(1, 7)) for _ in range(2))
        examples.append(
            {
                "prompt_ids": [PROMPT] * draw.randrange(1, 5),
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "chosen_weights": [token / 4 for token in chosen],
                "rejected_weights": [token / 4 for token in rejected],
                "sample_key": -(2**63) + index,
            }
        )
    return examples


@dataclass
class Mirrored:
    """A collator of one's own: padding on the left."""

    inner: DataCollatorForPreference

    def __call__(self, examples):
        return {key: value.flip(1) for key, value in self.inner(examples).items()}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 5, 3])
@pytest.mark.parametrize("multiple", [None, 8])
def test_weights_stand_where_their_tokens_do(mode, max_length, multiple):
    draw = random.Random(0)
    inner = DataCollatorForPreference(0, max_length=max_length, truncation_mode=mode, pad_to_multiple_of=multiple)
    for _ in range(20):
        examples = pairs(draw, 4)
        expected, batch = inner(examples), DataCollatorWithColumns(inner)(examples)
        tokens = batch["input_ids"]
        assert torch.equal(batch["token_weights"], torch.where(tokens < PROMPT, tokens, 0).float() / 4)
        assert batch["token_weights"].dtype == torch.float32
        assert batch["sample_keys"].tolist() == [-(2**63), 1 - 2**63, 2 - 2**63, 3 - 2**63]
        assert batch.keys() == {*expected, "token_weights", "sample_keys"}
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_number_counts_for_every_token(mode):
    examples = pairs(random.Random(1), 3)
    for example, weights in zip(examples, (0.5, 2, [3.0] * 9)):
        example["chosen_weights"], example["rejected_weights"] = weights, 0
    examples[2]["chosen_ids"] = list(range(1, 10))
    collator = DataCollatorWithColumns(DataCollatorForPreference(0, max_length=4, truncation_mode=mode))
    batch = collator(examples)
    value = torch.tensor([0.5, 2.0, 3.0, 0.0, 0.0, 0.0]).unsqueeze(1)
    assert torch.equal(batch["token_weights"], value * batch["completion_mask"])


def test_lists_and_pairs_without_weights_get_keys_alone():
    examples = [
        {
            "prompt_ids": [PROMPT],
            "completion_ids": [[1], [2, 3], [4]],
            "list_labels": [0.0, 1.0, 0.5],
            "sample_key": 5,
        },
        {"prompt_ids": [PROMPT], "completion_ids": [[1], [2, 3]], "list_labels": [0.0, 1.0], "sample_key": 9},
    ]
    batch = DataCollatorWithColumns(DataCollatorForLists(0))(examples)
    assert batch["sample_keys"].tolist() == [5, 9]
    assert "token_weights" not in batch
    pair = {"prompt_ids": [PROMPT], "chosen_ids": [1], "rejected_ids": [2]}
    inner = DataCollatorForPreference(0)
    assert DataCollatorWithColumns(inner)([pair]).keys() == inner([pair]).keys()


def test_collators_of_ones_own():
    examples = pairs(random.Random(2), 3)
    batch = DataCollatorWithColumns(Mirrored(DataCollatorForPreference(0)))(examples)
    ours = DataCollatorWithColumns(DataCollatorForPreference(0))(examples)
    # The collator turned every completion round, and its weights are none of its business.
    for row, example in enumerate(examples):
        assert batch["token_weights"][row][batch["completion_mask"][row].bool()].tolist() == example["chosen_weights"]
    assert torch.equal(batch["token_weights"] != 0, ours["token_weights"].flip(1) != 0)

    def sees(examples):
        assert all(example.keys() == {"prompt_ids", "chosen_ids", "rejected_ids"} for example in examples)
        return {}

    with pytest.raises(InputError, match="need a completion_mask with 6 rows, .* gives none"):
        DataCollatorWithColumns(sees)(examples)
    with pytest.raises(InputError, match=r"function gives one of shape \(1, 4\)"):
        DataCollatorWithColumns(lambda examples: {"completion_mask": torch.ones(1, 4)})(examples)


def test_weights_that_do_not_fit():
    (example,) = pairs(random.Random(3), 1)
    inner = DataCollatorForPreference(0)
    with pytest.raises(InputError, match=r"A completion of 3 tokens has 2 weights; give one for each token"):
        DataCollatorWithColumns(inner)([{**example, "chosen_ids": [1, 2, 3], "chosen_weights": [1.0, 2.0]}])
    cutting = Mirrored(DataCollatorForPreference(0, max_length=len(example["prompt_ids"]) + 1))
    with pytest.raises(InputError, match="Mirrored, which has no truncation_mode to say which ones were cut off"):
        DataCollatorWithColumns(cutting)([{**example, "chosen_ids": [1, 2, 3], "chosen_weights": [1.0, 2.0, 3.0]}])


def test_it_goes_to_workers_of_a_data_loader():
    examples = pairs(random.Random(4), 2)
    collator = DataCollatorWithColumns(DataCollatorForPreference(0))
    again = pickle.loads(pickle.dumps(collator))
    assert torch.equal(again(examples)["token_weights"], collator(examples)["token_weights"])
