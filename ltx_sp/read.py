"""Files -> tensors: the pictures, videos and sounds that a clip starts from, through PyAV.

Y, X pixel rows and columns of a file; F frames. What a file holds is hostile: its content alone says what it is, it
opens no other file, and nothing larger than ``MAX_PIXELS`` is decoded.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import av
import torch
from av.container import InputContainer
from torch import Tensor
from torch.nn import functional

from ltx_sp.errors import RequestError

_log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
"""Of a picture, or of a video's frame. Beyond it there are more bombs than pictures."""

MAX_SIDE = 16_384
"""As far as H.264 goes."""

_RATES = range(1_000, 768_001)
_OPTIONS = {
    "max_pixels": str(MAX_PIXELS),
    "skip_frame": "all",  # sizes come from headers: whether a picture may be decoded is not known yet
    "protocol_whitelist": "none",  # playlists and the like name other files
}
_Kind = Literal["image", "video", "audio"]
_FORMATS: dict[_Kind, str] = {
    "image": "a PNG or JPEG file",
    "video": "an MP4 file with H.264",
    "audio": "a WAV, FLAC or MP3 file",
}


def read_image(path: Path, *, height: int, width: int, crf: int) -> Tensor:
    """Read a picture to ``[1, 3, 1, height, width]``, float32 in -1..1 on the host: scaled to cover, then cropped.

    Args:
        path: any format that PyAV decodes; transparency is dropped, and a camera's rotation undone.
        crf: how strongly H.264 compresses the picture first, as the model saw its frames; 0 leaves it as it is.

    Raises:
        RequestError: no such file, no picture, a damaged one, or one that is too large.
    """
    pixels_YX3 = _picture(path)
    if crf > 0:
        pixels_YX3 = _compressed(pixels_YX3, crf)
    return _covering(pixels_YX3, height, width)[None, :, None]


def read_video(path: Path, *, height: int, width: int, num_frames: int, frame_rate: float) -> Tensor:
    """Read the beginning of a video to ``[1, 3, F, height, width]``, float32 in -1..1 on the host.

    Frame i is the one of the file that is nearest to i / ``frame_rate`` seconds after its first; scaled and cropped
    as pictures are.

    Raises:
        RequestError: no such file, no video, a damaged one, frames that are too large, or too short a video.
    """
    pixels_3FYX = torch.empty(3, num_frames, height, width)
    filled = 0

    def fill(frame: av.VideoFrame, end: float) -> int:
        """Take ``frame`` for all places before ``end`` seconds that are still empty."""
        # A place that lies halfway between two frames gets the later one, whichever way its time was rounded.
        until = min(max(math.ceil(end * frame_rate - 1e-6), filled), num_frames)
        if until > filled:
            pixels_3FYX[:, filled:until] = _covering(_upright(path, frame), height, width)[:, None]
        return until

    with _opened(path, "video") as container:
        frames = _timed(container)
        shown, start = next(frames)
        length = 0.0
        for frame, seconds in frames:
            filled = fill(shown, (start + seconds) / 2)
            if filled == num_frames:
                break
            length = seconds - start
            shown, start = frame, seconds
        else:
            if shown.duration and shown.time_base:
                length = float(shown.duration * shown.time_base)
            filled = fill(shown, start + length)
            if filled < num_frames:
                raise RequestError(
                    f"The video {path} lasts {start + length:.2f} seconds; {num_frames} frames at {frame_rate:g} per "
                    f"second take {num_frames / frame_rate:.2f}. Ask for fewer frames, or give a longer video."
                )
    return pixels_3FYX[None]


def read_audio(path: Path, *, seconds: float) -> tuple[Tensor, int]:
    """Read the beginning of a sound: the waveform ``[2, samples]``, float32 on the host, and its sampling rate in Hz.

    What is too short is filled with silence, and the log says so.

    Args:
        path: a sound, or a video with one. One channel is taken for both; more than two are mixed down.

    Raises:
        RequestError: no such file, no sound, or a damaged one.
    """
    parts: list[Tensor] = []
    found = 0
    with _opened(path, "audio") as container:
        frames = container.decode(container.streams.audio[0])
        first = next(frames, None)
        if first is None:
            raise ValueError("no samples")
        rate = first.sample_rate
        if rate not in _RATES:
            raise RequestError(
                f"The sound of {path} has {rate} samples per second; it must have {_RATES[0]} to {_RATES[-1]}. "
                "Resample it."
            )
        mono = first.layout.nb_channels == 1
        convert = av.AudioResampler(format="fltp", layout="mono" if mono else "stereo", rate=rate)
        wanted = round(seconds * rate)
        for frame in itertools.chain([first], frames):
            for part in convert.resample(frame):
                parts.append(torch.from_numpy(part.to_ndarray()))
                found += part.samples
            if found >= wanted:
                break
        if found == 0:
            raise ValueError("no samples")
    waveform = torch.cat(parts, dim=1)[:, :wanted].expand(2, -1)
    if not bool(torch.isfinite(waveform).all()):
        raise RequestError(f"The sound of {path} has samples that are not finite. {_advice('audio')}")
    if found < wanted:
        _log.warning("The sound of %s lasts %.2f seconds, the clip %.2f: silence follows.", path, found / rate, seconds)
    return functional.pad(waveform, (0, max(0, wanted - found))), rate


