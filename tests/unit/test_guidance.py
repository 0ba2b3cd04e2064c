"""Oracle: the formula, written out with torch's own std."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltx_sp.model.guidance import guide
from ltx_sp.recipes import CONDITIONAL, ISOLATED, PERTURBED, UNCONDITIONAL, Guidance

FULL = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale_scale=0.7, stg_blocks=(1,), modality_scale=2.0)


def _predictions() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = (CONDITIONAL, UNCONDITIONAL, PERTURBED, ISOLATED)
    return {name: torch.randn((1, 12, 8), generator=generator) for name in names}


def _expected(predictions: dict[str, Tensor]) -> Tensor:
    c, u, p, m = predictions.values()
    guided = c + 2 * (c - u) + 1 * (c - p) + 1 * (c - m)
    return guided * (0.7 * c.std() / guided.std() + 0.3)


def test_all_passes_and_rescaling() -> None:
    predictions = _predictions()
    torch.testing.assert_close(guide(predictions, FULL, lambda moments: moments), _expected(predictions))


def test_moments_of_shards_add_up_to_those_of_the_whole() -> None:
    predictions = _predictions()
    parts = [{name: x[:, a:b] for name, x in predictions.items()} for a, b in ((0, 5), (5, 12))]
    moments: list[Tensor] = []

    def collect(own: Tensor) -> Tensor:
        moments.append(own)
        return own

    for part in parts:
        guide(part, FULL, collect)
    total = sum(moments[1:], moments[0])
    whole = torch.cat([guide(part, FULL, lambda own: total) for part in parts], dim=1)
    torch.testing.assert_close(whole, _expected(predictions))


def test_unguided_is_the_conditional_prediction_and_asks_for_no_moments() -> None:
    def fail(moments: Tensor) -> Tensor:
        raise AssertionError("no exchange is needed")

    predictions = _predictions()
    assert torch.equal(guide(predictions, Guidance(rescale_scale=0.7), fail), predictions[CONDITIONAL])


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_constant_prediction_stays_finite(value: float) -> None:
    """A given stream of silence: every pass predicts the same constant."""
    predictions = {name: torch.full((1, 4, 8), value) for name in (CONDITIONAL, UNCONDITIONAL, PERTURBED, ISOLATED)}
    assert torch.equal(guide(predictions, FULL, lambda moments: moments), predictions[CONDITIONAL])
