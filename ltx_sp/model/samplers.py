"""Samplers: how the denoised prediction moves the latents from one noise level to the next.

A sampler turns noise levels into a schedule: for every step its kind and a row of numbers. Steps of one kind run the
same operations on the same shapes and differ in their rows alone, which the device reads: a captured step of a kind
serves all others of it. Everything is elementwise, so it runs on sharded latents as they are; noise is drawn for the
whole clip by whoever walks. Nothing here waits for the device.

Formulas: Euler and its ancestral form for rectified flow (k-diffusion, alpha = 1 - sigma); gradient estimation
(Permenter and Yuan 2023); res_2s, a second-order exponential Runge-Kutta method with c2 = 1/2 (Zhang et al. 2023,
"Improved order analysis and design of exponential integrator for diffusion models sampling").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ltx_sp.model.streams import Streams

Denoise = Callable[[Streams, Tensor], Streams]
"""``x, sigma -> x0``: the guided prediction of the clean latents, in x's type; sigma is 0-d float32."""

Keep = Callable[[Streams], Streams]
"""Puts back tokens that are given and not generated, after noise was added to all."""

State = tuple[Streams, ...]
"""What goes from step to step: first of all the latents."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What all steps of a kind have in common.

    Args:
        num_predictions: calls of the denoiser.
        num_noises: fresh draws that it takes.
    """

    name: str
    num_predictions: int = 1
    num_noises: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a walk: of each its kind, and its numbers."""

    kinds: tuple[Kind, ...]
    rows: tuple[tuple[float, ...], ...]


class Sampler(Protocol):
    """A way down the noise levels, in the latents' type."""

    def schedule(self, sigmas: Sequence[float]) -> Schedule:
        """Turn noise levels, falling, into steps."""
        ...

    def begin(self, x: Streams) -> State:
        """Give the state before the first step."""
        ...

    def step(
        self, kind: Kind, denoise: Denoise, state: State, row: Tensor, noises: Sequence[Streams], keep: Keep, /
    ) -> State:
        """Take one step. Capturable.

        Args:
            row: the step's numbers, float64 on the device.
            noises: fresh standard normal draws, of this rank's tokens.
        """
        ...


_STEP = Kind("step")
_LAST = Kind("last")


