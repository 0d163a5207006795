"""Bad reward functions: what cannot be imported or called, and what returns no rewards."""

from tests.bad_inputs.case import run, slow
from tests.bad_inputs.recipes import TWO_PROMPTS


def reward(id, body, says, given, **changes):
    """A run with `my_rewards.reward`, a function with this body."""
    code = (
        f"async def reward(completions, **kwargs):\n    {body}\n"
        if id.startswith("async")
        else f"def reward(completions, **kwargs):\n    {body}\n"
    )
    return module(id, code, says, f"a reward function {given}", **changes)


def module(id, code, says, given, name="my_rewards.reward", **changes):
    return run(id, "grpo", {"reward_funcs": [name], **changes}, says, given=given, files={"my_rewards.py": code})


NAMES = [
    run(
        "reward-typo",
        "grpo",
        {"reward_funcs": ["playground_rewards"]},
        "reward_funcs: no reward function 'playground_rewards'; did you mean 'playground_reward'?",
    ),
    run(
        "reward-module",
        "grpo",
        {"reward_funcs": ["my_rewards.reward"]},
        "reward_funcs: my_rewards.reward: cannot import my_rewards (No module named 'my_rewards').",
        given="`reward_funcs: [my_rewards.reward]` without a file `my_rewards.py`",
    ),
    run(
        "reward-empty-name",
        "grpo",
        {"reward_funcs": [""]},
        "reward_funcs: no reward function ''; there are accuracy_reward, get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment, playground_digit_reward, playground_reward, reasoning_accuracy_reward, think_format_reward.",
    ),
    run(
        "reward-null",
        "grpo",
        {"reward_funcs": [None]},
        "recipe.yaml:15: reward_funcs must be a list of texts or blocks of keys or null, got the list [None].",
        given="`reward_funcs: [null]`",
    ),
    run(
        "reward-relative",
        "grpo",
        {"reward_funcs": [".my_rewards"]},
        "reward_funcs: '.my_rewards' is not a dotted path such as my_module.my_function.",
    ),
    run(
        "reward-trailing-dot",
        "grpo",
        {"reward_funcs": ["my_rewards."]},
        "reward_funcs: 'my_rewards.' is not a dotted path such as my_module.my_function.",
    ),
    run(
        "reward-path",
        "grpo",
        {"reward_funcs": ["./my_rewards.py"]},
        "reward_funcs: './my_rewards.py' is not a dotted path such as my_module.my_function.",
    ),
    run(
        "reward-block-of-two",
        "grpo",
        {"reward_funcs": [{"a": {}, "b": {}}]},
        "reward_funcs: {'a': {}, 'b': {}} must have one name, as in {name: {argument: value}}.",
    ),
    run(
        "reward-without-arguments",
        "grpo",
        {"reward_funcs": ["get_soft_overlong_punishment"]},
        "reward_funcs: get_soft_overlong_punishment takes arguments; write {get_soft_overlong_punishment: {max_completion_len: …, soft_punish_cache: …}}.",
    ),
    run(
        "reward-with-wrong-arguments",
        "grpo",
        {"reward_funcs": [{"get_soft_overlong_punishment": {"max_length": 8}}]},
        "reward_funcs: get_soft_overlong_punishment: missing a required argument: 'max_completion_len'; it takes (max_completion_len: …, soft_punish_cache: …).",
    ),
    run(
        "reward-that-makes-none",
        "grpo",
        {"reward_funcs": [{"playground_reward": {"completions": [], "answer": []}}]},
        "reward_funcs: playground_reward{'completions': [], 'answer': []} is not a function; write the name alone.",
    ),
    run(
        "judge-typo",
        "sft",
        {"evaluate_pass_at": [1], "evaluate_reward": "playground_rewardd"},
        "evaluate_reward: no reward function 'playground_rewardd'; did you mean 'playground_reward'?",
    ),
    module(
        "no-name",
        "x = 1\n",
        "reward_funcs: my_rewards.reward: module my_rewards has no name 'reward'.",
        "a module without that name",
    ),
    module(
        "not-a-function",
        "reward = 1.0\n",
        "reward_funcs: my_rewards.reward is not a function.",
        "a number instead of a function",
    ),
    module(
        "syntax-error",
        "def reward(completions, **kwargs)\n    return 1\n",
        "reward_funcs: my_rewards.reward: my_rewards fails when it is imported (SyntaxError: expected ':' (my_rewards.py, line 1)).",
        "a module with a syntax error",
    ),
    module(
        "fails-at-import",
        "import json\njson.loads('{')\n",
        "reward_funcs: my_rewards.reward: my_rewards fails when it is imported (JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)).",
        "a module that raises when it is imported",
    ),
    module(
        "exits-at-import",
        "raise SystemExit(0)\n",
        "reward_funcs: my_rewards.reward: my_rewards fails when it is imported (SystemExit: 0).",
        "a module that exits when it is imported",
    ),
    module(
        "imports-nothing-there",
        "import not_installed_at_all\n",
        "reward_funcs: my_rewards.reward: cannot import my_rewards (No module named 'not_installed_at_all').",
        "a module that imports what is not installed",
    ),
    module(
        "no-kwargs",
        "def reward(completions):\n    return [1.0] * len(completions)\n",
        "The reward function reward has no parameter for answer, completion_ids, level, log_extra, log_metric, prompt_id, prompts, trainer_state, which TRL passes: add **kwargs to its parameters.",
        "a reward function without `**kwargs`",
    ),
    module(
        "a-column",
        "def reward(completions, difficulty, **kwargs):\n    return [1.0] * len(completions)\n",
        "The reward function reward needs the column 'difficulty', and the dataset has prompt, answer, level, prompt_id. Map one to it: dataset_columns: {difficulty: <its name in the dataset>}.",
        "a reward function that needs a column which is not there",
    ),
    module(
        "class",
        "class reward:\n    def __call__(self, completions, **kwargs):\n        return [1.0] * len(completions)\n",
        "reward_funcs: my_rewards.reward takes arguments; write {my_rewards.reward: {}}.",
        "a class without arguments",
    ),
    module(
        "maker-raises",
        "def make(scale):\n    raise ValueError('scale must be positive')\n",
        "reward_funcs: my_rewards.make{'scale': -1} raised ValueError: scale must be positive",
        "a maker of functions that raises",
        name={"my_rewards.make": {"scale": -1}},
    ),
    module(
        "type",
        "reward = int\n",
        "reward_funcs: my_rewards.reward does not say which parameters it has. Write a function.",
        "a class of Python's own",
    ),
    module(
        "no-parameters",
        "def reward():\n    return []\n",
        "The reward function reward has no parameter for answer, completion_ids, completions, level, log_extra, log_metric, prompt_id, prompts, trainer_state, which TRL passes: add **kwargs to its parameters.",
        "a reward function without parameters",
    ),
    module(
        "imports-itself",
        "from my_rewards import reward\n",
        "reward_funcs: my_rewards.reward: cannot import my_rewards (cannot import name 'reward' from partially initialized module 'my_rewards' (most likely due to a circular import) (my_rewards.py)).",
        "a module that imports itself",
    ),
    module(
        "null-bytes",
        "reward = '\0'\n",
        "reward_funcs: my_rewards.reward: my_rewards fails when it is imported (SyntaxError: source code string cannot contain null bytes).",
        "a module with a NUL byte",
    ),
    module(
        "maker-exits",
        "import sys\n\n\ndef make(scale):\n    sys.exit(3)\n",
        "reward_funcs: my_rewards.make{'scale': 1} raised SystemExit: 3",
        "a maker of functions that exits",
        name={"my_rewards.make": {"scale": 1}},
    ),
    run(
        "reward-without-module",
        "grpo",
        {"reward_funcs": ["len"]},
        "reward_funcs: no reward function 'len'; there are accuracy_reward, get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment, playground_digit_reward, playground_reward, reasoning_accuracy_reward, think_format_reward.",
    ),
]

