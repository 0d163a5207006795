"""The files of pairs: where they lie, and how they come to be there whole."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hf_delta.errors import InputError
from hf_delta.paths import check_writable


def provenance_path(out: Path) -> Path:
    """Where the provenance of a file of pairs lies: `pairs.provenance.json` for `pairs.jsonl`."""
    return out.with_name(f"{out.stem}.provenance.json")


def partial_path(out: Path) -> Path:
    """Where answers are kept until all are there."""
    return out.with_name(f"{out.name}.partial")


def check_out(out: Path) -> None:
    """
    Raises:
        InputError: the file cannot be written, has another suffix, or would replace something.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"--out: {out} must end in .jsonl, by which trainers know JSON lines.")
    check_writable(out, "--out", directory=False)
    if out.exists():
        raise InputError(f"--out: {out} exists: remove it, or choose another name.")
    # Without answers that are to be gone on with, whatever is there is somebody else's.
    if provenance_path(out).exists() and not partial_path(out).exists():
        raise InputError(f"--out: {provenance_path(out)} exists: remove it, or choose another name.")


def write_pairs(out: Path, rows: list[dict[str, Any]], provenance: dict[str, Any]) -> None:
    """Write both files, the provenance first, so that pairs never lie there without it, and give up the partial file."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    provenance = {**provenance, "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(provenance, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for path, data in ((provenance_path(out), text.encode()), (out, content)):
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    partial_path(out).unlink()
