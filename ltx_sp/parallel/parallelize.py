"""The one place that exchanges the transformer's attentions for sequence-parallel ones."""

from __future__ import annotations

import dataclasses

from ltx_sp.model.attention import Attends, Backend, Beside, in_turn, local_attends
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.ulysses import ulysses, video_to_audio_gather, video_to_audio_partial


def parallelize(
    backend: Backend, axis: Axis, *, num_tokens: int, num_heads: int, video_to_audio: str, beside: Beside = in_turn
) -> Attends:
    """Make the attentions of a forward whose video tokens are sharded over ``axis``.

    On an axis of one rank they are the plain ones: there is nothing to exchange, and nothing to pack.

    Args:
        num_tokens: video tokens on all ranks together.
        video_to_audio: ``partial`` (merge by log-sum-exp) or ``gather`` (collect keys and values).
        beside: as ``Attends.beside``.
    """
    if axis.size == 1:
        return dataclasses.replace(local_attends(backend), beside=beside)
    return Attends(
        video_self=ulysses(backend.attend, axis, num_tokens=num_tokens, num_heads=num_heads),
        local=backend.attend,
        video_to_audio=video_to_audio_partial(backend, axis)
        if video_to_audio == "partial"
        else video_to_audio_gather(backend.attend, axis, num_tokens=num_tokens),
        beside=beside,
    )
