"""Two ranks, real NCCL, captured steps; both on one device, for where there are more see tests/multigpu.

Oracles: the same steps taken as they are, bit by bit, and the ledger's counts beside the kernels that a replay ran.
NCCL refuses two ranks of one host on one device, so that each says that it is a host of its own and they talk through
the loopback network.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ltx_sp.denoise import make_sampler, make_walk, run, steps_of
from ltx_sp.graph import SideStream, StepGraphs, TakeStep
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh, resolve_device, start, start_store
from ltx_sp.parallel.ulysses import shard_tokens
from ltx_sp.spec import LatentShape
from profiling.kernel_traces import COLLECTIVES, read_trace
from profiling.models import random_inputs, random_transformer, transformer_spec
from profiling.steps import SIGMAS, guided, make_denoiser, start_of
from tests.support.ranks import RankError, run_ranks

SPEC = transformer_spec(num_heads=4, head_dim=64, audio_head_dim=32, num_layers=3)
SHAPE = LatentShape(3, 4, 5, 18)  # 60 tokens
REFUSALS = ("Duplicate GPU detected",)

Place = Callable[[int], None]
"""Prepares a rank's environment, before NCCL starts."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one rank brings back.

    Args:
        is_equal: a clip whose steps were replayed to one whose steps ran as they are.
        ledger: collectives of one step, by operation, as this rank's ledger has them.
        replayed: the same as the device ran them, from the trace of one replay.
    """

    is_equal: bool = False
    is_finite: bool = False
    ledger: Counter[str] = dataclasses.field(default_factory=Counter)
    replayed: Counter[str] = dataclasses.field(default_factory=Counter)


def on_one_device(rank: int) -> None:
    """Let NCCL take the ranks for hosts with the same one device each."""
    os.environ.update(
        LOCAL_RANK="0",
        NCCL_HOSTID=f"rank{rank}",
        NCCL_IB_DISABLE="1",
        NCCL_MNNVL_ENABLE="0",
        NCCL_SOCKET_IFNAME="lo",
        NCCL_DEBUG="WARN",
    )


def walk(rank: int, num_ranks: int, place: Place, hands: int, sampler_name: str) -> Answer:
    """Take a clip's steps as they are, then captured, with a clip of other noise levels in between."""
    place(rank)
    with start(resolve_device("cuda"), start_store()) as mesh, torch.no_grad():
        clip = Clip(mesh.with_guidance(hands), sampler_name)
        plain = clip.walk(SIGMAS, clip.take)
        clip.walk(tuple(0.9 * sigma for sigma in SIGMAS), clip.graphed)
        replayed = clip.walk(SIGMAS, clip.graphed)
        answer = Answer(
            torch.equal(plain.video, replayed.video) and torch.equal(plain.audio, replayed.audio),  # type: ignore[arg-type]
            bool(torch.isfinite(plain.video).all()),
        )
        clip.close()
    return answer


def count(rank: int, num_ranks: int, place: Place, hands: int) -> Answer:
    """Count the collectives of a step as it is and of its replay."""
    place(rank)
    with start(resolve_device("cuda"), start_store()) as mesh, torch.no_grad():
        clip = Clip(mesh.with_guidance(hands), "euler")
        clip.walk(SIGMAS, clip.graphed)
        mesh.ledger.recording = True
        clip.step(clip.take)
        mesh.ledger.recording = False
        clip.step(clip.graphed)
        torch.cuda.synchronize(mesh.device)
        mesh.world.gather_text("", label="meet")
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            clip.step(clip.graphed)
            torch.cuda.synchronize(mesh.device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            (track,) = read_trace(path)
        counts = track.counts()
        answer = Answer(
            ledger=Counter(exchange.operation for exchange in mesh.ledger.exchanges),
            replayed=Counter({name: counts[name] for name in COLLECTIVES if counts[name]}),
        )
        clip.close()
    return answer


class Clip:
    """A guided clip on a mesh, and two ways to take its steps: one operation after the other, and in graphs that run
    the audio stream beside the video.
    """

    def __init__(self, mesh: Mesh, sampler_name: str):
        self._mesh, self._sampler_name = mesh, sampler_name
        model = random_transformer(SPEC, dtype=torch.bfloat16, device=mesh.device)
        self._inputs = random_inputs(SPEC, SHAPE, num_text=20, dtype=torch.bfloat16, device=mesh.device)
        self._whole = Streams(self._inputs.video, self._inputs.audio)
        self._sampler, _ = make_sampler(sampler_name, 3, self._whole)
        self.take = steps_of(make_denoiser(model, self._inputs, mesh, guided()), self._sampler)
        beside = SideStream(mesh.device)
        denoiser = make_denoiser(model, self._inputs, mesh, guided(), beside=beside)
        self._graphs = StepGraphs(mesh.device, self._first_reason, is_required=True, beside=beside)
        self.graphed = self._graphs.stage("stage", 0, steps_of(denoiser, self._sampler), denoiser.constants())

    def _first_reason(self, reason: str) -> str:
        return next(filter(None, self._mesh.world.gather_text(reason, label="capture")), "")

    def walk(self, sigmas: tuple[float, ...], take: TakeStep) -> Streams:
        """The whole clip, from the same noise every time. Collective."""
        _, noises = make_sampler(self._sampler_name, 3, self._whole)
        walk = make_walk(self._sampler, sigmas, noises, self._mesh.device)
        return run(take, walk, *start_of(self._inputs), self._mesh)

    def step(self, take: TakeStep) -> None:
        """One step of a sampler that draws no noise. Collective."""
        walk = make_walk(self._sampler, SIGMAS, [], self._mesh.device)
        video = shard_tokens(self._whole.video, self._mesh.tokens)
        take(walk.kinds[1], self._sampler.begin(Streams(video, self._whole.audio)), walk.rows[1], [])

    def close(self) -> None:
        """Let go of the graphs, which must not outlive the process group."""
        torch.cuda.synchronize(self._mesh.device)
        self._graphs.clear()
        del self.graphed


def answers_of(function: Callable[..., Answer], num_ranks: int, *args: object) -> list[Answer]:
    """Run it on NCCL ranks; skips the test where NCCL refuses to have them on one device."""
    try:
        return run_ranks(function, num_ranks, *args, timeout=45, init_group=False)
    except RankError as error:
        for refusal in REFUSALS:
            if refusal in str(error):
                pytest.skip(f"NCCL: {refusal}")
        raise


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "res_2s"])
@pytest.mark.parametrize("hands", [1, 2], ids=["1x2", "2x1"])
def test_replayed_steps_are_the_steps(hands: int, sampler: str) -> None:
    for answer in answers_of(walk, 2, on_one_device, hands, sampler):
        assert answer == Answer(is_equal=True, is_finite=True)


@pytest.mark.parametrize("hands", [1, 2], ids=["1x2", "2x1"])
def test_a_replay_exchanges_what_the_step_does(hands: int) -> None:
    for answer in answers_of(count, 2, on_one_device, hands):
        assert answer.ledger.total() > 0
        assert answer.replayed == answer.ledger
