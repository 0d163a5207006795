"""What the documentation shows is run, and what it points to exists."""

import re
import sys
from pathlib import Path

import pytest

import hf_delta.playground


ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_first_python_block_of_the_readme_trains(playground, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The short playground of the tests instead of 20 seconds of pre-training.
    monkeypatch.setattr(hf_delta.playground, "build_playground", lambda out: playground)
    scope = {}
    exec(code_blocks(ROOT / "README.md", "python")[0], scope)
    trainer = scope["trainer"]
    assert trainer.state.global_step == 10
    assert "weights/std" in trainer.state.log_history[-2]


def test_the_commands_of_the_first_screen_stand_word_for_word():
    commands = code_blocks(ROOT / "README.md", "")
    assert commands[0].strip() == "pip install -c constraints.txt -e . && hf-delta run recipes/quickstart.yaml"
    assert commands[1].strip() == "pip install -c constraints.txt -e '.[test]' && pytest"
    assert commands[1].strip() in (ROOT / ".ci" / "run").read_text()


def test_the_example_of_a_weight_rule_works(tmp_path, monkeypatch):
    import torch

    from hf_delta.rl.weights import combine_weights
    from tests.rl.test_delta_l import batch

    (tmp_path / "my_rules.py").write_text(code_blocks(ROOT / "docs/rl/advantage_transforms.md", "python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    from hf_delta.imports import load_object

    rule = load_object("my_rules.HarderPrompts", key="advantage_transforms")(floor=0.2)
    seen = batch([3, 3, 3, 3], prompt_ids=["a", "a", "b", "b"], correct=torch.tensor([True, True, True, False]))
    assert combine_weights([rule], seen).tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5])
    other = load_object("my_rules.HarderPrompts", key="advantage_transforms")()
    other.load_state_dict(rule.state_dict())
    assert other.seen == {"a": 2, "b": 2}


def test_the_example_of_an_allocation_rule_works(tmp_path, monkeypatch):
    from hf_delta.imports import load_object
    from tests.rl.test_allocation import batch

    (tmp_path / "my_budgets.py").write_text(code_blocks(ROOT / "docs/rl/allocation_rules.md", "python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rule = load_object("my_budgets.UnsolvedFirst", key="rollout_allocation")(floor=3)
    assert rule(batch([0, 4, 0, 8], [8, 8, 8, 8], mean=4)).tolist() == [5, 3, 5, 3]
    assert rule(batch([1, 4], [8, 8], mean=4)).tolist() == [4, 4]
    with pytest.raises(ValueError, match="more than 8 rollouts"):
        rule.check(8, 3)


def example_of(page):
    """The names that the first Python block of a page leaves behind."""
    scope = {}
    exec(code_blocks(ROOT / "docs/preference" / page, "python")[0], scope)
    return scope


@pytest.mark.parametrize(
    ("page", "logged"), [("tdpo.md", {"kl/chosen", "kl/rejected"}), ("sparse_po.md", {"weights/kl_zero", "penalty"})]
)
def test_the_examples_of_token_objectives_train(playground, tmp_path, monkeypatch, page, logged):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_delta.playground, "build_playground", lambda out: playground)
    trainer = example_of(page)["trainer"]
    assert trainer.state.global_step == 5
    assert logged < trainer.state.log_history[-2].keys()


def test_the_example_of_contrast_weights_gives_what_it_says():
    scope = example_of("tis_dpo.md")
    assert scope["chosen_weights"].tolist() == pytest.approx([1.0, 0.7, 1.3])
    assert scope["rejected_weights"].tolist() == pytest.approx([1.0, 1.3, 0.7])


def test_the_example_of_lists_gives_what_it_says():
    scope = example_of("lipo.md")
    assert scope["scored"].rows == [{"prompt": "2+2:", "completions": ["#4", "#5"], "scores": [1.0, 0.25]}]
    assert (scope["scored"].duplicates, scope["scored"].single, scope["scored"].tied) == (1, 1, 0)
    assert scope["ranked"].rows == [{"prompt": "2+2:", "completions": ["#4", "#5", "#22"], "ranks": [1, 2, 3]}]


def test_the_example_of_multipliers_settles_where_it_says():
    scope = example_of("feasible.md")
    assert scope["multipliers"].weights(scope["keys"]).tolist() == pytest.approx([0.0, 1.0], abs=1e-5)
    assert scope["tail_report"](scope["losses"], 0.3)["satisfied"] == 0.5


def test_the_example_of_a_rule_of_token_weights_works(tmp_path, monkeypatch):
    import torch

    from hf_delta import DeltaDPOConfig
    from hf_delta.preference.weights import TokenBatch

    (tmp_path / "my_weights.py").write_text(code_blocks(ROOT / "docs/preference/token_weights.md", "python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rule = DeltaDPOConfig("out", token_weights="my_weights.unexpected", bf16=False, report_to=[]).build_rule()
    mask = torch.tensor([[True, True, True], [False, True, True]])
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-7.0, -1.0, -3.0]])
    weights = rule.weights(TokenBatch(tokens=mask.long(), mask=mask, logps=logps, ref_logps=logps)).reward
    assert weights.tolist() == [[0.5, 1.0, 1.5], [0.0, 0.5, 1.5]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing
