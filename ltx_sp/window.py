"""A window of denoising steps for a profiler, and names for what runs inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

__all__ = ["CudaWindow", "StepWindow", "Window", "mark"]

_is_open = False


def mark(name: str) -> AbstractContextManager[None]:
    """Name what happens within for the profiler that looks; nothing outside its window."""
    return _marked(name) if _is_open else nullcontext()


@contextmanager
def _marked(name: str) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()


class Window(Protocol):
    """What records between its start and its stop."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class CudaWindow:
    """Tells a profiler that watches the process, such as nsys with ``-c cudaProfilerApi``."""

    def start(self) -> None:
        torch.cuda.profiler.start()

    def stop(self) -> None:
        torch.cuda.profiler.stop()


class StepWindow:
    """Opens a window around some of a request's steps, once.

    Args:
        first, last: counted from 1 over all stages: predictions of the clean latents.
        meet: waits for all ranks at a place of the name given: a profiler that stops with the first would lose what the
            others still do. Not by an exchange, which it would see.
    """

    def __init__(self, window: Window, first: int, last: int, meet: Callable[[str], None] = lambda _: None):
        self._window, self._first, self._last, self._meet = window, first, last, meet
        self._is_done = False

    def at(self, done: int) -> None:
        """Open or close where it is time to. Blocks the host there, for other ranks too.

        Args:
            done: steps so far.
        """
        global _is_open
        if not _is_open and not self._is_done and self._first - 1 <= done < self._last:
            self._settle("opens")
            self._window.start()
            _is_open = True
        elif _is_open and done >= self._last:
            self._settle("closes")
            self._window.stop()
            _is_open, self._is_done = False, True

    def _settle(self, place: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._meet(f"window {place}")
