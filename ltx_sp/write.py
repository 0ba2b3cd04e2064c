"""Clip -> file: H.264 and AAC, streamed, and never half a file under the name that was asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from safetensors.torch import save
from torch import Tensor

from ltx_sp.errors import LtxSpError, RequestError, UnsupportedError
from ltx_sp.handoff import Clip, Latents

SUFFIXES = (".mp4", ".mov", ".mkv")

# BT.709's number in the tables of ITU-T H.273, which are primaries, transfer and matrix alike.
_BT709 = 1
_LIMITED_RANGE = 1


def check_writable(path: Path) -> None:
    """Raise where a clip could not be written to ``path``. To be called before anything is loaded.

    Raises:
        RequestError: wrong suffix, no such folder, no permission, or a folder of that name.
        UnsupportedError: PyAV was built without an encoder that is needed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{path} does not end in {', '.join(SUFFIXES)}. Give the output one of these.")
    check_place(path)
    for codec in ("libx264", "aac"):
        if codec not in av.codecs_available:
            raise UnsupportedError(f"The installed av package cannot encode {codec}. Install av from PyPI.")


def check_place(path: Path) -> None:
    """Raise where no file of this name could be made. Leaves nothing behind.

    Raises:
        RequestError: no such folder, no permission, or a folder of that name.
    """
    try:
        if path.is_dir():
            raise RequestError(f"{path} is a folder. Give the output a file name.")
        if not path.parent.is_dir():
            raise RequestError(f"{path} cannot be written: there is no folder {path.parent}. Create it first.")
        # Not os.access, which knows nothing of read-only mounts, of quotas and of names that are too long.
        unfinished = _unfinished(path)
        unfinished.touch(exist_ok=False)
        unfinished.unlink()
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}. Choose another place or name.") from error


def _unfinished(path: Path) -> Path:
    # The suffix stays: it is what the container's format is chosen by.
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")


def rational_frame_rate(frame_rate: float) -> Fraction:
    """Read 24, 12.5 and the like as they are, and 23.976, 29.97, 59.94 as the n * 1000 / 1001 that they stand for."""
    ntsc = Fraction(round(frame_rate * 1.001) * 1000, 1001)
    # People round these to two digits, seldom to three.
    if frame_rate != round(frame_rate) and abs(float(ntsc) - frame_rate) < 0.005:
        return ntsc
    return Fraction(frame_rate).limit_denominator(1001)


