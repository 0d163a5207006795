"""Names that mean a path on this disk, told from ids of the Hub."""

from pathlib import Path
from typing import Any


def is_local(name: str) -> bool:
    """Whether the name of a model or file is a path here, and no id of the Hub."""
    path = Path(name).expanduser()
    return path.is_absolute() or name.startswith(".") or path.exists()


def local_paths(values: Any) -> list[str]:
    """The texts among values that are paths here, wherever they stand."""
    if isinstance(values, str):
        return [values] if "/" in values and is_local(values) else []
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return sorted({path for part in parts for path in local_paths(part)})
