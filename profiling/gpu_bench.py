"""Time denoising steps of the published 22B size on one GPU, and set them beside what the GPU can do.

    python profiling/gpu_bench.py --json steps.json
    python profiling/gpu_bench.py --device cpu --size small

Random weights, made on the device. One unguided and one guided step (four passes, one after the other, the perturbed
one from the STG block on) at 768x1280 and 1088x1920, 121 frames each: as they are, captured in a CUDA graph, with
compiled blocks, and both. Graphs run the audio stream beside the video's where blocks are not compiled; what that
brings, and what two passes in one batch bring, is timed in the guided step of the smaller clip. For each the median
time between events around a step, the peak of memory, operations per second, and from a trace of one step the share of
it in which no kernel ran. `roof` is the time that the counted operations would take at the rates that this GPU reached
in matrix products and in attention of that length just before. Where diffusers is installed, its transformer takes the
same steps on the same weights; operations are ours there too, although it runs all blocks of all passes. Cases that no
longer fit into --time-limit are left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.denoise import EULER, steps_of
from ltx_sp.errors import LtxSpError
from ltx_sp.graph import SideStream, StepGraphs
from ltx_sp.model.attention import Backend, SdpaBackend, choose_backend, in_turn
from ltx_sp.model.dit import Transformer
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh, device_name, resolve_device
from ltx_sp.recipes import Guidance
from ltx_sp.spec import LatentShape, TransformerSpec
from ltx_sp.weights.merge import use_full_precision
from profiling.bench_step import SIGMAS, diffusers_step, diffusers_twin
from profiling.calibrate import measure_attention, measure_products
from profiling.kernel_traces import Track, read_trace, union
from profiling.models import Inputs, full_size, random_inputs, random_transformer, transformer_spec
from profiling.steps import UNGUIDED, guided, make_denoiser

# In the order in which they matter, if time is short.
BATCHED, ONE_STREAM = "graph, batched", "graph, one stream"
WAYS = ("graph", "compile + graph", ONE_STREAM, BATCHED, "eager", "compile")
THEIRS = ("diffusers", "diffusers compiled")

_LONG = 6.0  # seconds for the timed steps of a case; a step that takes as long is not traced


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the clips that it makes.

    Args:
        clips: the latent space of each, by what people call them.
        num_text: tokens of a prompt.
    """

    spec: TransformerSpec
    clips: Mapping[str, LatentShape]
    num_text: int
    stg_block: int


