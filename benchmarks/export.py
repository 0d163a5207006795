"""Peak memory of the two exports, beside PEFT's own merge of the model in memory.

    python benchmarks/export.py --hidden 1024 --layers 24

Each way runs in a process of its own; the peak is that of its resident memory, less what the process had once everything
was imported. Pages of the checkpoint that the system maps count too, so the rows for files read one by one are upper bounds.
Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_delta.adapters.export import export_lora, export_merged


METHODS = {"lora": {}, "dora": {"use_dora": True}}


def build(folder: Path, hidden: int, layers: int, shard: str) -> None:
    """A random Llama in bfloat16, and one adapter of each method on all its linear layers."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=32000,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size=shard)
    for name, fields in METHODS.items():
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", **fields))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter += 1e-3 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)


def merge_in_memory(adapter: Path, out: Path) -> None:
    AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(out)


WAYS = {
    "PEFT merge_and_unload": merge_in_memory,
    "hf-delta export --format merged": export_merged,
    "hf-delta export --format lora": lambda adapter, out: export_lora(adapter).save(out),
}


def measure(way: str, adapter: Path, out: Path) -> dict[str, float]:
    before, start = resident("VmRSS"), time.process_time()
    WAYS[way](adapter, out)
    return {"peak_mib": resident("VmHWM") - before, "seconds": time.process_time() - start}


def resident(field: str) -> float:
    """Resident memory now or at most, as Linux counts it for this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shard", default="100MB", help="size of the files of the base model (default: %(default)s)")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "ADAPTER", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        way, adapter, out = arguments.one
        print(json.dumps(measure(way, Path(adapter), Path(out))))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build(root, arguments.hidden, arguments.layers, arguments.shard)
        size = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors")) / 2**20
        print(f"base model: {size:.0f} MiB in files of {arguments.shard}")
        print("| adapter | way | peak MiB | CPU s |\n|---|---|---|---|")
        for name in METHODS:
            for number, way in enumerate(WAYS):
                command = [sys.executable, __file__, "--one", way, str(root / name), str(root / f"{name}{number}")]
                ran = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(ran.stdout.splitlines()[-1])
                print(f"| {name} | {way} | {found['peak_mib']:.0f} | {found['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
