"""Embedding: an existing group, a sub-group, several requests, no group at all. Oracle: self."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ltx_sp import RankMismatchError, Request, Runtime, Settings, WeightsError
from ltx_sp.components import COMPONENTS, DECODERS, ENCODERS
from ltx_sp.demo import write_demo
from ltx_sp.encode import encode_prompts
from ltx_sp.request import GuidanceRequest
from ltx_sp.weights.load import load
from tests.support.ranks import run_ranks

STG = GuidanceRequest(stg_blocks=(1,))
REQUEST = Request(
    "a robot dancing", "blurry", height=64, width=96, num_frames=9, num_inference_steps=2, video=STG, audio=STG
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    checkpoint = write_demo(tmp_path_factory.mktemp("demo") / "2.3")
    return Settings(checkpoint, checkpoint.parent / "gemma", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def alone(settings: Settings) -> Tensor:
    with Runtime.load(settings) as runtime:
        return runtime.generate(REQUEST).latents.video


def _generate(rank: int, num_ranks: int, settings: Settings) -> Tensor:
    with Runtime.load(settings) as runtime:
        return runtime.generate(REQUEST).latents.video


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_inside_an_existing_group(settings: Settings, alone: Tensor, num_ranks: int) -> None:
    for video in run_ranks(_generate, num_ranks, settings, timeout=120):
        torch.testing.assert_close(video, alone, atol=1e-4, rtol=0)


def _generate_in_sub_group(rank: int, num_ranks: int, settings: Settings) -> Tensor | None:
    group = dist.new_group([1, 2])
    if rank not in (1, 2):
        return None
    assert isinstance(group, dist.ProcessGroup)
    with Runtime.load(settings, group) as runtime:
        assert runtime.mesh.world.size == 2
        result = runtime.generate(REQUEST)
        assert (result.clip is not None) == (rank == 1), "the group's first rank decodes"
        return result.latents.video


def test_inside_a_sub_group(settings: Settings, alone: Tensor) -> None:
    results = run_ranks(_generate_in_sub_group, 4, settings, timeout=120)
    assert results[0] is None
    assert results[3] is None
    for video in results[1:3]:
        torch.testing.assert_close(video, alone, atol=1e-4, rtol=0)


def test_several_requests_load_once(settings: Settings, alone: Tensor) -> None:
    loads: list[str] = []

    def counting(*args: object, component: str, **kwargs: object) -> object:
        loads.append(component)
        return load(*args, component=component, **kwargs)  # type: ignore[arg-type]

    other = dataclasses.replace(REQUEST, prompt="a cat sings", seed=11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltx_sp.components.load", counting)
        with Runtime.load(dataclasses.replace(settings, keep_text_encoder=True)) as runtime:
            first = runtime.generate(REQUEST).latents.video
            between = runtime.generate(other).latents.video
            again = runtime.generate(REQUEST).latents.video
    assert sorted(loads) == ["audio_vae", "connectors", "text_encoder", "transformer", "video_vae", "vocoder"]
    assert torch.equal(first, alone)
    assert torch.equal(again, alone)
    assert not torch.allclose(between, alone)


def _held_while_loading(settings: Settings, free_bytes: Callable[[torch.device], int]) -> list[tuple[set[str], str]]:
    """What was there when each component began to load."""
    held: list[tuple[set[str], str]] = []
    with pytest.MonkeyPatch.context() as patch, Runtime.load(settings) as runtime:

        def watching(*args: object, component: str, **kwargs: object) -> object:
            held.append((_held(runtime), component))
            return load(*args, component=component, **kwargs)  # type: ignore[arg-type]

        patch.setattr("ltx_sp.components.load", watching)
        patch.setattr("ltx_sp.components.free_bytes", free_bytes)
        runtime.generate(REQUEST)
    return held


def _held(runtime: Runtime) -> set[str]:
    return {name for name in COMPONENTS if name in runtime._components}


def test_where_memory_is_short_the_text_encoder_is_gone_before_the_transformer_comes(settings: Settings) -> None:
    held = _held_while_loading(settings, lambda device: 0)
    assert [component for _, component in held] == list(COMPONENTS)
    assert not any({"text_encoder", "transformer"} <= before | {component} for before, component in held)


def test_where_memory_suffices_prompts_are_encoded_while_the_transformer_loads(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transformer's load waits for the encoding to begin: one after the other, neither would come."""
    encoding, seen = threading.Event(), list[bool]()

    def encode(*args: object, **kwargs: object) -> object:
        encoding.set()
        return encode_prompts(*args, **kwargs)  # type: ignore[arg-type]

    def waiting(*args: object, component: str, **kwargs: object) -> object:
        if component == "transformer":
            seen.append(encoding.wait(30))
        return load(*args, component=component, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("ltx_sp.prepare.encode_prompts", encode)
    monkeypatch.setattr("ltx_sp.components.load", waiting)
    with Runtime.load(settings) as runtime:
        runtime.generate(REQUEST)
        assert seen == [True]
        assert _held(runtime) == {"transformer", *DECODERS}


def test_progress_is_told_step_by_step(settings: Settings) -> None:
    steps: list[tuple[int, int]] = []
    with Runtime.load(settings) as runtime:
        runtime.generate(REQUEST, on_progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize("strategy", ["partial", "gather"])
@pytest.mark.parametrize("max_batch_size", [1, 3, 4])
def test_batched_passes_equal_separate_ones(
    settings: Settings, alone: Tensor, max_batch_size: int, strategy: str
) -> None:
    with Runtime.load(dataclasses.replace(settings, max_batch_size=max_batch_size, video_to_audio=strategy)) as runtime:
        torch.testing.assert_close(runtime.generate(REQUEST).latents.video, alone, atol=1e-4, rtol=0)


def _disagree(rank: int, num_ranks: int, settings: Settings) -> str:
    with Runtime.load(settings) as runtime:
        try:
            runtime.generate(dataclasses.replace(REQUEST, seed=rank // 2))
        except RankMismatchError as error:
            return str(error)
    return "no error"


def test_ranks_that_ask_for_different_things_all_say_so(settings: Settings) -> None:
    for message in run_ranks(_disagree, 3, settings, timeout=120):
        assert message.startswith("Rank 2 made another plan than rank 0.")


def _without_unguided_negative(settings: Settings) -> Tensor:
    off = GuidanceRequest(cfg_guidance_scale=1, stg_guidance_scale=0, modality_scale=1)
    with Runtime.load(settings) as runtime:
        result = runtime.generate(dataclasses.replace(REQUEST, video=off, audio=off))
        assert result.plan.stages[0].passes == ("conditional",)
        encoded = list(runtime._preparation._texts)
        assert encoded == [REQUEST.prompt], "a negative prompt that no pass needs is not encoded"
        return result.latents.video


def test_unguided(settings: Settings, alone: Tensor) -> None:
    assert not torch.allclose(_without_unguided_negative(settings), alone)


def _fail_on_rank_0(rank: int, num_ranks: int, settings: Settings) -> str:
    def broken(*args: object, **kwargs: object) -> object:
        raise WeightsError("The tokenizer is broken.")

    with pytest.MonkeyPatch.context() as patch, Runtime.load(settings) as runtime:
        patch.setattr("ltx_sp.prepare.encode_prompts", broken)
        try:
            runtime.generate(REQUEST)
        except WeightsError as error:
            return str(error)
    return "no error"


def test_what_fails_on_one_rank_fails_on_all(settings: Settings) -> None:
    messages = run_ranks(_fail_on_rank_0, 2, settings, timeout=60)
    assert messages == ["The tokenizer is broken.", "Rank 0: The tokenizer is broken."]


def test_a_new_prompt_makes_room_for_the_text_encoder(
    settings: Settings, alone: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders go first; the transformer goes if that is not enough; both come back when they are needed."""
    with Runtime.load(settings) as runtime:
        runtime.generate(REQUEST)
        assert _held(runtime) == {"transformer", *DECODERS}
        monkeypatch.setattr("ltx_sp.components.free_bytes", lambda device: 0)
        runtime._components.make_room(*ENCODERS)
        assert _held(runtime) == set()
        assert torch.equal(runtime.generate(REQUEST).latents.video, alone)


def test_latents_can_be_worked_on(settings: Settings) -> None:
    with Runtime.load(settings) as runtime:
        latents = runtime.generate(REQUEST).latents
    latents.video.mul_(2)
    assert not latents.audio.is_inference()


@pytest.mark.parametrize("version", ["2.0"])
def test_the_older_model_runs_too(tmp_path: Path, version: str) -> None:
    checkpoint = write_demo(tmp_path / version, version)
    settings = Settings(checkpoint, checkpoint.parent / "gemma", device="cpu", dtype="float32")
    with Runtime.load(settings) as runtime:
        result = runtime.generate(REQUEST)
        assert result.clip is not None
        frames = torch.cat(list(result.clip.frames))
    assert frames.shape == (9, 64, 96, 3)
    assert torch.isfinite(frames).all()
    assert result.clip.sample_rate == 24000
    by_rank = run_ranks(_generate, 3, settings, timeout=120)
    torch.testing.assert_close(by_rank[2], result.latents.video, atol=1e-4, rtol=0)
