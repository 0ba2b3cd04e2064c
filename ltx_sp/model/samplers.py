"""Samplers: how the denoised prediction moves the latents from one noise level to the next.

All of them are elementwise, so they run on sharded latents as they are; noise comes from a callable that draws
it for the whole clip. Noise levels are host numbers; nothing here waits for the device.

Formulas: Euler and its ancestral form for rectified flow (k-diffusion, alpha = 1 - sigma); gradient estimation
(Permenter and Yuan 2023); res_2s, a second-order exponential Runge-Kutta method with c2 = 1/2 (Zhang et al. 2023,
"Improved order analysis and design of exponential integrator for diffusion models sampling").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ltx_sp.model.streams import Streams

Denoise = Callable[[Streams, float], Streams]
"""``x, sigma -> x0``: the guided prediction of the clean latents, in x's type."""

Noise = Callable[[], Streams]
"""The next standard normal draw, of this rank's tokens."""


class Sampler(Protocol):
    """Denoise ``x`` from ``sigmas[0]`` down to ``sigmas[-1]``, in x's type."""

    def __call__(self, denoise: Denoise, x: Streams, sigmas: Sequence[float], noise: Noise, /) -> Streams: ...


def euler(denoise: Denoise, x: Streams, sigmas: Sequence[float], noise: Noise, /) -> Streams:
    """First order: ``x + (x - x0) / sigma * (sigma' - sigma)``."""
    for sigma, sigma_next in pairwise(sigmas):
        velocity = _velocity(x, denoise(x, sigma), sigma)
        x = _advance(x, velocity, sigma_next - sigma)
    return x


def _velocity(x: Streams, x0: Streams, sigma: float) -> Streams:
    """``(x - x0) / sigma``, rounded to x's type as the reference does."""
    return x.map(lambda x, x0: ((x.float() - x0.float()) / sigma).to(x.dtype), x0)


def _advance(x: Streams, velocity: Streams, dt: float) -> Streams:
    return x.map(lambda x, v: (x.float() + v.float() * dt).to(x.dtype), velocity)


def euler_ancestral(denoise: Denoise, x: Streams, sigmas: Sequence[float], noise: Noise, /) -> Streams:
    """Euler to a lower level, then fresh noise up to the next one, so that all noise is new (eta = 1)."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            return x0
        sigma_down = sigma_next * sigma_next / sigma
        ratio = sigma_down / sigma
        scale = (1 - sigma_next) / (1 - sigma_down)
        renoise = math.sqrt(max(sigma_next**2 - (sigma_down * scale) ** 2, 0.0))

        def step(
            x: Tensor, x0: Tensor, fresh: Tensor, ratio: float = ratio, scale: float = scale, renoise: float = renoise
        ) -> Tensor:
            moved = ratio * x.float() + (1 - ratio) * x0.float()
            return (scale * moved + renoise * fresh.float()).to(x.dtype)

        x = x.map(step, x0, noise())
    return x


def gradient_estimation(denoise: Denoise, x: Streams, sigmas: Sequence[float], noise: Noise, /) -> Streams:
    """Euler along a velocity extrapolated from the last two: ``2 v - v_before`` (gamma = 2)."""
    before: Streams | None = None
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            return x0
        velocity = _velocity(x, x0, sigma)
        along = velocity if before is None else velocity.map(lambda v, v_before: 2 * v - v_before, before)
        x = _advance(x, along, sigma_next - sigma)
        before = velocity
    return x


_SDE_ETA = 0.5
_SIGMA_BEFORE_ZERO = 0.0011
_ANCHOR_ITERATIONS = 100


class Res2s:
    """Second order with fresh noise at each half step and step, in float64; two denoisings per step.

    Args:
        substep_noise: drawn at the half steps, from a generator of its own.
    """

    def __init__(self, substep_noise: Noise):
        self._substep_noise = substep_noise

    def __call__(self, denoise: Denoise, x: Streams, sigmas: Sequence[float], noise: Noise, /) -> Streams:
        ends_clean = sigmas[-1] == 0
        levels = [*sigmas[:-1], _SIGMA_BEFORE_ZERO] if ends_clean else list(sigmas)
        for sigma, sigma_next in pairwise(levels):
            x = self._step(denoise, x, sigma, sigma_next, noise)
        if ends_clean:
            x = denoise(x, _SIGMA_BEFORE_ZERO)
        return x

    def _step(self, denoise: Denoise, x: Streams, sigma: float, sigma_next: float, noise: Noise) -> Streams:
        h = math.log(sigma / sigma_next)
        a21 = 0.5 * _phi1(-h / 2)
        b2 = 2 * _phi2(-h)
        b1 = _phi1(-h) - b2
        sigma_half = math.sqrt(sigma * sigma_next)

        anchor = x.map(torch.Tensor.double)
        x0 = denoise(x, sigma).map(torch.Tensor.double)
        half = anchor.map(lambda a, d: a + h * a21 * (d - a), x0)
        half = _renoise(anchor, half, self._substep_noise(), sigma, sigma_half)
        if h < 0.5 and sigma > 0.03:
            anchor = _settle(anchor, half, x0, h * a21)

        x0_half = denoise(half.map(lambda m, x: m.to(x.dtype), x), sigma_half).map(torch.Tensor.double)
        moved = anchor.map(lambda a, d1, d2: a + h * (b1 * (d1 - a) + b2 * (d2 - a)), x0, x0_half)
        moved = _renoise(anchor, moved, noise(), sigma, sigma_next)
        return moved.map(lambda m, x: m.to(x.dtype), x)


def _settle(anchor: Streams, half: Streams, x0: Streams, step: float) -> Streams:
    """Move the anchor to where the half step would have come from without its noise.

    The fixed-point iteration ``a <- half - step (x0 - a)`` is a geometric series; this is its sum.
    """
    rest = step**_ANCHOR_ITERATIONS
    gain = (1 - rest) / (1 - step)
    return anchor.map(lambda a, m, d: gain * (m - step * d) + rest * a, half, x0)


def _renoise(x: Streams, moved: Streams, fresh: Streams, sigma: float, sigma_next: float) -> Streams:
    """Replace part of the noise left in ``moved`` by fresh noise, keeping the variance (eta = 1/2)."""
    up = sigma_next * _SDE_ETA
    residual = math.sqrt(sigma_next**2 - up**2)
    scale = 1 - sigma_next + residual
    down = residual / scale

    def step(x: Tensor, moved: Tensor, fresh: Tensor) -> Tensor:
        eps = (x - moved) / (sigma - sigma_next)
        return scale * (x - sigma * eps + down * eps) + up * fresh

    return x.map(step, moved, fresh)


def _phi1(z: float) -> float:
    return math.expm1(z) / z if abs(z) > 1e-10 else 1.0


def _phi2(z: float) -> float:
    return (math.exp(z) - 1 - z) / z**2 if abs(z) > 1e-10 else 0.5


def normalise_noise(noise_1TC: Tensor) -> Tensor:
    """Bring a whole draw to mean 0 and deviation 1 exactly, as res_2s wants it, float64."""
    centred = (noise_1TC - noise_1TC.mean()) / noise_1TC.std()
    mean, std = centred.mean(dim=(-2, -1), keepdim=True), centred.std(dim=(-2, -1), keepdim=True)
    return (centred - mean) / std
