"""What is given -> what the transformer takes: prompts to text contexts, pictures, videos and sound to latents.

C text tokens, always ``TEXT_TOKENS``; D and E the context widths of video and audio; F, H, W latent frames, rows and
columns; A audio latent frames.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ltx_sp.errors import WeightsError
from ltx_sp.handoff import TextContext
from ltx_sp.spec import (
    AUDIO_LATENT_CHANNELS,
    AUDIO_LATENT_SCALE,
    LATENT_CHANNELS,
    SPATIAL_SCALE,
    TEMPORAL_SCALE,
    TEXT_TOKENS,
)

_log = logging.getLogger(__name__)

# What is larger than this many latent cells is encoded in pieces of at most so many cells along each axis, of which
# those next to a cut are not used: in time, which is causal, these after it, in space those on both sides. Beyond them
# a cut is hardly seen. A piece is 185 frames of 768 x 768, a picture of 14 megapixels is still whole.
_PIECE, _TIME_REACH, _SPACE_REACH = 24, 12, 6
_WHOLE = _PIECE**3

_STFT_SAMPLES = 1024  # in every published model; diffusers' configuration does not say
_SILENCE = 1e-5


def encode_prompts(
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    text_encoder: nn.Module,
    connectors: nn.Module,
    device: torch.device,
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> list[TextContext]:
    """Encode each prompt for both streams, in the connectors' dtype, on ``device``.

    Blocks the host. One prompt at a time: the states of all 49 layers of one prompt are 0.4 GB in bf16.

    Args:
        tokenizer, text_encoder, connectors: as ``model.upstream`` builds them, the modules loaded on ``device``.
        phase: measures what happens within it, under a name.
    """
    contexts = []
    for prompt in prompts:
        with phase("encode text"), torch.no_grad():
            ids_1C, mask_1C = (ids.to(device) for ids in tokenize(prompt, tokenizer))
            output = text_encoder(input_ids=ids_1C, attention_mask=mask_1C, output_hidden_states=True)
            # Hidden-major: the projection's columns run through the layers of one channel first.
            states = torch.stack(output.hidden_states, dim=-1)
            del output
        with phase("connectors"), torch.no_grad():
            video_1CD, audio_1CE, _ = connectors(states, mask_1C, padding_side="left")
        contexts.append(TextContext(video=video_1CD, audio=audio_1CE))
    return contexts


def tokenize(prompt: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokenise one prompt: ids and mask, both ``[1, C]`` int64 on the host, padded on the left.

    The text is stripped and starts with BOS. What does not fit is cut at its end, with a warning.
    """
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    if bos is None or pad is None:
        raise WeightsError(
            "The Gemma folder's tokenizer has no <bos> or no <pad> token. Fetch tokenizer.json and "
            "tokenizer_config.json again."
        )
    ids = list(tokenizer(prompt.strip(), add_special_tokens=True, verbose=False)["input_ids"])
    if ids[:1] != [bos]:
        ids.insert(0, bos)
    if len(ids) > TEXT_TOKENS:
        _log.warning(
            "The prompt has %d tokens; the text encoder takes %d: the last %d are cut.",
            len(ids),
            TEXT_TOKENS,
            len(ids) - TEXT_TOKENS,
        )
        ids = ids[:TEXT_TOKENS]
    padding = TEXT_TOKENS - len(ids)
    ids_1C = torch.tensor([[pad] * padding + ids], dtype=torch.int64)
    mask_1C = torch.tensor([[0] * padding + [1] * len(ids)], dtype=torch.int64)
    return ids_1C, mask_1C


def encode_video(pixels: Tensor, *, video_vae: nn.Module) -> Tensor:
    """Encode frames, or a picture: ``[1, 3, 8 (F - 1) + 1, 32 H, 32 W]`` in -1..1 -> normalised ``[1, 128, F, H, W]``.

    The latents are on the VAE's device, in its dtype. What is large is encoded in pieces, each with enough
    around it that where it was cut hardly shows; only one piece's pixels are on the device at a time.
    """
    mean, std = video_vae.get_buffer("latents_mean"), video_vae.get_buffer("latents_std")
    encoder = video_vae.get_submodule("encoder")
    cells = (
        (pixels.shape[2] - 1) // TEMPORAL_SCALE + 1,
        pixels.shape[3] // SPATIAL_SCALE,
        pixels.shape[4] // SPATIAL_SCALE,
    )
    if math.prod(cells) <= _WHOLE:
        pieces = [[(0, length, 0, length)] for length in cells]
    else:
        pieces = [
            _pieces(cells[0], _TIME_REACH, 0),
            *(_pieces(length, _SPACE_REACH, _SPACE_REACH) for length in cells[1:]),
        ]
    latent = torch.empty(1, LATENT_CHANNELS, *cells, device=mean.device)
    for time, row, column in itertools.product(*pieces):
        frames = slice(TEMPORAL_SCALE * time[0], TEMPORAL_SCALE * (time[1] - 1) + 1)
        rows, columns = (slice(SPATIAL_SCALE * start, SPATIAL_SCALE * stop) for start, stop, _, _ in (row, column))
        with torch.no_grad():
            encoded = encoder(pixels[:, :, frames, rows, columns].to(mean.device, mean.dtype))
        # Means, then logarithms of variances.
        means = encoded[:, :LATENT_CHANNELS]
        used = [slice(first - start, last - start) for start, _, first, last in (time, row, column)]
        kept = [slice(first, last) for _, _, first, last in (time, row, column)]
        latent[:, :, kept[0], kept[1], kept[2]] = means[:, :, used[0], used[1], used[2]].float()
    shape = (1, -1, 1, 1, 1)
    return ((latent - mean.float().view(shape)) / std.float().view(shape)).to(mean.dtype)


