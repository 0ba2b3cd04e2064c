"""Which attention runs where, and why. Oracle: the order that was asked of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from ltx_sp.model import attention
from ltx_sp.model.attention import SdpaBackend, choose_backend

CUDA = torch.device("cuda", 0)


def order_of(backend: object) -> list[SDPBackend]:
    assert isinstance(backend, SdpaBackend)
    return backend._order


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """On which types cuDNN's kernel was tried."""
    types = list[torch.dtype]()
    monkeypatch.setattr(attention, "_try_cudnn", lambda _, dtype: types.append(dtype))
    monkeypatch.setattr(attention, "_capability", lambda _: (9, 0))
    return types


@pytest.mark.parametrize("name", ["sdpa", "auto"])
def test_cudnn_leads_where_it_runs(tried: list[torch.dtype], name: str) -> None:
    backend, _ = choose_backend(name, CUDA, torch.bfloat16)
    assert order_of(backend)[0] == SDPBackend.CUDNN_ATTENTION
    assert tried == [torch.bfloat16]


@pytest.mark.parametrize("name", ["sdpa", "auto"])
def test_where_cudnn_has_no_kernel_the_others_are_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(_: torch.device, dtype: torch.dtype) -> None:
        raise RuntimeError("No execution plans support the graph.\nand a stack")

    monkeypatch.setattr(attention, "_try_cudnn", fail)
    monkeypatch.setattr(attention, "_capability", lambda _: (9, 0))
    backend, reason = choose_backend(name, CUDA, torch.bfloat16)
    assert order_of(backend)[0] == SDPBackend.FLASH_ATTENTION
    assert SDPBackend.CUDNN_ATTENTION not in order_of(backend)
    assert reason.endswith("cuDNN's kernel does not run here (No execution plans support the graph.)")


def test_elsewhere_the_order_is_pytorchs_own(tried: list[torch.dtype]) -> None:
    for device, dtype in ((CUDA, torch.float32), (torch.device("cpu"), torch.bfloat16)):
        backend, _ = choose_backend("sdpa", device, dtype)
        assert order_of(backend) == []
    assert tried == []


def test_an_order_is_what_pytorch_is_asked_for() -> None:
    """On a CPU the explicit form stands for a kernel that is there, cuDNN's for one that is not."""
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 5, 2, 8)
    plain = SdpaBackend().attend(q, k, k)
    torch.testing.assert_close(SdpaBackend([SDPBackend.MATH]).attend(q, k, k), plain)
    with pytest.raises(RuntimeError):
        SdpaBackend([SDPBackend.CUDNN_ATTENTION]).attend(q, k, k)
