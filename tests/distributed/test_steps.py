"""How steps are run: compiled, in a profiler's window, replayed. Oracles: self, and counts."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ltx_sp import GuidanceRequest, Lora, Request, Runtime, Settings, UnsupportedError
from ltx_sp.demo import write_demo
from ltx_sp.generate import main
from ltx_sp.model.dit import Transformer
from ltx_sp.parallel.mesh import meet
from ltx_sp.window import StepWindow, mark
from tests.support.commands import arguments
from tests.support.ranks import run_ranks

STG = GuidanceRequest(stg_blocks=(1,))
REQUEST = Request(
    "a robot dancing", "blurry", height=128, width=192, num_frames=9, num_inference_steps=3, video=STG, audio=STG
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    checkpoint = write_demo(tmp_path_factory.mktemp("demo") / "2.3")
    folder = checkpoint.parent
    return Settings(
        checkpoint,
        folder / "gemma",
        device="cpu",
        dtype="float32",
        pipeline="two-stages",
        spatial_upsampler_path=folder / "upsampler.safetensors",
        distilled_lora=Lora(folder / "distilled_lora.safetensors"),
    )


def _compiled_and_not(rank: int, num_ranks: int, settings: Settings) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Both results, and how many graphs there were after each of three requests."""
    compile_blocks, sizes = Transformer.compile_blocks, list[int]()
    results: list[list[Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        # Traced as for Inductor, and run by PyTorch's own kernels: what is slow is not what can go wrong here.
        patch.setattr(Transformer, "compile_blocks", lambda self: compile_blocks(self, "eager"))
        for compiles in (False, True):
            with Runtime.load(dataclasses.replace(settings, compile=compiles)) as runtime:
                for _ in range(3 if compiles else 1):
                    result = runtime.generate(REQUEST)
                    sizes.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
                results.append([tensor for stage in result.stages for tensor in (stage.video, stage.audio)])
    return results[0], results[1], sizes


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compiled_blocks_give_the_same_and_are_compiled_once(settings: Settings, num_ranks: int) -> None:
    settings = dataclasses.replace(settings, parallel=f"1x{num_ranks}", max_batch_size=num_ranks)
    for plain, compiled, (before, first, second, third) in run_ranks(
        _compiled_and_not, num_ranks, settings, timeout=200
    ):
        for ours, theirs in zip(compiled, plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert before == 0
        # Variants by size and by what a pass skips; on several ranks cut in two or three by the exchanges.
        assert 0 < first <= 6 * (1 if num_ranks == 1 else 3)
        assert first == second == third, "a step of a known shape is not compiled again"


class _Recorder:
    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self) -> None:
        self.events.append("start")

    def stop(self) -> None:
        self.events.append("stop")


def test_the_window_opens_and_closes_around_its_steps() -> None:
    recorder = _Recorder()
    window = StepWindow(recorder, 2, 3, recorder.events.append)
    for done in range(6):
        recorder.events.append(str(done))
        window.at(done)
        with mark("step"):
            pass
    assert recorder.events == ["0", "1", "window opens", "start", "2", "3", "window closes", "stop", "4", "5"]


def test_ranks_meet_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody goes on before all are there, at each place anew, and no process group is asked for."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    store, order = dist.HashStore(), list[str]()

    def rank(seconds: float) -> None:
        for place in ("window opens", "window closes"):
            time.sleep(seconds)
            order.append(f"to {place}")
            meet(store, place)
            order.append(f"from {place}")

    with ThreadPoolExecutor(3) as pool:
        for _ in pool.map(rank, (0.0, 0.2, 0.4)):
            pass
    for place in ("window opens", "window closes"):
        came, went = ([at for at, what in enumerate(order) if what == f"{way} {place}"] for way in ("to", "from"))
        assert len(came) == len(went) == 3
        assert max(came) < min(went)
    assert not dist.is_initialized()


def test_from_the_command_line(settings: Settings, tmp_path: Path) -> None:
    argv = arguments(settings.checkpoint_path.parent, tmp_path / "clip.mp4", {}, "--profile-steps", "2-2")
    recorder = _Recorder()
    assert main(argv, window=recorder) == 0
    assert recorder.events == ["start", "stop"]


def test_graphs_want_cuda(settings: Settings) -> None:
    with pytest.raises(UnsupportedError, match="graphs need CUDA"):
        Runtime.load(dataclasses.replace(settings, cuda_graph="on"))
