"""Make one clip of two stages under every residency, and print side by side what each takes.

    python profiling/residency.py
    python profiling/residency.py --ranks 2
    python profiling/residency.py --device cuda --size 22b --folder /local/disk

Writes a model of random weights with an upsampler and a LoRA, then starts a process for each mode and round, in
shuffled order; with several ranks under torchrun. Each makes the clip twice, and then switches there and back on its
own, with nothing to hide behind. A mode that does not fit is left out with its reason. Returns 1 unless the latents of
all modes and rounds are the same bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp import GuidanceRequest, Lora, PlanError, Request, Runtime, Settings
from ltx_sp.demo import demo_config, write_demo
from ltx_sp.observe import Observer
from ltx_sp.parallel.mesh import environment_rank, resolve_device, start, start_store
from profiling.load_checkpoints import read_header

MODES = ("legacy", "snapshot-low-vram", "snapshot", "resident", "sharded")
DIRECTIONS = ("host_to_device", "device_to_host", "device_to_device", "exchanged")
NUM_SWITCHES = 5
CHECKPOINT = "ltx-2.3-demo.safetensors"
ALONE, BESIDE = "switch there, nothing beside it", "switch there, in the request"
WHOLE = "second request"


@dataclasses.dataclass(frozen=True)
class Size:
    """A transformer in the published 2.3 layout, and a clip for it.

    Args:
        rank: of the LoRA; 0 for the demo's own.
    """

    num_heads: int
    head_dim: int
    num_layers: int
    rank: int
    height: int
    width: int
    num_frames: int
    steps: int


SIZES = {
    "demo": Size(4, 16, 2, 0, 128, 192, 17, 3),
    "small": Size(16, 64, 8, 64, 128, 192, 17, 3),
    "22b": Size(32, 128, 48, 384, 1024, 1536, 121, 8),
}


def write_model(folder: Path, size: Size) -> None:
    """Write the checkpoint, its text encoder, the upsampler and the LoRA; all but the transformer are the demo's."""
    config = demo_config("2.3")
    if not size.rank:
        write_demo(folder)
        return
    heads, width = size.num_heads, size.num_heads * size.head_dim
    config["transformer"] |= {"num_layers": 1, "cross_attention_dim": width, "audio_cross_attention_dim": width // 2}
    for prefix in ("", "connector_", "audio_", "audio_connector_"):
        head_dim = size.head_dim // 2 if prefix.startswith("audio_") else size.head_dim
        config["transformer"] |= {f"{prefix}num_attention_heads": heads, f"{prefix}attention_head_dim": head_dim}
    one_layer = write_demo(folder, config=config)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, (shape, _, _) in read_header(str(one_layer)).items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        if "transformer_blocks.0." in name and name.endswith(".weight") and len(shape) == 2:
            for role, sizes in (("lora_A", (size.rank, shape[1])), ("lora_B", (shape[0], size.rank))):
                factor = torch.randn(sizes, generator=generator).mul_(0.02)
                factors[f"{stem}.{role}.weight"] = factor.bfloat16()
    lora = folder / "distilled_lora.safetensors"
    save_file(factors, lora, {"format": "pt"})
    config["transformer"]["num_layers"] = size.num_layers
    for file in (one_layer, lora):
        repeat_block(file, size.num_layers, {"config": json.dumps(config), "model_version": "2.3.0"})


def repeat_block(file: Path, num_layers: int, metadata: dict[str, str]) -> None:
    """Give a file of one transformer block more of them, each with its rows in another order. In place."""
    source, target = np.memmap(file, np.uint8, "r"), file.with_suffix(".part")
    parts: list[tuple[str, tuple[int, ...], int, int, int]] = []
    for name, (shape, begin, end) in read_header(str(file)).items():
        layers = num_layers if "transformer_blocks.0." in name else 1
        parts += [(name.replace("blocks.0.", f"blocks.{i}."), shape, begin, end, i) for i in range(layers)]
    table: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, shape, begin, end, _ in parts:
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at := at + end - begin]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with target.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for _, shape, begin, end, i in parts:
            row_bytes = (end - begin) // max(shape[0], 1) if shape else 2
            stream.write(np.roll(source[begin:end], i * row_bytes).data)
    os.replace(target, file)


