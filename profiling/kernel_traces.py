"""Traces of Nsight Systems and of torch.profiler -> what ran, when, and of which class it is."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gzip
import json
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ltx_sp.errors import RequestError

COLLECTIVES = ("all_gather", "all_to_all", "all_reduce", "broadcast", "other_collective")
CLASSES = {
    "all_gather": "all-gather",
    "all_to_all": "all-to-all, send/recv",
    "all_reduce": "all-reduce, reduce-scatter",
    "broadcast": "broadcast",
    "other_collective": "other collectives",
    "attention": "attention",
    "gemm": "GEMM",
    "normalisation": "normalisation",
    "elementwise": "elementwise",
    "copies": "copies",
    "other": "other",
}

# The first pattern that is found in a name counts; case does not. Whose names these are:
#   NCCL: ncclDevKernel_AllGather_RING_LL, ncclDevKernel_SendRecv; in older versions ncclKernel_...; with symmetric
#     memory ncclSymkDevKernel_AllGather_STMC. PyTorch's symmetric memory: multimem_all_gather_kernel. Gloo:
#     gloo:all_gather.
#   Attention: pytorch_flash::flash_fwd_kernel, FlashAttnFwdSm90, cudnn_generated_fort_native_sdpa_...,
#     fmha_cutlassF_...
#   GEMM: nvjet_..., cutlass_80_tensorop_..., sm80_xmma_gemm_..., ampere_sgemm_..., gemv2T_..., splitKreduce_kernel.
#   PyTorch: vectorized_layer_norm_kernel (both norms); elementwise_kernel, a copy with direct_copy_kernel_cuda in it.
#   torch.compile: triton_poi_ (pointwise), triton_red_ and triton_per_ (reductions), triton_tem_ (templates), and then
#     the names of all operations that were fused, which decide nothing.
PATTERNS = (
    ("elementwise", r"\btriton_poi_"),
    ("normalisation", r"\btriton_(red|per)_\w*(norm|rsqrt|var)"),
    ("other", r"\btriton_(red|per)_"),
    ("attention", r"\btriton_tem_\w*attention"),
    ("gemm", r"\btriton_tem_"),
    ("all_gather", r"all_?gather"),
    ("all_to_all", r"sendrecv|all_?to_?all"),
    ("all_reduce", r"all_?reduce|\breduce_?scatter|nccl\w*ReduceScatter"),
    ("broadcast", r"nccl\w*_Broadcast|^gloo:broadcast"),
    ("other_collective", r"\bnccl|^gloo:"),
    ("attention", r"flash|fmha|sdpa|attention|softmax"),
    ("gemm", r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|^aten::(addmm|mm|bmm|baddbmm|_addmm_activation|matmul)\b"),
    ("normalisation", r"norm(?!al)"),
    ("copies", r"copy|memcpy|memset|catarray|fillfunctor|^aten::(cat|clone|contiguous|fill_|zero_)\b"),
    (
        "elementwise",
        r"elementwise|^aten::(add|sub|rsub|mul|div|square|pow|r?sqrt|exp|silu|gelu|sigmoid|cos|sin|addcmul|where|lerp)",
    ),
)

_SQLITE_MAGIC, _GZIP_MAGIC = b"SQLite format 3\0", b"\x1f\x8b"
_DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclasses.dataclass(frozen=True)
class Activity:
    """Something that ran, in nanoseconds.

    Args:
        own: its time without that of the operations inside it; a kernel has none inside.
    """

    name: str
    start: float
    end: float
    own: float


@dataclasses.dataclass(frozen=True)
class Track:
    """What one rank did; in a trace without a GPU the operations on the host.

    Args:
        rank: None where the trace does not say.
    """

    name: str
    activities: tuple[Activity, ...]
    is_device: bool
    rank: int | None = None

    def sums(self) -> dict[str, tuple[int, float]]:
        """Count and own time of each class that occurs."""
        found: dict[str, tuple[int, float]] = {}
        for activity in self.activities:
            key = classify(activity.name)
            count, own = found.get(key, (0, 0.0))
            found[key] = count + 1, own + activity.own
        return {key: found[key] for key in CLASSES if key in found}

    def counts(self) -> collections.Counter[str]:
        """Count of each class, and of all collectives under ``collectives``."""
        counts = collections.Counter({key: count for key, (count, _) in self.sums().items()})
        counts["collectives"] = sum(counts[key] for key in COLLECTIVES)
        return counts


@functools.cache
def classify(name: str) -> str:
    """Name the class of a kernel or operation: a key of ``CLASSES``."""
    return next((key for key, pattern in PATTERNS if re.search(pattern, name, re.IGNORECASE)), "other")


def read_trace(path: Path) -> list[Track]:
    """Read either kind of trace: a track per device and process, or per file where no GPU was in use.

    Raises:
        RequestError: it is neither, or is damaged, or shows no kernels.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(_SQLITE_MAGIC))
        if magic == _SQLITE_MAGIC:
            return _read_nsys(path)
        with gzip.open(path) if magic.startswith(_GZIP_MAGIC) else path.open("rb") as file:
            content = json.load(file)
        return _read_torch(path, content)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}. Name a trace that is there and whole.") from error
    except (AttributeError, EOFError, KeyError, TypeError, ValueError, sqlite3.Error, zlib.error) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"{path} is neither an SQLite export of Nsight Systems nor a trace of torch.profiler "
            f"({type(error).__name__}: {error}). Use profiling/nsys.sh or profiling/trace.py."
        ) from error


