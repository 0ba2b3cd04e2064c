"""Attention behind one protocol: which kernel runs is a choice made once, with a reason.

Shapes: B batch, T query tokens, S key tokens, H heads, K head width; tokens stand before heads.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltx_sp.errors import UnsupportedError
from ltx_sp.model.rope import Rotation, rotate

Pending = Callable[[], Tensor]
"""A result under way: calling it waits and returns the tensor. Called once."""


class Attend(Protocol):
    """Full attention: ``q_BTHK, k_BSHK, v_BSHK -> BTHK``."""

    def __call__(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> Tensor: ...


class CrossAttend(Protocol):
    """Attention of replicated audio queries over video keys, started now and finished later.

    The keys come without their rotation, so that an implementation may rotate them before or after it moves
    them: ``local`` holds the rotations of the keys given, ``full`` those of the whole video.
    """

    def __call__(
        self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /, *, local: Rotation, full: Rotation
    ) -> Pending: ...


_Result = TypeVar("_Result")


class Beside(Protocol):
    """May start work whose result is wanted later; calling what it returns, once, gives the result.

    Until then nobody changes what the work reads, and the work changes nothing that others read.
    """

    def __call__(self, work: Callable[[], _Result], /) -> Callable[[], _Result]: ...


def in_turn(work: Callable[[], _Result], /) -> Callable[[], _Result]:
    """Leave the work until its result is wanted."""
    return work


class Backend(Protocol):
    """An attention kernel, with and without the log-sum-exp of its scores."""

    name: str

    def attend(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> Tensor:
        """Softmax attention at scale ``K ** -0.5``. Capturable."""
        ...

    def attend_lse(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> tuple[Tensor, Tensor]:
        """The same, with the log-sum-exp of the scaled scores, ``[B, H, T]`` float32. Capturable.

        Without keys the output is 0 and the log-sum-exp -inf.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Attends:
    """What a block calls that is not its own; parallelism is injected by exchanging it.

    Args:
        video_self: over all video tokens, called with this rank's.
        local: everything whose keys are replicated: audio, text, audio-to-video.
        video_to_audio: audio queries over all video tokens, called with this rank's keys.
        beside: runs the audio stream's layers beside the video's where neither needs the other.
    """

    video_self: Attend
    local: Attend
    video_to_audio: CrossAttend
    beside: Beside = in_turn


def local_attends(backend: Backend) -> Attends:
    """Attentions of a process that holds every token itself."""

    def video_to_audio(q: Tensor, k: Tensor, v: Tensor, /, *, local: Rotation, full: Rotation) -> Pending:
        out = backend.attend(q, rotate(k, local), v)
        return lambda: out

    return Attends(backend.attend, backend.attend, video_to_audio)


def merge_partials(out_PBTHK: Tensor, lse_PBHT: Tensor) -> Tensor:
    """Combine attention over disjoint sets of keys into attention over their union. Capturable.

    ``out = sum_p exp(lse_p - m) out_p / sum_p exp(lse_p - m)`` with ``m = max_p lse_p``, in float32 and in the
    order of P, so that equal inputs give equal bits everywhere (Milakov and Gimelshein 2018, section 3).
    """
    weight_PBHT = torch.exp(lse_PBHT - lse_PBHT.amax(dim=0))
    weight_PBTH1 = (weight_PBHT / weight_PBHT.sum(dim=0)).transpose(2, 3).unsqueeze(-1)
    merged = out_PBTHK[0].float() * weight_PBTH1[0]
    for part, weight in zip(out_PBTHK[1:], weight_PBTH1[1:], strict=True):
        merged = torch.addcmul(merged, part.float(), weight)
    return merged.to(out_PBTHK.dtype)