SIZES = {
    "22b": Size(
        full_size(),
        {"768x1280x121": LatentShape(16, 24, 40, 126), "1088x1920x121": LatentShape(16, 34, 60, 126)},
        1024,
        28,
    ),
    "small": Size(
        transformer_spec(num_heads=4, head_dim=32, audio_head_dim=16, num_layers=2),
        {"64x96x17": LatentShape(3, 2, 3, 18)},
        16,
        1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of a step, multiply and add counted apart: in matrix products and in attention."""

    products: int
    attention: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        seconds: of a step, each time that it was taken after the first two.
        first_seconds: of the first two, which choose kernels, compile and capture.
        peak_bytes: on the device, weights included; 0 where there is none.
        flops: counted operations per second, of products and attention together.
        roof: seconds that they would take at the rates measured.
        busy, window: seconds of a traced step in which something ran, and from its first kernel to its last; 0 where
            nothing was traced.
        classes: of that step, the seconds of each class of kernels.
        failure: why there are no figures.
    """

    clip: str
    guidance: str
    way: str
    seconds: tuple[float, ...] = ()
    first_seconds: float = 0.0
    peak_bytes: int = 0
    flops: float = 0.0
    roof: float = 0.0
    busy: float = 0.0
    window: float = 0.0
    classes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def gaps(self) -> float:
        """Share of the traced step in which nothing ran."""
        return 1 - self.busy / self.window if self.window else math.nan


def count_work(size: Size, shape: LatentShape, guidance: Guidance, *, max_batch_size: int = 1) -> Work:
    """Count the operations of one step, on tensors without values."""
    # Blocks are alike, and so are those that a pass does not run again because another one had them, up to STG's.
    few, layer, shared = (
        _count(size, shape, guidance, *sizes, max_batch_size=max_batch_size) for sizes in ((2, 1), (3, 1), (3, 2))
    )
    layers, blocks = size.spec.num_layers - 2, size.stg_block - 1
    counts = zip(few, layer, shared, strict=True)
    return Work(*(one + layers * (two - one) + blocks * (three - two) for one, two, three in counts))


def _count(
    size: Size, shape: LatentShape, guidance: Guidance, num_layers: int, stg_block: int, *, max_batch_size: int = 1
) -> tuple[int, int]:
    """Operations in products and in attention of a model with fewer blocks."""
    meta, spec = torch.device("meta"), dataclasses.replace(size.spec, num_layers=num_layers)
    model = random_transformer(spec, dtype=torch.bfloat16, device=meta)
    inputs = random_inputs(spec, shape, num_text=size.num_text, dtype=torch.bfloat16, device=meta)
    blocks = (stg_block,) if guidance.stg_blocks else ()
    guidance = dataclasses.replace(guidance, stg_blocks=blocks)
    step = our_step(model, inputs, guidance, SdpaBackend(), max_batch_size=max_batch_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        step()
    by_name = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    # On meta attention is what it is made of: two batched products.
    attention = sum(count for name, count in by_name.items() if "attention" in name or name.endswith("bmm"))
    return sum(by_name.values()) - attention, attention


def our_step(
    model: Transformer,
    inputs: Inputs,
    guidance: Guidance,
    backend: Backend,
    graphs: StepGraphs | None = None,
    *,
    max_batch_size: int = 1,
) -> Callable[[], object]:
    """One Euler step of ours, always from the same noise; captured the second time where there are graphs."""
    device = inputs.video.device
    beside = in_turn if graphs is None else graphs.beside
    mesh = Mesh.alone(device)
    denoiser = make_denoiser(
        model, inputs, mesh, guidance, max_batch_size=max_batch_size, backend=backend, beside=beside
    )
    schedule = EULER.schedule(SIGMAS)
    row = torch.tensor(schedule.rows[0], dtype=torch.float64, device=device)
    take = steps_of(denoiser, EULER)
    if graphs is not None:
        take = graphs.stage("step", 0, take, denoiser.constants())
    state = EULER.begin(Streams(inputs.video, inputs.audio))
    return lambda: take(schedule.kinds[0], state, row, [])


class Timer:
    """Times steps on a device, within a limit for all of them together.

    Args:
        rounds: of each step, where the limit allows.
    """

    def __init__(self, device: torch.device, rounds: int, time_limit: float):
        self.device, self._rounds = device, rounds
        self._on_gpu, self._deadline = device.type == "cuda", time.monotonic() + time_limit

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, step: Callable[[], object]) -> float:
        """One step, by events on the device. Blocks the host."""
        self.synchronize()
        if not self._on_gpu:
            began = time.perf_counter()
            step()
            return time.perf_counter() - began
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        step()
        events[1].record()
        self.synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3

    def rounds(self, step: Callable[[], object]) -> tuple[float, tuple[float, ...]]:
        """Seconds of the first two together, and of each further one: fewer where they are long. Blocks the host."""
        began = time.perf_counter()
        for _ in range(2):
            step()
        self.synchronize()
        first, found = time.perf_counter() - began, [self.seconds(step)]
        while len(found) < self._rounds and sum(found) < _LONG and 3 * found[-1] < self.left:
            found.append(self.seconds(step))
        return first, tuple(found)

    def trace(self, step: Callable[[], object]) -> Track:
        """What the device ran in one step; on a CPU what the host did. Blocks the host."""
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU]) as profiler:
            step()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.json"
            profiler.export_chrome_trace(str(path))
            return read_trace(path)[0]


