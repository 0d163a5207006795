"""A tiny arithmetic world built on the spot, in which post-training can be seen to work on one CPU core."""

from hf_delta.playground.build import build_playground
from hf_delta.playground.rewards import playground_reward
from hf_delta.playground.tasks import TASKS, Level, Problem, Task


__all__ = ["TASKS", "Level", "Problem", "Task", "build_playground", "playground_reward"]
