"""Time the start of a run with a LoRA: merged beside the other loads, merged afterwards, and left out.

    python profiling/startup.py

Writes a model of some hundred million random parameters and a LoRA for all its linear layers, then starts processes
of one thread each, in shuffled order: from the opened files to loaded weights and encoded prompts. What the LoRA costs
is the difference to starting without one; what is hidden is the part of that cost which merging beside saves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp import GuidanceRequest, Lora, Request, Runtime, Settings
from ltx_sp.demo import GEMMA_CONFIG, demo_config, write_demo
from ltx_sp.weights.index import read_index
from ltx_sp.weights.verify import digest

_WAYS = ("none", "beside", "after")
# As launch/env.sh sets them.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
_REQUEST = Request(
    "a robot dancing on a rooftop",
    height=64,
    width=64,
    num_frames=9,
    num_inference_steps=1,
    video=GuidanceRequest(stg_blocks=(1,)),
    audio=GuidanceRequest(stg_blocks=(1,)),
)


def write_model(folder: Path, *, width: int, num_layers: int, rank: int) -> None:
    """Write the checkpoint, its text encoder and a LoRA for every two-dimensional weight of the blocks."""
    config = demo_config("2.3")
    config["transformer"] |= {
        "num_layers": num_layers,
        "num_attention_heads": width // 64,
        "attention_head_dim": 64,
        "cross_attention_dim": width,
        "caption_channels": width,
        "audio_num_attention_heads": width // 64,
        "audio_attention_head_dim": 32,
        "audio_cross_attention_dim": width // 2,
        "connector_num_attention_heads": width // 64,
        "connector_attention_head_dim": 64,
        "audio_connector_num_attention_heads": width // 64,
        "audio_connector_attention_head_dim": 32,
    }
    text: dict[str, Any] = GEMMA_CONFIG["text_config"] | {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": width // 8,
    }
    checkpoint = write_demo(folder / "model", config=config, gemma_config=GEMMA_CONFIG | {"text_config": text})
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, entry in read_index(checkpoint).entries.items():
        prefix, found, module = name.partition("diffusion_model.transformer_blocks.")
        if found and name.endswith(".weight") and len(entry.shape) == 2 and prefix == "model.":
            stem = f"diffusion_model.transformer_blocks.{module.removesuffix('.weight')}"
            for role, shape in (("lora_A", (rank, entry.shape[1])), ("lora_B", (entry.shape[0], rank))):
                factor = torch.randn(shape, generator=generator).mul_(0.02)
                factors[f"{stem}.{role}.weight"] = factor.bfloat16()
    save_file(factors, folder / "lora.safetensors")


def start(folder: Path, way: str) -> dict[str, Any]:
    """Load and encode once in this process."""
    loras = () if way == "none" else (Lora(folder / "lora.safetensors", 0.8),)
    settings = Settings(
        folder / "model" / "ltx-2.3-demo.safetensors",
        folder / "model" / "gemma",
        device="cpu",
        load_mode="stream",  # mapped, a model without a LoRA would not be copied, and the difference be more than LoRA
        loras=loras,
        overlap_lora=way != "after",
    )
    with Runtime.load(settings):
        pass  # imports what is imported late, and reads headers
    began = time.perf_counter()
    with Runtime.load(settings) as runtime:
        opened = time.perf_counter() - began
        runtime.prepare(_REQUEST)
        seconds = time.perf_counter() - began
        phases = {record.phase: record.seconds for record in runtime._observer.records} | {"read headers": opened}
        return {"seconds": seconds, "phases": phases, "digest": digest(runtime._components["transformer"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=384)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(start(Path(arguments.child[0]), arguments.child[1])))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, width=arguments.width, num_layers=arguments.layers, rank=arguments.rank)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
        for i in range(arguments.rounds + 1):
            for way in random.Random(i).sample(_WAYS, len(_WAYS)):
                command = [sys.executable, __file__, "--child", str(folder), way]
                environment = os.environ | {"OMP_NUM_THREADS": "1"} | _MALLOC
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                if i:  # the first round brings everything into the page cache
                    runs[way].append(json.loads(done.stdout.splitlines()[-1]))
        return report(folder, runs)


def _hidden(none: float, beside: float, after: float) -> float:
    """The share of what a LoRA costs afterwards that is saved by merging beside."""
    return (after - beside) / (after - none)


def report(folder: Path, runs: dict[str, list[dict[str, Any]]]) -> int:
    """Print the medians and what of the LoRA's cost is hidden; 1 if that is less than 80 %."""
    sizes = {path.name: path.stat().st_size / 2**20 for path in sorted(folder.rglob("*.safetensors"))}
    print(", ".join(f"{name} {size:.0f} MiB" for name, size in sizes.items()))
    print(f"torch {torch.__version__}, one thread per pool, {os.cpu_count()} cores, {platform.release()}, warm")
    for way in _WAYS:
        seconds = [run["seconds"] for run in runs[way]]
        print(f"{way:8s} median {statistics.median(seconds):6.2f} s   {min(seconds):.2f} to {max(seconds):.2f}")
    for phase in ("read headers", "load text_encoder", "encode text", "load transformer", "merge lora"):
        medians = {way: statistics.median(run["phases"].get(phase, 0.0) for run in runs[way]) for way in _WAYS}
        print(f"  {phase:18s}" + "".join(f"{seconds:8.2f} s {way}" for way, seconds in medians.items()))
    rounds = zip(*(runs[way] for way in _WAYS), strict=True)
    hidden = [_hidden(*(run["seconds"] for run in taken)) for taken in rounds]
    # Of the medians: within a round, noise of the three starts is divided by a difference of the same size.
    share = _hidden(*(statistics.median(run["seconds"] for run in runs[way]) for way in _WAYS))
    rounds_apart = f"by round {min(hidden):.2f} to {max(hidden):.2f}"
    print(f"hidden of the LoRA's own time: {share:.2f} (at least 0.80); {rounds_apart}")
    digests = {way: {run["digest"] for run in runs[way]} for way in ("beside", "after")}
    equal = digests["beside"] == digests["after"] and len(digests["after"]) == 1
    print(f"merged weights of all runs: {'bit-identical' if equal else 'DIFFERENT'}")
    return 0 if equal and share >= 0.8 else 1


if __name__ == "__main__":
    sys.exit(main())