def measure(
    timer: Timer, name: tuple[str, str, str], step: Callable[[], object], work: Work, rates: tuple[float, float]
) -> Case:
    """Time one case and take a trace of it. Blocks the host.

    Args:
        rates: operations per second in products and in attention.
    """
    on_gpu = timer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(timer.device)
    try:
        with torch.no_grad():
            first, seconds = timer.rounds(step)
            peak = torch.cuda.max_memory_allocated(timer.device) if on_gpu else 0
    except Exception as error:  # whatever it is, the other cases have figures
        return Case(*name, failure=str(error).partition("\n")[0] or type(error).__name__)
    track = None
    if seconds[-1] < _LONG and (3 * seconds[-1] + 5 < timer.left or not on_gpu):
        try:
            with torch.no_grad():
                track = timer.trace(step)
        except Exception as error:  # the figures are there without it
            print(f"no trace: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    busy = window = 0.0
    classes: dict[str, float] = {}
    if track is not None and track.activities:
        busy = union(track.activities)[0] / 1e9
        ends = [(activity.start, activity.end) for activity in track.activities]
        window = (max(end for _, end in ends) - min(start for start, _ in ends)) / 1e9
        classes = {key: own / 1e9 for key, (_, own) in track.sums().items()}
    return Case(
        *name,
        seconds=seconds,
        first_seconds=first,
        peak_bytes=peak,
        flops=(work.products + work.attention) / statistics.median(seconds),
        roof=work.products / rates[0] + work.attention / rates[1],
        busy=busy,
        window=window,
        classes=classes,
    )


def decompile(model: Any) -> None:
    """Run the blocks as they are again, and forget their sizes: another clip's are to be compiled for that clip."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


class Bench:
    """The cases, in the order in which they matter if time is short: ways first, the larger clip a little later.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace, device: torch.device):
        self._size, self._device, self._ways = SIZES[given.size], device, tuple(given.ways)
        self._timer = Timer(device, given.rounds, given.time_limit)
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.backend, self.reason = choose_backend(given.attention, device, self._dtype)
        self.cases: list[Case] = []
        self.rates: dict[str, tuple[float, float]] = {}
        self.work: dict[tuple[str, str], Work] = {}
        self._model = random_transformer(self._size.spec, dtype=self._dtype, device=device)
        self._twin = diffusers_twin(self._model) if set(THEIRS) & set(self._ways) else None

    def run(self, on_case: Callable[[Case], None]) -> None:
        """Take each case that fits into the time. Blocks the host."""
        guidances = {"unguided": UNGUIDED, "guided": guided(self._size.stg_block)}
        self.rates = {clip: self._measure_rates(shape) for clip, shape in self._size.clips.items()}
        self.work = {
            (clip, name): count_work(self._size, shape, guidance)
            for clip, shape in self._size.clips.items()
            for name, guidance in guidances.items()
        }
        clips = list(self._size.clips)
        order = sorted(
            (2 * self._ways.index(way) + 5 * clips.index(clip), way, clip) for way in self._ways for clip in clips
        )
        for _, way, clip in order:
            for name, guidance in guidances.items():
                if way in (BATCHED, ONE_STREAM) and (clip, name) != (clips[0], "guided"):
                    continue
                case = self._case(clip, name, way, guidance)
                self.cases.append(case)
                on_case(case)

    def _case(self, clip: str, guidance_name: str, way: str, guidance: Guidance) -> Case:
        name, work, rates = (clip, guidance_name, way), self.work[clip, guidance_name], self.rates[clip]
        # Two to warm up and one to time, none of them as fast as the roof.
        if self._timer.left < 4 * (work.products / rates[0] + work.attention / rates[1]):
            return Case(*name, failure="left out: the time limit")
        inputs = random_inputs(
            self._size.spec,
            self._size.clips[clip],
            num_text=self._size.num_text,
            dtype=self._dtype,
            device=self._device,
        )
        if way in THEIRS:
            if guidance == UNGUIDED:
                return Case(*name, failure="left out: timed in the guided step only")
            twin = cast(Any, self._twin)
            if way == "diffusers compiled":
                twin.compile_repeated_blocks()
            step = diffusers_step(twin, inputs, guidance, self._size.spec.timestep_scale)
            case = measure(self._timer, name, step, work, rates)
            decompile(twin)
            return case
        graphs = None
        if "graph" in way:
            if self._device.type != "cuda":
                return Case(*name, failure="left out: graphs need CUDA")
            beside = in_turn if way == ONE_STREAM or "compile" in way else SideStream(self._device)
            graphs = StepGraphs(self._device, str, is_required=True, beside=beside)
        if "compile" in way:
            self._model.compile_blocks()
        size = 2 if way == BATCHED else 1
        if size > 1:
            work = count_work(self._size, self._size.clips[clip], guidance, max_batch_size=size)
        own = our_step(self._model, inputs, guidance, self.backend, graphs, max_batch_size=size)
        case = measure(self._timer, name, own, work, rates)
        decompile(self._model)
        if graphs is not None:
            graphs.clear()
            torch.cuda.empty_cache()
        return case

    def checks(self, size: str) -> dict[str, bool]:
        """What the cases so far are held to; nothing but the published size is."""
        return checks(self.cases) if size == "22b" else {}

    def content(self, size: str) -> dict[str, Any]:
        """All figures so far, for a file."""
        return {
            "device": device_name(self._device),
            "torch": torch.__version__,
            "attention": self.backend.name,
            "size": size,
            "cases": [dataclasses.asdict(case) for case in self.cases],
            "rates": self.rates,
            "work": {" ".join(key): dataclasses.asdict(work) for key, work in self.work.items()},
            "checks": self.checks(size),
        }

    def _measure_rates(self, shape: LatentShape) -> tuple[float, float]:
        """Operations per second in products of the model's sizes and in self-attention of the clip's length."""
        tokens, width = shape.video_tokens, self._size.spec.video.width
        products = [(tokens, width, width), (tokens, 4 * width, width), (tokens, width, 4 * width)]
        with torch.inference_mode():
            rate = measure_products(products, self._dtype, self._device, rounds=10)
            heads = self._size.spec.video.num_heads
            attention = measure_attention(self.backend, [tokens], heads, self._dtype, self._device, rounds=5)[tokens]
        return rate, attention


