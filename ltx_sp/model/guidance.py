"""Guidance: several predictions of the clean latents combined into one, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ltx_sp.recipes import CONDITIONAL, ISOLATED, PERTURBED, UNCONDITIONAL, Guidance


def guide(predictions: Mapping[str, Tensor], guidance: Guidance, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Combine one stream's passes: ``c + (cfg - 1)(c - u) + stg (c - p) + (mod - 1)(c - m)``, then rescale.

    Rescaling pulls the standard deviation over the whole stream back to the conditional prediction's (Lin et al.
    2023, section 3.4): ``x (r std(c) / std(x) + 1 - r)``. Capturable. Collective where ``total`` is and r is not 0.

    Args:
        predictions: x0 by pass name, ``[1, s, C]``; passes that did not run may be absent.
        total: adds float64 moments over the ranks that share the stream; the identity where it is not sharded.
    """
    conditional = predictions[CONDITIONAL].float()
    guided = conditional
    for name, weight in (
        (UNCONDITIONAL, guidance.cfg_scale - 1),
        (PERTURBED, guidance.stg_scale),
        (ISOLATED, guidance.modality_scale - 1),
    ):
        if weight != 0:
            guided = guided + weight * (conditional - predictions[name])
    if guidance.rescale_scale == 0 or guided is conditional:
        return guided
    variance_c, variance_g = _variances(total(torch.cat([_moments(conditional), _moments(guided)])))
    # A constant prediction has no spread to pull back, and 0 / 0 would spoil what is kept of it.
    ratio = torch.where(variance_g > 0, variance_c / variance_g, 1.0).sqrt().float()
    return guided * (guidance.rescale_scale * ratio + (1 - guidance.rescale_scale))


def _moments(x: Tensor) -> Tensor:
    """Count, sum and sum of squares in float64, which adds up to the same variance however x is cut."""
    x = x.double()
    return torch.stack([x.new_full((), x.numel()), x.sum(), x.square().sum()])


def _variances(moments_6: Tensor) -> tuple[Tensor, Tensor]:
    count, sums, squares = moments_6.view(2, 3).unbind(1)
    first, second = (squares / count - (sums / count).square()).unbind(0)
    return first, second
