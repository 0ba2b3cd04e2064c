"""What whole steps exchange, run and allocate, in every layout.

Oracles: the design's counts, PyTorch's own dispatcher, which sees every collective and every operation whoever issues
it, and the meta device, which has no values that a host could wait for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_sp.cost import DEFAULT_MACHINE
from ltx_sp.denoise import make_sampler, make_walk, run, steps_of
from ltx_sp.model.attention import in_turn
from ltx_sp.model.dit import Transformer
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.collectives import Exchange, Ledger
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.parallel.ulysses import shard_tokens
from ltx_sp.recipes import Guidance
from ltx_sp.request import Request, Settings
from ltx_sp.spec import LatentShape, ModelSpec
from ltx_sp.stage import Walk, make_stage
from profiling.comm import FULL_SHAPE, SMALL_SHAPE, small_spec
from profiling.models import full_size, random_inputs, random_transformer
from profiling.steps import SIGMAS, UNGUIDED, guided, make_denoiser, start_of
from tests.support.ranks import run_ranks

Result = TypeVar("Result")
LAYOUTS = [(1, 4), (2, 2), (3, 1), (4, 1)]
STG_BLOCK = 1
QKV, OUT = "video self-attention: q, k, v", "video self-attention: out"
TO_AUDIO = {"partial": "video-to-audio: partial, log-sum-exp", "gather": "video-to-audio: k, v"}
# What the dispatcher calls them.
OPERATIONS = {"c10d.alltoall_base_": "all_to_all", "c10d._allgather_base_": "all_gather"}
WAITS = {"aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.nonzero", "aten.equal", "aten._unique2"}


@dataclasses.dataclass(frozen=True)
class Step:
    """What one rank did from the end of one step to the end of the next.

    Args:
        exchanges: as the ledger has them.
        collectives: as the dispatcher saw them.
        operations: all of them, with the shapes of their tensors, in order.
    """

    exchanges: tuple[Exchange, ...]
    collectives: tuple[str, ...]
    operations: tuple[str, ...]


class Operations(TorchDispatchMode):
    """Notes every operation that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]
        self.seen.append(f"{func.overloadpacket} {shapes}")
        return func(*args, **(kwargs or {}))


def take_steps(
    mesh: Mesh,
    model: Transformer,
    shape: LatentShape,
    guidance: Guidance,
    *,
    max_batch_size: int,
    sampler: str = "euler",
    strategy: str = "partial",
    sigmas: Sequence[float] = SIGMAS,
) -> list[Step]:
    """Walk a whole stage; of each step what was done in it, and last what came after them. Collective."""
    weight = model.proj_out.weight
    inputs = random_inputs(model.spec, shape, num_text=8, dtype=weight.dtype, device=weight.device)
    steps, mesh.ledger.recording = list[Step](), True
    with torch.inference_mode():
        denoiser = make_denoiser(model, inputs, mesh, guidance, max_batch_size=max_batch_size, video_to_audio=strategy)
        own, noises = make_sampler(sampler, 7, Streams(inputs.video, inputs.audio))
        walk = make_walk(own, sigmas, [lambda: Streams(inputs.video, inputs.audio)] * len(noises), weight.device)
        assert not mesh.ledger.exchanges, "what a stage is prepared with needs no exchange"
        with Operations() as operations:

            def note(_: int) -> None:
                seen = tuple(operations.seen)
                collectives = (OPERATIONS.get(name.partition(" ")[0], name) for name in seen if name.startswith("c10d"))
                steps.append(Step(tuple(mesh.ledger.exchanges), tuple(collectives), seen))
                operations.seen.clear()
                mesh.ledger.exchanges.clear()

            run(steps_of(denoiser, own), walk, *start_of(inputs), mesh, on_step=note)
            note(0)
    mesh.ledger.recording = False
    return steps


def on_gloo(rank: int, num_ranks: int, hands: int, guidance: Guidance, options: dict[str, Any]) -> list[Step]:
    mesh = Mesh.of_group(None, torch.device("cpu")).with_guidance(hands)
    model = random_transformer(small_spec(), dtype=torch.float32, device=torch.device("cpu"))
    return take_steps(mesh, model, SMALL_SHAPE, guidance, **options)


