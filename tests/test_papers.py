"""Every method stands with its paper, which cards cite: its title and number on arXiv, or `None`, said on purpose."""

import re
from types import SimpleNamespace

import pytest
from peft import LoraConfig, MissConfig

from hf_delta import BoneConfig, EdoraConfig, PmssConfig
from hf_delta.adapters import ADAPTERS
from hf_delta.preference import feasible, lists
from hf_delta.preference.weights import TOKEN_WEIGHTS
from hf_delta.rl.allocation import ALLOCATION_RULES
from hf_delta.rl.weights import WEIGHT_RULES
from hf_delta.run.papers import papers_of_adapter, papers_of_training


METHODS = {
    **{f"adapter {name}": config for name, (config, _) in ADAPTERS.items()},
    **{f"weight rule {name}": rule for name, rule in WEIGHT_RULES.items()},
    **{f"allocation rule {name}": rule for name, rule in ALLOCATION_RULES.items()},
    **{f"token weights {name}": rule for name, rule in TOKEN_WEIGHTS.items()},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_which_paper_it_is_of(name):
    # Of its own: what a method inherits is the paper of another one.
    assert "paper" in vars(METHODS[name]), f"{name} has no `paper`: write its title and number on arXiv, or None"
    check(METHODS[name].paper)


def test_losses_of_lists_and_bounds_have_papers():
    check(lists.PAPER)
    check(feasible.PAPER)


def check(paper):
    if paper is not None:
        title, number = paper
        assert len(title) > 10 and title == title.strip() and re.fullmatch(r"\d{4}\.\d{5}", number)


@pytest.mark.parametrize(
    ("config", "number"),
    [
        (LoraConfig(), "2106.09685"),
        (LoraConfig(use_dora=True), "2402.09353"),
        (MissConfig(), "2409.15371"),
        (BoneConfig(mode="bat_row"), "2409.15371"),
        (PmssConfig(), "2409.16722"),
        (EdoraConfig(), "2501.12067"),
        (EdoraConfig(magnitude=False), "2405.17604"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_adapter_is_cited_by_what_its_files_say(config, number):
    ((_, found),) = papers_of_adapter({**config.to_dict(), "peft_type": config.peft_type.value})
    assert found == number


def test_a_run_cites_its_loss_and_its_rules_once():
    rules = [WEIGHT_RULES["delta_l"], WEIGHT_RULES["prompt_gdro"], lambda batch: batch]
    curriculum = SimpleNamespace(allocation=ALLOCATION_RULES["rollout_gdro"])
    trainer = SimpleNamespace(
        _paper={"title": "GRPO", "id": "2402.03300"}, advantage_transforms=rules, curriculum=curriculum
    )
    assert [number for _, number in papers_of_training(trainer)] == ["2402.03300", "2509.07558", "2601.19280"]
    assert papers_of_training(SimpleNamespace(_paper={})) == []


def test_what_has_no_paper_here_has_none():
    assert papers_of_adapter(None) == papers_of_adapter({"peft_type": "VERA"}) == papers_of_adapter({}) == []