RETURNS = [
    reward(
        "raises",
        "raise KeyError('level')",
        "The reward function 'reward' raised KeyError: 'level' (my_rewards.py, line 2).",
        "that raises",
    ),
    reward(
        "raises-without-words",
        "assert False",
        "The reward function 'reward' raised AssertionError (my_rewards.py, line 2).",
        "that fails an assertion",
    ),
    reward(
        "exits",
        "raise SystemExit(1)",
        "The reward function 'reward' raised SystemExit: 1 (my_rewards.py, line 2).",
        "that exits",
    ),
    reward(
        "nan",
        "return [float('nan')] * len(completions)",
        "The reward function 'reward' returned nan for the completion …. Return a finite number, or None where the function does not apply.",
        "that returns NaN",
    ),
    reward(
        "infinity",
        "return [float('-inf')] * len(completions)",
        "The reward function 'reward' returned -inf for the completion …. Return a finite number, or None where the function does not apply.",
        "that returns minus infinity",
    ),
    reward(
        "too-few",
        "return [1.0] * (len(completions) - 1)",
        "The reward function 'reward' returned 3 rewards for 4 completions; it must return one reward per completion.",
        "that returns a reward too few",
    ),
    reward(
        "none",
        "return None",
        "The reward function 'reward' returned NoneType; it must return a list with one reward per completion.",
        "that returns nothing",
    ),
    reward(
        "scalar",
        "return 1.0",
        "The reward function 'reward' returned float; it must return a list with one reward per completion.",
        "that returns one number",
    ),
    reward(
        "text",
        "return 'good'",
        "The reward function 'reward' returned str; it must return a list with one reward per completion.",
        "that returns a text",
    ),
    reward(
        "texts",
        "return ['good'] * len(completions)",
        "The reward function 'reward' returned 'good' for the completion …. Return a finite number, or None where the function does not apply.",
        "that returns texts",
    ),
    reward(
        "numbers-as-texts",
        "return ['1.0'] * len(completions)",
        "The reward function 'reward' returned '1.0' for the completion …. Return a finite number, or None where the function does not apply.",
        "that returns numbers as texts",
    ),
    reward(
        "too-large",
        "return [10**400] * len(completions)",
        "The reward function 'reward' returned a number that is too large for the completion …. Return a finite number, or None where the function does not apply.",
        "that returns 10**400",
    ),
    reward(
        "arrays",
        "import numpy; return numpy.ones((len(completions), 2))",
        "The reward function 'reward' returned array([1., 1.]) for the completion …. Return a finite number, or None where the function does not apply.",
        "that returns two numbers for each completion",
    ),
    reward(
        "tensor-of-one",
        "import torch; return torch.ones(())",
        "The reward function 'reward' returned Tensor; it must return a list with one reward per completion.",
        "that returns one tensor",
    ),
    reward(
        "too-many",
        "return [1.0] * (len(completions) + 1)",
        "The reward function 'reward' returned 5 rewards for 4 completions; it must return one reward per completion.",
        "that returns a reward too many",
    ),
    reward(
        "recursion",
        "return reward(completions, **kwargs)",
        "The reward function 'reward' raised RecursionError: … (my_rewards.py, line 2).",
        "that calls itself",
    ),
    reward(
        "raises-in-lines",
        "raise ValueError('one' + chr(10) + 'two')",
        "The reward function 'reward' raised ValueError: one two (my_rewards.py, line 2).",
        "that raises with words in two lines",
    ),
    module(
        "raises-what-has-no-words",
        "class Oops(Exception):\n    def __str__(self):\n        raise RuntimeError\n\n\ndef reward(completions, **kwargs):\n    raise Oops\n",
        "The reward function 'reward' raised Oops (my_rewards.py, line 7).",
        "a reward function that raises what cannot be printed",
    ),
    module(
        "position-only",
        "def reward(completions, /, **kwargs):\n    return [1.0] * len(completions)\n",
        "The reward function 'reward' raised TypeError: reward() missing 1 required positional argument: 'completions' (…).",
        "a reward function whose parameter has no name",
    ),
    reward(
        "block",
        "return {'reward': 1.0}",
        "The reward function 'reward' returned dict; it must return a list with one reward per completion.",
        "that returns a dict",
    ),
    reward(
        "lists",
        "return [[1.0]] * len(completions)",
        "The reward function 'reward' returned [1.0] for the completion …. Return a finite number, or None where the function does not apply.",
        "that returns a list for each completion",
    ),
    reward(
        "complex",
        "return [1j] * len(completions)",
        "The reward function 'reward' returned 1j for the completion …. Return a finite number, or None where the function does not apply.",
        "that returns complex numbers",
    ),
    reward(
        "none-for-all",
        "return [None] * len(completions)",
        "None of the reward functions (reward) gave a score…",
        "that returns None for all",
    ),
    reward(
        "async-raises",
        "raise ConnectionError('the judge is away')",
        "The reward function 'reward' raised ConnectionError: the judge is away (my_rewards.py, line 2).",
        "that is `async` and raises",
    ),
    reward(
        "async-too-few",
        "return [1.0]",
        "The reward function 'reward' returned 1 rewards for 4 completions; it must return one reward per completion.",
        "that is `async` and returns too few",
    ),
    module(
        "coroutine",
        "async def judge(completions, **kwargs):\n    return [1.0] * len(completions)\n\n\ndef reward(completions, **kwargs):\n    return judge(completions)\n",
        "The reward function 'reward' returned coroutine; it must return a list with one reward per completion.",
        "a reward function that returns a coroutine and is not `async`",
    ),
    run(
        "every-completion-cut-off",
        "grpo",
        {"max_completion_length": 1, "mask_truncated_completions": True},
        "Every one of the 4 completions was cut at max_completion_length = 1 tokens, and mask_truncated_completions leaves none to train on. Raise max_completion_length, or write mask_truncated_completions: false.",
    ),
    reward(
        "pass-rates-of-large-rewards",
        "return [float(len(c)) for c in completions]",
        "The weighted sum of rewards lies between …, and pass rates need to know what is correct. Write correct_threshold, or in correct_reward_func the name of a function that returns 0 or 1.",
        "above 1, with `prompt_weighting: prompt_gdro`",
        prompt_weighting="prompt_gdro",
        per_device_train_batch_size=8,
    ),
    reward(
        "judge-returns-none",
        "return [None] * len(completions)",
        "The reward function 'reward' returned None for prompt_id 'addition/add1/1+4': evaluation needs a verdict on every problem. Leave out the problems it does not apply to.",
        "that returns None, as `evaluate_reward`",
        reward_funcs=["playground_reward"],
        evaluate_pass_at=[1],
        evaluate_reward="my_rewards.reward",
        evaluate_max_new_tokens=2,
    ),
    reward(
        "judge-raises",
        "raise KeyError('level')",
        "The reward function 'reward' raised KeyError: 'level' (my_rewards.py, line 2).",
        "that raises, as `evaluate_reward`",
        reward_funcs=["playground_reward"],
        evaluate_pass_at=[1],
        evaluate_reward="my_rewards.reward",
        evaluate_max_new_tokens=2,
    ),
]