def write_clip(clip: Clip, path: Path, *, on_frames: Callable[[int], None] | None = None) -> None:
    """Encode ``clip`` to ``path`` while its frames are decoded; a file of that name is replaced at the end.

    Blocks the host. Rank 0 only. The file appears whole or not at all: what was written is removed on any
    failure, an interrupt included.

    Args:
        on_frames: called after each chunk with the number of frames in it.
    """
    with _whole_file(path) as unfinished, _container(unfinished) as container:
        _encode(clip, container, on_frames)


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Give the name of a sibling that becomes ``path`` when the block ends well, and is removed otherwise."""
    unfinished = _unfinished(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _container(path: Path) -> Iterator[OutputContainer]:
    # The index goes to the front, so that a browser can play the file while it loads.
    options = {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
    container = av.open(str(path), "w", options=options)
    try:
        yield container
    except BaseException:
        # Closing writes the trailer, which may fail in its turn; the first failure is the one to report.
        with contextlib.suppress(Exception):
            container.close()
        raise
    container.close()


def _encode(clip: Clip, container: OutputContainer, on_frames: Callable[[int], None] | None) -> None:
    video, audio = _video_stream(clip, container), _audio_stream(clip, container)
    rate = rational_frame_rate(clip.frame_rate)
    _check_finite(clip.waveform, "waveform")
    written = samples = 0
    for chunk in clip.frames:
        _check_finite(chunk, f"frames {written} to {written + len(chunk) - 1}")
        for frame in chunk:
            _mux_frame(frame, written, rate, video, container)
            written += 1
        # Sound up to where the picture is, so that neither stream waits in the muxer for the other.
        until = min(clip.waveform.shape[1], round(written / rate * clip.sample_rate))
        _mux_sound(clip, samples, until, audio, container)
        samples = until
        if on_frames is not None:
            on_frames(len(chunk))
    if written != clip.num_frames:
        raise LtxSpError(f"The decoder gave {written} frames; the clip has {clip.num_frames}. Please report this.")
    _mux_sound(clip, samples, clip.waveform.shape[1], audio, container)
    for stream in (video, audio):
        container.mux(stream.encode(None))


def _check_finite(tensor: Tensor, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise LtxSpError(
            f"Not all values of the decoded {name} are finite. Check the weights, and the dtype that they are used in."
        )


def _video_stream(clip: Clip, container: OutputContainer) -> VideoStream:
    rate = rational_frame_rate(clip.frame_rate)
    stream = container.add_stream("libx264", rate=rate, options={"crf": "19", "preset": "veryfast"})
    context = stream.codec_context
    context.width, context.height, context.pix_fmt = clip.width, clip.height, "yuv420p"
    context.time_base = 1 / rate
    context.color_range = _LIMITED_RANGE
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    return stream


def _audio_stream(clip: Clip, container: OutputContainer) -> AudioStream:
    stream = container.add_stream("aac", rate=clip.sample_rate)
    stream.codec_context.bit_rate = 192_000  # the encoder's own choice, 128 000, is heard at 48 kHz
    stream.codec_context.layout = "stereo"
    stream.codec_context.format = "fltp"
    stream.codec_context.time_base = Fraction(1, clip.sample_rate)
    return stream


def _mux_frame(frame: Tensor, place: int, rate: Fraction, stream: VideoStream, container: OutputContainer) -> None:
    pixels = frame.mul(255.0).round_().clamp_(0.0, 255.0).to(torch.uint8)
    picture = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )
    picture.pts, picture.time_base = place, 1 / rate
    container.mux(stream.encode(picture))


def _mux_sound(clip: Clip, start: int, stop: int, stream: AudioStream, container: OutputContainer) -> None:
    if stop <= start:
        return
    samples = clip.waveform[:, start:stop].clamp(-1.0, 1.0).contiguous()
    frame = av.AudioFrame.from_ndarray(samples.numpy(), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = clip.sample_rate, start, Fraction(1, clip.sample_rate)
    container.mux(stream.encode(frame))


def tee_frames(clip: Clip) -> tuple[Clip, list[Tensor]]:
    """Give a clip that writes like ``clip``, and a list that holds its chunks once it has been iterated."""
    kept: list[Tensor] = []

    def frames() -> Iterator[Tensor]:
        for chunk in clip.frames:
            kept.append(chunk)
            yield chunk

    return dataclasses.replace(clip, frames=frames()), kept


def save_decoded(path: Path, frames: Sequence[Tensor], waveform: Tensor) -> None:
    """Save ``frames [num_frames, height, width, 3]`` in 0..1 and ``waveform [2, samples]`` as safetensors.

    Blocks the host. Rank 0 only. Unlike a video file this loses nothing: it is for comparing runs.

    Args:
        frames: chunks, as a clip gives them or as ``tee_frames`` kept them.
    """
    _save(path, {"frames": torch.cat(list(frames)), "waveform": waveform}, torch.float32)


def save_latents(path: Path, latents: Latents) -> None:
    """Save ``video_latent [1, 128, F, H, W]`` and ``audio_latent [1, 8, A, 16]`` as safetensors, in their type.

    Blocks the host. Rank 0 only.
    """
    _save(path, {"video_latent": latents.video, "audio_latent": latents.audio})


def _save(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    check_place(path)
    with _whole_file(path) as unfinished:
        # Not save_file, which lets nobody else read what it writes.
        unfinished.write_bytes(save({name: t.to("cpu", dtype).contiguous() for name, t in tensors.items()}))
