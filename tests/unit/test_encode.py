"""What is given -> what the transformer takes. Oracles: figures for tokens, of which tests/parity has the contexts; the
reference's latents for pictures; encoders that see just as far as is allowed for pieces; transformers for spectra."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import audio_utils

from ltx_sp import encode
from ltx_sp.decode import decode_frames, decode_waveform
from ltx_sp.demo import write_demo
from ltx_sp.encode import encode_audio, encode_video, log_mel, mel_filters, resample, tokenize
from ltx_sp.errors import WeightsError
from ltx_sp.model import upstream
from ltx_sp.model.upstream import load_tokenizer
from ltx_sp.read import read_image
from ltx_sp.weights.checkpoint import Checkpoint, open_checkpoint
from ltx_sp.weights.load import load

BOS, FIRST_BYTE = 2, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return load_tokenizer(folder / "gemma")


def test_prompts_are_stripped_started_and_padded_on_the_left(tokenizer: Any) -> None:
    ids, mask = tokenize("  a\tb \n", tokenizer)
    expected = [BOS, *(FIRST_BYTE + byte for byte in b"a\tb")]
    assert ids.shape == mask.shape == (1, 1024)
    assert ids[0, -4:].tolist() == expected
    assert not ids[0, :-4].any()
    assert mask[0].tolist() == [0] * 1020 + [1] * 4


def test_an_empty_prompt_is_a_bos(tokenizer: Any) -> None:
    ids, mask = tokenize("", tokenizer)
    assert ids[0, -2:].tolist() == [0, BOS]
    assert int(mask.sum()) == 1


def test_bos_is_added_where_the_tokenizer_adds_none() -> None:
    class Bare:
        bos_token_id, pad_token_id = 5, 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [7] * len(text)}

    assert tokenize("abc", Bare())[0][0, -5:].tolist() == [0, 5, 7, 7, 7]


def test_a_prompt_that_just_fits_is_not_cut(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = tokenize("x" * 1023, tokenizer)
    assert bool(mask.all())
    assert ids[0, 0] == BOS
    assert not caplog.records


def test_what_does_not_fit_is_cut_at_the_end_and_told(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenize("x" * 1020 + "yyyyy", tokenizer)
    assert bool(mask.all())
    assert ids[0, 0] == BOS
    assert (ids[0, -3:] == FIRST_BYTE + ord("y")).all()
    assert torch.count_nonzero(ids == FIRST_BYTE + ord("y")) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "The prompt has 1026 tokens; the text encoder takes 1024: the last 2 are cut."
    ]


def test_a_tokenizer_without_bos_or_pad_is_refused() -> None:
    class Bare:
        bos_token_id, pad_token_id = None, 0

    with pytest.raises(WeightsError, match="no <bos>"):
        tokenize("abc", Bare())


# --- pictures and videos ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(golden: Path) -> Checkpoint:
    return open_checkpoint(golden / "pipeline-2.3" / "ltx-2.3.safetensors", golden / "pipeline-2.3" / "gemma")


def _loaded(checkpoint: Checkpoint, module: nn.Module, component: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    names = checkpoint.keymap(component)
    load(module, checkpoint.index(component), names, device=torch.device("cpu"), dtype=dtype, component=component)
    return module


@pytest.fixture(scope="module")
def video_vae(checkpoint: Checkpoint) -> nn.Module:
    return _loaded(checkpoint, upstream.build_video_vae(checkpoint.spec), "video_vae")


@pytest.fixture(scope="module")
def audio_vae(checkpoint: Checkpoint) -> nn.Module:
    return _loaded(checkpoint, upstream.build_audio_vae(checkpoint.spec), "audio_vae")


@pytest.mark.parametrize(("stage", "side"), [("s1_2", 64), ("s2_6", 128)])
def test_an_image_gives_the_references_latent(stage: str, side: int, golden: Path, video_vae: nn.Module) -> None:
    """In its first latent frame the reference keeps the picture as it is.

    Not compressed, the picture would be 1.4e-2 off. The same build of the H.264 encoder gives 1e-6, others less.
    """
    with safe_open(golden / "pipeline-2.3" / "two_stage_i2v_io.safetensors", "pt") as file:
        expected = file.get_tensor(f"{stage}.video_latent")[:, :, :1]
    pixels = read_image(golden / "pipeline-2.3" / "image.png", height=side, width=side, crf=33)
    latent = encode_video(pixels, video_vae=video_vae)
    assert latent.shape == (1, 128, 1, side // 32, side // 32)
    torch.testing.assert_close(latent, expected, rtol=0, atol=5e-3)


def test_latents_come_in_the_vaes_type(checkpoint: Checkpoint, video_vae: nn.Module) -> None:
    half = _loaded(checkpoint, upstream.build_video_vae(checkpoint.spec), "video_vae", torch.bfloat16)
    pixels = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    exact, rounded = (encode_video(pixels, video_vae=vae) for vae in (video_vae, half))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


class _Local(nn.Module):
    """Sees 12 latent frames back, its own included, and 6 cells around; a cell is the middle of its pixels.

    Like the real one it takes the first frame for a whole latent frame.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[int, ...]] = []
        self.weight = torch.randn(128, 3, 12, 13, 13)

    def forward(self, pixels: Tensor) -> Tensor:
        middles = pixels[..., 16::32, 16::32]
        later = middles[:, :, 1:].unflatten(2, (-1, 8)).mean(dim=3)
        cells = torch.cat([middles[:, :, :1], later], dim=2)
        self.pieces.append(tuple(cells.shape[2:]))
        means = functional.conv3d(functional.pad(cells, (6, 6, 6, 6, 11, 0)), self.weight)
        return torch.cat([means, torch.full_like(means, torch.nan)], dim=1)


