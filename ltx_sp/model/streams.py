"""A pair of tensors, one per stream: what samplers and guidance work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Streams:
    """Video and audio tokens ``[B, T, C]`` side by side; audio is None for video alone."""

    video: Tensor
    audio: Tensor | None

    def map(self, function: Callable[..., Tensor], *others: Streams) -> Streams:
        """Apply ``function`` to each stream, with the same stream of ``others`` as further arguments."""
        if self.audio is None:
            return Streams(function(self.video, *(other.video for other in others)), None)
        return Streams(
            function(self.video, *(other.video for other in others)),
            function(self.audio, *(other.audio for other in others)),
        )
