"""Rows for training and evaluation."""

from hf_delta.data.checks import check_rows
from hf_delta.data.files import CACHE, Source
from hf_delta.data.load import as_conversation, load_eval_rows, load_train_rows


__all__ = ["CACHE", "Source", "as_conversation", "check_rows", "load_eval_rows", "load_train_rows"]
