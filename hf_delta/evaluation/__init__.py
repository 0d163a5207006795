"""pass@k with intervals: measure a model, keep the result, compare two results.

Names are resolved on first use, so that reading or comparing reports imports neither torch nor transformers.
"""

from importlib import import_module
from typing import Any


_PUBLIC = {
    "Comparison": "hf_delta.evaluation.comparison",
    "Estimate": "hf_delta.evaluation.estimates",
    "Report": "hf_delta.evaluation.report",
    "comparison_report": "hf_delta.evaluation.comparison",
    "evaluate": "hf_delta.evaluation.evaluator",
    "evaluate_files": "hf_delta.evaluation.evaluator",
    "load_rows": "hf_delta.evaluation.rows",
    "pass_at_k": "hf_delta.evaluation.estimates",
}

__all__ = [*_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_delta.evaluation' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)