def _no_keys(q_BTHK: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q_BTHK.shape
    return torch.zeros_like(q_BTHK), q_BTHK.new_full((batch, heads, tokens), -torch.inf, dtype=torch.float32)


class SdpaBackend:
    """PyTorch's scaled_dot_product_attention: the reference, on every device.

    Args:
        order: its kernels, best first; PyTorch's own order where there is none.
    """

    name = "sdpa"

    def __init__(self, order: Sequence[SDPBackend] = ()):
        self._order = list(order)

    def attend(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
        if self._order:
            with sdpa_kernel(self._order, set_priority=True):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2)

    def attend_lse(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> tuple[Tensor, Tensor]:
        if k_BSHK.shape[1] == 0:
            return _no_keys(q_BTHK)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
        if q.is_cuda:
            out, lse = self._cuda_lse(q, k, v)
        elif q.is_cpu:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        else:
            out, lse = _explicit_lse(q, k, v)
        return out.transpose(1, 2), lse.float()

    @staticmethod
    def _cuda_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        head_width = q.shape[-1]
        if q.dtype in (torch.float16, torch.bfloat16) and head_width % 8 == 0 and head_width <= 256:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
            return out, lse
        if head_width % 4 == 0:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
            return out, lse[..., : q.shape[2]]  # the kernel pads the log-sum-exp to a multiple of 32
        return _explicit_lse(q, k, v)


def _explicit_lse(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
    scores = q_BHTK.float() @ k_BHSK.float().transpose(2, 3) * q_BHTK.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, dim=-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v_BHSK.float()).to(q_BHTK.dtype), lse


class FlashBackend:
    """FlashAttention 3 or 4: bfloat16 and float16 on Hopper and later."""

    def __init__(self, name: str, kernel: Callable[..., Any], lse_flag: str):
        self.name, self._kernel, self._lse_flag = name, kernel, lse_flag

    def attend(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> Tensor:
        if q_BTHK.shape[1] == 0:  # a rank without video tokens
            return torch.empty_like(q_BTHK)
        return self._run(q_BTHK, k_BSHK, v_BSHK)[0]

    def attend_lse(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, /) -> tuple[Tensor, Tensor]:
        if k_BSHK.shape[1] == 0:
            return _no_keys(q_BTHK)
        out, lse = self._run(q_BTHK, k_BSHK, v_BSHK)
        return out, lse.float()

    def _run(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self._kernel(q, k, v, **{self._lse_flag: True})[:2]
        return out, lse


@dataclasses.dataclass(frozen=True)
class _Flash:
    name: str
    module: str
    lse_flag: str
    min_capability: tuple[int, int]
    max_capability: tuple[int, int]


# In the order of preference: 3 is written for Hopper alone, 4 for Blackwell first.
_FLASH = (
    _Flash("fa3", "flash_attn_interface", "return_attn_probs", (9, 0), (9, 9)),
    _Flash("fa4", "flash_attn.cute.interface", "return_lse", (9, 0), (10, 9)),
)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """Pick the attention kernel and say why in one clause.

    Args:
        name: one of ``CHOICES["attention"]``.

    Raises:
        UnsupportedError: the named kernel cannot run here.
    """
    if name == "sdpa":
        backend, flaw = _sdpa(device, dtype)
        return backend, f"asked for{flaw and f'; {flaw}'}"
    reasons = []
    for flash in _FLASH:
        if name not in ("auto", flash.name):
            continue
        obstacle = _obstacle(flash, device, dtype)
        if obstacle is None:
            kernel = importlib.import_module(flash.module).flash_attn_func
            return FlashBackend(flash.name, kernel, flash.lse_flag), "asked for" if name != "auto" else "installed"
        reasons.append(f"{flash.name} {obstacle}")
    if name != "auto":
        raise UnsupportedError(f"The attention backend {reasons[0]}. Use --attention auto or sdpa.")
    backend, flaw = _sdpa(device, dtype)
    return backend, "; ".join([*reasons, flaw] if flaw else reasons)


# On Hopper cuDNN's kernel leads, and flash is the next best wherever cuDNN refuses a shape.
_CUDA_ORDER = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def _sdpa(device: torch.device, dtype: torch.dtype) -> tuple[SdpaBackend, str]:
    """PyTorch's attention, with cuDNN's kernel in front where that runs, and what is wrong with it elsewhere."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return SdpaBackend(), ""
    try:
        _try_cudnn(device, dtype)
    except RuntimeError as error:
        # What a build of cuDNN lacks shows when a kernel is made, past the checks by which PyTorch chooses.
        return SdpaBackend(_CUDA_ORDER[1:]), f"cuDNN's kernel does not run here ({str(error).partition(chr(10))[0]})"
    return SdpaBackend(_CUDA_ORDER), ""


def _try_cudnn(device: torch.device, dtype: torch.dtype) -> None:
    """Attend once with heads of both of the published widths; what has no kernel says so at the call."""
    for width in (64, 128):
        q, k = (torch.zeros((1, tokens, 2, width), dtype=dtype, device=device) for tokens in (48, 80))
        SdpaBackend(_CUDA_ORDER[:1]).attend(q, k, k)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _obstacle(flash: _Flash, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, this is {str(dtype).removeprefix('torch.')}"
    if not flash.min_capability <= _capability(device) <= flash.max_capability:
        return f"does not run on compute capability {'.'.join(map(str, _capability(device)))}"
    try:
        kernel = importlib.import_module(flash.module).flash_attn_func
    except ImportError:
        return f"is not installed ({flash.module})"
    except Exception as error:  # a build for another torch fails in ways of its own
        return f"does not load ({type(error).__name__})"
    if flash.lse_flag not in inspect.signature(kernel).parameters:
        return f"is too old (no {flash.lse_flag})"
    return None
