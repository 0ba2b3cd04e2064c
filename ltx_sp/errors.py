"""The ways a run can end badly, one kind per exit code.

Every message is one sentence or two: what is so, what must be so, what to do.
"""

from __future__ import annotations

__all__ = [
    "LtxSpError",
    "PeerLostError",
    "PlanError",
    "RankMismatchError",
    "RequestError",
    "UnsupportedError",
    "WeightsError",
]


class LtxSpError(Exception):
    """Base of every error that ltx_sp raises on purpose."""

    exit_code = 1


class RequestError(LtxSpError, ValueError):
    """What the user asked for cannot be meant: no prompt, NaN guidance, an unwritable output."""

    exit_code = 2


class PlanError(LtxSpError, ValueError):
    """A sound request that this model or this number of ranks cannot carry out."""

    exit_code = 3


class WeightsError(LtxSpError, RuntimeError):
    """A checkpoint that is absent, damaged or not what it claims to be."""

    exit_code = 4


class RankMismatchError(LtxSpError, RuntimeError):
    """Ranks were started with different requests, code or weights."""

    exit_code = 5


class UnsupportedError(LtxSpError, NotImplementedError):
    """A published option, or a package or device that is not there, that ltx_sp does not implement."""

    exit_code = 6


class PeerLostError(LtxSpError, RuntimeError):
    """Another rank died or stopped answering."""

    exit_code = 7
