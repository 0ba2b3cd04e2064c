"""Oracle: diffusers with equal weights, at sizes that the golden files do not have."""

from __future__ import annotations

import pytest
import torch

from ltx_sp.spec import LatentShape
from profiling.bench_step import diffusers_twin, forwards
from profiling.models import random_inputs, random_transformer, transformer_spec


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "audio_head_dim", "shape"),
    [(3, 32, 16, LatentShape(3, 3, 5, 18)), (8, 24, 8, LatentShape(2, 4, 7, 9))],
)
def test_text_to_video_forward(num_heads: int, head_dim: int, audio_head_dim: int, shape: LatentShape) -> None:
    device = torch.device("cpu")
    spec = transformer_spec(num_heads=num_heads, head_dim=head_dim, audio_head_dim=audio_head_dim, num_layers=2)
    model = random_transformer(spec, dtype=torch.float32, device=device)
    inputs = random_inputs(spec, shape, num_text=20, dtype=torch.float32, device=device, batch=2)
    calls = forwards(model, diffusers_twin(model), inputs)
    with torch.inference_mode():
        ours, theirs = calls["ours"](), calls["theirs"]()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
        assert own.std() > 0.05, "a comparison of zeros would prove nothing"
