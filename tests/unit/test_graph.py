"""Oracles: steps taken one by one, and counts. What CUDA would record is played by keeping the function."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from ltx_sp.cost import DEFAULT_MACHINE
from ltx_sp.errors import UnsupportedError
from ltx_sp.graph import GraphedSteps, SideStream, StepGraphs, TakeStep
from ltx_sp.model.attention import in_turn
from ltx_sp.model.samplers import Euler, EulerAncestral, Kind, Res2s, Sampler, State
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.request import Settings
from ltx_sp.runtime import Runtime

SIGMAS = (1.0, 0.98, 0.9, 0.7, 0.4, 0.2, 0.0)


@dataclasses.dataclass
class Recorder:
    """Keeps what is recorded, and counts."""

    captures: int = 0
    replays: int = 0
    failure: str = ""

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        if self.failure:
            raise RuntimeError(f"{self.failure}\nand a stack")

        def replay() -> None:
            self.replays += 1
            function()

        return replay


def _noise(seed: int) -> Callable[[], Streams]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: Streams(torch.randn(1, 6, 4, generator=generator), torch.randn(1, 3, 4, generator=generator))


def _take(sampler: Sampler, constant: Tensor, calls: list[Kind]) -> TakeStep:
    """Steps that predict what depends on the state, on sigma and on a constant."""

    def denoise(x: Streams, sigma: Tensor) -> Streams:
        return x.map(lambda x: (x * sigma + constant).tanh())

    def take(kind: Kind, state: State, row: Tensor, noises: Sequence[Streams]) -> State:
        calls.append(kind)
        return sampler.step(kind, denoise, state, row, noises, lambda x: x)

    return take


def _walk(sampler: Sampler, take: TakeStep, seed: int = 1) -> Streams:
    schedule = sampler.schedule(SIGMAS)
    noises = [_noise(seed + 1), _noise(seed + 2)]
    state = sampler.begin(_noise(seed)())
    for kind, row in zip(schedule.kinds, torch.tensor(schedule.rows, dtype=torch.float64), strict=True):
        state = take(kind, state, row, [noise() for noise in noises[: kind.num_noises]])
    return state[0].map(torch.clone)


def _equal(one: Streams, other: Streams) -> bool:
    assert one.audio is not None
    assert other.audio is not None
    return torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio)


@pytest.mark.parametrize("sampler", [Euler(), EulerAncestral(), Res2s()])
def test_replayed_steps_are_the_steps(sampler: Sampler) -> None:
    constant, recorder = torch.full((4,), 0.3), Recorder()
    plain = _walk(sampler, _take(sampler, constant, []))
    steps = GraphedSteps(_take(sampler, constant, []), [constant], recorder, str)
    assert _equal(_walk(sampler, steps), plain)
    kinds = sampler.schedule(SIGMAS).kinds
    assert recorder.captures == sum(kinds.count(kind) > 1 for kind in set(kinds))
    assert recorder.replays == len(kinds) - len(set(kinds)), "the first of a kind runs as it is"
    assert _equal(_walk(sampler, steps), plain), "a second clip begins anew"
    assert _equal(_walk(sampler, steps, seed=7), _walk(sampler, _take(sampler, constant, []), seed=7))


def test_a_known_stage_replays_with_other_values() -> None:
    sampler, recorder = Euler(), Recorder()
    graphs = StepGraphs(torch.device("cpu"), str, capture=recorder)
    values = torch.full((4,), 0.3), torch.full((4,), -0.6)
    for value in values:
        plain = _walk(sampler, _take(sampler, value, []))
        constant = value.clone()
        assert _equal(_walk(sampler, graphs.stage("key", 0, _take(sampler, constant, []), [constant])), plain)
    assert recorder.captures == 1
    assert recorder.replays == 5 + 6


@pytest.mark.parametrize(
    ("key", "epoch", "shape"), [("other", 0, (4,)), ("key", 1, (4,)), ("key", 0, (1, 4))], ids=["key", "epoch", "shape"]
)
def test_what_is_not_known_is_captured_anew(key: str, epoch: int, shape: tuple[int, ...]) -> None:
    sampler, recorder = Euler(), Recorder()
    graphs = StepGraphs(torch.device("cpu"), str, capture=recorder)
    for name, number, size in (("key", 0, (4,)), (key, epoch, shape)):
        constant = torch.full(size, 0.3)
        _walk(sampler, graphs.stage(name, number, _take(sampler, constant, []), [constant]))
    assert recorder.captures == 2


def test_stages_that_were_not_used_lately_go() -> None:
    sampler, recorder, constant = Euler(), Recorder(), torch.zeros(4)
    graphs = StepGraphs(torch.device("cpu"), str, capture=recorder)
    for key in (0, 1, 2, 2, 1, 0):
        _walk(sampler, graphs.stage(key, 0, _take(sampler, constant, []), [constant]))
    assert recorder.captures == 3 + 1, "0 had to go for 2"


def test_where_capturing_fails_on_any_rank_all_steps_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    sampler, constant = Euler(), torch.full((4,), 0.3)
    plain = _walk(sampler, _take(sampler, constant, []))
    for recorder, agree in (
        (Recorder(failure="operation not permitted"), str),
        (Recorder(), lambda reason: reason or "operation not permitted"),  # another rank's
    ):
        caplog.clear()
        calls: list[Kind] = []
        graphs = StepGraphs(torch.device("cpu"), agree, capture=recorder)
        for _ in range(2):
            assert _equal(_walk(sampler, graphs.stage("key", 0, _take(sampler, constant, calls), [constant])), plain)
        assert len(calls) == 12
        assert recorder.captures == 1
        assert recorder.replays == 0
        assert [record.getMessage() for record in caplog.records] == [
            "Steps run without CUDA graphs: capturing one failed (operation not permitted)."
        ]


def test_graphs_that_are_asked_for_are_graphs_or_an_error() -> None:
    sampler, constant, recorder = Euler(), torch.zeros(4), Recorder(failure="operation not permitted")
    graphs = StepGraphs(torch.device("cpu"), str, is_required=True, capture=recorder)
    with pytest.raises(UnsupportedError, match="operation not permitted"):
        _walk(sampler, graphs.stage("key", 0, _take(sampler, constant, []), [constant]))


class FakeStream:
    """Notes who waits for whom, in order."""

    def __init__(self, name: str, notes: list[str]):
        self.name, self.notes, self.device = name, notes, torch.device("cpu")

    def wait_stream(self, other: FakeStream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")


def _streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plays CUDA's streams; gives who waits for whom, in order."""
    notes = list[str]()
    current, side = FakeStream("main", notes), FakeStream("side", notes)

    @contextlib.contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        notes.append(f"{stream.name} begins")
        yield
        notes.append(f"{stream.name} ends")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return notes


