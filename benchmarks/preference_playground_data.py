"""Problems, pairs and lists of `preference_playground.py`; everything is a function of the seed."""

import json
from pathlib import Path
from random import Random

import preference_playground_task as filled
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_delta.evaluation.sampling import complete, prompt_ids, sampling_config, undisturbed
from hf_delta.playground import TASKS, Problem, Task
from hf_delta.playground.rewards import playground_digit_reward


FAMILIES: dict[str, type[Task]] = {**TASKS, filled.FilledSums.name: filled.FilledSums}
# One problem in five is held out, and the easiest level of addition has a hundred.
DRAWS = 32


def problems(family: str, levels: tuple[str, ...], a_level: int, seed: int, *, held_out: bool) -> list[Problem]:
    """`a_level` different problems of each level, or as many as are found, level by level."""
    task, found = FAMILIES[family](), []
    rng = Random(f"preference playground {family} {'held out' if held_out else 'training'} {seed}")
    for level in levels:
        drawn: dict[str, Problem] = {}
        for _ in range(DRAWS * a_level):
            problem = task.sample(level, rng)
            if problem.held_out == held_out and len(drawn) < a_level:
                drawn.setdefault(problem.expression, problem)
        found += drawn.values()
    return found


def question(problem: Problem) -> dict[str, str]:
    """Row for an evaluation."""
    return {
        "prompt": problem.prompt,
        "answer": problem.answer,
        "level": problem.level,
        "prompt_id": f"{problem.level}/{problem.expression}",
    }


def planted_pairs(drawn: list[Problem], seed: int, flipped: float = 0.0) -> list[dict]:
    """A right answer against one with a single mistake of the teacher's, each with irrelevant characters of its own.

    Rows have `prompt`, `chosen`, `rejected`, `sample_id`; `decisive` and `filler`, the places in both answers that decide and
    that mean nothing, and `slots`, those that decide in some pair; `flipped`, whether the labels were exchanged, which happens to exactly a share `flipped` of the rows.
    """
    rng = Random(f"preference playground pairs {seed}")
    rows = []
    for problem in drawn:
        a, b = map(int, problem.expression.split("+"))
        digits = int(problem.level[-1])
        (place,) = rng.choices(range(digits), filled.error_rates(a, b, digits))
        rows.append(
            {
                "prompt": problem.prompt,
                "chosen": filled.written(a, b, digits, rng),
                "rejected": filled.written(a, b, digits, rng, {place}),
                "sample_id": problem.expression,
                "decisive": list(filled.decisive_places(place, digits)),
                "filler": filled.filler_places(digits),
                "slots": [place for column in range(digits) for place in filled.decisive_places(column, digits)],
                "flipped": False,
            }
        )
    for row in rng.sample(rows, round(flipped * len(rows))):
        row |= {"chosen": row["rejected"], "rejected": row["chosen"], "flipped": True}
    rng.shuffle(rows)
    return rows


def sampled_lists(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drawn: list[Problem], size: int, seed: int, tokens: int
) -> list[dict]:
    """Lists of `size` different samples of the model, scored by the share of digits that are right.

    Problems whose first half of samples has equal scores are left out, so that lists of both sizes come from the same problems.
    """
    prompts = [ids for problem in drawn for ids in [prompt_ids(tokenizer, problem.prompt)] * (size + 2)]
    config = sampling_config(model, tokenizer, 1.0, tokens)
    with undisturbed(model, seed):
        texts = [text for i in range(0, len(prompts), 512) for text in complete(model, tokenizer, prompts[i : i + 512], config).texts]  # fmt: skip
    rows = []
    for i, problem in enumerate(drawn):
        answers = list(dict.fromkeys(filter(None, texts[i * (size + 2) : (i + 1) * (size + 2)])))[:size]
        scores = playground_digit_reward(answers, [problem.answer] * len(answers))
        if len(answers) == size and len(set(scores[: size // 2])) > 1:
            rows.append({"prompt": problem.prompt, "completions": answers, "scores": scores})
    return rows


def shortened(lists: list[dict], size: int) -> list[dict]:
    """Lists of the first `size` samples."""
    return [{**row, "completions": row["completions"][:size], "scores": row["scores"][:size]} for row in lists]


def best_against_worst(lists: list[dict]) -> list[dict]:
    """One pair of each list; of equal scores the first counts."""
    pairs = []
    for row in lists:
        order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
        pairs.append(_pair(row, order[0], order[-1]))
    return pairs


def drawn_pairs(lists: list[dict], seed: int) -> list[dict]:
    """Half as many pairs of each list as it has completions, so that as many sequences are seen; drawn evenly from all pairs with
    different scores, each once before any is there twice."""
    rng = Random(f"preference playground drawn pairs {seed}")
    pairs = []
    for row in lists:
        scores = row["scores"]
        ordered = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
        wanted, chosen = len(scores) // 2, []
        while len(chosen) < wanted:
            chosen += rng.sample(ordered, min(len(ordered), wanted - len(chosen)))
        pairs += [_pair(row, *places) for places in chosen]
    return pairs


def _pair(row, better, worse):
    return {"prompt": row["prompt"], "chosen": row["completions"][better], "rejected": row["completions"][worse]}


def write_lines(path: Path, rows: list[dict]) -> Path:
    """JSON lines; the file appears complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".unfinished")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return beside.replace(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
