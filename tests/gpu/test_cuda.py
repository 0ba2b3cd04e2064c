"""One CUDA device. Oracles: the golden files, the CPU, replay equals eager, and CUDA's own guard against host waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx_sp.denoise import Denoiser
from ltx_sp.handoff import Conditioning, TextContext
from ltx_sp.model.args import BlockSkips
from ltx_sp.model.attention import SdpaBackend, choose_backend, local_attends
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.recipes import Guidance, guidance_passes
from ltx_sp.spec import LatentShape, ModelSpec
from ltx_sp.start import StreamStart, audio_positions, video_positions
from profiling.models import random_inputs, random_transformer, stream_inputs, transformer_spec
from tests.parity.golden import find_files, run_file

CUDA = torch.device("cuda")
SPEC = transformer_spec(num_heads=4, head_dim=64, audio_head_dim=32, num_layers=2)
SHAPE = LatentShape(3, 4, 5, 18)


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def test_golden_cases_on_cuda(golden: Path) -> None:
    mesh = Mesh.alone("cuda")
    rows = [
        row
        for checkpoint, io, kind in find_files(golden / "transformer")
        for row in run_file(checkpoint, io, kind, mesh)
    ]
    assert len(rows) == 116
    # Other kernels add up in another order, and guidance multiplies the difference.
    assert [str(row) for row in rows if max(row.video, row.audio or 0) > 10 * row.tolerance] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_width", [32, 64, 128])
@pytest.mark.parametrize("num_keys", [0, 1, 33, 257])
@pytest.mark.parametrize("name", ["sdpa", "auto"])
def test_attention_with_its_log_sum_exp(dtype: torch.dtype, head_width: int, num_keys: int, name: str) -> None:
    backend, _ = choose_backend(name, CUDA, dtype)
    q = torch.randn(2, 17, 4, head_width, device=CUDA, dtype=dtype)
    k, v = (torch.randn(2, num_keys, 4, head_width, device=CUDA, dtype=dtype) for _ in range(2))
    out, lse = backend.attend_lse(q, k, v)
    if num_keys == 0:
        assert torch.isneginf(lse).all()
        assert not out.any()
        return
    scores = torch.einsum("bthk,bshk->bhts", q.double(), k.double()) * head_width**-0.5
    want = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v.double())
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=tolerance, rtol=0)
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=0)
    torch.testing.assert_close(backend.attend(q, k, v).double(), want, atol=tolerance, rtol=0)


def _denoiser() -> tuple[Denoiser, Streams]:
    model = random_transformer(SPEC, dtype=torch.bfloat16, device=CUDA)
    inputs = random_inputs(SPEC, SHAPE, num_text=20, dtype=torch.bfloat16, device=CUDA)
    mask = torch.ones((1, 1, 1), device=CUDA)
    spec = ModelSpec((2, 3), "published", SPEC, {})
    video = StreamStart(inputs.video, torch.zeros_like(inputs.video), mask, video_positions(SHAPE, 24.0, CUDA))
    audio = StreamStart(
        inputs.audio, torch.zeros_like(inputs.audio), mask, audio_positions(SHAPE.audio_frames, spec, CUDA)
    )
    text = TextContext(inputs.video_context, inputs.audio_context)
    guidance = Guidance(3.0, 1.0, 0.7, (1,), 3.0)
    passes = guidance_passes(guidance, guidance)
    denoiser = Denoiser(
        model, SdpaBackend(), Mesh.alone(CUDA), video, audio, Conditioning(text, text), passes=passes,
        forwards=[[[index] for index in range(len(passes))]], video_guidance=guidance, audio_guidance=guidance,
        video_to_audio="partial",
    )  # fmt: skip
    return denoiser, Streams(inputs.video, inputs.audio)


def test_a_guided_step_never_waits_for_the_device() -> None:
    denoiser, x = _denoiser()
    with torch.inference_mode():
        sigma = torch.full((), 0.9, device=CUDA)
        denoiser(x, sigma)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            denoiser(x, sigma)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_guided_step_replays_as_it_ran() -> None:
    """At another sigma than it was captured with: nothing of a step may be baked in."""
    denoiser, x = _denoiser()
    with torch.inference_mode():
        sigma = torch.full((), 0.9, device=CUDA)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                denoiser(x, sigma)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = denoiser(x, sigma)
        sigma.fill_(0.5)
        eager = denoiser(x, sigma)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(captured.video, eager.video)
    assert captured.audio is not None
    assert eager.audio is not None
    assert torch.equal(captured.audio, eager.audio)


def test_the_forward_equals_the_cpu() -> None:
    outputs = []
    for device in (torch.device("cpu"), CUDA):
        model = random_transformer(SPEC, dtype=torch.float32, device=torch.device("cpu")).to(device)
        inputs = random_inputs(SPEC, SHAPE, num_text=20, dtype=torch.float32, device=device)
        video, audio = stream_inputs(model, inputs, Mesh.alone(device).tokens)
        with torch.inference_mode():
            out, _ = model(video, audio, local_attends(SdpaBackend()), [BlockSkips()] * SPEC.num_layers)
        outputs.append(out.cpu())
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=0)