def on_fake(
    rank: int, num_ranks: int, hands: int, guidance: Guidance, options: dict[str, Any], model: Transformer
) -> list[Step]:
    """One rank of a model on meta, without the other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        mesh = Mesh.of_group(None, torch.device("meta")).with_guidance(hands)
        return take_steps(mesh, model, FULL_SHAPE, guidance, **options)
    finally:
        dist.destroy_process_group()


# By the passes of a rank (their first letters) and how many may share a batch: in how many blocks video self-attention
# and video-to-audio run, of a model of three blocks whose second one STG perturbs. Written down from the design: the
# perturbed pass is the conditional one in block 0 and has no self-attention in block 1; the isolated one has no
# video-to-audio and no company.
BLOCKS = {
    ("c", 1): (3, 3),
    ("p", 1): (2, 3),
    ("u", 1): (3, 3),
    ("i", 1): (3, 0),
    ("cp", 1): (3 + 1, 3 + 2),
    ("cp", 2): (3, 3),
    ("ui", 1): (3 + 3, 3),
    ("cpui", 1): (3 + 1 + 3 + 3, 3 + 2 + 3),
    ("cpui", 2): (3 + 1 + 3, 3 + 2),
    ("cpui", 3): (3 + 3, 3),
}
HANDS = {1: ("cpui",), 2: ("cp", "ui"), 3: ("cp", "u", "i"), 4: ("c", "p", "u", "i")}


def expected(
    rank: int, layout: tuple[int, int], guidance: Guidance, *, max_batch_size: int, num_forwards: int,
    strategy: str = "partial",
) -> Counter[tuple[str, str]]:  # fmt: skip
    """The design's count for one step.

    Args:
        num_forwards: predictions of the clean latents in it.
    """
    hands, on_tokens = layout
    passes = HANDS[hands][rank // on_tokens] if guidance.is_guided else "c"
    most = max(number for names, number in BLOCKS if names == passes)
    attending, to_audio = BLOCKS[passes, min(max_batch_size, most)]
    counts = Counter[tuple[str, str]]()
    if on_tokens > 1:
        counts[QKV, "all_to_all"] = counts[OUT, "all_to_all"] = attending
        if to_audio:
            counts[TO_AUDIO[strategy], "all_gather"] = to_audio
    if hands > 1:
        counts["guidance: x0", "all_gather"] += 1
    if on_tokens > 1 and guidance.rescale_scale:
        counts["guidance: moments", "all_gather"] += 1
    return Counter({key: count * num_forwards for key, count in counts.items()})


def check(
    steps: list[Step], rank: int, layout: tuple[int, int], guidance: Guidance, shape: LatentShape, element_size: int,
    *, max_batch_size: int, num_forwards: tuple[int, ...] = (1,) * (len(SIGMAS) - 1), strategy: str = "partial",
) -> None:  # fmt: skip
    hands, on_tokens = layout
    *taken, after = steps
    assert len(taken) == len(num_forwards)
    most = max(map(len, HANDS[hands]))
    for step, forwards in zip(taken, num_forwards, strict=True):
        found = Counter((exchange.label, exchange.operation) for exchange in step.exchanges)
        assert found == expected(
            rank, layout, guidance, max_batch_size=max_batch_size, num_forwards=forwards, strategy=strategy
        )
        small = {exchange.label: exchange.num_bytes for exchange in step.exchanges}
        if hands > 1:
            video_tokens = _largest_share(shape.video_tokens, on_tokens)
            one_pass = (video_tokens + shape.audio_frames) * 128 * element_size
            assert small["guidance: x0"] == (hands - 1) * most * one_pass, "local tokens of each rank's passes"
        if on_tokens > 1 and guidance.rescale_scale:
            assert small["guidance: moments"] == (on_tokens - 1) * 6 * 8, "count, sum and squares, twice, float64"
    assert [exchange.label for exchange in after.exchanges] == (["latents"] if on_tokens > 1 else [])
    for step in steps:
        assert list(step.collectives) == [exchange.operation for exchange in step.exchanges], "past the ledger"
        assert not WAITS.intersection(name.partition(" ")[0] for name in step.operations)


def _largest_share(total: int, parts: int) -> int:
    assert total % parts == 0
    return total // parts


@pytest.mark.parametrize("max_batch_size", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_guided_steps_on_gloo(layout: tuple[int, int], max_batch_size: int) -> None:
    guidance, options = guided(STG_BLOCK), {"max_batch_size": max_batch_size}
    by_rank = run_ranks(on_gloo, layout[0] * layout[1], layout[0], guidance, options)
    for rank, steps in enumerate(by_rank):
        check(steps, rank, layout, guidance, SMALL_SHAPE, 4, max_batch_size=max_batch_size)
    walk = Walk("denoise", SIGMAS, "euler", guidance, guidance)
    settings = Settings(
        Path(), Path(), dtype="float32", parallel=f"{layout[0]}x{layout[1]}", max_batch_size=max_batch_size
    )
    spec = ModelSpec((2, 3), "published", small_spec(), {})
    stage = make_stage(walk, SMALL_SHAPE, Request("a fox"), spec, settings, len(by_rank), DEFAULT_MACHINE)
    for hand, cost in enumerate(stage.predictions):
        exchanges = [steps[0].exchanges for steps in by_rank[hand * layout[1] : (hand + 1) * layout[1]]]
        counts = Counter(exchange.operation for exchange in exchanges[0])
        assert counts == Counter(all_to_all=cost.all_to_alls, all_gather=cost.all_gathers + (layout[0] > 1))
        assert counts.total() == cost.collectives, "as the plan says"
        sent = {exchange.label: exchange.num_bytes for exchange in exchanges[0]}
        assert sent.get("guidance: x0", 0) == cost.x0_bytes
        bytes_of_blocks = [e.num_bytes for own in exchanges for e in own if not e.label.startswith("guidance")]
        assert sum(bytes_of_blocks) / layout[1] == pytest.approx(cost.received_bytes, abs=1)


@pytest.mark.parametrize("strategy", TO_AUDIO)
def test_unguided_steps_on_gloo(strategy: str) -> None:
    options = {"max_batch_size": 1, "strategy": strategy}
    for rank, steps in enumerate(run_ranks(on_gloo, 4, 1, UNGUIDED, options)):
        check(steps, rank, (1, 4), UNGUIDED, SMALL_SHAPE, 4, max_batch_size=1, strategy=strategy)
        assert all(len(step.exchanges) == 3 * 3 for step in steps[:-1]), "three per block"


@pytest.mark.parametrize(
    ("sampler", "num_forwards"), [("euler_ancestral", (1, 1, 1, 1, 1)), ("res_2s", (2, 2, 2, 2, 2, 1))]
)
def test_a_sampler_exchanges_nothing_of_its_own(sampler: str, num_forwards: tuple[int, ...]) -> None:
    guidance, options = guided(STG_BLOCK), {"max_batch_size": 1, "sampler": sampler}
    for rank, steps in enumerate(run_ranks(on_gloo, 4, 2, guidance, options)):
        check(steps, rank, (2, 2), guidance, SMALL_SHAPE, 4, max_batch_size=1, num_forwards=num_forwards)


@pytest.mark.parametrize("layout", [*LAYOUTS, (1, 8), (2, 4), (4, 2)])
def test_full_size_in_the_fake_group(layout: tuple[int, int]) -> None:
    """Blocks of the 22B model, first and last rank; nothing may ask meta for a value."""
    guidance, num_ranks = guided(STG_BLOCK), layout[0] * layout[1]
    model = random_transformer(full_size(num_layers=3), dtype=torch.bfloat16, device=torch.device("meta"))
    options = {"max_batch_size": 1, "sigmas": SIGMAS[:3]}
    for rank in (0, num_ranks - 1):
        steps = on_fake(rank, num_ranks, layout[0], guidance, options, model)
        check(steps, rank, layout, guidance, FULL_SHAPE, 2, max_batch_size=1, num_forwards=(1, 1))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "res_2s"])
@pytest.mark.parametrize("max_batch_size", [1, 4])
def test_steps_of_a_kind_run_the_same_operations(sampler: str, max_batch_size: int) -> None:
    """So that a captured one can stand for the others: no operation or shape depends on where the walk is."""
    model = random_transformer(small_spec(), dtype=torch.float32, device=torch.device("cpu"))
    options: dict[str, Any] = {"max_batch_size": max_batch_size, "sampler": sampler}
    steps = take_steps(Mesh.alone(), model, SMALL_SHAPE, guided(STG_BLOCK), **options)[:-1]
    own, _ = make_sampler(sampler, 7, Streams(torch.zeros(1, 1, 1), None))
    first: dict[object, tuple[str, ...]] = {}
    # The walk takes a step's row before the step and the next one's after it, so the first and last are left out.
    for kind, step in list(zip(own.schedule(SIGMAS).kinds, steps, strict=True))[1:-1]:
        assert step.operations == first.setdefault(kind, step.operations)


def test_steps_allocate_alike_and_keep_nothing() -> None:
    """From the second step on each asks for memory as often, for as much of it, and gives all of it back."""
    model = random_transformer(small_spec(), dtype=torch.float32, device=torch.device("cpu"))
    inputs = random_inputs(model.spec, SMALL_SHAPE, num_text=8, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        denoiser = make_denoiser(model, inputs, Mesh.alone(), guided(STG_BLOCK))
        own, _ = make_sampler("euler", 7, Streams(inputs.video, inputs.audio))
        schedule = own.schedule(SIGMAS)
        rows = torch.tensor(schedule.rows, dtype=torch.float64)
        state = own.begin(Streams(inputs.video, inputs.audio))

        def step(index: int) -> None:
            nonlocal state
            state = own.step(schedule.kinds[index], denoiser, state, rows[index], [], denoiser.keep)

        step(0)
        # What a first one frees was allocated before the profiler looked.
        _, *taken = [_allocations(step, index) for index in range(1, len(SIGMAS) - 1)]
    assert taken[0][0] > 100, "a profiler that sees nothing would prove nothing"
    assert {(count, num_bytes) for count, num_bytes, _ in taken} == {taken[0][:2]}
    assert {kept for _, _, kept in taken} == {0}


def _allocations(step: Callable[[int], None], index: int) -> tuple[int, int, int]:
    """Number of allocations, their bytes, and what of these is still held afterwards."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(index)
    assert profiler.profiler is not None
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sum(size > 0 for size in sizes), sum(size for size in sizes if size > 0), sum(sizes)


