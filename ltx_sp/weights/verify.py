"""What a loaded module holds, in a few bytes: the same on every rank, or something went wrong on the way."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ltx_sp.errors import WeightsError

__all__ = ["digest", "require_finite"]

_CHUNK = 2**22


def digest(module: nn.Module) -> str:
    """Fingerprint the bits, names and dtypes of all parameters and persistent buffers. Blocks the host.

    Computed where the tensors are; the result does not depend on the device.
    """
    whole = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}\n".encode())
    return whole.hexdigest()[:32]


def require_finite(module: nn.Module, component: str) -> None:
    """Raise WeightsError where a floating tensor of the module holds NaN or infinity. Blocks the host."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            count = sum(int((~torch.isfinite(part)).sum()) for part in tensor.reshape(-1).split(_CHUNK))
            if count:
                raise WeightsError(
                    f"Parameter {name} of {component} holds {count} values that are not finite, of {tensor.numel()}; "
                    "weights must be finite. Fetch the checkpoint again."
                )


def _checksum(tensor: Tensor) -> list[int]:
    """Two sums over the tensor's words, modulo 2^64: of the words, and of the words times their places."""
    words = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    padded = -words.numel() % 4
    if padded or words.storage_offset() % 4:  # in a mapped file a tensor may begin anywhere
        words = torch.cat([words, words.new_zeros(padded)])
    plain = placed = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for i, part in enumerate(words.view(torch.int32).split(_CHUNK)):
        values = part.to(torch.int64)
        places = torch.arange(1 + i * _CHUNK, 1 + i * _CHUNK + values.numel(), device=tensor.device)
        plain, placed = plain + values.sum(), placed + (values * places).sum()
    return torch.stack([plain, placed]).tolist()
