"""Captured steps on one CUDA device.

Oracles: the same steps taken as they are, bit by bit; the allocator's books; CUDA's own guard against host waits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ltx_sp.denoise import make_sampler, make_walk, run, steps_of
from ltx_sp.graph import SideStream, StepGraphs, TakeStep
from ltx_sp.model.attention import in_turn
from ltx_sp.model.dit import Transformer
from ltx_sp.model.samplers import Kind, State
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.recipes import Guidance
from ltx_sp.spec import LatentShape
from profiling.models import Inputs, random_inputs, random_transformer, transformer_spec
from profiling.steps import SIGMAS, UNGUIDED, guided, make_denoiser, start_of

CUDA = torch.device("cuda")
SPEC = transformer_spec(num_heads=4, head_dim=64, audio_head_dim=32, num_layers=2)
SHAPE = LatentShape(3, 4, 5, 18)
SAMPLERS = ("euler", "euler_ancestral", "res_2s")
OTHER_SIGMAS = (0.99, 0.9, 0.72, 0.5, 0.2, 0.0)


@dataclasses.dataclass
class Counted:
    """Steps as they are, and how often each kind of them was taken so: once to warm up, once in a capture."""

    take: TakeStep
    calls: Counter[Kind] = dataclasses.field(default_factory=Counter)

    def __call__(self, kind: Kind, state: State, row: Tensor, noises: Sequence[Streams]) -> State:
        self.calls[kind] += 1
        return self.take(kind, state, row, noises)


@dataclasses.dataclass
class Clip:
    """A clip on its way, from its own noise and prompt, as often as it is asked for.

    Args:
        batch: passes that share a forward.
    """

    model: Transformer
    guidance: Guidance
    sampler: str = "euler"
    batch: int = 1
    sigmas: tuple[float, ...] = SIGMAS
    sign: float = 1.0

    @property
    def inputs(self) -> Inputs:
        found = random_inputs(SPEC, SHAPE, num_text=20, dtype=torch.bfloat16, device=CUDA)
        return dataclasses.replace(
            found,
            video=self.sign * found.video,
            video_context=self.sign * found.video_context,
            audio_context=self.sign * found.audio_context,
        )

    def walk(self, graphs: StepGraphs | None = None) -> tuple[Streams, Counter[Kind]]:
        """The clip, and how often steps ran as they are."""
        inputs, mesh = self.inputs, Mesh.alone(CUDA)
        with torch.no_grad():
            denoiser = make_denoiser(
                self.model,
                inputs,
                mesh,
                self.guidance,
                max_batch_size=self.batch,
                beside=in_turn if graphs is None else graphs.beside,
            )
            sampler, noises = make_sampler(self.sampler, 3, Streams(inputs.video, inputs.audio))
            counted = Counted(steps_of(denoiser, sampler))
            take: TakeStep = counted
            if graphs is not None:
                take = graphs.stage("stage", 0, counted, denoiser.constants())
            walk = make_walk(sampler, self.sigmas, noises, CUDA)
            x = run(take, walk, *start_of(inputs), mesh)
        return x, counted.calls


def assert_equal(one: Streams, other: Streams) -> None:
    assert one.audio is not None
    assert other.audio is not None
    assert torch.isfinite(one.video).all()
    assert torch.equal(one.video, other.video)
    assert torch.equal(one.audio, other.audio)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_transformer(SPEC, dtype=torch.bfloat16, device=CUDA)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("guidance", [UNGUIDED, guided()], ids=["unguided", "guided"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_replayed_steps_are_the_steps(model: Transformer, sampler: str, guidance: Guidance, batch: int) -> None:
    clip = Clip(model, guidance, sampler, batch)
    plain, counts = clip.walk()
    graphed, calls = clip.walk(StepGraphs(CUDA, str, is_required=True))
    assert_equal(graphed, plain)
    assert calls == Counter({kind: min(2, count) for kind, count in counts.items()})
    assert counts.total() > calls.total(), "some must have been replayed"


@pytest.mark.parametrize("batch", [1, 4])
def test_audio_on_a_stream_of_its_own_changes_nothing(model: Transformer, batch: int) -> None:
    """As it is, captured and replayed: a race would show in one of many walks, or in what reuses the memory."""
    clip = Clip(model, guided(), "res_2s", batch)
    plain, counts = clip.walk()
    graphs = StepGraphs(CUDA, str, is_required=True, beside=SideStream(CUDA))
    for _ in range(5):
        beside, _ = clip.walk(graphs)
        assert_equal(beside, plain)

    def refuse(_: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("as it is")

    for _ in range(5):
        beside, calls = clip.walk(StepGraphs(CUDA, str, capture=refuse, beside=SideStream(CUDA)))
        assert_equal(beside, plain)
        assert calls == counts


@pytest.mark.parametrize("guidance", [UNGUIDED, guided()], ids=["unguided", "guided"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_known_stage_serves_other_noise_levels_and_prompts(
    model: Transformer, sampler: str, guidance: Guidance
) -> None:
    first, graphs = Clip(model, guidance, sampler), StepGraphs(CUDA, str, is_required=True)
    other = dataclasses.replace(first, sigmas=OTHER_SIGMAS, sign=-1.0)
    (plain, _), (plain_other, counts) = first.walk(), other.walk()
    assert not torch.equal(plain.video, plain_other.video)
    first.walk(graphs)
    again, calls = other.walk(graphs)
    assert_equal(again, plain_other)
    # Only a kind that came once before is captured now.
    assert all(calls[kind] <= (1 if count == 1 else 0) + 1 for kind, count in counts.items())
    assert calls[max(counts, key=lambda kind: counts[kind])] == 0
    back, _ = first.walk(graphs)
    assert_equal(back, plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_replays_take_no_memory_and_never_wait(model: Transformer, sampler: str) -> None:
    clip = Clip(model, guided(), sampler)
    inputs = clip.inputs
    with torch.no_grad():
        denoiser = make_denoiser(model, inputs, Mesh.alone(CUDA), clip.guidance)
        own, _ = make_sampler(sampler, 3, Streams(inputs.video, inputs.audio))
        take = StepGraphs(CUDA, str, is_required=True).stage("stage", 0, steps_of(denoiser, own), denoiser.constants())
        walk = make_walk(own, SIGMAS, [], CUDA)
        kind = Counter(walk.kinds).most_common(1)[0][0]
        noises = [Streams(inputs.video, inputs.audio).map(torch.randn_like) for _ in range(kind.num_noises)]
        state, row = own.begin(Streams(inputs.video, inputs.audio)), walk.rows[1]
        for _ in range(3):  # as it is, in a capture, and the first replay that changes its own state
            state = take(kind, state, row, noises)
        torch.cuda.synchronize()
        before = _books()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                state = take(kind, state, row, noises)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert _books() == before


def test_the_books_and_the_guard_see_a_step_as_it_is(model: Transformer) -> None:
    """Or the test before this one would prove nothing."""
    clip = Clip(model, guided())
    before = _books()
    clip.walk()
    assert _books() != before
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones((), device=CUDA).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _books() -> tuple[int, ...]:
    """How often memory was ever asked for, how much of it, and how much is reserved."""
    stats = torch.cuda.memory_stats(CUDA)
    names = ("allocation.all.allocated", "allocated_bytes.all.allocated", "reserved_bytes.all.allocated")
    return tuple(stats[name] for name in names)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch.compile needs triton on CUDA")
@pytest.mark.parametrize("sampler", ["euler", "res_2s"])
def test_compiled_steps_replay_as_they_run(sampler: str) -> None:
    compiled = random_transformer(SPEC, dtype=torch.bfloat16, device=CUDA)
    compiled.compile_blocks()
    clip = Clip(compiled, guided(), sampler)
    plain, counts = clip.walk()
    graphed, calls = clip.walk(StepGraphs(CUDA, str, is_required=True))
    assert_equal(graphed, plain)
    assert counts.total() > calls.total()


def test_other_weights_are_captured_anew(model: Transformer) -> None:
    """A second set has its own graphs; those of weights that moved are gone."""
    clip, graphs = Clip(model, UNGUIDED), StepGraphs(CUDA, str, is_required=True)
    clip.walk(graphs)
    other = dataclasses.replace(clip, model=random_transformer(SPEC, dtype=torch.bfloat16, device=CUDA, seed=5))
    plain, _ = other.walk()
    graphs.clear()
    graphed, calls = other.walk(graphs)
    assert_equal(graphed, plain)
    assert calls.total() == 2
