"""Oracle: self. A whole forward on any number of ranks equals the one on one rank, whatever the token count."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ltx_sp.model.args import BlockSkips
from ltx_sp.model.attention import SdpaBackend
from ltx_sp.model.blocks import Block
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.parallel.parallelize import parallelize
from ltx_sp.parallel.ulysses import gather_tokens
from ltx_sp.spec import LatentShape
from profiling.models import random_inputs, random_transformer, stream_inputs, transformer_spec
from tests.support.ranks import run_ranks


def _forward(rank: int, num_ranks: int, shape: LatentShape, num_heads: int, strategy: str) -> tuple[Tensor, Tensor]:
    device = torch.device("cpu")
    mesh = Mesh.alone() if num_ranks == 1 else Mesh.of_group(None, device)
    spec = transformer_spec(num_heads=num_heads, head_dim=8, audio_head_dim=4, num_layers=2)
    model = random_transformer(spec, dtype=torch.float32, device=device)
    inputs = random_inputs(spec, shape, num_text=6, dtype=torch.float32, device=device)
    attends = parallelize(
        SdpaBackend(), mesh.tokens, num_tokens=shape.video_tokens, num_heads=num_heads, video_to_audio=strategy
    )
    with torch.inference_mode():
        video, audio = stream_inputs(model, inputs, mesh.tokens)
        out_video, out_audio = model(video, audio, attends, [BlockSkips()] * spec.num_layers)
        assert out_audio is not None
        whole = gather_tokens(out_video, mesh.tokens, num_tokens=shape.video_tokens, label="out")
    return whole, out_audio


@pytest.mark.parametrize("strategy", ["partial", "gather"])
@pytest.mark.parametrize(
    ("num_ranks", "num_heads", "shape"),
    [
        (5, 5, LatentShape(3, 3, 5, 18)),
        (3, 5, LatentShape(1, 1, 2, 3)),  # fewer tokens than ranks: one rank holds none
        (4, 6, LatentShape(2, 1, 1, 1)),
    ],
)
def test_any_number_of_ranks_and_tokens(num_ranks: int, num_heads: int, shape: LatentShape, strategy: str) -> None:
    video, audio = run_ranks(_forward, 1, shape, num_heads, strategy)[0]
    for other_video, other_audio in run_ranks(_forward, num_ranks, shape, num_heads, strategy):
        torch.testing.assert_close(other_video, video, atol=1e-5, rtol=0)
        torch.testing.assert_close(other_audio, audio, atol=1e-5, rtol=0)


def test_the_forward_never_looks_at_a_value() -> None:
    """Tensors on meta have none: whatever waits for the device or branches on a value fails here."""
    device = torch.device("meta")
    spec = transformer_spec(num_heads=4, head_dim=8, audio_head_dim=4, num_layers=2)
    model = random_transformer(spec, dtype=torch.bfloat16, device=device)
    inputs = random_inputs(spec, LatentShape(2, 2, 2, 5), num_text=6, dtype=torch.bfloat16, device=device)
    video, audio = stream_inputs(model, inputs, Mesh.alone().tokens)
    attends = parallelize(SdpaBackend(), Mesh.alone().tokens, num_tokens=8, num_heads=4, video_to_audio="partial")
    out_video, out_audio = model(video, audio, attends, [BlockSkips()] * spec.num_layers)
    assert out_video.shape == (1, 8, 128)
    assert out_audio is not None
    assert out_audio.shape == (1, 5, 128)


def test_keys_made_once_equal_keys_made_in_the_forward() -> None:
    """2.0, and models without prompt adaLN: text keys and values do not depend on sigma."""
    device = torch.device("cpu")
    spec = dataclasses.replace(
        transformer_spec(num_heads=4, head_dim=8, audio_head_dim=4, num_layers=2), prompt_adaln=False
    )
    model = random_transformer(spec, dtype=torch.float32, device=device)
    inputs = random_inputs(spec, LatentShape(2, 2, 2, 5), num_text=6, dtype=torch.float32, device=device)
    text = model.make_text(inputs.video_context, audio=False)
    assert text.context_UCD is None
    assert text.keys_values is not None
    assert len(text.keys_values) == spec.num_layers
    k, v = text.keys_values[1]
    block = list(model.transformer_blocks)[1]
    assert isinstance(block, Block)
    assert block.prompt_scale_shift_table is not None
    shift, scale = block.prompt_scale_shift_table.unbind(0)
    context = inputs.video_context * (1 + scale) + shift
    torch.testing.assert_close(k, block.attn2.key(context))
    torch.testing.assert_close(v, block.attn2.value(context))
