"""Latents -> Clip. Oracle: decoders that look at one latent cell only, so that tiles must give exactly what the whole
gives, wherever they are cut and however they are blended. Real decoders are compared in tests/parity."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from ltx_sp.decode import REFERENCE_TILING, Tiling, decode_frames, decode_waveform
from ltx_sp.errors import RequestError


class _Cellwise(nn.Module):
    """Repeats each latent cell over its 32 x 32 pixels and its frames: one for the first, eight for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, latent: Tensor) -> Tensor:
        self.calls.append(tuple(latent.shape[2:]))
        pixels = latent[:, :3].repeat_interleave(32, dim=3).repeat_interleave(32, dim=4)
        return torch.cat([pixels[:, :, :1], pixels[:, :, 1:].repeat_interleave(8, dim=2)], dim=2)


class _Vae(nn.Module):
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.decoder = _Cellwise()
        self.register_buffer("latents_mean", torch.linspace(-0.1, 0.1, 4))
        self.register_buffer("latents_std", torch.linspace(0.2, 0.4, 4))


def _whole(latent: Tensor, vae: _Vae) -> Tensor:
    shape = (1, -1, 1, 1, 1)
    pixels = _Cellwise()(latent * vae.latents_std.view(shape) + vae.latents_mean.view(shape))[0]
    frames: Tensor = ((pixels + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0)
    return frames


SIZES = [(1, 1, 1), (2, 3, 4), (5, 3, 3), (7, 3, 7), (16, 5, 4), (17, 2, 9)]
TILINGS = [
    None,
    REFERENCE_TILING,
    Tiling(side=96, overlap=32, frames=24, frame_overlap=8),
    Tiling(side=128, overlap=32, frames=40, frame_overlap=8),
    Tiling(side=768, overlap=64, frames=48, frame_overlap=16),
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_give_what_the_whole_gives(size: tuple[int, int, int], tiling: Tiling | None) -> None:
    vae, latent = _Vae(), torch.randn(1, 4, *size)
    chunks = list(decode_frames(latent, vae, tiling))
    frames = torch.cat(chunks)
    assert frames.shape == (8 * size[0] - 7, 32 * size[1], 32 * size[2], 3)
    assert frames.dtype == torch.float32
    assert frames.is_contiguous()
    torch.testing.assert_close(frames, _whole(latent, vae), rtol=0, atol=1e-6)
    if tiling is not None:
        limits = (tiling.frames // 8, tiling.side // 32, tiling.side // 32)
        assert all(cells <= limit for call in vae.decoder.calls for cells, limit in zip(call, limits, strict=True))


def test_one_tile_is_decoded_as_a_whole() -> None:
    vae, latent = _Vae(), torch.randn(1, 4, 3, 4, 4)
    (frames,) = decode_frames(latent, vae, Tiling(side=128, overlap=32, frames=24, frame_overlap=8))
    assert vae.decoder.calls == [(3, 4, 4)]
    assert torch.equal(frames, next(decode_frames(latent, vae, None)))


def test_frames_come_as_soon_as_they_are_final() -> None:
    """Three temporal tiles: each is decoded only when its turn comes, and only the shared frames wait."""
    vae, latent = _Vae(), torch.randn(1, 4, 7, 1, 1)
    chunks = decode_frames(latent, vae, Tiling(frames=24, frame_overlap=8))
    lengths = []
    for number, chunk in enumerate(chunks, 1):
        lengths.append(len(chunk))
        assert len(vae.decoder.calls) == number
    assert lengths == [16, 16, 17]


def test_every_length_is_covered_without_a_gap() -> None:
    """Weights of all tiles add up to 1 at every frame, row and column, for any length: a constant stays constant."""
    vae = _Vae()
    vae.latents_mean.zero_()
    vae.latents_std.fill_(0.5)
    tilings = [
        Tiling(side=32 * a, overlap=32 * b, frames=8 * a, frame_overlap=8 * b)
        for a, b in itertools.product(range(3, 13), range(1, 5))
        if a >= 3 * b
    ]
    for tiling in tilings:
        for length in range(1, 40):
            along_time = torch.cat(list(decode_frames(torch.ones(1, 4, length, 1, 1), vae, tiling)))
            assert along_time.shape[0] == 8 * length - 7
            assert (along_time - 0.75).abs().max() < 1e-6, (tiling, length)
        for length in (7, 11, 24, 39):
            (across,) = decode_frames(torch.ones(1, 4, 1, length, 2), vae, tiling)
            assert (across - 0.75).abs().max() < 1e-6, (tiling, length)


def test_a_tile_fades_in_from_nothing() -> None:
    """A tile's first frame stands for a whole latent frame, and was decoded without what came before: it must not show.

    Here a decoder that spoils the first frame of every piece; only the clip's own first frame may be spoilt.
    """

    class Spoils(_Cellwise):
        def forward(self, latent: Tensor) -> Tensor:
            pixels = super().forward(latent)
            pixels[:, :, 0] += 100.0
            return pixels

    vae, latent = _Vae(), torch.randn(1, 4, 9, 1, 1)
    expected = _whole(latent, vae)
    vae.decoder = Spoils()
    frames = torch.cat(list(decode_frames(latent, vae, Tiling(frames=24, frame_overlap=8))))
    assert len(vae.decoder.calls) > 2
    torch.testing.assert_close(frames[1:], expected[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [{"side": 100}, {"side": 64, "overlap": 32}, {"overlap": 0}, {"frames": 20}, {"frame_overlap": 4}, {"frames": 64}],
    ids=str,
)
def test_tilings_that_do_not_work_are_refused(keys: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="multiples of"):
        Tiling(**keys)


def test_sound_is_unnormalised_token_by_token() -> None:
    """Value v = 16 c + m of the statistics belongs to channel c, mel bin m, of every latent frame."""

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Identity()
            self.register_buffer("latents_mean", torch.randn(128))
            self.register_buffer("latents_std", torch.rand(128))

    vae, audio = Vae(), torch.randn(1, 8, 5, 16)
    waveform = decode_waveform(audio, vae, nn.Flatten(2))
    std, mean = vae.get_buffer("latents_std").view(8, 1, 16), vae.get_buffer("latents_mean").view(8, 1, 16)
    torch.testing.assert_close(waveform, (audio[0] * std + mean).flatten(1))
