"""Clip -> file. Oracle: what PyAV demuxes and decodes from the file, and the figures of BT.709."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ltx_sp.errors import LtxSpError, RequestError
from ltx_sp.handoff import Clip, Latents
from ltx_sp.write import check_writable, rational_frame_rate, save_decoded, save_latents, tee_frames, write_clip

HEIGHT, WIDTH = 64, 96
RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def _frames(count: int, chunk: int = 8) -> Iterator[Tensor]:
    """Grey that brightens with time, and three patches of one colour each."""
    for start in range(0, count, chunk):
        times = torch.arange(start, min(start + chunk, count))
        frames = (times / count).view(-1, 1, 1, 1).repeat(1, HEIGHT, WIDTH, 3)
        for place, colour in enumerate((RED, GREEN, BLUE)):
            frames[:, 16:48, 32 * place : 32 * place + 32] = torch.tensor(colour)
        yield frames


def _tone(seconds: float, rate: int) -> Tensor:
    time = torch.arange(round(seconds * rate)) / rate
    return torch.stack([0.5 * torch.sin(2 * math.pi * hertz * time) for hertz in (440.0, 660.0)])


def _clip(
    count: int = 25, frame_rate: float = 24.0, sample_rate: int = 48000, frames: Iterator[Tensor] | None = None
) -> Clip:
    return Clip(
        frames=_frames(count) if frames is None else frames,
        num_frames=count,
        height=HEIGHT,
        width=WIDTH,
        frame_rate=frame_rate,
        waveform=_tone(count / frame_rate, sample_rate),
        sample_rate=sample_rate,
    )


def _sound(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        return torch.from_numpy(np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1))


RATES = [
    (24.0, "24"),
    (25.0, "25"),
    (23.976, "24000/1001"),
    (29.97, "30000/1001"),
    (59.94, "60000/1001"),
    (12.5, "25/2"),
]


@pytest.mark.parametrize(("frame_rate", "fraction"), [*RATES, (23.98, "24000/1001"), (15.0, "15"), (7.5, "15/2")])
def test_rational_frame_rate(frame_rate: float, fraction: str) -> None:
    assert rational_frame_rate(frame_rate) == Fraction(fraction)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize(("frame_rate", "fraction"), RATES)
def test_size_rate_and_length(frame_rate: float, fraction: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    write_clip(_clip(frame_rate=frame_rate), path)
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        # Matroska rounds every time to a millisecond, and no rate is stored.
        rate = float(video.average_rate or 0)
        assert rate == pytest.approx(float(Fraction(fraction)), rel=1e-3 if suffix == ".mkv" else 1e-9)
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (audio.codec_context.name, audio.layout.name, audio.sample_rate) == ("aac", "stereo", 48000)
        times = [frame.time for frame in container.decode(video=0)]
    assert len(times) == 25
    assert times == pytest.approx([place / Fraction(fraction) for place in range(25)], abs=1e-3)
    # What AAC pads its last frame with is the only difference.
    seconds = _sound(path).shape[1] / 48000
    assert 0 <= seconds - 25 / frame_rate < 1024 / 48000 + 1e-3
    assert os.listdir(tmp_path) == [path.name]


def test_colours_are_those_of_bt709(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(_clip(), path)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert tags == (1, 1, 1, 1)
        frame = next(frame for place, frame in enumerate(container.decode(video=0)) if place == 5)
    luma = frame.to_ndarray()[:HEIGHT]
    for place, weight in enumerate((0.2126, 0.7152, 0.0722)):
        assert luma[32, 32 * place + 16] == pytest.approx(16 + 219 * weight, abs=2)
    assert luma[4, 4] == pytest.approx(16 + 219 * 5 / 25, abs=2)


def test_frames_are_in_order(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(_clip(), path)
    with av.open(str(path)) as container:
        greys = [float(frame.to_ndarray(format="rgb24")[4, 4].mean()) for frame in container.decode(video=0)]
    assert greys == pytest.approx([255 * place / 25 for place in range(25)], abs=3)


@pytest.mark.parametrize("sample_rate", [24000, 48000])
def test_sound_is_the_waveform(sample_rate: int, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(_clip(sample_rate=sample_rate), path)
    sound, waveform = _sound(path), _tone(25 / 24, sample_rate)
    start, stop = sample_rate // 4, sample_rate // 2
    expected = waveform[:, start:stop]
    errors = {
        shift: float((sound[:, start + shift : stop + shift] - expected).norm() / expected.norm())
        for shift in (-1, 0, 1)
    }
    assert errors[0] < 0.06
    assert min(errors, key=lambda shift: errors[shift]) == 0


@pytest.mark.parametrize("seconds", [0.01, 3.0])
def test_sound_may_be_shorter_or_longer_than_the_picture(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    clip = _clip()
    write_clip(Clip(**{**vars(clip), "waveform": _tone(seconds, 48000)}), path)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 25
    assert 0 <= _sound(path).shape[1] / 48000 - seconds < 1024 / 48000


def test_frames_are_taken_one_chunk_at_a_time(tmp_path: Path) -> None:
    events: list[str] = []

    def chunks() -> Iterator[Tensor]:
        for place, chunk in enumerate(_frames(25)):
            events.append(f"decoded {place}")
            yield chunk

    write_clip(_clip(frames=chunks()), tmp_path / "clip.mp4", on_frames=lambda count: events.append(f"written {count}"))
    expected = [
        f"{what} {n}"
        for place, count in enumerate((8, 8, 8, 1))
        for what, n in (("decoded", place), ("written", count))
    ]
    assert events == expected


def test_a_file_of_that_name_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    write_clip(_clip(), path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].width == WIDTH


def _interrupted() -> Iterator[Tensor]:
    yield next(_frames(25))
    raise KeyboardInterrupt


def _failing() -> Iterator[Tensor]:
    yield next(_frames(25))
    raise MemoryError


def _not_a_number() -> Iterator[Tensor]:
    yield next(_frames(25))
    yield torch.full((8, HEIGHT, WIDTH, 3), torch.nan)


def _too_few() -> Iterator[Tensor]:
    yield next(_frames(25))


FAILURES: list[tuple[Callable[[], Iterator[Tensor]], type[BaseException], str]] = [
    (_interrupted, KeyboardInterrupt, "^$"),
    (_failing, MemoryError, "^$"),
    (_not_a_number, LtxSpError, "frames 8 to 15"),
    (_too_few, LtxSpError, "8 frames; the clip has 25"),
]


@pytest.mark.parametrize(("frames", "error", "message"), FAILURES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_failure_leaves_the_folder_as_it_was(
    frames: Callable[[], Iterator[Tensor]], error: type[BaseException], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    with pytest.raises(error, match=message):
        write_clip(_clip(frames=frames()), path)
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert path.read_text() == "old"


def test_a_waveform_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    clip = _clip()
    clip.waveform[0, 100] = torch.inf
    with pytest.raises(LtxSpError, match="waveform"):
        write_clip(clip, tmp_path / "clip.mp4")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "clip.MP4")
    check_writable(Path("clip.mkv"))
    (tmp_path / "folder.mp4").mkdir()
    for path, message in (
        (tmp_path / "clip.avi", r"does not end in \.mp4, \.mov, \.mkv"),
        (tmp_path / "clip", "does not end in"),
        (tmp_path / "absent" / "clip.mp4", "there is no folder"),
        (tmp_path / "folder.mp4", "is a folder"),
    ):
        with pytest.raises(RequestError, match=message):
            check_writable(path)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:  # root may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(RequestError, match="Permission denied"):
        check_writable(tmp_path / "clip.mp4")
    assert os.listdir(tmp_path) == []


def test_decoded_clip_is_kept_beside_the_file(tmp_path: Path) -> None:
    clip, kept = tee_frames(_clip())
    write_clip(clip, tmp_path / "clip.mp4")
    save_decoded(tmp_path / "clip.safetensors", kept, clip.waveform)
    saved = load_file(tmp_path / "clip.safetensors")
    assert torch.equal(saved["frames"], torch.cat(list(_frames(25))))
    assert torch.equal(saved["waveform"], clip.waveform)
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "clip.safetensors"]


def test_latents_are_saved_in_their_type(tmp_path: Path) -> None:
    latents = Latents(torch.randn(1, 128, 2, 2, 3).bfloat16(), torch.randn(1, 8, 5, 16).transpose(2, 3).contiguous())
    save_latents(tmp_path / "latents.safetensors", latents)
    saved = load_file(tmp_path / "latents.safetensors")
    assert torch.equal(saved["video_latent"], latents.video)
    assert torch.equal(saved["audio_latent"], latents.audio)
    assert saved["video_latent"].dtype == torch.bfloat16
    with pytest.raises(RequestError, match="there is no folder"):
        save_latents(tmp_path / "absent" / "latents.safetensors", latents)