def test_work_beside_is_forked_joined_and_its_inputs_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stream reads must not go back to the other's allocator before they have met."""
    notes = _streams(monkeypatch)
    beside = SideStream(torch.device("cpu"))
    read = torch.ones(3)
    is_held = weakref.ref(read)
    result = beside(partial(torch.add, read, 1))
    del read
    assert notes == ["side waits for main", "side begins", "side ends"]
    assert is_held() is not None
    assert torch.equal(result(), torch.full((3,), 2.0))
    assert notes[3:] == ["main waits for side"]
    del result
    assert is_held() is None


@contextlib.contextmanager
def _no_graph(*_: object, **__: object) -> Iterator[None]:
    yield


def test_a_pool_goes_with_the_last_graph_that_had_memory_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's allocator has forgotten it then, and a capture into it would fail."""
    _streams(monkeypatch)
    numbers, pools = iter(range(9)), list[object]()

    class Graph:
        def pool(self) -> str:
            return f"pool {next(numbers)}"

        def replay(self) -> None: ...

    def graph(_: Graph, *, pool: object, **__: object) -> contextlib.AbstractContextManager[None]:
        pools.append(pool)
        return _no_graph()

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    graphs = StepGraphs(torch.device("cpu"), str)

    def captured(key: str, constant: Tensor) -> None:
        steps = graphs.stage(key, 0, _take(Euler(), constant, []), [constant])
        x = Streams(torch.zeros(1, 2, 3), None)
        for _ in range(2):
            steps(Kind("step"), (x,), torch.ones(2), [])

    captured("one", torch.ones(1))
    captured("two", torch.ones(1))
    assert pools == [None, "pool 0"], "of two stages at once there is one"
    captured("two", torch.ones(1, 1))
    assert pools[2:] == ["pool 1"], "the first stage still has its graph there"
    graphs.stage("three", 0, _take(Euler(), torch.ones(1), []), [])
    captured("two", torch.ones(1, 1, 1))
    assert pools[3:] == [None], "nobody has"


def test_a_capture_that_fails_is_joined_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would end with another stream on its own, and fail by that instead of by its reason."""
    notes = _streams(monkeypatch)
    beside = SideStream(torch.device("cpu"))
    for name in ("synchronize", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph", _no_graph)
    reasons = list[str]()

    def agree(reason: str) -> str:
        reasons.append(reason)
        return reason

    def take(kind: Kind, state: State, row: Tensor, noises: Sequence[Streams]) -> State:
        if len(taken) == 1:
            beside(lambda: None)
            taken.append(kind)
            raise RuntimeError("no memory is left")
        taken.append(kind)
        return state

    taken = list[Kind]()
    graphs = StepGraphs(torch.device("cpu"), agree, beside=beside)
    assert graphs.beside is beside
    steps = graphs.stage("stage", 0, take, [])
    state: State = (Streams(torch.zeros(1, 2, 3), None),)
    for _ in range(2):
        state = steps(Kind("step"), state, torch.zeros(2), [])
    assert reasons == ["no memory is left"]
    assert notes[-1] == "main waits for side"
    assert graphs.beside is in_turn, "and steps as they are stay on one stream"


@pytest.mark.parametrize("compiles", [False, True])
def test_a_runtime_on_cuda_runs_audio_beside_video_unless_it_compiles(
    monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    _streams(monkeypatch)
    mesh = Mesh.alone(torch.device("cuda"))
    settings = Settings(Path("model.safetensors"), compile=compiles)
    anything: Any = Mock()
    runtime = Runtime(settings, anything, anything, anything, mesh, anything, anything, DEFAULT_MACHINE)
    assert runtime._graphs is not None
    assert isinstance(runtime._graphs.beside, SideStream) is not compiles


@pytest.mark.parametrize("is_explained", [False, True])
def test_the_reason_is_what_went_wrong_first_in_its_best_words(is_explained: bool) -> None:
    """Ending a capture that failed fails too; an error that was put into other words stands by these."""

    def end() -> None:
        raise RuntimeError("the capture was invalidated")

    def ends_badly(function: Callable[[], None]) -> Callable[[], None]:
        try:
            raise RuntimeError("no memory is left")
        except RuntimeError as error:
            if is_explained:
                raise RuntimeError("A peer was lost.") from error
            end()
        return function

    reasons = list[str]()

    def agree(reason: str) -> str:
        reasons.append(reason)
        return reason

    graphs = StepGraphs(torch.device("cpu"), agree, capture=ends_badly)
    _walk(Euler(), graphs.stage("stage", 0, _take(Euler(), torch.ones(1), []), []))
    assert reasons == ["A peer was lost." if is_explained else "no memory is left"]
