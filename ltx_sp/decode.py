"""Latents -> Clip: the video VAE's frames, tile by tile, and the audio VAE's and vocoder's waveform.

F, H, W latent frames, rows and columns; T, Y, X the same in pixels; A audio latent frames.
A latent row is 32 pixels. Latent frame 0 is one frame, each later one eight: latent frames a to b - 1
decode to the frames 8a to 8(b - 1), of which the first stands for the whole of latent frame a.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn

from ltx_sp.errors import RequestError
from ltx_sp.handoff import Clip, Given, Latents
from ltx_sp.model.upstream import output_sampling_rate
from ltx_sp.spec import SPATIAL_SCALE, TEMPORAL_SCALE


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The largest piece of a clip that the video VAE decodes at once.

    Args:
        side, overlap: of a tile, in pixels, both ways.
        frames, frame_overlap: the same in time.
    """

    side: int = 768
    overlap: int = 64
    frames: int = 80
    frame_overlap: int = 24

    def __post_init__(self) -> None:
        for tile, overlap, scale in (
            (self.side, self.overlap, SPATIAL_SCALE),
            (self.frames, self.frame_overlap, TEMPORAL_SCALE),
        ):
            if tile % scale or overlap % scale or overlap < scale or tile < 3 * overlap:
                raise RequestError(
                    f"A tile of {tile} with {overlap} overlap does not work: both must be multiples of {scale}, "
                    "the overlap at least that, and the tile at least three times the overlap."
                )


REFERENCE_TILING = Tiling()
NOTHING_GIVEN = Given()


def decode(
    latents: Latents,
    *,
    video_vae: nn.Module,
    audio_vae: nn.Module,
    vocoder: nn.Module,
    frame_rate: float,
    tiling: Tiling | None = REFERENCE_TILING,
    given: Given = NOTHING_GIVEN,
) -> Clip:
    """Decode the waveform now, and the frames as the clip is iterated.

    Blocks the host.

    Args:
        latents: normalised, on the modules' device.
        vocoder: in float32.
        tiling: None decodes the whole clip at once.
        given: takes the place of what would be decoded.
    """
    _, _, num_latents, rows, columns = latents.video.shape
    waveform, sample_rate = given.waveform, given.sample_rate
    if waveform is None:
        waveform = decode_waveform(latents.audio, audio_vae, vocoder)
        sample_rate = output_sampling_rate(vocoder)
    frames = decode_frames(latents.video, video_vae, tiling) if given.frames is None else iter([given.frames])
    return Clip(
        frames=frames,
        num_frames=TEMPORAL_SCALE * (num_latents - 1) + 1,
        height=rows * SPATIAL_SCALE,
        width=columns * SPATIAL_SCALE,
        frame_rate=frame_rate,
        waveform=waveform,
        sample_rate=sample_rate,
    )


def decode_waveform(audio: Tensor, audio_vae: nn.Module, vocoder: nn.Module) -> Tensor:
    """Decode normalised audio latents ``[1, 8, A, 16]`` -> ``[2, samples]``, float32 on the host.

    Blocks the host.
    """
    mean, std = audio_vae.get_buffer("latents_mean"), audio_vae.get_buffer("latents_std")
    channels = audio.shape[1]
    with torch.no_grad():
        # The statistics are those of a token: channel-major over the 8 x 16 values of one latent frame.
        tokens = rearrange(audio.float(), "b c a m -> b a (c m)") * std.float() + mean.float()
        latent = rearrange(tokens, "b a (c m) -> b c a m", c=channels)
        mel = audio_vae.get_submodule("decoder")(latent.to(mean.dtype))
        waveform: Tensor = vocoder(mel.float())[0]
    return waveform.float().cpu()


