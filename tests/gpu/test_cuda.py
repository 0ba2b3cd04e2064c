"""One CUDA device. Oracles: the golden files, the CPU, float64, and CUDA's own guard against host waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx_sp.model.args import BlockSkips
from ltx_sp.model.attention import SdpaBackend, choose_backend, local_attends
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.spec import LatentShape
from profiling.models import random_inputs, random_transformer, stream_inputs, transformer_spec
from profiling.steps import guided, make_denoiser
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


@pytest.mark.parametrize("max_batch_size", [1, 4])
def test_a_guided_step_never_waits_for_the_device(max_batch_size: int) -> None:
    model = random_transformer(SPEC, dtype=torch.bfloat16, device=CUDA)
    inputs = random_inputs(SPEC, SHAPE, num_text=20, dtype=torch.bfloat16, device=CUDA)
    with torch.inference_mode():
        denoiser = make_denoiser(model, inputs, Mesh.alone(CUDA), guided(), max_batch_size=max_batch_size)
        x, sigma = Streams(inputs.video, inputs.audio), torch.full((), 0.9, device=CUDA)
        denoiser(x, sigma)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            denoiser(x, sigma)
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