class Watching:
    """Notes, for work that may run beside other work, what it exchanged."""

    def __init__(self, ledger: Ledger):
        self._ledger, self.started = ledger, list[int]()

    def __call__(self, work: Callable[[], Result], /) -> Callable[[], Result]:
        before = len(self._ledger.exchanges)
        result = work()
        self.started.append(len(self._ledger.exchanges) - before)
        return lambda: result


def _beside(rank: int, num_ranks: int, strategy: str) -> tuple[list[int], bool]:
    mesh = Mesh.of_group(None, torch.device("cpu"))
    model = random_transformer(small_spec(), dtype=torch.float32, device=torch.device("cpu"))
    inputs = random_inputs(model.spec, SMALL_SHAPE, num_text=8, dtype=torch.float32, device=torch.device("cpu"))
    mesh.ledger.recording, watching = True, Watching(mesh.ledger)
    x = Streams(shard_tokens(inputs.video, mesh.tokens), inputs.audio)
    with torch.inference_mode():
        after, before = (
            make_denoiser(model, inputs, mesh, guided(STG_BLOCK), video_to_audio=strategy, beside=beside)(
                x, torch.tensor(0.7)
            )
            for beside in (in_turn, watching)
        )
    assert after.audio is not None
    assert before.audio is not None
    return watching.started, torch.equal(after.video, before.video) and torch.equal(after.audio, before.audio)


@pytest.mark.parametrize("strategy", ["partial", "gather"])
def test_no_exchange_starts_beside_another_stream(strategy: str) -> None:
    """All start on one stream, so that they come in one order on every rank, wherever they are waited for."""
    for started, is_equal in run_ranks(_beside, 2, strategy):
        assert len(started) == 2 * (3 + 2 + 3 + 3)
        assert set(started) == {0}
        assert is_equal
