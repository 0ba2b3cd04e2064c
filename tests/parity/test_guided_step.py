"""Oracle: diffusers' LTX2Pipeline's arithmetic of one guided step, on its transformer with equal weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ltx_sp.recipes import Guidance
from ltx_sp.spec import LatentShape
from profiling.bench_step import diffusers_step, diffusers_twin, guided_step
from profiling.models import random_inputs, random_transformer, transformer_spec
from profiling.steps import guided

SPEC = transformer_spec(num_heads=3, head_dim=32, audio_head_dim=16, num_layers=3)
TOLERANCE = 1e-5  # guidance multiplies what the forwards differ by


def difference(guidance: Guidance, other: Guidance, max_batch_size: int) -> float:
    """Between the latents after a step of ours and one of theirs, the largest of both streams."""
    model = random_transformer(SPEC, dtype=torch.float32, device=torch.device("cpu"))
    inputs = random_inputs(SPEC, LatentShape(3, 3, 5, 18), num_text=20, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        ours = guided_step(model, inputs, guidance, max_batch_size=max_batch_size)()
        theirs = diffusers_step(diffusers_twin(model), inputs, other, SPEC.timestep_scale)()
    return max(map(_largest, ours, theirs))


def _largest(own: Tensor, other: Tensor) -> float:
    return float((own - other).abs().max())


@pytest.mark.parametrize("max_batch_size", [1, 2, 4])
@pytest.mark.parametrize("stg_block", [0, 2])
def test_guided_step(stg_block: int, max_batch_size: int) -> None:
    guidance = guided(stg_block)
    assert difference(guidance, guidance, max_batch_size) < TOLERANCE


@pytest.mark.parametrize(
    "change",
    [{"cfg_scale": 2.9}, {"stg_scale": 0.9}, {"modality_scale": 2.9}, {"rescale_scale": 0.6}, {"stg_blocks": (1,)}],
)
def test_each_term_of_the_guidance_counts(change: dict[str, float]) -> None:
    """Or the test above would not see it missing."""
    guidance = guided(0)
    assert difference(guidance, dataclasses.replace(guidance, **change), 1) > 10 * TOLERANCE  # type: ignore[arg-type]