def _pieces(length: int, before: int, after: int) -> list[tuple[int, int, int, int]]:
    """Cover an axis with pieces ``start, stop`` of at most ``_PIECE`` cells, and say which cells of each are used.

    Args:
        before, after: how many cells of a piece are not used where it does not begin or end with the axis.
    """
    pieces: list[tuple[int, int, int, int]] = []
    used = 0
    while used < length:
        start = max(0, min(used - before, length - _PIECE))
        stop = min(length, start + _PIECE)
        last = length if stop == length else stop - after
        pieces.append((start, stop, used, last))
        used = last
    return pieces


def encode_audio(waveform: Tensor, sample_rate: int, *, audio_vae: nn.Module, num_latents: int) -> Tensor:
    """Encode ``waveform [2, samples]`` -> the first ``num_latents`` normalised latents ``[1, 8, A, 16]``.

    The latents are on the VAE's device, in its dtype. What the waveform is too short for is silent.
    """
    mean, std = audio_vae.get_buffer("latents_mean"), audio_vae.get_buffer("latents_std")
    config: Any = audio_vae.config
    rate, hop = int(config.sample_rate), int(config.mel_hop_length)
    waveform = resample(waveform.float(), sample_rate, rate)
    # A latent frame ends with its last spectrum: the first one has a single spectrum, the others four.
    needed = max(AUDIO_LATENT_SCALE * (num_latents - 1) * hop, _STFT_SAMPLES // 2 + 1)
    waveform = functional.pad(waveform, (0, max(0, needed - waveform.shape[1])))
    mel = rearrange(log_mel(waveform, rate, hop, int(config.mel_bins)), "c mel t -> 1 c t mel")
    with torch.no_grad():
        encoded = audio_vae.get_submodule("encoder")(mel.to(mean.device, mean.dtype))
    latent = encoded[:, :AUDIO_LATENT_CHANNELS, :num_latents].float()
    # The statistics are those of a token, as in decode.
    tokens = (rearrange(latent, "b c a m -> b a (c m)") - mean.float()) / std.float()
    normalised: Tensor = rearrange(tokens, "b a (c m) -> b c a m", c=AUDIO_LATENT_CHANNELS)
    return normalised.to(mean.dtype)


def resample(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    """Change the sampling rate of ``waveform [channels, samples]``: band-limited, by a windowed sinc.

    The window is a Hann window over six zero crossings each way, the cut at 0.99 of the lower Nyquist rate: what the
    audio VAE's training data went through.
    """
    if rate == wanted:
        return waveform
    crossings, cut = 6, 0.99 * min(rate, wanted)
    reach = math.ceil(crossings * rate / cut)
    padded = functional.pad(waveform, (reach, reach + 1))
    pieces = []
    # A second at a time: a position takes some tens of weights, and it is rare that two take the same.
    for outputs in torch.arange(math.ceil(waveform.shape[1] * wanted / rate)).split(wanted):
        places = outputs.double() * (rate / wanted)
        taps = places.long()[:, None] + torch.arange(-reach, reach + 1)
        phases = ((taps - places[:, None]) * (cut / rate)).clamp_(-crossings, crossings)
        weights = torch.sinc(phases) * torch.cos(phases * (math.pi / crossings / 2)).square_() * (cut / rate)
        pieces.append((padded[:, taps + reach] * weights.to(waveform.dtype)).sum(dim=2))
    return torch.cat(pieces, dim=1)


def log_mel(waveform: Tensor, rate: int, hop: int, bins: int) -> Tensor:
    """Compute the logarithmic mel spectrogram of magnitudes: ``[channels, bins, 1 + samples // hop]``."""
    window = torch.hann_window(_STFT_SAMPLES, device=waveform.device)
    spectrum = torch.stft(waveform, _STFT_SAMPLES, hop, window=window, pad_mode="reflect", return_complex=True).abs()
    filters = mel_filters(rate, _STFT_SAMPLES // 2 + 1, bins).to(spectrum)
    return (filters.T @ spectrum).clamp_(min=_SILENCE).log_()


def mel_filters(rate: int, frequencies: int, bins: int) -> Tensor:
    """Weigh ``frequencies``, 0 to half the ``rate``, by triangles of equal area: ``[frequencies, bins]``, float64.

    Their corners are evenly spread on Slaney's mel scale, which is linear up to 1000 Hz, which are 15 mel, and grows by
    a factor of 6.4 every 27 mel from there.
    """
    top = rate / 2
    mels = torch.linspace(0.0, 15 + 27 * math.log(top / 1000, 6.4), bins + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * (200 / 3), 1000 * 6.4 ** ((mels - 15) / 27))
    heard = torch.linspace(0.0, top, frequencies, dtype=torch.float64)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((heard - low) / (middle - low), (high - heard) / (high - middle)).clamp_(min=0.0)
    return triangles * (2 / (high - low))
