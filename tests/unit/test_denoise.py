"""What passes share gives the bits that each of them would compute by itself, in whatever order streams run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from ltx_sp.denoise import Denoiser
from ltx_sp.model.attention import Beside, SdpaBackend, in_turn
from ltx_sp.model.dit import Transformer
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.recipes import Guidance, Segment, deal_passes, guidance_passes
from ltx_sp.spec import LatentShape
from profiling.models import Inputs, random_inputs, random_transformer, transformer_spec
from profiling.steps import prompts_of, start_of

Result = TypeVar("Result")
LAYERS = 4
GUIDED = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale_scale=0.7, stg_blocks=(2,), modality_scale=3.0)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Transformer:
    spec = transformer_spec(num_heads=4, head_dim=32, audio_head_dim=16, num_layers=LAYERS)
    return random_transformer(spec, dtype=request.param, device=torch.device("cpu"))


def predict(
    model: Transformer,
    inputs: Inputs,
    video: Guidance,
    audio: Guidance,
    segments: tuple[Segment, ...],
    beside: Beside = in_turn,
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        denoiser = Denoiser(
            model, SdpaBackend(), Mesh.alone(), *start_of(inputs), prompts_of(inputs), segments=[segments],
            video_guidance=video, audio_guidance=audio, video_to_audio="partial", beside=beside,
        )  # fmt: skip
        x0 = denoiser(Streams(inputs.video, inputs.audio), torch.tensor(0.7))
    assert x0.audio is not None
    return x0.video, x0.audio


@pytest.mark.parametrize(
    ("video_blocks", "audio_blocks"), [((2,), (2,)), ((3, 1), (2,)), ((), (3,)), ((0,), (0,)), ((1,), ())]
)
def test_passes_that_part_late_are_those_that_never_met(
    model: Transformer, video_blocks: tuple[int, ...], audio_blocks: tuple[int, ...]
) -> None:
    video, audio = (
        dataclasses.replace(GUIDED, stg_scale=float(bool(blocks)), stg_blocks=blocks)
        for blocks in (video_blocks, audio_blocks)
    )
    shape = LatentShape(frames=2, height=3, width=4, audio_frames=7)
    dtype = model.proj_out.weight.dtype
    inputs = random_inputs(model.spec, shape, num_text=6, dtype=dtype, device=torch.device("cpu"))
    apart = tuple(Segment((name,), 0, LAYERS) for name in guidance_passes(video, audio))
    expected = predict(model, inputs, video, audio, apart)
    for max_batch_size in (1, 2, 3):
        (segments,) = deal_passes(video, audio, LAYERS, num_hands=1, max_batch_size=max_batch_size)
        found = predict(model, inputs, video, audio, segments)
        for ours, theirs in zip(found, expected, strict=True):
            if max_batch_size == 1:
                assert torch.equal(ours, theirs)
            else:  # other shapes of products, other roundings
                tolerance = 1e-5 if dtype == torch.float32 else 5e-2
                torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


class AtOnce:
    """Does what is to run beside the video before anything else of it, as the side stream's work may come first."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, work: Callable[[], Result], /) -> Callable[[], Result]:
        self.calls += 1
        result = work()
        return lambda: result


@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_the_audio_stream_may_run_before_the_video_or_after_it(model: Transformer, max_batch_size: int) -> None:
    shape = LatentShape(frames=2, height=3, width=4, audio_frames=7)
    dtype = model.proj_out.weight.dtype
    inputs = random_inputs(model.spec, shape, num_text=6, dtype=dtype, device=torch.device("cpu"))
    (segments,) = deal_passes(GUIDED, GUIDED, LAYERS, num_hands=1, max_batch_size=max_batch_size)
    at_once = AtOnce()
    after = predict(model, inputs, GUIDED, GUIDED, segments)
    before = predict(model, inputs, GUIDED, GUIDED, segments, at_once)
    assert at_once.calls == 2 * sum(segment.stop - segment.start for segment in segments)
    for ours, theirs in zip(after, before, strict=True):
        assert torch.equal(ours, theirs)


def test_each_block_of_a_pass_runs_once(model: Transformer) -> None:
    """Whatever is shared, every pass goes through all blocks in order, and leaves them once."""
    for num_hands in (1, 2, 3, 4):
        for max_batch_size in (1, 2, 3, 4):
            hands = deal_passes(GUIDED, GUIDED, LAYERS, num_hands=num_hands, max_batch_size=max_batch_size)
            left = [name for hand in hands for segment in hand if segment.stop == LAYERS for name in segment.passes]
            assert sorted(left) == sorted(guidance_passes(GUIDED, GUIDED))
            for hand in hands:
                for place, segment in enumerate(hand):
                    source = None if segment.source is None else hand[segment.source]
                    assert segment.start == (0 if source is None else source.stop)
                    assert segment.source is None or segment.source < place
                    assert 0 < len(segment.passes) <= max_batch_size