def _read_nsys(path: Path) -> list[Track]:
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "CUPTI_ACTIVITY_KIND_GRAPH_TRACE" in tables:
            raise RequestError(
                f"{path} has CUDA graphs as a whole, without their kernels. Record it with --cuda-graph-trace=node, "
                "as profiling/nsys.sh does."
            )
        if "CUPTI_ACTIVITY_KIND_KERNEL" not in tables:
            raise RequestError(
                f"{path} has no kernels: the window was never opened. Give --profile-steps, and steps that the run has."
            )
        rows: list[tuple[int, int, str, int, int]] = list(
            # Not the short name, which leaves out the template's arguments and with them what the kernel does.
            database.execute(
                'SELECT start, "end", value, globalPid, deviceId FROM CUPTI_ACTIVITY_KIND_KERNEL '
                "JOIN StringIds ON StringIds.id = demangledName"
            )
        )
        for name in ("MEMCPY", "MEMSET"):
            if f"CUPTI_ACTIVITY_KIND_{name}" in tables:
                rows += database.execute(
                    f"SELECT start, \"end\", '{name}', globalPid, deviceId FROM CUPTI_ACTIVITY_KIND_{name}"
                )
    tracks = collections.defaultdict(list)
    for start, end, name, process, device in rows:
        tracks[device, process >> 24 & 0xFFFFFF].append(Activity(name, start, end, end - start))
    return [
        Track(f"{path.name}: GPU {device}, process {process}", tuple(activities), is_device=True)
        for (device, process), activities in sorted(tracks.items())
    ]


def _read_torch(path: Path, content: Any) -> list[Track]:
    events = [event for event in content["traceEvents"] if event.get("ph") == "X"]
    rank = content.get("distributedInfo", {}).get("rank", 0)
    on_device = collections.defaultdict(list)
    for event in events:
        # Not gpu_user_annotation: NCCL's ranges stand there once more, under nccl:... names.
        if event.get("cat") in _DEVICE_CATEGORIES:
            on_device[event["pid"]].append(_span(event))
    if on_device:
        return [
            Track(f"{path.name}: rank {rank}, GPU {device}", tuple(spans), is_device=True, rank=rank)
            for device, spans in sorted(on_device.items())
        ]
    by_thread = collections.defaultdict(list)
    for event in events:
        # A backend's collective is an annotation on a thread of its own; the c10d operation is who waits for it.
        name = str(event["name"])
        if name.startswith("gloo:") or (event.get("cat") == "cpu_op" and not name.startswith("c10d::")):
            by_thread[event["tid"]].append(_span(event))
    found = [activity for spans in by_thread.values() for activity in _own_times(spans)]
    if not found:
        raise RequestError(
            f"{path} has neither kernels nor operations: the window was never opened. Give --profile-steps, and steps "
            "that the run has."
        )
    return [Track(f"{path.name}: rank {rank}, host", tuple(found), is_device=False, rank=rank)]


def _span(event: Mapping[str, Any]) -> Activity:
    start, length = 1000 * float(event["ts"]), 1000 * float(event["dur"])
    return Activity(str(event["name"]), start, start + length, length)


def _own_times(spans: Iterable[Activity]) -> Iterator[Activity]:
    """Take from each operation of a thread the time of those inside it; a collective is one piece."""
    # Those around the current one, outermost first, and what those directly inside them took.
    around: list[tuple[Activity, list[float]]] = []
    ended = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while around and span.start >= around[-1][0].end:
            ended.append(around.pop())
        if around and classify(around[0][0].name) in COLLECTIVES:
            continue
        if around:
            around[-1][1].append(span.own)
        around.append((span, []))
    for span, inside in ended + around:
        yield dataclasses.replace(span, own=max(0.0, span.own - sum(inside)))


def union(activities: Iterable[Activity]) -> tuple[float, int]:
    """How long at least one of them ran, and in how many stretches."""
    total, stretches, reached = 0.0, 0, float("-inf")
    for activity in sorted(activities, key=lambda activity: activity.start):
        if activity.start > reached:
            stretches += 1
            total += activity.end - activity.start
        else:
            total += max(0.0, activity.end - reached)
        reached = max(reached, activity.end)
    return total, stretches