RULES = [
    run(
        "transform-that-raises",
        "grpo",
        {"advantage_transforms": ["my_rules.rule"]},
        "The advantage transform my_rules.rule raised KeyError: 'level' (my_rules.py, line 2)",
        given="an own weight rule that raises",
        files={"my_rules.py": "def rule(batch):\n    raise KeyError('level')\n"},
    ),
    run(
        "transform-of-another-shape",
        "grpo",
        {"advantage_transforms": ["my_rules.rule"]},
        "The advantage transform my_rules.rule returned weights of shape (); it must return one weight per sequence, shape (4,).",
        given="an own weight rule that returns one number",
        files={"my_rules.py": "def rule(batch):\n    return 1.0\n"},
    ),
    run(
        "transform-nan",
        "grpo",
        {"advantage_transforms": ["my_rules.rule"]},
        "The advantage transform my_rules.rule returned the weight nan for sequence 0 of the batch; weights must be finite and not negative.",
        given="an own weight rule that returns NaN",
        files={
            "my_rules.py": "import torch\n\n\ndef rule(batch):\n    return torch.full((len(batch.rewards),), float('nan'))\n"
        },
    ),
    run(
        "allocation-that-raises",
        "grpo",
        {"rollout_allocation": "my_rules.rule"},
        "rollout_allocation: my_rules.rule raised KeyError: 'level' (my_rules.py, line 2)",
        beside=TWO_PROMPTS,
        given="an own budget rule that raises",
        files={"my_rules.py": "def rule(batch):\n    raise KeyError('level')\n"},
    ),
    run(
        "allocation-of-another-sum",
        "grpo",
        {"rollout_allocation": "my_rules.Rule"},
        "rollout_allocation: my_rules.Rule returned [1, 1] for 2 prompts; it must return for each at least 2 rollouts, 8 in all.",
        beside=TWO_PROMPTS,
        given="an own budget rule whose budgets do not add up",
        files={
            "my_rules.py": "import torch\n\n\nclass Rule:\n    def __call__(self, batch):\n        return torch.ones(len(batch.prompt_ids), dtype=torch.long)\n\n    def check(self, *args):\n        pass\n"
        },
    ),
    run(
        "token-rule-that-raises",
        "dpo",
        {"token_weights": "my_rules.rule"},
        "token weights my_rules.rule: it raised KeyError: 'level' (my_rules.py, line 2)",
        given="an own rule of token weights that raises",
        files={"my_rules.py": "def rule(batch):\n    raise KeyError('level')\n"},
    ),
    run(
        "token-rule-of-another-shape",
        "dpo",
        {"token_weights": "my_rules.rule"},
        "token weights my_rules.rule: the reward weights are (3,) and must be (N, T), here (8, 51).",
        given="an own rule of token weights of another shape",
        files={"my_rules.py": "import torch\n\n\ndef rule(batch):\n    return torch.ones(3)\n"},
    ),
]

# Each takes a step of training.
RETURNS = slow(RETURNS, but=["grpo-raises", "grpo-too-few", "grpo-too-large", "grpo-judge-raises"])
RULES = slow(RULES, but=["grpo-transform-that-raises", "dpo-token-rule-that-raises"])
