"""Run PEFT's own tests for our adapters: `python -m tests.adapters.peft_matrix [--out FOLDER]`.

Fetches the source distribution of the installed PEFT from the package index, whose tests come without conftest, and runs
those that need no network for our configurations and, beside them, for PEFT's LoRA and MiSS. See `peft_rows.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).parents[2]
OUTCOMES = ("passed", "failed", "skipped")


class Unreachable(Exception):
    """The package index gave no source distribution."""


def fetch(folder: Path) -> Path:
    """Folder with PEFT's tests as package `peft_tests`.

    Raises:
        `Unreachable`: the package index cannot be reached.
    """
    wanted = f"peft=={version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--no-binary", "peft", "--no-deps", wanted, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Unreachable(done.stderr.strip().splitlines()[-1])
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    (tests,) = folder.glob("peft-*/tests")
    tests = tests.rename(folder / "peft_tests")
    (tests / "__init__.py").touch()
    return tests


def run(folder: Path, *options: str) -> list[dict]:
    """One dict for each test: `variant`, `test`, `id`, `outcome` and `message`."""
    tests = fetch(folder)
    results = folder / "results.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.adapters.peft_rows", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(folder), "-c", os.devnull, "--tb=short", "-W", "ignore", *options]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PEFT_MATRIX_RESULTS": str(results),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    names = [str(tests / f"{name}.py") for name in ("test_custom_models", "test_decoder_models")]
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run([*command, *names], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode not in (0, 1):
        raise RuntimeError((folder / "log.txt").read_text()[-4000:])
    return [json.loads(line) for line in results.read_text().splitlines()]


def table(results: list[dict]) -> str:
    """Counts by variant, as Markdown."""
    counts = Counter((result["variant"], result["outcome"]) for result in results)
    lines = ["| | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 1) + "|"]
    for variant in dict.fromkeys(result["variant"] for result in results):
        lines.append(f"| {variant} | " + " | ".join(str(counts[variant, outcome]) for outcome in OUTCOMES) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to keep PEFT's tests, the log and results.jsonl in")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = run(folder, *options)
    sys.stdout.write(table(results) + "\n\n")
    for result in results:
        if result["outcome"] == "failed":
            message = result["message"].splitlines() or [""]
            sys.stdout.write(f"{result['variant']}: {result['test']}[{result['id']}]: {message[0]}\n")


if __name__ == "__main__":
    main()
