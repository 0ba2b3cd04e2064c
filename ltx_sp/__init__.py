"""Sequence-parallel inference for the LTX-2 family: video with sound, exact on any number of GPUs.

``Runtime``, ``Result`` and ``write_clip`` are imported when they are first asked for: planning needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ltx_sp.errors import (
    LtxSpError,
    PeerLostError,
    PlanError,
    RankMismatchError,
    RequestError,
    UnsupportedError,
    WeightsError,
)
from ltx_sp.plan import Plan, make_plan
from ltx_sp.request import GuidanceRequest, Image, Lora, Request, Settings

if TYPE_CHECKING:
    from ltx_sp.handoff import Result
    from ltx_sp.runtime import Runtime
    from ltx_sp.write import write_clip

__all__ = [
    "GuidanceRequest",
    "Image",
    "Lora",
    "LtxSpError",
    "PeerLostError",
    "Plan",
    "PlanError",
    "RankMismatchError",
    "Request",
    "RequestError",
    "Result",
    "Runtime",
    "Settings",
    "UnsupportedError",
    "WeightsError",
    "make_plan",
    "write_clip",
]

_LAZY = {"Runtime": "ltx_sp.runtime", "Result": "ltx_sp.handoff", "write_clip": "ltx_sp.write"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
