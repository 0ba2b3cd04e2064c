"""Files -> tensors. Oracle: the pixels and samples that the files were made of, and what torch's own scaling gives."""

from __future__ import annotations

import errno
import logging
import math
import os
import struct
import sys
import wave
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ltx_sp.errors import RequestError
from ltx_sp.handoff import Clip
from ltx_sp.read import read_audio, read_image, read_video
from ltx_sp.write import write_clip

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
Pixels = np.ndarray[Any, Any]


def check_image(path: Path) -> None:
    """Read a picture, whatever it shows."""
    read_image(path, height=64, width=64, crf=0)


def _noise(height: int, width: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _quarters(height: int = 32, width: int = 64) -> Pixels:
    """Red, green over blue, white."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for place, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        row, column = divmod(place, 2)
        pixels[row * height // 2 : (row + 1) * height // 2, column * width // 2 : (column + 1) * width // 2] = colour
    return pixels


def _save(path: Path, pixels: Pixels, codec: str, pix_fmt: str, **options: str) -> Path:
    """Write one picture as a stream of ``codec`` without a container."""
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream: Any = container.add_stream(codec, rate=1, options=options)
        stream.height, stream.width, stream.pix_fmt = pixels.shape[0], pixels.shape[1], pix_fmt
        source = "rgba" if pixels.shape[2] == 4 else "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format=source).reformat(format=pix_fmt)))
        container.mux(stream.encode(None))
    return path


def _png(path: Path, pixels: Pixels) -> Path:
    return _save(path, pixels, "png", "rgba" if pixels.shape[2] == 4 else "rgb24")


def _blank_png(width: int, height: int) -> bytes:
    """A grey picture of one bit per pixel: 16 000 x 16 000 are 31 kB."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _with_orientation(jpeg: bytes, orientation: int) -> bytes:
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    content = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def _in_range(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels).float().permute(2, 0, 1) / 127.5 - 1.0


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    pixels = _noise(48, 80)
    image = read_image(_png(tmp_path / "a.png", pixels), height=48, width=80, crf=0)
    assert image.shape == (1, 3, 1, 48, 80)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image[0, :, 0], _in_range(pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "options", "tolerance"),
    [
        ("mjpeg", "yuvj444p", {"qmin": "1", "qmax": "1"}, 6),
        ("libwebp", "yuv420p", {"quality": "100"}, 8),
        ("bmp", "bgr24", {}, 0),
        ("tiff", "rgb24", {}, 0),
        ("png", "rgb48be", {}, 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats(codec: str, pix_fmt: str, options: dict[str, str], tolerance: int, tmp_path: Path) -> None:
    """Colours away from the edges; no name helps to recognise the format."""
    path = _save(tmp_path / "picture", _quarters(), codec, pix_fmt, **options)
    check_image(path)
    image = read_image(path, height=32, width=64, crf=0)
    for row, column, colour in ((8, 16, RED), (8, 48, GREEN), (24, 16, BLUE), (24, 48, WHITE)):
        found = (image[0, :, 0, row, column] + 1) * 127.5
        assert (found - torch.tensor(colour)).abs().max() <= tolerance + 1e-3


@pytest.mark.parametrize(("codec", "pix_fmt"), [("png", "rgba"), ("libwebp", "bgra")])
def test_transparency_is_dropped(codec: str, pix_fmt: str, tmp_path: Path) -> None:
    pixels = np.concatenate([_quarters(), np.full((32, 64, 1), 40, dtype=np.uint8)], axis=2)
    path = _save(tmp_path / "picture", pixels, codec, pix_fmt, **({"lossless": "1"} if codec == "libwebp" else {}))
    image = read_image(path, height=32, width=64, crf=0)
    torch.testing.assert_close(image[0, :, 0], _in_range(pixels[..., :3]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_a_cameras_rotation_is_undone(orientation: int, turns: int, tmp_path: Path) -> None:
    plain = _save(tmp_path / "plain.jpg", _quarters(), "mjpeg", "yuvj444p", qmin="1", qmax="1")
    path = tmp_path / "turned.jpg"
    path.write_bytes(_with_orientation(plain.read_bytes(), orientation))
    upright = np.rot90(_quarters(), turns).copy()
    image = read_image(path, height=upright.shape[0], width=upright.shape[1], crf=0)
    assert (image[0, :, 0] - _in_range(upright)).abs().mean() < 0.02


SIZES = [(48, 80), (80, 48), (33, 57), (200, 300), (31, 500), (64, 64), (2, 2), (100, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("wanted", [(64, 64), (64, 96), (96, 32)], ids=str)
def test_scaled_to_cover_and_cropped_in_the_middle(
    size: tuple[int, int], wanted: tuple[int, int], tmp_path: Path
) -> None:
    pixels = _noise(*size)
    image = read_image(_png(tmp_path / "a.png", pixels), height=wanted[0], width=wanted[1], crf=0)
    scale = max(wanted[0] / size[0], wanted[1] / size[1])
    scaled = functional.interpolate(
        _in_range(pixels)[None],
        size=[math.ceil(size[0] * scale), math.ceil(size[1] * scale)],
        mode="bilinear",
        align_corners=False,
    )
    top, left = (scaled.shape[2] - wanted[0]) // 2, (scaled.shape[3] - wanted[1]) // 2
    expected = scaled[0, :, top : top + wanted[0], left : left + wanted[1]]
    torch.testing.assert_close(image[0, :, 0], expected, rtol=0, atol=2e-4)


def test_a_narrow_picture_is_not_scaled_whole(tmp_path: Path) -> None:
    """16 384 x 2 pixels that cover 1024 x 64 would be 8 million columns: 96 GB."""
    path = tmp_path / "a.png"
    path.write_bytes(_blank_png(16384, 2))
    image = read_image(path, height=1024, width=64, crf=33)
    assert image.shape == (1, 3, 1, 1024, 64)
    assert (image + 1).abs().max() < 0.05


def test_compression_grows_with_crf(tmp_path: Path) -> None:
    pixels = _noise(64, 64)
    path = _png(tmp_path / "a.png", pixels)
    images = {crf: read_image(path, height=64, width=64, crf=crf) for crf in (0, 1, 18, 33, 51)}
    errors = [float((image - images[0]).square().mean()) for image in images.values()]
    assert errors[0] == 0
    assert all(errors[place] < errors[place + 1] for place in range(4)), errors
    assert torch.equal(images[33], read_image(path, height=64, width=64, crf=33))


def test_compression_is_that_of_the_reference(tmp_path: Path) -> None:
    """One frame of H.264, preset veryfast, in yuv420p."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    path = _png(tmp_path / "a.png", pixels)

    def through(preset: str) -> Tensor:
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=1, options={"preset": preset, "crf": "33"})
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))
            container.mux(stream.encode(None))
        with av.open(str(tmp_path / "a.mp4")) as container:
            return _in_range(next(container.decode(video=0)).to_ndarray(format="rgb24"))

    image = read_image(path, height=64, width=64, crf=33)[0, :, 0]
    torch.testing.assert_close(image, through("veryfast"), rtol=0, atol=1e-6)
    assert not torch.allclose(image, through("slower"), atol=1e-3)


def test_compression_cuts_an_odd_last_row_and_column(tmp_path: Path) -> None:
    """Black but for a white last row and column."""
    pixels = np.zeros((33, 65, 3), dtype=np.uint8)
    pixels[32:], pixels[:, 64:] = 255, 255
    path = _png(tmp_path / "a.png", pixels)
    assert read_image(path, height=32, width=64, crf=18).max() < -0.95
    assert read_image(path, height=33, width=65, crf=0).max() == 1.0


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.fixture
def _nothing_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No file stays open, and FFmpeg prints nothing."""
    yield
    if sys.platform == "linux":
        opened = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_link(name)]
        assert [path for path in opened if path.startswith(str(tmp_path))] == []
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def _is_link(name: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{name}")


def _read_as_image(path: Path) -> None:
    try:
        read_image(path, height=64, width=64, crf=33)
    except RequestError:
        with pytest.raises(RequestError):
            check_image(path)
        raise
    check_image(path)


def _read_as_video(path: Path) -> None:
    read_video(path, height=64, width=64, num_frames=9, frame_rate=24.0)


def _read_as_audio(path: Path) -> None:
    read_audio(path, seconds=0.375)


READERS = {"image": _read_as_image, "video": _read_as_video, "audio": _read_as_audio}


def _refused(reader: Callable[[Path], None], path: Path, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        reader(path)
    text = str(caught.value)
    assert str(path) in text
    assert text.endswith(".")
    assert len(text.removeprefix(str(path)).replace(str(path), "").split(". ")) <= 2, text


def _truncated_png() -> bytes:
    return _blank_png(4000, 4000)[:1000]


def _jpeg(tmp_path: Path) -> bytes:
    return _save(tmp_path / "whole.jpg", _noise(256, 256), "mjpeg", "yuvj420p").read_bytes()


BROKEN: list[tuple[str, Callable[[Path], bytes]]] = [
    ("cut.png", lambda _: _truncated_png()),
    ("cut.jpg", lambda folder: _jpeg(folder)[:20_000]),
    ("flipped.png", lambda folder: _flipped(_png(folder / "whole.png", _noise(64, 64)).read_bytes())),
    ("text.png", lambda _: b"hello world\n" * 100),
    ("text.txt", lambda _: b"hello world\n" * 100),
    ("note.nfo", lambda _: b"hello world\n" * 100),
    ("noise.jpg", lambda _: np.random.default_rng(0).bytes(4000)),
    ("magic.png", lambda _: b"\x89PNG\r\n\x1a\n"),
    ("magic.jpg", lambda _: b"\xff\xd8\xff\xe0"),
    ("zeros.mp4", lambda _: bytes(10_000)),
    ("huge.png", lambda _: _blank_png(40_000, 10_000)),
    ("words.vtt", lambda _: b"WEBVTT\n\n00:00.000 --> 00:10.000\nhello\n"),
]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.usefixtures("_nothing_stays")
@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(("name", "content"), BROKEN, ids=[name for name, _ in BROKEN])
def test_what_is_damaged_or_something_else_is_refused(
    kind: str, name: str, content: Callable[[Path], bytes], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content(tmp_path))
    _refused(READERS[kind], path, "cannot be decoded|holds no|pixels")


@pytest.mark.usefixtures("_nothing_stays")
@pytest.mark.parametrize("kind", READERS)
def test_what_is_not_there_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("absent.png", "does not exist. Check"),
        ("folder.png", "is not a file"),
        ("pipe.png", "is not a file"),
        ("empty.png", "is empty"),
        ("x" * 300, "cannot be read: File name too long|does not exist"),
        ("nul\0.png", "does not exist"),
    ):
        _refused(READERS[kind], tmp_path / name, message)

    secret, opening = tmp_path / "secret.png", os.open

    def refuse(path: Any, *arguments: Any, **keys: Any) -> int:  # root may read everything
        if path == secret:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opening(path, *arguments, **keys)

    secret.write_bytes(_blank_png(8, 8))
    monkeypatch.setattr(os, "open", refuse)
    _refused(READERS[kind], secret, "cannot be read: Permission denied")


@pytest.mark.usefixtures("_nothing_stays")
def test_a_file_without_the_stream_is_refused(tmp_path: Path) -> None:
    _wav(tmp_path / "sound.wav", np.zeros((1, 1000), dtype=np.int16), 16000)
    _movie(tmp_path / "silent.mov", [Fraction(place, 24) for place in range(9)])
    _refused(_read_as_image, tmp_path / "sound.wav", "holds no picture. Give a PNG")
    _refused(_read_as_video, tmp_path / "sound.wav", "holds no picture. Give an MP4")
    _refused(_read_as_audio, tmp_path / "silent.mov", "holds no sound. Give a WAV")


@pytest.mark.usefixtures("_nothing_stays")
def test_several_pictures_are_refused(tmp_path: Path) -> None:
    """As HEIC files come: the first would be a tile."""
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        streams: list[Any] = [container.add_stream("png", rate=24) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 32, 64, "rgb24"
        for stream in streams:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_quarters(), format="rgb24")))
            container.mux(stream.encode(None))
    _refused(_read_as_image, path, "holds 2 pictures; it must hold one")


@pytest.mark.usefixtures("_nothing_stays")
@pytest.mark.parametrize("kind", READERS)
def test_a_codec_that_is_not_known_is_refused(kind: str, tmp_path: Path) -> None:
    """A sound whose format has no decoder, and a picture."""
    sound, picture = tmp_path / "a.wav", tmp_path / "a.mov"
    content = bytearray(_wav(sound, np.zeros((1, 1000), dtype=np.int16), 16000).read_bytes())
    content[20:22] = b"\x34\x12"
    sound.write_bytes(content)
    _refused(READERS[kind], sound, "decoded|holds no picture")
    content = bytearray(_movie(picture, [Fraction(0)]).read_bytes())
    place = content.index(b"png ")
    content[place : place + 4] = b"zzzz"
    picture.write_bytes(content)
    _refused(READERS[kind], picture, "decoded|holds no sound")


@pytest.mark.usefixtures("_nothing_stays")
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_bomb_is_not_decoded(hidden: bool, kind: str, tmp_path: Path) -> None:
    """Nor looked into for its size, which would be in the message; also where a container says that it is small."""
    content, path = _blank_png(16_000, 16_000), tmp_path / "bomb.png"
    path.write_bytes(content)
    if hidden:
        path = tmp_path / "bomb.mov"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("png", rate=24)
            stream.height, stream.width, stream.pix_fmt = 64, 64, "rgb24"
            container.start_encoding()
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 24)
            container.mux(packet)
    _refused(READERS[kind], path, "cannot be decoded .* too large")


@pytest.mark.usefixtures("_nothing_stays")
def test_sizes_are_limited_by_the_header(tmp_path: Path) -> None:
    """A film strip whose container says how large its frames are; and a picture that is too small to compress."""
    path = tmp_path / "wide.mov"
    _movie(path, [Fraction(0)], pixels=np.zeros((2, 16_400, 3), dtype=np.uint8))
    _refused(_read_as_image, path, "16400 x 2 pixels; each side must have 2 to 16384")
    path = tmp_path / "dot.png"
    path.write_bytes(_blank_png(1, 1))
    _refused(_read_as_image, path, "1 x 1 pixels")


@pytest.mark.usefixtures("_nothing_stays")
@pytest.mark.parametrize("kind", READERS)
def test_a_file_opens_no_other(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _movie(tmp_path / "secret.mov", [Fraction(place, 24) for place in range(9)])
    lists = {
        "list.ffconcat": "ffconcat version 1.0\nfile 'secret.mov'\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nsecret.mov\n#EXT-X-ENDLIST\n",
        "list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path}/secret.mov\n#EXT-X-ENDLIST\n",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    }
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
        _refused(READERS[kind], tmp_path / name, "cannot be decoded")


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    """FFmpeg takes %03d in a name for a series of files."""
    path = _png(tmp_path / "plain.png", _quarters()).rename(tmp_path / "a%03d.png")
    check_image(path)


# --- videos -----------------------------------------------------------------------------------------------------------


def _shade(place: int) -> int:
    return 5 + 2 * place


def _movie(path: Path, times: list[Fraction], *, pixels: Pixels | None = None, turned: int = 0) -> Path:
    """Write lossless frames at ``times``; frame i is grey, as bright as ``_shade`` says."""
    with av.open(str(path), "w") as container:
        lossless = ("png", "rgb24") if path.suffix == ".mov" else ("ffv1", "bgr0")
        stream: Any = container.add_stream(lossless[0], rate=24)
        size = (32, 64) if pixels is None else pixels.shape[:2]
        stream.height, stream.width, stream.pix_fmt = size[0], size[1], lossless[1]
        stream.codec_context.time_base = Fraction(1, 120_000)
        if turned:
            stream.set_display_rotation(turned)
        for place, at in enumerate(times):
            shown = np.full((*size, 3), _shade(place), dtype=np.uint8) if pixels is None else pixels
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24").reformat(format=lossless[1])
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(at / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _shown(path: Path, num_frames: int, frame_rate: float) -> list[int]:
    """Which frame of the file each frame is."""
    video = read_video(path, height=32, width=64, num_frames=num_frames, frame_rate=frame_rate)
    assert video.shape == (1, 3, num_frames, 32, 64)
    assert video.dtype == torch.float32
    assert torch.equal(video, video[:, :, :, :1, :1].expand_as(video))
    return [round(float(((video[0, 0, place, 0, 0] + 1) * 127.5 - 5) / 2)) for place in range(num_frames)]


@pytest.mark.parametrize("frame_rate", [24.0, 25.0, 23.976, 12.0, 48.0, 7.5])
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60), Fraction(10)])
def test_each_frame_is_the_nearest_in_time(rate: Fraction, frame_rate: float, tmp_path: Path) -> None:
    times = [place / rate for place in range(80)]
    path = _movie(tmp_path / "a.mov", times)
    num_frames = 9
    found = _shown(path, num_frames, frame_rate)
    for place, index in enumerate(found):
        at = place / frame_rate
        distances = [abs(float(time) - at) for time in times]
        assert distances[index] == pytest.approx(min(distances), abs=2e-5), (place, index)
    assert found[0] == 0


def test_irregular_times(tmp_path: Path) -> None:
    times = [Fraction(ticks, 24) for ticks in (10, 11, 15, 16, 20, 21, 22)]
    path = _movie(tmp_path / "a.mov", times)
    # Counted from the file's first frame these are 0, 1, 5, 6, 10, 11, 12. Halfway, at 3 and 8, the later one is taken.
    assert _shown(path, 12, 24.0) == [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5]


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
def test_a_video_may_be_just_long_enough(suffix: str, tmp_path: Path) -> None:
    path = _movie(tmp_path / f"a{suffix}", [Fraction(place, 24) for place in range(17)])
    assert _shown(path, 17, 24.0) == list(range(17))
    message = r"lasts 0\.7\d seconds; 25 frames at 24 per second take 1\.04\. Ask for fewer"
    with pytest.raises(RequestError, match=message):
        _shown(path, 25, 24.0)
    with pytest.raises(RequestError, match=r"take 1\.42"):
        _shown(path, 17, 12.0)


def test_a_damaged_video_is_refused(tmp_path: Path) -> None:
    """But its damaged end does not matter to a clip that ends before it."""
    path = _movie(tmp_path / "a.mov", [Fraction(place, 24) for place in range(9)], pixels=_noise(32, 64))
    content = path.read_bytes()
    path.write_bytes(content[:40_000] + bytes(1000) + content[41_000:])
    _refused(_read_as_video, path, "cannot be decoded")
    read_video(path, height=32, width=64, num_frames=5, frame_rate=24.0)


def test_made_up_frames_are_refused(tmp_path: Path) -> None:
    """FFmpeg fills a hole in a frame from its neighbours, and says so."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 128, 128, "yuv420p"
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_noise(128, 128), format="rgb24")))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    _read_as_video(path)
    for place in range(1000, len(whole) - 1000, 500):
        path.write_bytes(whole[:place] + bytes(20) + whole[place + 20 :])
        try:
            with av.open(str(path)) as container:
                made_up = any(frame.is_corrupt for frame in container.decode(video=0))
        except av.FFmpegError:
            continue
        if made_up:
            _refused(_read_as_video, path, "a damaged frame")
            return
    pytest.fail("no damage was found that FFmpeg mends")


def test_a_still_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"lasts 0\.\d\d seconds; 9 frames"):
        _read_as_video(_png(tmp_path / "a.png", _quarters()))


@pytest.mark.parametrize(("turned", "turns"), [(90, 1), (-90, 3), (180, 2)])
def test_a_turned_video_is_shown_upright(turned: int, turns: int, tmp_path: Path) -> None:
    times = [Fraction(place, 24) for place in range(2)]
    path = _movie(tmp_path / "a.mov", times, pixels=_quarters(), turned=turned)
    upright = np.rot90(_quarters(), turns).copy()
    video = read_video(path, height=upright.shape[0], width=upright.shape[1], num_frames=1, frame_rate=24.0)
    assert torch.equal(video[0, :, 0], _in_range(upright))


def test_frames_without_times(tmp_path: Path) -> None:
    """A bare H.264 stream."""
    path = tmp_path / "a.h264"
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "0", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for place in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), _shade(place), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = read_video(path, height=32, width=64, num_frames=9, frame_rate=25.0)
    shades = ((video[0, 0, :, 0, 0] + 1) * 127.5).tolist()
    assert shades == pytest.approx([_shade(place) for place in range(9)], abs=1.5)


def test_a_written_clip_is_read_back(tmp_path: Path) -> None:
    """Colours too: the file says that they are those of BT.709."""
    frames = torch.zeros(9, 64, 96, 3)
    frames[:, :, :32, 0] = frames[:, :, 32:64, 1] = frames[:, :, 64:, 2] = 1.0
    tone = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(18000) / 48000).expand(2, -1)
    clip = Clip(
        frames=iter([frames]), num_frames=9, height=64, width=96, frame_rate=24.0, waveform=tone, sample_rate=48000
    )
    path = tmp_path / "clip.mp4"
    write_clip(clip, path)
    video = read_video(path, height=64, width=96, num_frames=9, frame_rate=24.0)
    centres = (video[0, :, :, 32, 16::32] + 1) / 2
    assert (centres - torch.eye(3)[:, None]).abs().max() < 0.03
    waveform, rate = read_audio(path, seconds=0.375)
    assert (waveform.shape, rate) == ((2, 18000), 48000)
    assert (waveform - tone)[:, 2000:16000].norm() < 0.06 * tone[:, 2000:16000].norm()


# --- sound ------------------------------------------------------------------------------------------------------------


def _wav(path: Path, samples: Pixels, rate: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.astype("<i2").tobytes())
    return path


def _encoded(path: Path, samples: Tensor, codec: str, layout: str, sample_format: str = "fltp") -> Path:
    """Encode samples at 48 kHz."""
    if sample_format == "s32":
        samples = (samples * 2**31).to(torch.int32)
    if not sample_format.endswith("p"):
        samples = samples.T.contiguous().view(1, -1)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=48000)
        stream.codec_context.layout, stream.codec_context.format = layout, sample_format
        frame = av.AudioFrame.from_ndarray(samples.numpy(), format=sample_format, layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _tones(hertz: tuple[float, ...], samples: int) -> Tensor:
    at = torch.arange(samples) / 48000
    return torch.stack([0.3 * torch.sin(2 * math.pi * f * at) for f in hertz])


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_samples_are_those_of_the_file(rate: int, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, (2, rate), dtype=np.int16)
    waveform, found = read_audio(_wav(tmp_path / "a.wav", samples, rate), seconds=0.375)
    assert found == rate
    assert waveform.dtype == torch.float32
    assert torch.equal(waveform, torch.from_numpy(samples[:, : round(0.375 * rate)] / 32768).float())
    whole, _ = read_audio(tmp_path / "a.wav", seconds=1.0)
    assert torch.equal(whole, torch.from_numpy(samples / 32768).float())


def test_one_channel_is_heard_on_both_sides(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, (1, 16000), dtype=np.int16)
    waveform, _ = read_audio(_wav(tmp_path / "a.wav", samples, 16000), seconds=1.0)
    assert torch.equal(waveform, torch.from_numpy(samples / 32768).float().repeat(2, 1))


@pytest.mark.parametrize(
    ("name", "codec", "sample_format"),
    [("a.flac", "flac", "s32"), ("a.wav", "pcm_f32le", "flt"), ("a.m4a", "aac", "fltp")],
)
def test_six_channels_are_mixed_down(name: str, codec: str, sample_format: str, tmp_path: Path) -> None:
    """Left and right keep to their sides, the centre is heard on both."""
    tones = _tones((300.0, 500.0, 700.0, 0.0, 0.0, 0.0), 24000)
    path = _encoded(tmp_path / name, tones, codec, "5.1", sample_format)
    waveform, _ = read_audio(path, seconds=0.5)
    assert waveform.shape == (2, 24000)
    assert bool(waveform[:, -100:].any())
    spectrum = torch.fft.rfft(waveform[:, 4800:19200]).abs() / 7200
    left, right, centre = (spectrum[:, round(hertz * 0.3)] for hertz in (300, 500, 700))
    assert left[0] > 0.05
    assert left[1] < 0.01 * left[0]
    assert right[1] == pytest.approx(float(left[0]), rel=0.05)
    assert right[0] < 0.01 * right[1]
    assert centre[0] == pytest.approx(float(centre[1]), rel=0.05)
    assert 0.5 < centre[0] / left[0] < 0.9


@pytest.mark.parametrize(
    ("name", "codec", "sample_format"),
    [("a.mp3", "libmp3lame", "fltp"), ("a.m4a", "aac", "fltp"), ("a.flac", "flac", "s32"), ("a.ogg", "libopus", "flt")],
)
def test_compressed_sound_is_not_shifted(name: str, codec: str, sample_format: str, tmp_path: Path) -> None:
    tones = _tones((440.0, 660.0), 48000)
    path = _encoded(tmp_path / name, tones, codec, "stereo", sample_format)
    waveform, rate = read_audio(path, seconds=0.8)
    assert rate == 48000
    span = slice(4800, 33600)
    assert (waveform - tones[:, : waveform.shape[1]])[:, span].norm() < 0.06 * tones[:, span].norm()


@pytest.mark.parametrize("channels", [3, 4, 6])
def test_channels_without_a_place(channels: int, tmp_path: Path) -> None:
    """The header does not say which loudspeakers they are for."""
    samples = np.random.default_rng(0).integers(-9000, 9000, (channels, 16000), dtype=np.int16)
    waveform, _ = read_audio(_wav(tmp_path / "a.wav", samples, 16000), seconds=1.0)
    assert waveform.shape == (2, 16000)
    for side in range(2):
        assert np.corrcoef(waveform[side].numpy(), samples[side])[0, 1] > 0.5


@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_sound_that_needs_no_conversion_may_end_early(layout: str, tmp_path: Path) -> None:
    tones = _tones((440.0, 660.0), 24000)[: 1 if layout == "mono" else 2]
    path = _encoded(tmp_path / "a.m4a", tones, "aac", layout)
    waveform, _ = read_audio(path, seconds=1.0)
    assert waveform.shape == (2, 48000)
    assert (waveform[:, 4800:19200] - tones[:, 4800:19200]).norm() < 0.1 * tones[:, 4800:19200].norm() * 2**0.5
    assert not waveform[:, 26000:].any()


def test_what_is_missing_is_silent_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = np.full((2, 8000), 16384, dtype=np.int16)
    path = _wav(tmp_path / "a.wav", samples, 16000)
    with caplog.at_level(logging.WARNING):
        waveform, _ = read_audio(path, seconds=1.25)
    assert waveform.shape == (2, 20000)
    assert (waveform[:, :8000] == 0.5).all()
    assert not waveform[:, 8000:].any()
    assert [record.getMessage() for record in caplog.records] == [
        f"The sound of {path} lasts 0.50 seconds, the clip 1.25: silence follows."
    ]
    caplog.clear()
    read_audio(path, seconds=0.5)
    assert not caplog.records


def test_a_title_in_another_encoding_does_no_harm(tmp_path: Path) -> None:
    path = _wav(tmp_path / "a.wav", np.zeros((1, 16000), dtype=np.int16), 16000)
    path.write_bytes(path.read_bytes() + b"LIST\x12\0\0\0INFOINAM\x05\0\0\0caf\xe9\0\0")
    read_audio(path, seconds=0.5)


@pytest.mark.usefixtures("_nothing_stays")
def test_sounds_that_are_refused(tmp_path: Path) -> None:
    _refused(_read_as_audio, _wav(tmp_path / "none.wav", np.zeros((2, 0), dtype=np.int16), 16000), "no samples|decoded")
    _refused(_read_as_audio, _wav(tmp_path / "fast.wav", np.zeros((1, 9), dtype=np.int16), 10**9), "samples per second")
    _refused(_read_as_audio, _wav(tmp_path / "slow.wav", np.zeros((1, 9), dtype=np.int16), 10), "samples per second")
    path = tmp_path / "nan.wav"
    content = np.array([0.0, np.nan] * 8000, dtype="<f4").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(content), b"WAVE", b"fmt ", 16, 3, 1, 16000, 64000, 4,
                         32, b"data", len(content))  # fmt: skip
    path.write_bytes(header + content)
    _refused(_read_as_audio, path, "not finite")


SIGNATURES = [
    b"GIF89a", b"BM", b"II*\0", b"RIFF\x10\0\0\0WEBPVP8 ", b"RIFF\x10\0\0\0AVI LIST", b"RIFF\x10\0\0\0WAVEfmt ",
    b"OggS\0\x02", b"fLaC\0\0\0\x22", b"ID3\x04\0\0\0\0\0\0\xff\xfb\x90", b"\x1aE\xdf\xa3\x01", b"FLV\x01\x05",
    b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", b"G" * 188, b"#!AMR\n",
    b"FORM\0\0\x10\0AIFF",
    b"\x76\x2f\x31\x01", b"P6\n64 64\n255\n", b"qoif\0\0\0\x40\0\0\0\x40\x03\0", b"\0\0\0\x0cjP  \r\n\x87\n",
]  # fmt: skip


@pytest.mark.usefixtures("_nothing_stays")
@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: repr(signature[:12]))
def test_a_signature_before_noise(kind: str, signature: bytes, tmp_path: Path) -> None:
    """Whatever PyAV takes it for, nothing but RequestError comes out."""
    path = tmp_path / "a"
    path.write_bytes(signature + np.random.default_rng(0).bytes(3000))
    try:
        READERS[kind](path)
    except RequestError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_bytes_after_the_picture_do_no_harm(tmp_path: Path) -> None:
    """Some cameras append a film, and some programs a thumbnail."""
    path = tmp_path / "a.jpg"
    path.write_bytes(_jpeg(tmp_path) + bytes(1000))
    check_image(path)
    path.write_bytes(_png(tmp_path / "b.png", _quarters()).read_bytes() + bytes(1000))
    check_image(path)