class _Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Local()
        self.register_buffer("latents_mean", torch.linspace(-0.1, 0.1, 128))
        self.register_buffer("latents_std", torch.linspace(0.2, 0.4, 128))


@pytest.mark.parametrize(
    ("cells", "pieces"),
    [
        ((1, 25, 3), [(1, 24, 3), (1, 24, 3)]),
        ((1, 40, 27), [(1, 24, 24)] * 6),
        ((25, 1, 2), [(24, 1, 2), (24, 1, 2)]),
        ((50, 2, 1), [(24, 2, 1)] * 4),
        ((26, 25, 1), [(24, 24, 1)] * 4),
        ((24, 24, 1), [(24, 24, 1)]),
    ],
    ids=str,
)
def test_pieces_give_what_the_whole_gives(
    cells: tuple[int, int, int], pieces: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, height, width = 8 * cells[0] - 7, 32 * cells[1], 32 * cells[2]
    # Each pixel of a cell alike, so that long clips take no memory.
    over_time = torch.randn(1, 3, frames, 1, 1).expand(-1, -1, -1, height, width)
    over_space = torch.randn(1, 3, 1, height, width).expand(-1, -1, frames, -1, -1)
    for pixels in (over_time, over_space):
        vae = _Vae()
        monkeypatch.setattr(encode, "_WHOLE", 2**30)
        whole = encode_video(pixels, video_vae=vae)
        assert vae.encoder.pieces == [cells]
        mean, std = (vae.get_buffer(name).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        torch.testing.assert_close(whole * std + mean, vae.encoder(pixels)[:, :128], rtol=0, atol=1e-4)
        vae.encoder.pieces.clear()
        monkeypatch.setattr(encode, "_WHOLE", 0)
        tiled = encode_video(pixels, video_vae=vae)
        assert vae.encoder.pieces == pieces
        torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-3)


def test_only_what_is_large_is_cut() -> None:
    vae = _Vae()
    encode_video(torch.zeros(1, 3, 1, 1, 1).expand(-1, -1, -1, 2176, 3840), video_vae=vae)
    encode_video(torch.zeros(1, 3, 1, 1, 1).expand(-1, -1, 121, 512, 768), video_vae=vae)
    assert vae.encoder.pieces == [(1, 68, 120), (16, 16, 24)]
    vae.encoder.pieces.clear()
    encode_video(torch.zeros(1, 3, 1, 1, 1).expand(-1, -1, 121, 1024, 1536), video_vae=vae)
    assert set(vae.encoder.pieces) == {(16, 24, 24)}


def test_a_real_encoder_in_pieces_is_as_good(video_vae: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """And decodes afterwards as it did before."""
    latent = torch.randn(1, 128, 2, 2, 2)
    before = torch.cat(list(decode_frames(latent, video_vae)))
    pixels = torch.rand(1, 3, 1, 64, 32 * 40) * 2 - 1
    whole = encode_video(pixels, video_vae=video_vae)
    monkeypatch.setattr(encode, "_WHOLE", 0)
    tiled = encode_video(pixels, video_vae=video_vae)
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().max() < 1e-3 * whole.std()
    assert torch.equal(torch.cat(list(decode_frames(latent, video_vae))), before)


# --- sound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "frequencies", "bins"), [(16000, 513, 64), (24000, 257, 80)])
def test_mel_filters_are_slaneys(rate: int, frequencies: int, bins: int) -> None:
    expected = audio_utils.mel_filter_bank(frequencies, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    assert np.abs(mel_filters(rate, frequencies, bins).numpy() - expected).max() < 1e-12


def test_spectrum() -> None:
    waveform = 0.1 * torch.randn(2, 5000)
    waveform[1, 2000:] = 0.0
    spectrum = log_mel(waveform, 16000, 160, 64)
    assert spectrum.shape == (2, 64, 32)
    for channel in range(2):
        expected = audio_utils.spectrogram(
            waveform[channel].numpy().astype(np.float64),
            audio_utils.window_function(1024, "hann"),
            frame_length=1024,
            hop_length=160,
            fft_length=1024,
            power=1.0,
            pad_mode="reflect",
            mel_filters=mel_filters(16000, 513, 64).numpy(),
            mel_floor=1e-5,
            log_mel="log",
        )
        assert np.abs(spectrum[channel].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 44101, 48000, 96000, 192000])
def test_resampling_keeps_what_the_new_rate_can_hold(rate: int) -> None:
    def tone(hertz: float, rate: int) -> Tensor:
        return torch.sin(2 * math.pi * hertz * torch.arange(rate, dtype=torch.float64) / rate).float()[None]

    waveform = resample(torch.cat([tone(440.0, rate), tone(2000.0, rate)]), rate, 16000)
    assert waveform.shape == (2, 16000)
    inside = slice(100, -100)
    expected = torch.cat([tone(440.0, 16000), tone(2000.0, 16000)])
    assert (waveform - expected)[:, inside].abs().max() < 4e-3
    if rate > 22000:  # else it does not hold the tone
        assert resample(tone(10000.0, rate), rate, 16000)[:, inside].abs().max() < 0.02


def test_resampling_weighs_as_its_formula_says() -> None:
    """Oracle: the sum over all samples, in double precision, sample by sample."""
    waveform = torch.randn(1, 90)
    cut, half = 0.99 * 16000, 6
    expected = []
    for place in range(33):
        at = sum(
            float(value) * float(np.sinc(x)) * math.cos(math.pi * x / half / 2) ** 2 * cut / 44100
            for index, value in enumerate(waveform[0])
            if abs(x := (index / 44100 - place / 16000) * cut) < half
        )
        expected.append(at)
    torch.testing.assert_close(resample(waveform, 44100, 16000), torch.tensor([expected]), rtol=0, atol=1e-6)
    assert resample(waveform, 44100, 44100) is waveform


@pytest.mark.parametrize("num_latents", [1, 2, 9, 26])
def test_a_waveform_of_their_length_gives_the_latents(num_latents: int, audio_vae: nn.Module) -> None:
    """25 a second, and what comes later does not matter: the first ends with its first spectrum."""
    waveform = 0.1 * torch.randn(2, 640 * num_latents + 4000)
    latent = encode_audio(waveform[:, : 640 * num_latents], 16000, audio_vae=audio_vae, num_latents=num_latents)
    assert latent.shape == (1, 8, num_latents, 16)
    longer = encode_audio(waveform, 16000, audio_vae=audio_vae, num_latents=num_latents)
    torch.testing.assert_close(latent, longer, rtol=0, atol=1e-5)
    doubled = resample(waveform, 16000, 32000)
    again = encode_audio(doubled, 32000, audio_vae=audio_vae, num_latents=num_latents)
    assert (again - latent).norm() < 0.1 * latent.norm()


@pytest.mark.parametrize("samples", [0, 1, 700])
def test_what_is_missing_is_silent(samples: int, audio_vae: nn.Module) -> None:
    waveform = 0.1 * torch.randn(2, samples)
    latent = encode_audio(waveform, 16000, audio_vae=audio_vae, num_latents=9)
    padded = functional.pad(waveform, (0, 8000 - samples))
    torch.testing.assert_close(
        latent, encode_audio(padded, 16000, audio_vae=audio_vae, num_latents=9), rtol=0, atol=1e-5
    )


def test_the_length_of_any_clip_is_enough(audio_vae: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are rounded to the nearest, so the sound of a clip may be half a latent shorter: nothing is filled up."""
    lengths: list[int] = []

    def spectrum(waveform: Tensor, *arguments: int) -> Tensor:
        lengths.append(waveform.shape[1])
        return log_mel(waveform, *arguments)

    monkeypatch.setattr(encode, "log_mel", spectrum)
    for num_frames, frame_rate in itertools.product((9, 17, 25, 33), (24.0, 25.0, 30.0, 23.976, 50.0)):
        num_latents = round(num_frames / frame_rate * 25)
        samples = round(num_frames / frame_rate * 16000)
        latent = encode_audio(torch.zeros(2, samples), 16000, audio_vae=audio_vae, num_latents=num_latents)
        assert latent.shape[2] == num_latents
        assert lengths.pop() == samples


def test_sound_is_normalised_as_decode_undoes_it(audio_vae: nn.Module) -> None:
    """Decoded without a decoder, latents are what the encoder gave."""

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: Any = audio_vae.config
            self.encoder, self.decoder = audio_vae.get_submodule("encoder"), nn.Identity()
            self.register_buffer("latents_mean", torch.randn(128))
            self.register_buffer("latents_std", torch.rand(128) + 0.5)

    waveform = 0.1 * torch.randn(2, 16000)
    vae, real = Vae(), cast("Any", audio_vae)
    latent = encode_audio(waveform, 16000, audio_vae=vae, num_latents=25)
    means = real.encode(log_mel(waveform, 16000, 160, 64).transpose(1, 2)[None]).latent_dist.mode()[:, :, :25]
    assert (latent - means).abs().max() > 0.1
    torch.testing.assert_close(decode_waveform(latent, vae, nn.Flatten(2)), means[0].flatten(1), rtol=0, atol=1e-5)