def _levels_and_steps(sigmas: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """``sigma, sigma' - sigma`` of every step, in float32 as the reference has them."""
    levels = torch.tensor(sigmas, dtype=torch.float32)
    return tuple(zip(levels[:-1].tolist(), levels.diff().tolist(), strict=True))


class Euler:
    """First order: ``x + (x - x0) / sigma * (sigma' - sigma)``."""

    def schedule(self, sigmas: Sequence[float]) -> Schedule:
        rows = _levels_and_steps(sigmas)
        return Schedule((_STEP,) * len(rows), rows)

    def begin(self, x: Streams) -> State:
        return (x,)

    def step(
        self, kind: Kind, denoise: Denoise, state: State, row: Tensor, noises: Sequence[Streams], keep: Keep, /
    ) -> State:
        sigma, dt = row.float()
        (x,) = state
        return (_advance(x, _velocity(x, denoise(x, sigma), sigma), dt),)


def _velocity(x: Streams, x0: Streams, sigma: Tensor) -> Streams:
    """``(x - x0) / sigma``, rounded to x's type as the reference does it."""
    return x.map(lambda x, x0: ((x.float() - x0.float()) / sigma).to(x.dtype), x0)


def _advance(x: Streams, velocity: Streams, dt: Tensor) -> Streams:
    return x.map(lambda x, v: (x.float() + v.float() * dt).to(x.dtype), velocity)


class EulerAncestral:
    """Euler to a lower level, then fresh noise up to the next one, so that all noise is new (eta = 1)."""

    _NOISY = Kind("step", num_noises=1)

    def schedule(self, sigmas: Sequence[float]) -> Schedule:
        kinds, rows = list[Kind](), list[tuple[float, ...]]()
        for sigma, sigma_next in pairwise(sigmas):
            if sigma_next == 0:
                kinds.append(_LAST)
                rows.append((sigma, 0.0, 0.0, 0.0, 0.0))
                break
            sigma_down = sigma_next * sigma_next / sigma
            ratio = sigma_down / sigma
            scale = (1 - sigma_next) / (1 - sigma_down)
            renoise = math.sqrt(max(sigma_next**2 - (sigma_down * scale) ** 2, 0.0))
            kinds.append(self._NOISY)
            rows.append((sigma, ratio, 1 - ratio, scale, renoise))
        return Schedule(tuple(kinds), tuple(rows))

    def begin(self, x: Streams) -> State:
        return (x,)

    def step(
        self, kind: Kind, denoise: Denoise, state: State, row: Tensor, noises: Sequence[Streams], keep: Keep, /
    ) -> State:
        sigma, ratio, rest, scale, renoise = row.float()
        (x,) = state
        x0 = denoise(x, sigma)
        if kind == _LAST:
            return (x0,)

        def move(x: Tensor, x0: Tensor, fresh: Tensor) -> Tensor:
            moved: Tensor = scale * (ratio * x.float() + rest * x0.float()) + renoise * fresh.float()
            return moved

        return (_in_type_of(x, keep(x.map(move, x0, *noises))),)


class GradientEstimation:
    """Euler along a velocity extrapolated from the last two: ``2 v - v_before`` (gamma = 2)."""

    _FIRST = Kind("first")

    def schedule(self, sigmas: Sequence[float]) -> Schedule:
        rows = _levels_and_steps(sigmas)
        kinds = [self._FIRST, *[_STEP] * (len(rows) - 1)]
        if sigmas[-1] == 0:
            kinds[-1] = _LAST
        return Schedule(tuple(kinds), rows)

    def begin(self, x: Streams) -> State:
        return (x, x.map(torch.zeros_like))

    def step(
        self, kind: Kind, denoise: Denoise, state: State, row: Tensor, noises: Sequence[Streams], keep: Keep, /
    ) -> State:
        sigma, dt = row.float()
        x, before = state
        x0 = denoise(x, sigma)
        if kind == _LAST:
            return (x0, before)
        velocity = _velocity(x, x0, sigma)
        along = velocity if kind == self._FIRST else velocity.map(lambda v, v_before: 2 * v - v_before, before)
        return (_advance(x, along, dt), velocity)


_SDE_ETA = 0.5
_SIGMA_BEFORE_ZERO = 0.0011
_ANCHOR_ITERATIONS = 100


class Res2s:
    """Second order with fresh noise at each half step and step, in float64; two denoisings per step."""

    _PLAIN = Kind("step", num_predictions=2, num_noises=2)
    _SETTLING = Kind("settling step", num_predictions=2, num_noises=2)

    def schedule(self, sigmas: Sequence[float]) -> Schedule:
        ends_clean = sigmas[-1] == 0
        levels = [*sigmas[:-1], _SIGMA_BEFORE_ZERO] if ends_clean else list(sigmas)
        kinds, rows = list[Kind](), list[tuple[float, ...]]()
        for sigma, sigma_next in pairwise(levels):
            h = math.log(sigma / sigma_next)
            half_step = h * 0.5 * _phi1(-h / 2)
            b2 = 2 * _phi2(-h)
            b1 = _phi1(-h) - b2
            sigma_half = math.sqrt(sigma * sigma_next)
            # The anchor is moved to where the half step would have come from without its noise. The fixed-point
            # iteration ``a <- half - half_step (x0 - a)`` is a geometric series; this is its sum.
            rest = half_step**_ANCHOR_ITERATIONS
            gain = (1 - rest) / (1 - half_step)
            kinds.append(self._SETTLING if h < 0.5 and sigma > 0.03 else self._PLAIN)
            to_half, to_next = _renoising(sigma, sigma_half), _renoising(sigma, sigma_next)
            rows.append((sigma, sigma_half, half_step, h * b1, h * b2, gain, rest, *to_half, *to_next))
        if ends_clean:
            kinds.append(_LAST)
            rows.append((_SIGMA_BEFORE_ZERO, *[0.0] * 12))
        return Schedule(tuple(kinds), tuple(rows))

    def begin(self, x: Streams) -> State:
        return (x,)

    def step(
        self, kind: Kind, denoise: Denoise, state: State, row: Tensor, noises: Sequence[Streams], keep: Keep, /
    ) -> State:
        (x,) = state
        sigma, sigma_half, half_step, step1, step2, gain, rest = row[:7].unbind()
        x0 = denoise(x, sigma.float())
        if kind == _LAST:
            return (x0,)
        at_half_step, at_step = noises
        anchor, x0 = x.map(torch.Tensor.double), x0.map(torch.Tensor.double)
        half = anchor.map(lambda a, d: a + half_step * (d - a), x0)
        half = keep(_renoise(anchor, half, at_half_step, row[7:10]))
        if kind == self._SETTLING:
            anchor = anchor.map(lambda a, m, d: gain * (m - half_step * d) + rest * a, half, x0)
        x0_half = denoise(_in_type_of(x, half), sigma_half.float()).map(torch.Tensor.double)
        moved = anchor.map(lambda a, d1, d2: a + (step1 * (d1 - a) + step2 * (d2 - a)), x0, x0_half)
        return (_in_type_of(x, keep(_renoise(anchor, moved, at_step, row[10:13]))),)


def _renoising(sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """The factors of ``_renoise``."""
    up = sigma_next * _SDE_ETA
    residual = math.sqrt(sigma_next**2 - up**2)
    scale = 1 - sigma_next + residual
    down = residual / scale
    # Of eps = (x - moved) / (sigma - sigma_next), the step's direction.
    return scale, scale * (down - sigma) / (sigma - sigma_next), up


def _renoise(x: Streams, moved: Streams, fresh: Streams, factors_3: Tensor) -> Streams:
    """Replace part of the noise left in ``moved`` by fresh noise, keeping the variance (eta = 1/2)."""
    scale, along, up = factors_3.unbind()
    return x.map(lambda x, moved, fresh: scale * x + along * (x - moved) + up * fresh, moved, fresh)


def _in_type_of(x: Streams, moved: Streams) -> Streams:
    return moved.map(lambda moved, x: moved.to(x.dtype), x)


def _phi1(z: float) -> float:
    return math.expm1(z) / z if abs(z) > 1e-10 else 1.0


def _phi2(z: float) -> float:
    return (math.exp(z) - 1 - z) / z**2 if abs(z) > 1e-10 else 0.5


def normalise_noise(noise_1TC: Tensor) -> Tensor:
    """Bring a whole draw to mean 0 and deviation 1 exactly, as res_2s wants it, float64."""
    centred = (noise_1TC - noise_1TC.mean()) / noise_1TC.std()
    mean, std = centred.mean(dim=(-2, -1), keepdim=True), centred.std(dim=(-2, -1), keepdim=True)
    return (centred - mean) / std
