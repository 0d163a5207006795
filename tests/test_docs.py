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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing
