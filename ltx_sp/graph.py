"""Denoising steps as CUDA graphs: captured when a kind of step comes for the second time, replayed from then on.

The first step of a kind runs as it is and is the warm-up. A capture records kernels and the addresses they read, so
everything that changes from step to step, and from request to request, lies in memory that stays: the state, the
step's numbers, the noises, and what a stage's steps are made from.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ltx_sp.errors import UnsupportedError
from ltx_sp.model.attention import Beside, in_turn
from ltx_sp.model.samplers import Kind, State
from ltx_sp.model.streams import Streams
from ltx_sp.observe import log

__all__ = ["Capture", "GraphedSteps", "SideStream", "StepGraphs", "TakeStep"]

TakeStep = Callable[[Kind, State, Tensor, Sequence[Streams]], State]
"""``kind, state, row, noises -> state``."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does, without doing it, and gives what does it again."""

# Stages and sets of weights; each holds the working set of a step.
_MAX_STAGES = 2

_Result = TypeVar("_Result")


class _Agree(Protocol):
    """Give every rank the first reason that any of them has; empty where none has one. Collective."""

    def __call__(self, reason: str, /) -> str: ...


class GraphedSteps:
    """Takes the steps of one stage, replaying those of a kind that it has seen.

    Args:
        take: the step as it is. Called within captures.
        constants: what ``take`` reads and does not change, in an order of its own.
    """

    def __init__(self, take: TakeStep, constants: Sequence[Tensor], capture: Capture, agree: _Agree):
        self._take, self._constants, self._capture, self._agree = take, list(constants), capture, agree
        self._seen: set[Kind] = set()
        self._replays: dict[Kind, Callable[[], None]] = {}
        self._state: State | None = None
        self._row: Tensor | None = None
        self._noises: list[Streams] = []
        self.failure = ""

    @property
    def has_graphs(self) -> bool:
        """Whether anything was captured."""
        return bool(self._replays)

    def fits(self, constants: Sequence[Tensor]) -> bool:
        """Whether these could take the place of its own."""
        return [(c.shape, c.dtype) for c in constants] == [(c.shape, c.dtype) for c in self._constants]

    def renew(self, constants: Sequence[Tensor]) -> None:
        """Let the steps read these values from now on. In place."""
        for own, other in zip(self._constants, constants, strict=True):
            if own.data_ptr() != other.data_ptr():
                own.copy_(other)

    def __call__(self, kind: Kind, state: State, row: Tensor, noises: Sequence[Streams]) -> State:
        """Take a step; from the second of a kind on, the state is memory that the next step overwrites.

        Collective where ``take`` is, and the second time that a kind comes.
        """
        if self.failure or kind not in self._seen:
            self._seen.add(kind)
            return self._take(kind, state, row, noises)
        held = self._hold(state, row, noises)
        if kind not in self._replays and not self._record(kind, held):
            return self._take(kind, state, row, noises)
        self._replays[kind]()
        return held

    def _hold(self, state: State, row: Tensor, noises: Sequence[Streams]) -> State:
        """Put what a step reads where graphs read it."""
        if self._state is None or self._row is None:
            self._state = tuple(streams.map(torch.clone) for streams in state)
            self._row = row.clone()
        elif self._state is not state:
            _copy(self._state, state)
        self._row.copy_(row)
        while len(self._noises) < len(noises):
            self._noises.append(noises[len(self._noises)].map(torch.clone))
        _copy(self._noises[: len(noises)], noises)
        return self._state

    def _record(self, kind: Kind, held: State) -> bool:
        row, noises = self._row, self._noises[: kind.num_noises]
        assert row is not None

        def step() -> None:
            _copy(held, self._take(kind, held, row, noises))

        reason = ""
        try:
            replay = self._capture(step)
        except RuntimeError as error:
            # Where ending the capture fails too, that hides what went wrong in it.
            told = error if error.__cause__ else error.__context__ or error
            reason = str(told).partition("\n")[0] or type(told).__name__
        self.failure = self._agree(reason)
        if self.failure:
            self._replays.clear()
            return False
        self._replays[kind] = replay
        return True


def _copy(targets: Sequence[Streams], sources: Sequence[Streams]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.map(lambda own, other: own.copy_(other), source)


class SideStream:
    """Runs work beside the current stream, on one of its own; an ``attention.Beside``.

    Memory stays sound without being recorded on both streams: what the work reads is held until its result is asked
    for, when the current stream waits for this one; and what it allocates is used again on this stream alone, after
    the beginning of other work, when this stream waits for the current one.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], _Result], /) -> Callable[[], _Result]:
        """Launch the work. Capturable."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            result = work()
        return partial(self._join, work, result)

    def _join(self, work: object, result: _Result) -> _Result:
        self.join()
        return result

    def join(self) -> None:
        """Let the current stream wait for all work so far. Capturable."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class StepGraphs:
    """The graphs of a runtime's stages, the least recently used of which go.

    Args:
        is_required: a failing capture is an error, not a reason to go on without.
        capture: None for CUDA graphs, which share one pool of memory.
        beside: how the steps run what need not wait for each other.
    """

    def __init__(
        self,
        device: torch.device,
        agree: _Agree,
        *,
        is_required: bool = False,
        capture: Capture | None = None,
        beside: Beside = in_turn,
    ):
        self._device, self._agree, self._is_required = device, agree, is_required
        self._capture = capture or self._capture_cuda
        self._beside = beside
        self._pool: Any = None
        self._stages: dict[Hashable, GraphedSteps] = {}
        self._epoch, self._failure = 0, ""

    @property
    def beside(self) -> Beside:
        """How steps run what need not wait for each other; in turn where nothing is captured any more."""
        return in_turn if self._failure else self._beside

    def stage(self, key: Hashable, epoch: int, take: TakeStep, constants: Sequence[Tensor]) -> TakeStep:
        """Give what takes the steps of a stage.

        Args:
            key: all that decides which kernels run on which memory, but ``constants``: equal on all ranks.
            epoch: another one says that weights have moved, and that all graphs so far are of no more use.
            take, constants: as for ``GraphedSteps``; where the key is known, the values of ``constants`` are copied.
        """
        if self._failure:
            return take
        if epoch != self._epoch:
            self.clear()
            self._epoch = epoch
        steps = self._stages.pop(key, None)
        if steps is None or not steps.fits(constants):
            steps = GraphedSteps(take, constants, self._capture, self._share)
        else:
            steps.renew(constants)
        self._stages[key] = steps
        while len(self._stages) > _MAX_STAGES:
            del self._stages[next(iter(self._stages))]
        if not any(stage.has_graphs for stage in self._stages.values()):
            self._pool = None  # it goes with the last of its graphs
        return steps

    def clear(self) -> None:
        """Let go of all graphs and their memory: before weights move, and before the process group ends."""
        self._stages.clear()
        self._pool = None

    def _share(self, reason: str) -> str:
        failure = self._agree(reason)
        if failure and self._is_required:
            raise UnsupportedError(f"Steps cannot be CUDA graphs: {failure}. Leave --cuda-graph out.")
        if failure and not self._failure:
            self._failure = failure
            self.clear()
            log.warning("Steps run without CUDA graphs: capturing one failed (%s).", failure)
        return failure

    def _capture_cuda(self, function: Callable[[], None]) -> Callable[[], None]:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads, the process group's watchdog among them, may call CUDA meanwhile. The outer stream comes back
        # even where ending a capture fails, which would leave the process on the inner one.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            try:
                function()
            except BaseException:
                # A capture cannot end with another stream on its own.
                if isinstance(self._beside, SideStream):
                    self._beside.join()
                raise
        self._pool = graph.pool()
        return graph.replay
