"""What a run tells: a rank-aware log, phases with their times and peaks, a table of them, and progress."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

log = logging.getLogger("ltx_sp")

_T = TypeVar("_T")
_NAME_WIDTH = 32
_COLUMNS = {"seconds": 11, "on device": 11, "host peak": 12, "device peak": 12, "moved": 12}  # and their widths

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
        seconds: by the host's clock, without what ``Observer.timed`` sets apart.
        host_peak_bytes: the process's largest resident size so far.
        device_peak_bytes: largest allocation on the device during the phase; None without a CUDA device, and for what
            runs beside other phases.
        device_seconds: the same time on the device's stream; None where there is no device peak either.
        moved_bytes: copied from the host to the device within it.
        began: seconds after the observer was made.
        request: which one it belongs to; 0 before the first.
        within: the phases around it, outermost first, joined by " / ".
        is_beside: it ran beside phases, and its time is in theirs too.
        details: what else there is to say; in the log beside the others.
    """

    phase: str
    rank: int
    seconds: float
    host_peak_bytes: int
    device_peak_bytes: int | None
    device_seconds: float | None = None
    moved_bytes: int = 0
    began: float = 0.0
    request: int = 0
    within: str = ""
    is_beside: bool = False
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def path(self) -> tuple[str, ...]:
        """The names of the phases around it, and its own."""
        return (*self.within.split(" / "), self.phase) if self.within else (self.phase,)

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        fields = dataclasses.asdict(self)
        return {**fields, **fields.pop("details")}


class _Phase:
    """A phase under way, in one stretch of time or in many."""

    def __init__(self, name: str, began: float):
        self.name, self.began, self.within = name, began, ""
        self.seconds, self.moved_bytes, self.peak_bytes = 0.0, 0, 0
        self.spans: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []  # 1 adds and -1 takes away

    def device_seconds(self) -> float:
        """Blocks the host until the device has come so far."""
        total = 0.0
        for sign, start, end in self.spans:
            end.synchronize()
            total += sign * start.elapsed_time(end) / 1000
        return total