def run_mode(folder: Path, mode: str, size: Size, device_name: str) -> dict[str, Any]:
    """Load, make the clip twice, and switch; what it took on this rank."""
    device, rank = resolve_device(device_name), environment_rank()
    settings = Settings(
        folder / CHECKPOINT,
        folder / "gemma",
        device=device_name,
        pipeline="two-stages",
        spatial_upsampler_path=folder / "upsampler.safetensors",
        distilled_lora=Lora(folder / "distilled_lora.safetensors"),
        residency=mode,
    )
    guidance = GuidanceRequest(stg_blocks=(size.num_layers // 2,))
    request = Request(
        "a robot dancing on a rooftop",
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        num_inference_steps=size.steps,
        video=guidance,
        audio=guidance,
    )
    observer = Observer(rank, device)
    with start(device, start_store()), Runtime.load(settings, observer=observer) as runtime:
        components = runtime._components
        first, first_digest = _make_clip(runtime, request, observer, device)
        moved, num_records = dict(components.ledger.num_bytes), len(observer.records)
        second, second_digest = _make_clip(runtime, request, observer, device)
        moved = {way: components.ledger.num_bytes[way] - moved.get(way, 0) for way in DIRECTIONS}
        phases = sorted(observer.records[num_records:], key=lambda record: record.began)
        components.enter(0)
        switches: list[list[float]] = [[], []]
        for stage in (1, 0) * NUM_SWITCHES:
            with _timed(device) as taken:
                components.enter(stage)
            switches[stage] += taken
        seconds = {
            ALONE: statistics.median(switches[1]),
            "switch back, nothing beside it": statistics.median(switches[0]),
            BESIDE: [record.seconds for record in phases if record.phase == "switch weights"][1],
            "first request, with loading": first,
            WHOLE: second,
        }
        for record in phases:
            if not record.is_beside:
                name = "  " * len(record.path) + record.phase
                seconds[name] = seconds.get(name, 0.0) + record.seconds
        sizes = {
            "peak on the device": max(record.device_peak_bytes or 0 for record in observer.records),
            "peak of the process on the host": observer.records[-1].host_peak_bytes,
            "for the sets, on the device": components.ledger.peak["device"],
            "for the sets, on the host": components.ledger.peak["host"],
        }
        sizes |= {f"second request, {way.replace('_', ' ')}": num_bytes for way, num_bytes in moved.items()}
    return {"seconds": seconds, "bytes": sizes, "digests": [first_digest, second_digest]}


def _make_clip(runtime: Runtime, request: Request, observer: Observer, device: torch.device) -> tuple[float, str]:
    """Seconds until the last frame is there, and a digest of the latents."""
    with _timed(device) as seconds:
        result = runtime.generate(request)
        for _ in observer.timed(result.clip.frames, "decode") if result.clip else ():
            pass
    whole = hashlib.sha256()
    for latent in (result.latents.video, result.latents.audio):
        whole.update(latent.float().cpu().numpy().tobytes())
    return seconds[0], whole.hexdigest()


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    """Seconds that the block takes on an idle device. Blocks the host."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began, seconds = time.perf_counter(), list[float]()
    yield seconds
    synchronize()
    seconds.append(time.perf_counter() - began)


def run_child(folder: Path, mode: str, size: Size, device: str) -> int:
    """Print a mode's measures as rank 0 has them, or why it was refused."""
    try:
        measures = run_mode(folder, mode, size, device)
    except PlanError as error:
        measures = {"refused": str(error)}
    if environment_rank() == 0:
        print(json.dumps(measures))
    return 0


def start_mode(folder: Path, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a mode in a process of its own, or one for each rank; rank 0's measures, or why it was refused."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    command = [sys.executable, *(torchrun if arguments.ranks > 1 else []), __file__, "--child", str(folder), mode]
    command += ["--size", arguments.size, "--device", arguments.device]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{mode} ended with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(runs: Mapping[str, Sequence[Mapping[str, Any]]], arguments: argparse.Namespace) -> int:
    """Print what all rounds took, a column for each mode; 1 if latents differ."""
    measured = {mode: taken for mode, taken in runs.items() if "refused" not in taken[0]}
    for mode in runs.keys() - measured.keys():
        print(f"{mode} is left out: {runs[mode][0]['refused']}")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} cores"
    print(f"{arguments.size}, {arguments.ranks} rank(s), {device}, torch {torch.__version__}, {platform.release()}")
    print(f"median of {arguments.rounds} round(s): seconds and MiB of rank 0")
    print(" " * 36 + "".join(f"{mode:>18}" for mode in measured))
    runs_of_all = [taken[0] for taken in measured.values()]
    names = {kind: dict.fromkeys(name for run in runs_of_all for name in run[kind]) for kind in ("seconds", "bytes")}

    def row(kind: str, name: str, label: str = "", of: Callable[[Iterable[float]], float] = statistics.median) -> None:
        values = (of(run[kind].get(name, 0) for run in taken) for taken in measured.values())
        cells = (f"{value:18.4f}" if kind == "seconds" else f"{value / 2**20:18.1f}" for value in values)
        print(f"{label or name:36}" + "".join(cells))

    for kind in names:
        for name in names[kind]:
            row(kind, name)
            if name in (ALONE, BESIDE, WHOLE):
                row(kind, name, "    least", min)
                row(kind, name, "    most", max)
    if arguments.device == "cuda" and len(measured) == len(runs):
        _print_targets(measured)
    digests = {digest for taken in measured.values() for run in taken for digest in run["digests"]}
    print(f"latents of all modes, rounds and requests: {'bit-identical' if len(digests) == 1 else 'DIFFERENT'}")
    return 0 if len(digests) == 1 else 1


def _print_targets(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    def median(mode: str, name: str) -> float:
        return float(statistics.median(run["seconds"][name] for run in runs[mode]))

    targets = [(f"{mode} / legacy, {WHOLE}", median(mode, WHOLE) / median("legacy", WHOLE), 1.0) for mode in runs]
    targets.append((f"resident, {BESIDE}", median("resident", BESIDE), 1e-3))
    hidden = median("snapshot", BESIDE) / median("snapshot", ALONE)
    targets.append((f"snapshot, {BESIDE} / {ALONE}", hidden, 0.2))
    for name, value, limit in targets:
        print(f"{name:80}{value:9.4f}  at most {limit:g}  {'met' if value <= limit else 'NOT MET'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the model, and of the clip (default demo)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="default 1, where sharded is left out")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument(
        "--folder", type=Path, help="where the model goes, and is found again; default: removed at the end"
    )
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run_child(Path(arguments.child[0]), arguments.child[1], SIZES[arguments.size], arguments.device)
    modes = MODES if arguments.ranks > 1 else MODES[:-1]
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.size
        if not folder.exists():
            unfinished = folder.with_suffix(".part")
            write_model(unfinished, SIZES[arguments.size])
            unfinished.rename(folder)
        for i in range(arguments.rounds):
            for mode in random.Random(i).sample(modes, len(modes)):
                runs[mode].append(start_mode(folder, mode, arguments))
        return report(runs, arguments)


if __name__ == "__main__":
    sys.exit(main())