HEADER = f"{'clip':14} {'guidance':9} {'way':18} {'s/step':>9} {'TFLOP/s':>8} {'of roof':>8} {'gaps':>7} {'peak GB':>8}"


def row(case: Case) -> str:
    """A case as a line of the table."""
    name = f"{case.clip:14} {case.guidance:9} {case.way:18}"
    if case.failure:
        return f"{name} {case.failure}"
    gaps = f"{case.gaps:7.1%}" if case.window else f"{'-':>7}"
    return (
        f"{name} {case.median:9.4f} {case.flops / 1e12:8.1f} {case.roof / case.median:8.1%} {gaps} "
        f"{case.peak_bytes / 1e9:8.2f}"
    )


def checks(cases: Sequence[Case]) -> dict[str, bool]:
    """What a step of full size is held to, of the cases that there are."""
    found: dict[str, bool] = {}
    timed = {(case.clip, case.guidance, case.way): case for case in cases if not case.failure}
    for (clip, guidance, way), case in timed.items():
        if way == "compile + graph":
            found[f"{clip}, {guidance}: at most 1.15 of the roof"] = case.median <= 1.15 * case.roof
        if way in ("graph", "compile + graph") and case.window:
            found[f"{clip}, {guidance}, {way}: gaps under 2 %"] = case.gaps < 0.02
        for theirs, ours in (("diffusers", "graph"), ("diffusers compiled", "compile + graph")):
            if way == theirs and (clip, guidance, ours) in timed:
                own = timed[clip, guidance, ours]
                found[f"{clip}, {guidance}: {ours} faster than {theirs}"] = own.median < case.median
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the file; return 1 where a check fails or nothing was timed."""
    has_diffusers = importlib.util.find_spec("diffusers") is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cpu, cuda or cuda:N (default cuda)")
    parser.add_argument("--size", choices=SIZES, default="22b", help="of model and clips (default 22b)")
    ways = (*WAYS, *(THEIRS if has_diffusers else ()))
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, *THEIRS), default=list(ways), help="default all there are")
    parser.add_argument("--attention", default="auto", help="the kernel, as for ltx_sp.generate (default auto)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each case (default 5)")
    parser.add_argument("--time-limit", type=float, default=300.0, metavar="SECONDS", help="for all cases (300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args(argv)
    if given.rounds < 1 or given.time_limit <= 0:
        parser.error("--rounds and --time-limit must be positive")
    if not has_diffusers and set(THEIRS) & set(given.ways):
        parser.error("diffusers is not installed, and some of --ways are its own")
    # Past the limit a block would run as it is, under the name of a compiled one.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    try:
        device = resolve_device(given.device)
        if device.type == "cuda":
            use_full_precision()
        bench = Bench(given, device)
    except LtxSpError as error:
        print(f"gpu_bench: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{device_name(device)}, torch {torch.__version__}, attention {bench.backend.name} ({bench.reason})")
    print(HEADER, flush=True)

    def on_case(case: Case) -> None:
        print(row(case), flush=True)
        if given.json is not None:  # whatever ends this, these figures are there
            given.json.write_text(json.dumps(bench.content(given.size), indent=1) + "\n")

    bench.run(on_case)
    for clip, (products, attention) in bench.rates.items():
        print(f"{clip}: measured {products / 1e12:.1f} TFLOP/s in products, {attention / 1e12:.1f} in attention")
    for (clip, guidance), work in bench.work.items():
        counted = f"{work.products / 1e12:.1f} TFLOP in products, {work.attention / 1e12:.1f} in attention"
        print(f"{clip}, {guidance}: {counted}")
    held = bench.checks(given.size)
    for what, passed in held.items():
        print(f"{'met' if passed else 'NOT MET':8} {what}")
    return 0 if all(held.values()) and not all(case.failure for case in bench.cases) else 1


if __name__ == "__main__":
    raise SystemExit(main())