def decode_frames(video: Tensor, video_vae: nn.Module, tiling: Tiling | None = REFERENCE_TILING) -> Iterator[Tensor]:
    """Decode normalised video latents ``[1, 128, F, H, W]`` to chunks ``[n, Y, X, 3]``, float32 in 0..1 on the host.

    Blocks the host, once per chunk. A chunk is yielded as soon as no later tile reaches into it; beside the
    tile that is being decoded, only the frames that it shares with the next one are kept.
    """
    mean, std = video_vae.get_buffer("latents_mean"), video_vae.get_buffer("latents_std")
    shape = (1, -1, 1, 1, 1)
    latent = (video.float() * std.float().view(shape) + mean.float().view(shape)).to(mean.dtype)
    _, _, num_latents, rows, columns = video.shape
    if tiling is None:
        tiling = Tiling(side=2**30, frames=2**30)
    spans = _spans(num_latents, tiling.frames // TEMPORAL_SCALE, tiling.frame_overlap // TEMPORAL_SCALE)
    side, overlap = tiling.side // SPATIAL_SCALE, tiling.overlap // SPATIAL_SCALE
    row_spans, column_spans = _spans(rows, side, overlap), _spans(columns, side, overlap)
    extents = [(TEMPORAL_SCALE * start, TEMPORAL_SCALE * (stop - 1) + 1) for start, stop in spans]
    # A tile's first frame was decoded as if the clip began there: it weighs nothing beside its neighbour's.
    windows = _windows(extents, phase=0.0, device=video.device)
    shared: Tensor | None = None
    for place, (start, stop) in enumerate(spans):
        slab_3TYX = _decode_slab(latent[:, :, start:stop], video_vae, row_spans, column_spans)
        if len(spans) > 1:
            slab_3TYX *= windows[place][:, None, None]
        if shared is not None:
            slab_3TYX[:, : shared.shape[1]] += shared
        done = extents[place + 1][0] - extents[place][0] if place + 1 < len(spans) else slab_3TYX.shape[1]
        shared = slab_3TYX[:, done:].clone()
        yield _to_frames(slab_3TYX[:, :done])


def _decode_slab(
    latent: Tensor, video_vae: nn.Module, row_spans: list[tuple[int, int]], column_spans: list[tuple[int, int]]
) -> Tensor:
    """Decode all rows and columns of one temporal tile: ``[3, T, Y, X]``, float32, not yet clamped."""
    decoder = video_vae.get_submodule("decoder")
    with torch.no_grad():
        if len(row_spans) == len(column_spans) == 1:
            whole: Tensor = decoder(latent)[0].float()
            return whole
        rows, columns = (
            [(SPATIAL_SCALE * start, SPATIAL_SCALE * stop) for start, stop in spans]
            for spans in (row_spans, column_spans)
        )
        row_windows = _windows(rows, phase=0.5, device=latent.device)
        column_windows = _windows(columns, phase=0.5, device=latent.device)
        num_frames = TEMPORAL_SCALE * (latent.shape[2] - 1) + 1
        slab = torch.zeros(3, num_frames, rows[-1][1], columns[-1][1], device=latent.device)
        for (top, bottom), (y0, y1), row_window in zip(row_spans, rows, row_windows, strict=True):
            for (left, right), (x0, x1), column_window in zip(column_spans, columns, column_windows, strict=True):
                tile = decoder(latent[..., top:bottom, left:right])[0].float()
                slab[..., y0:y1, x0:x1] += tile * row_window[:, None] * column_window
    return slab


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Cover ``length`` cells with the fewest tiles of at most ``tile``, all of one size and evenly spread.

    Neighbours share at least ``overlap`` cells. Equal tiles cost less than full ones with a sliver at the end.
    """
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    size = math.ceil((length + (count - 1) * overlap) / count)
    starts = [round(place * (length - size) / (count - 1)) for place in range(count)]
    return [(start, start + size) for start in starts]


def _windows(extents: list[tuple[int, int]], *, phase: float, device: torch.device) -> list[Tensor]:
    """Weigh the tiles ``[start, stop)`` of one axis by trapezoids that add up to 1 everywhere.

    Args:
        phase: where in the ramp a tile's first pixel lies: 0.0 gives it no weight, 0.5 makes the ramps of two
            neighbours mirror images.
    """
    ramps = []
    for (_, stop), (start, _) in itertools.pairwise(extents):
        shared = stop - start
        ramps.append((torch.arange(shared, device=device, dtype=torch.float32) + phase) / shared)
    windows = []
    for place, (start, stop) in enumerate(extents):
        window = torch.ones(stop - start, device=device)
        if place > 0:
            window[: len(ramps[place - 1])] = ramps[place - 1]
        if place < len(ramps):
            window[len(window) - len(ramps[place]) :] = 1.0 - ramps[place]
        windows.append(window)
    return windows


def _to_frames(slab_3TYX: Tensor) -> Tensor:
    """Map the decoder's -1..1 to 0..1, channels last, on the host."""
    return rearrange((slab_3TYX + 1.0).mul_(0.5).clamp_(0.0, 1.0), "c t y x -> t y x c").contiguous().cpu()