class Observer:
    """Collects the phases of one rank.

    Args:
        phase_log: a file that gets one JSON line per phase, appended as the phase ends; None for none.
        show_progress: draw progress bars on stderr.
    """

    def __init__(self, rank: int, device: torch.device, *, phase_log: Path | None = None, show_progress: bool = False):
        self.records: list[PhaseRecord] = []
        self._rank, self._device, self._phase_log = rank, device, phase_log
        self._on_gpu = device.type == "cuda"
        self._show_progress = show_progress and rank == 0
        self._lock, self._thread, self._began = threading.Lock(), threading.local(), time.perf_counter()
        self._request, self._extents = 0, [(0.0, 0.0)]  # when each began, and when its last phase ended
        self._moved_beside = collections.Counter[int]()
        device_name = torch.cuda.get_device_name(device) if self._on_gpu else str(device)
        self._facts: dict[str, Any] = {"torch": torch.__version__, "device": device_name}

    @property
    def seconds(self) -> float:
        """Since this observer was made."""
        return time.perf_counter() - self._began

    def note(self, **facts: Any) -> None:
        """Have the report say these of the whole run: versions, ranks, what was chosen."""
        self._facts |= facts

    def begin(self) -> None:
        """Count what comes to the next request; they are numbered from 1."""
        self._request += 1
        self._extents.append((self.seconds, self.seconds))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside, further phases included; on CUDA also mark it for the profiler.

        Blocks the host at the end, until this thread's stream is done; side streams go on. One thread at a time: what
        runs beside is for ``record``.
        """
        phase = _Phase(name, self.seconds)
        with self._stretch(phase, is_apart=False):
            yield
        self._end(phase)

    def timed(self, items: Iterator[_T], name: str) -> Iterator[_T]:
        """Pass ``items`` on, and sum the time in which they are made to a phase that began with this call.

        The phase in which they are asked for goes without that time, and the two stand side by side.
        """
        phase = _Phase(name, self.seconds)

        def pull() -> Iterator[_T]:
            while True:
                with self._stretch(phase, is_apart=True):
                    try:
                        item = next(items)
                    except StopIteration:
                        break
                yield item
            self._end(phase)

        return pull()

    def record(self, name: str, seconds: float, *, moved_bytes: int = 0, **details: Any) -> None:
        """Note a phase that was measured elsewhere and ran beside others. From any thread."""
        began = max(0.0, self.seconds - seconds)
        self._add(name, seconds, began=began, moved_bytes=moved_bytes, is_beside=True, details=details)

    def moved(self, num_bytes: int) -> None:
        """Count a copy from the host to the device: to this thread's phase, or to the request where it has none."""
        if stack := self._stack():
            stack[-1].moved_bytes += num_bytes
            return
        with self._lock:
            self._moved_beside[self._request] += num_bytes

    def _stack(self) -> list[_Phase]:
        """This thread's open phases, outermost first."""
        stack: list[_Phase] = self._thread.__dict__.setdefault("stack", [])
        return stack

    @contextmanager
    def _stretch(self, phase: _Phase, *, is_apart: bool) -> Iterator[None]:
        """Count what happens inside to the phase and to those around it; not to the innermost if it stands apart."""
        stack = self._stack()
        around = stack[:-1] if is_apart else stack[:]
        if around:
            phase.within = f"{around[-1].within} / {around[-1].name}".removeprefix(" / ")
        moved_before, span = phase.moved_bytes, None
        if self._on_gpu:
            self._take_peak(stack)
            torch.cuda.nvtx.range_push(phase.name)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(self._device))
        stack.append(phase)
        began = time.perf_counter()
        try:
            yield
            if self._on_gpu:
                end.record(torch.cuda.current_stream(self._device))
                span = (start, end)
                if not is_apart:
                    end.synchronize()
        finally:
            seconds = time.perf_counter() - began
            phase.seconds += seconds
            if self._on_gpu:
                torch.cuda.nvtx.range_pop()
                self._take_peak(stack)
            stack.pop()
            if around:
                around[-1].moved_bytes += phase.moved_bytes - moved_before
                around[-1].peak_bytes = max(around[-1].peak_bytes, phase.peak_bytes)
            if is_apart and stack:
                stack[-1].seconds -= seconds
            if span is not None:
                phase.spans.append((1, *span))
                if is_apart and stack:
                    stack[-1].spans.append((-1, *span))

    def _take_peak(self, stack: Sequence[_Phase]) -> None:
        """Give the innermost phase the largest allocation since this was last called."""
        if stack:
            stack[-1].peak_bytes = max(stack[-1].peak_bytes, torch.cuda.max_memory_allocated(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)

    def _end(self, phase: _Phase) -> None:
        self._add(
            phase.name,
            phase.seconds,
            began=phase.began,
            device_peak_bytes=phase.peak_bytes if self._on_gpu else None,
            device_seconds=round(phase.device_seconds(), 6) if self._on_gpu else None,
            moved_bytes=phase.moved_bytes,
            within=phase.within,
        )

    def _add(
        self, name: str, seconds: float, *, began: float, device_peak_bytes: int | None = None, **others: Any
    ) -> None:
        record = PhaseRecord(
            phase=name,
            rank=self._rank,
            seconds=round(seconds, 6),
            host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            device_peak_bytes=device_peak_bytes,
            began=round(began, 6),
            request=self._request,
            **others,
        )
        with self._lock:
            self.records.append(record)
            if not record.is_beside:
                self._extents[record.request] = (self._extents[record.request][0], self.seconds)
            if self._phase_log is not None:
                with self._phase_log.open("a") as file:
                    file.write(json.dumps(record.fields()) + "\n")

    def report(self, request: int | None = None) -> str:
        """Describe a request's phases in a table, nested ones indented, and below what ran beside them.

        Args:
            request: None for the last; the table of the first has what came before it too.
        """
        request = self._request if request is None else request
        numbers = [0, request] if request == 1 else [request]
        total = self._total(numbers)
        rows = _rows([record for record in self.records if record.request in numbers])
        elsewhere = sum(self._moved_beside[number] for number in numbers)
        return "\n".join(
            [
                " | ".join([f"request {request}", *(f"{name} {value}" for name, value in self._facts.items())]),
                " " * _NAME_WIDTH + "".join(f"{name:>{width}}" for name, width in _COLUMNS.items()),
                *(_line(name, sums) for name, is_beside, sums in rows if not is_beside),
                _line("not in a phase", {"seconds": max(0.0, total["seconds"] - total["seconds_in_phases"])}),
                _line("total", total),
                *(_line(f"beside: {name}", sums) for name, is_beside, sums in rows if is_beside),
                *([_line("beside: other copies", {"moved_bytes": elsewhere})] if elsewhere else []),
            ]
        )

    def write_report(self, path: Path) -> None:
        """Write every request's phases and totals, and what is known of the run, as JSON. Blocks the host.

        The file appears whole or not at all.
        """
        requests = [
            {"request": number}
            | self._total([number])
            | {"phases": [record.fields() for record in self.records if record.request == number]}
            for number in range(len(self._extents))
        ]
        text = json.dumps({"facts": self._facts, "requests": requests}, indent=1, default=str)
        unfinished = path.with_name(f".{path.name}.part")
        try:
            unfinished.write_text(text + "\n")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _total(self, requests: Sequence[int]) -> dict[str, Any]:
        """Of the outermost phases, which those within are a part of."""
        records = [record for record in self.records if record.request in requests]
        sums = _sums([record for record in records if not record.within and not record.is_beside])
        seconds = sum(end - began for began, end in (self._extents[request] for request in requests))
        moved = sum(record.moved_bytes for record in records if record.is_beside)
        moved += sum(self._moved_beside[request] for request in requests)
        sums["moved_bytes"] += moved
        return sums | {"seconds": round(seconds, 6), "seconds_in_phases": sums["seconds"]}

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


def _rows(records: Sequence[PhaseRecord]) -> list[tuple[str, bool, dict[str, Any]]]:
    """Sum those that occur several times: name, whether beside, sums; in the order in which they first began."""
    groups: dict[tuple[bool, tuple[str, ...]], list[PhaseRecord]] = {}
    for record in sorted(records, key=lambda record: record.began):
        groups.setdefault((record.is_beside, record.path), []).append(record)

    def order(group: tuple[bool, tuple[str, ...]]) -> list[float]:
        is_beside, path = group
        around = [groups.get((is_beside, path[:depth])) for depth in range(1, len(path))]
        return [phases[0].began for phases in around if phases] + [groups[group][0].began]

    rows = []
    for is_beside, path in sorted(groups, key=order):
        phases = groups[is_beside, path]
        count = f" x{len(phases)}" if len(phases) > 1 else ""
        rows.append((f"{'  ' * (len(path) - 1)}{path[-1]}{count}", is_beside, _sums(phases)))
    return rows


def _sums(records: Sequence[PhaseRecord]) -> dict[str, Any]:
    on_device = [record.device_seconds for record in records if record.device_seconds is not None]
    peaks = [record.device_peak_bytes for record in records if record.device_peak_bytes is not None]
    return {
        "seconds": round(sum(record.seconds for record in records), 6),
        "device_seconds": round(sum(on_device), 6) if on_device else None,
        "host_peak_bytes": max((record.host_peak_bytes for record in records), default=None),
        "device_peak_bytes": max(peaks, default=None),
        "moved_bytes": sum(record.moved_bytes for record in records),
    }


def _line(name: str, sums: Mapping[str, Any]) -> str:
    times = (sums.get(field) for field in ("seconds", "device_seconds"))
    sizes = (sums.get(field) for field in ("host_peak_bytes", "device_peak_bytes", "moved_bytes"))
    cells = ["-" if seconds is None else f"{seconds:.4f}" for seconds in times]
    cells += [_size(num_bytes) if num_bytes else "-" for num_bytes in sizes]
    return f"{name:<{_NAME_WIDTH}}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True)
    )


def _size(num_bytes: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >> power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes} B"
