"""The demo checkpoint. Oracles: names and shapes of golden files in the published layout; a load that must use every
tensor; a run from prompt to clip; and PyAV's decoder."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ltx_sp import demo
from ltx_sp.decode import decode
from ltx_sp.demo import VERSIONS, main, write_demo
from ltx_sp.encode import encode_prompts
from ltx_sp.errors import RequestError
from ltx_sp.handoff import Latents
from ltx_sp.model import upstream
from ltx_sp.model.dit import Transformer
from ltx_sp.upsample import upsample
from ltx_sp.weights.checkpoint import Checkpoint, open_checkpoint
from ltx_sp.weights.load import load

CPU = torch.device("cpu")


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module", params=VERSIONS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = write_demo(tmp_path_factory.mktemp("demo") / "here", request.param)
    assert path.name == f"ltx-{request.param}-demo.safetensors"
    return open_checkpoint(path, path.parent / "gemma", path.parent / "upsampler.safetensors")


def test_2_3_has_the_names_and_shapes_of_a_published_checkpoint(golden: Path, tmp_path: Path) -> None:
    ours = _header(write_demo(tmp_path))
    theirs = _header(golden / "pipeline-2.3" / "ltx-2.3.safetensors")
    metadata = ours.pop("__metadata__")
    theirs.pop("__metadata__")
    assert {name: entry["shape"] for name, entry in ours.items()} == {n: entry["shape"] for n, entry in theirs.items()}
    assert {entry["dtype"] for entry in ours.values()} == {"BF16"}
    assert metadata["model_version"] == "2.3.0"


@pytest.mark.parametrize("name", ["upsampler.safetensors", "distilled_lora.safetensors"])
def test_what_lies_beside_2_3_has_the_names_and_shapes_of_a_published_one(
    name: str, golden: Path, tmp_path: Path
) -> None:
    ours, theirs = _header(write_demo(tmp_path).with_name(name)), _header(golden / "pipeline-2.3" / name)
    metadata, expected = ours.pop("__metadata__"), theirs.pop("__metadata__")
    if "config" in expected:
        assert json.loads(metadata["config"]) == json.loads(expected["config"])
    assert {name: entry["shape"] for name, entry in ours.items()} == {n: entry["shape"] for n, entry in theirs.items()}
    assert {entry["dtype"] for entry in ours.values()} == {"BF16"}


def test_the_lora_changes_every_linear_weight_of_the_blocks_a_little(checkpoint: Checkpoint) -> None:
    weights = load_file(checkpoint.path)
    factors = load_file(checkpoint.path.with_name("distilled_lora.safetensors"))
    targets = {name.rpartition(".lora_")[0] for name in factors}
    blocks = "model.diffusion_model.transformer_blocks."
    linear = {name for name, tensor in weights.items() if name.startswith(blocks) and name.endswith(".weight")}
    linear = {name for name in linear if weights[name].ndim == 2}
    assert {f"model.{target}.weight" for target in targets} == linear
    for target in targets:
        up, down = (factors[f"{target}.lora_{side}.weight"].float() for side in "BA")
        assert up.shape[1] == down.shape[0] == 4
        assert 0.05 < (up @ down).norm() / weights[f"model.{target}.weight"].float().norm() < 0.8


def test_the_picture_is_one(checkpoint: Checkpoint) -> None:
    path = checkpoint.path.with_name("image.png")
    with av.open(path) as file:
        (frame,) = file.decode(video=0)
    assert frame.format.name == "rgb24"
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).float()
    assert pixels.shape == (192, 256, 3)
    assert pixels[73, 128].tolist() == [255.0, 230.0, 120.0]  # the sun
    assert len(pixels.flatten(0, 1).unique(dim=0)) > 100
    content, kinds = path.read_bytes()[8:], []
    while content:  # stricter readers than this one refuse a chunk whose checksum is wrong
        end = 8 + int.from_bytes(content[:4], "big")
        assert int.from_bytes(content[end : end + 4], "big") == zlib.crc32(content[4:end])
        kinds.append(content[4:8])
        content = content[end + 4 :]
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


def test_every_tensor_is_loaded_and_the_clip_is_sane(checkpoint: Checkpoint) -> None:
    spec, gemma_config = checkpoint.spec, checkpoint.gemma_config
    with torch.device("meta"):
        transformer = Transformer(spec.transformer)
    modules: dict[str, nn.Module] = {
        "transformer": transformer,
        "text_encoder": upstream.build_text_encoder(gemma_config),
        "connectors": upstream.build_connectors(spec, gemma_config),
        "video_vae": upstream.build_video_vae(spec),
        "audio_vae": upstream.build_audio_vae(spec),
        "vocoder": upstream.build_vocoder(spec),
        "upsampler": upstream.build_upsampler(checkpoint.upsampler_config),
    }
    loaded = 0
    for component, module in modules.items():
        dtype = torch.float32 if component == "vocoder" else torch.bfloat16
        report = load(
            module,
            checkpoint.index(component),
            checkpoint.keymap(component),
            device=CPU,
            dtype=dtype,
            component=component,
        )
        assert report.unexpected == ()
        loaded += report.num_tensors
    assert checkpoint.upsampler_path is not None
    files = (checkpoint.path, checkpoint.gemma_root / "model.safetensors", checkpoint.upsampler_path)
    assert loaded == sum(len(_header(file).keys() - {"__metadata__"}) for file in files)

    (context,) = encode_prompts(
        ["a robot"],
        tokenizer=upstream.load_tokenizer(checkpoint.tokenizer_root),
        text_encoder=modules["text_encoder"],
        connectors=modules["connectors"],
        device=CPU,
    )
    widths = (spec.transformer.caption_channels,) * 2 if spec.version < (2, 3) else (64, 32)
    assert (context.video.shape[-1], context.audio.shape[-1]) == widths
    assert context.video.float().std() == pytest.approx(1.0, abs=0.05)

    video = upsample(torch.randn(1, 128, 2, 2, 2), upsampler=modules["upsampler"], video_vae=modules["video_vae"])
    assert 0.2 < video.std() < 2.0
    latents = Latents(torch.randn(1, 128, 2, 4, 4), torch.randn(1, 8, 9, 16))
    clip = decode(
        latents,
        video_vae=modules["video_vae"],
        audio_vae=modules["audio_vae"],
        vocoder=modules["vocoder"],
        frame_rate=24.0,
    )
    frames = torch.cat(list(clip.frames))
    assert frames.shape == (9, 128, 128, 3)
    assert 0.1 < frames.std() < 0.4  # neither grey nor saturated
    assert clip.sample_rate == (24000 if spec.version < (2, 3) else 48000)
    assert clip.waveform.shape == (2, 33 * clip.sample_rate // 100)
    assert 0.001 < clip.waveform.std() < 0.2


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo(tmp_path / folder, seed=seed)
    first, second, third = (_digests(tmp_path / folder) for folder in "abc")
    assert first == second
    assert sorted(first) == sorted(third)
    name = "ltx-2.3-demo.safetensors"
    assert first[name] != third[name]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="not an empty folder"):
        write_demo(tmp_path)
    with pytest.raises(RequestError, match="not an empty folder"):
        write_demo(tmp_path / "mine.txt")
    with pytest.raises(RequestError, match=r"no demo of version '2\.5'"):
        write_demo(tmp_path / "new", "2.5")
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_tokenizer", interrupted)  # asked for after the weights are written
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo")
    assert os.listdir(tmp_path) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x" / "demo"
    assert main([str(folder), "--version", "2.0"]) == 0
    printed = capsys.readouterr().out
    for path in folder.iterdir():
        assert printed.count(f" {path}\n") == 1
    assert main([str(folder)]) == RequestError.exit_code
    assert "not an empty folder" in capsys.readouterr().err
