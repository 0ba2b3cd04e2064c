"""What a run tells: a rank-aware log, phases with their times and peaks, and progress."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

log = logging.getLogger("ltx_sp")


_bars: list[tqdm[Any]] = []  # those that are being drawn


class _BesideBars(logging.Handler):
    """Writes whole lines to what stderr is by then, above the progress bars and not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def end_progress() -> None:
    """Leave the bars as they are, and what is written next to a line of its own. From any thread."""
    while _bars:
        _bars.pop().close()


def configure_logging(rank: int) -> None:
    """Send the log to stderr: everything of rank 0, warnings and errors of the others, each with its rank."""
    handler = _BesideBars()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False


@dataclasses.dataclass(frozen=True)
class PhaseRecord:
    """One finished phase on one rank.

    Args:
        host_peak_bytes: the process's largest resident size so far.
        device_peak_bytes: largest allocation on the device during the phase; None without a CUDA device, and for what
            runs beside other phases.
        details: what else there is to say; in the log beside the others.
    """

    phase: str
    rank: int
    seconds: float
    host_peak_bytes: int
    device_peak_bytes: int | None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Observer:
    """Collects the phases of one rank.

    Args:
        phase_log: a file that gets one JSON line per phase, appended as the phase ends; None for none.
        show_progress: draw progress bars on stderr.
    """

    def __init__(self, rank: int, device: torch.device, *, phase_log: Path | None = None, show_progress: bool = False):
        self.records: list[PhaseRecord] = []
        self._rank, self._device, self._phase_log = rank, device, phase_log
        self._show_progress = show_progress and rank == 0
        self._lock, self._began = threading.Lock(), time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since this observer was made."""
        return time.perf_counter() - self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside; on CUDA also mark it for the profiler. Blocks the host at the end."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            torch.cuda.nvtx.range_push(name)
        began = time.perf_counter()
        try:
            yield
            if on_gpu:
                torch.cuda.synchronize(self._device)
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else None
        self._add(name, seconds, peak, {})

    def record(self, name: str, seconds: float, **details: Any) -> None:
        """Note a phase that was measured elsewhere and ran beside others. From any thread."""
        self._add(name, seconds, None, details)

    def _add(self, name: str, seconds: float, device_peak_bytes: int | None, details: Mapping[str, Any]) -> None:
        record = PhaseRecord(
            phase=name,
            rank=self._rank,
            seconds=round(seconds, 6),
            host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            device_peak_bytes=device_peak_bytes,
            details=details,
        )
        with self._lock:
            self.records.append(record)
            if self._phase_log is not None:
                fields = dataclasses.asdict(record)
                with self._phase_log.open("a") as file:
                    file.write(json.dumps(fields | fields.pop("details")) + "\n")

    @contextmanager
    def progress(self, total: int, name: str, unit: str) -> Iterator[Callable[[int], None]]:
        """Draw a bar on rank 0; the callable takes how many units came since its last call."""
        scale = unit == "B"
        with tqdm(
            total=total, desc=name, unit=unit, unit_scale=scale, unit_divisor=1024 if scale else 1000,
            disable=not self._show_progress, file=sys.stderr, dynamic_ncols=True,
            # A log file keeps every state of the bar.
            mininterval=0.1 if sys.stderr.isatty() else 1.0,
        ) as bar:  # fmt: skip
            _bars.append(bar)

            def advance(count: int) -> None:
                bar.update(count)

            try:
                yield advance
            finally:
                if bar in _bars:
                    _bars.remove(bar)