@contextlib.contextmanager
def _opened(path: Path, kind: _Kind) -> Iterator[InputContainer]:
    """Open a file with a stream of ``kind``. What is wrong with its content is a RequestError, in the block too."""
    try:
        with (
            _without_name(path, kind) as file,
            av.open(file, "r", options=_OPTIONS, metadata_errors="replace") as container,
        ):
            _check_streams(path, kind, container)
            yield container
    except RequestError:
        raise
    except (av.FFmpegError, ValueError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else str(error).rstrip(".")
        raise RequestError(
            f"The {kind} file {path} cannot be decoded ({reason}): it is damaged, too large, or of a kind that PyAV "
            f"does not read. {_advice(kind)}"
        ) from error
    except OSError as error:
        raise RequestError(
            f"The {kind} file {path} cannot be read: {error.strerror}. Check its name and permissions."
        ) from error


def _check_streams(path: Path, kind: _Kind, container: InputContainer) -> None:
    """Raise where there is nothing to decode, or what is too large, and set limits to what the header does not say."""
    streams = container.streams.audio if kind == "audio" else container.streams.video
    if not streams:
        content = "sound" if kind == "audio" else "picture"
        raise RequestError(f"The file {path} holds no {content}. {_advice(kind)}")
    if kind == "image" and len(streams) > 1:  # HEIC's, which are tiles of one
        raise RequestError(f"The file {path} holds {len(streams)} pictures; it must hold one. {_advice(kind)}")
    codec: Any = streams[0].codec_context
    if codec is None:
        raise ValueError("no decoder")
    if kind != "audio":
        if codec.width and codec.height:
            _check_size(path, codec.width, codec.height)
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        if codec.name == "mjpeg":  # which otherwise makes up what is missing, and says nothing
            codec.options |= {"err_detect": "explode"}


def _advice(kind: _Kind) -> str:
    return f"Give {_FORMATS[kind]}."


def _without_name(path: Path, kind: _Kind) -> io.BufferedReader:
    """Open a file so that FFmpeg does not learn its name: it would believe the suffix before the content."""
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise RequestError(f"The {kind} file {path} {state}. Check its name.")
    file = os.fdopen(os.open(path, os.O_RDONLY), "rb")
    if not file.peek(1):
        file.close()
        raise RequestError(f"The {kind} file {path} is empty. {_advice(kind)}")
    return file


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE or min(width, height) < 2:
        raise RequestError(
            f"The frames of {path} have {width} x {height} pixels; each side must have 2 to {MAX_SIDE}, and both "
            f"together at most {MAX_PIXELS // 10**6} million. Scale it."
        )


def _picture(path: Path) -> Tensor:
    """Decode the first frame of a file: ``[Y, X, 3]``, uint8."""
    with _opened(path, "image") as container:
        frame, _ = next(_timed(container))
        pixels_YX3 = _upright(path, frame)
        if container.streams.video[0].frames > 1:
            _log.warning("The image file %s holds several pictures; the first is taken.", path)
    return pixels_YX3.contiguous()


def _timed(container: InputContainer) -> Iterator[tuple[av.VideoFrame, float]]:
    """Decode the frames of a file's first video, each with its seconds after the first. There is at least one."""
    stream = container.streams.video[0]
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    start = None
    for place, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise ValueError("a damaged frame")
        seconds = place / rate if frame.time is None else frame.time
        start = seconds if start is None else start
        yield frame, seconds - start
    if start is None:
        raise ValueError("no frames")


def _upright(path: Path, frame: av.VideoFrame) -> Tensor:
    """Convert a frame to ``[Y, X, 3]``, uint8, the way up that its file says."""
    _check_size(path, frame.width, frame.height)  # each frame has its own
    return torch.rot90(torch.from_numpy(frame.to_ndarray(format="rgb24")), round(frame.rotation / 90))


def _compressed(pixels_YX3: Tensor, crf: int) -> Tensor:
    """Pass a picture through H.264. An odd last row or column is cut off."""
    height, width = (side // 2 * 2 for side in pixels_YX3.shape[:2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as written:
        stream = written.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(pixels_YX3[:height, :width].contiguous().numpy(), format="rgb24")
        written.mux(stream.encode(frame.reformat(format="yuv420p")))
        written.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as container:
        return torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb24"))


def _covering(pixels_YX3: Tensor, height: int, width: int) -> Tensor:
    """Scale a picture until it covers ``height`` x ``width``, and keep its middle: ``[3, height, width]`` in -1..1.

    What ``interpolate`` does, bilinear and without aligned corners, for the middle only: a narrow picture that is
    scaled whole may have any size.
    """
    rows, columns, _ = pixels_YX3.shape
    scale = max(height / rows, width / columns)
    above, below, down = _between(rows, math.ceil(rows * scale), height)
    left, right, across = _between(columns, math.ceil(columns * scale), width)
    band = torch.lerp(pixels_YX3[above].float(), pixels_YX3[below].float(), down[:, None, None])
    middle = torch.lerp(band[:, left], band[:, right], across[:, None])
    return middle.permute(2, 0, 1) / 127.5 - 1.0


def _between(length: int, scaled: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find, for the middle cells of an axis that is scaled, both neighbours, and how near the second is."""
    cells = torch.arange(kept, dtype=torch.float64) + (scaled - kept) // 2
    places = ((cells + 0.5) * (length / scaled) - 0.5).clamp_(min=0.0)
    before = places.long()
    return before, (before + 1).clamp_(max=length - 1), (places - before).float()
