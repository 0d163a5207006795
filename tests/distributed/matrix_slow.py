"""The half of the table of `matrix.py` that is run in the slow tier, in a launch of its own."""

from tests.distributed.matrix import SLOW as CASES


__all__ = ["CASES"]
