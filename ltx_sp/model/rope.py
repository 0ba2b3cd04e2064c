"""Positions to rotations: split RoPE with frequencies computed in float64.

Shapes: B batch, T tokens, H heads, K head width, k = K / 2, N position axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every token's angles, per head: ``cos_BTHk``, ``sin_BTHk``."""

    cos_BTHk: Tensor
    sin_BTHk: Tensor

    def narrow(self, start: int, length: int) -> Rotation:
        """The rotations of tokens ``start`` to ``start + length``, in memory of their own."""
        return Rotation(
            self.cos_BTHk.narrow(1, start, length).contiguous(),
            self.sin_BTHk.narrow(1, start, length).contiguous(),
        )


def make_rotation(
    positions_BNT2: Tensor, *, width: int, num_heads: int, max_pos: Sequence[float], theta: float, dtype: torch.dtype
) -> Rotation:
    """Turn token extents into rotations, rounded to ``dtype`` at the end.

    The midpoint of each extent is scaled by ``max_pos`` to p in 0..1 and gives the angles ``f_i (2p - 1)``,
    with ``f_i = theta ** linspace(0, 1, n)_i * pi / 2`` and ``n = width // 2N``; the axes alternate within a
    frequency. Channels that N does not divide are padded in front with the identity.

    Args:
        positions_BNT2: (start, end) of each token on each axis: seconds, then pixels.
        width: inner width of the attention, all heads together.
        max_pos: extent per axis.
    """
    num_axes = positions_BNT2.shape[1]
    num_frequencies = width // (2 * num_axes)
    exponents = torch.linspace(0.0, 1.0, num_frequencies, dtype=torch.float64, device=positions_BNT2.device)
    frequencies = (torch.pow(theta, exponents) * (math.pi / 2)).float()

    extent = torch.tensor(max_pos, dtype=torch.float32, device=positions_BNT2.device)
    fraction_BTN = positions_BNT2.float().mean(dim=-1).transpose(1, 2) / extent
    angles = rearrange((fraction_BTN * 2 - 1).unsqueeze(-2) * frequencies[:, None], "b t f n -> b t (f n)")

    padding = width // 2 - angles.shape[-1]
    cos = torch.nn.functional.pad(angles.cos(), (padding, 0), value=1.0)
    sin = torch.nn.functional.pad(angles.sin(), (padding, 0), value=0.0)
    return Rotation(
        rearrange(cos, "b t (h k) -> b t h k", h=num_heads).to(dtype).contiguous(),
        rearrange(sin, "b t (h k) -> b t h k", h=num_heads).to(dtype).contiguous(),
    )


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first half of each head against its second half, in x's own type. Capturable."""
    halves = x_BTHK.unflatten(-1, (2, -1))
    rotated = halves * rotation.cos_BTHk.unsqueeze(-2)
    # Written into the product's own memory: three passes instead of seven, and 0.4 of the time on a CPU.
    rotated[..., 0, :].addcmul_(halves[..., 1, :], rotation.sin_BTHk, value=-1)
    rotated[..., 1, :].addcmul_(halves[..., 0, :], rotation.sin_BTHk)
    flat: Tensor = rotated.flatten(-2)
    return flat
