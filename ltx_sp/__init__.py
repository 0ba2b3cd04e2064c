"""Sequence-parallel inference for the LTX-2 family: video with sound, exact on any number of GPUs."""

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
from ltx_sp.request import GuidanceRequest, Request, Settings

__all__ = [
    "GuidanceRequest",
    "LtxSpError",
    "PeerLostError",
    "Plan",
    "PlanError",
    "RankMismatchError",
    "Request",
    "RequestError",
    "Settings",
    "UnsupportedError",
    "WeightsError",
    "make_plan",
]
