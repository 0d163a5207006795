"""Names that mean a path on this disk, told from ids of the Hub."""

import os
import re
from pathlib import Path
from typing import Any


def is_local(name: str) -> bool:
    """Whether the name of a model or file is a path here, and no id of the Hub."""
    path = Path(os.path.expanduser(name))
    named_so = name.startswith((".", "~")) or "\\" in name or (name.count("/") > 1 and "://" not in name)
    return path.is_absolute() or named_so or os.path.exists(path)


def _on_this_disk(text: str) -> bool:
    """As [`is_local`], for a text that may be anything: a regular expression, a sentence."""
    path = Path(os.path.expanduser(text))
    # Unlike pathlib's, it says no to a text that is too long for a name.
    return text.startswith("~") or path.is_absolute() or os.path.exists(path)


def local_paths(values: Any) -> list[str]:
    """The texts among values that are paths here, wherever they stand."""
    if isinstance(values, str):
        return [values] if re.search(r"[/\\]", values) and "://" not in values and _on_this_disk(values) else []
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return sorted({path for part in parts for path in local_paths(part)})
