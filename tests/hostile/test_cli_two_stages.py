"""What may be wrong with two stages, and with pictures, sounds and videos that are given: one sentence, no trace."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_sp import GuidanceRequest, Lora, LtxSpError, Request, Runtime, Settings, WeightsError, components
from ltx_sp.demo import write_demo
from ltx_sp.weights.lora import LoraMerger
from tests.hostile.test_cli_errors import NAME, edit_header
from tests.support.commands import Outcome, Prepare, Value, arguments, assert_fails_cleanly, run_main
from tests.support.ranks import run_ranks
from tests.support.sets import MODES
from tests.unit.test_read import _blank_png


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo checkpoint with all its files, good and bad."""
    folder = write_demo(tmp_path_factory.mktemp("inputs") / "2.3").parent
    (folder / "folder.safetensors").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "text.png").write_text("Not a picture, nor a sound.\n" * 100)
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:-300])
    (folder / "wide.png").write_bytes(_blank_png(20_000, 16))
    (folder / "bomb.png").write_bytes(_blank_png(16_000, 16_000))
    factors = load_file(folder / "distilled_lora.safetensors")
    _write_loras(folder, factors)
    for name, source in (("cut_lora", "distilled_lora"), ("cut_upsampler", "upsampler")):
        data = (folder / f"{source}.safetensors").read_bytes()
        (folder / f"{name}.safetensors").write_bytes(data[:-5])
    upsamplers: dict[str, dict[str, object]] = {
        "temporal": {"spatial_upsample": False, "temporal_upsample": True},
        "larger": {"spatial_scale": 1.5},
        "resampling": {"rational_resampler": True},
    }
    for name, changes in upsamplers.items():
        shutil.copy(folder / "upsampler.safetensors", folder / f"{name}.safetensors")
        edit_header(folder / f"{name}.safetensors", functools.partial(_edit_config, changes))
    _write_sound(folder / "sound.wav")
    _write_movie(folder / "short.mp4", "mpeg4", "yuv420p", num_frames=4)
    _write_movie(folder / "clip.mp4", "mpeg4", "yuv420p", num_frames=12)
    _write_movie(folder / "many.gif", "gif", "rgb8", num_frames=3)
    return folder


def _write_loras(folder: Path, factors: Mapping[str, Tensor]) -> None:
    first = next(iter(factors))
    wide = {name: torch.cat([tensor] * 2, 1) if ".lora_A." in name else tensor for name, tensor in factors.items()}
    save_file(wide, folder / "of_another.safetensors")
    save_file({name: tensor for name, tensor in factors.items() if name != first}, folder / "unpaired.safetensors")
    renamed = {name.replace("transformer_blocks", "layers"): tensor for name, tensor in factors.items()}
    save_file(renamed, folder / "nothing.safetensors")
    save_file({name: 3 * tensor for name, tensor in factors.items() if ".attn2." in name}, folder / "style.safetensors")


def _edit_config(changes: Mapping[str, object], header: dict[str, Any]) -> None:
    config = json.loads(header["__metadata__"]["config"])
    header["__metadata__"]["config"] = json.dumps(config | changes)


def _write_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes(bytes(2 * 12_000))


def _write_movie(path: Path, codec: str, pix_fmt: str, num_frames: int) -> None:
    """Without a sound, 24 frames per second."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt = 64, 64, pix_fmt
        for shade in range(num_frames):
            pixels = torch.full((64, 64, 3), 20 * shade, dtype=torch.uint8).numpy()
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode(None))


# What the flags of every case are changed from. IN/ stands for the folder of the inputs, OUT for that of the output.
TWO: dict[str, Value] = {
    "--pipeline": "two-stages",
    "--height": 128,
    "--width": 128,
    "--spatial-upsampler-path": "IN/upsampler.safetensors",
    "--distilled-lora": "IN/distilled_lora.safetensors",
}
NO_STG: dict[str, Value] = {"--video-stg-blocks": None, "--audio-stg-blocks": None}
DISTILLED = TWO | NO_STG | {"--pipeline": "distilled", "--distilled-lora": None, "--num-inference-steps": None}
SOUND: dict[str, Value] = {"--audio": "IN/sound.wav", "--audio-stg-blocks": None}
CLIP: dict[str, Value] = {"--video": "IN/clip.mp4", "--video-stg-blocks": None}


def lora(name: str) -> dict[str, Value]:
    return TWO | {"--distilled-lora": f"IN/{name}"}


def upsampler(name: str) -> dict[str, Value]:
    return TWO | {"--spatial-upsampler-path": f"IN/{name}"}


def run_with(
    inputs: Path, output: Path, changes: Mapping[str, Value], words: str, num_ranks: int, prepare: Prepare | None = None
) -> Outcome:
    def place(text: str) -> str:
        return text.replace("IN/", f"{inputs}/").replace("OUT", str(output))

    placed = {flag: place(value) if isinstance(value, str) else value for flag, value in changes.items()}
    argv = arguments(inputs, output / "clip.mp4", placed, *map(place, words.split()))
    return run_main(argv, num_ranks, output.parent / "ranks", prepare)


# What is found before a rank meets another: name -> (flags changed, words at the end, exit code, message).
ARGUMENTS: dict[str, tuple[dict[str, Value], str, int, str]] = {
    "upsampler absent": (upsampler("x.safetensors"), "", 4, "WeightsError: .*/x.safetensors does not exist; .*"),
    "upsampler a folder": (upsampler("folder.safetensors"), "", 4, "WeightsError: .* holds no .safetensors file.*"),
    "upsampler cut": (upsampler("cut_upsampler.safetensors"), "", 4, r"WeightsError: .* ends at byte \d+, its .*"),
    "upsampler a LoRA": (upsampler("distilled_lora.safetensors"), "", 4, "WeightsError: .* a latent upsampler does.*"),
    "upsampler a model": (upsampler(NAME), "", 4, "WeightsError: .*; it must hold a latent upsampler of LTX-2. .*"),
    "upsampler temporal": (upsampler("temporal.safetensors"), "", 6, "UnsupportedError: .*upsampler.* temporal_ups.*"),
    "upsampler by 1.5": (upsampler("larger.safetensors"), "", 6, "UnsupportedError: .* spatial_scale = 1.5; .* 2.0.*"),
    "upsampler incomplete": (upsampler("resampling.safetensors"), "", 4, "WeightsError: .* lacks 2 .* upsampler: .*"),
    "no upsampler": (TWO | {"--spatial-upsampler-path": None}, "", 2, "RequestError: .* two-stages needs a latent .*"),
    "no LoRA": (TWO | {"--distilled-lora": None}, "", 2, "RequestError: .* two-stages needs a distilled LoRA .*"),
    "no LoRA for HQ": (
        TWO | {"--pipeline": "two-stages-hq", "--distilled-lora": None},
        "",
        2,
        r"RequestError: .* two-stages-hq needs a distilled LoRA \(--distilled-lora\), and none is given\. Pass .*",
    ),
    "distilled without": (DISTILLED | {"--spatial-upsampler-path": None}, "", 2, ".* distilled needs a latent ups.*"),
    "LoRA without use": ({}, "--distilled-lora x", 2, "RequestError: .* one-stage has no use for a distilled LoRA .*"),
    "LoRA twice distilled": (DISTILLED, "--distilled-lora x", 2, "RequestError: .* distilled has no use for .*"),
    "upsampler without use": ({}, "--spatial-upsampler-path x", 2, "RequestError: .* no use for a latent upsampler .*"),
    "LoRA nan": (TWO, "--distilled-lora a nan", 2, "RequestError: The strength of the LoRA a is nan; .*"),
    "LoRA with words": (TWO, "--distilled-lora a 1 2", 2, "RequestError: --distilled-lora a 1 2 must be a file, .*"),
    "pipeline": ({"--pipeline": "three"}, "", 2, "RequestError: Argument --pipeline: invalid choice: 'three' .*"),
    "steps that are fixed": (DISTILLED | {"--num-inference-steps": 3}, "", 3, "PlanError: .* own noise levels. .*"),
    "blocks of no use": (DISTILLED, "--video-stg-blocks 0", 3, "PlanError: The video STG blocks .* do nothing. .*"),
    "rescale of no use": (DISTILLED, "--audio-rescale-scale 0.5", 3, "PlanError: .* audio is unguided, .*"),
    "blocks of no use in HQ": (TWO | {"--pipeline": "two-stages-hq"}, "", 3, "PlanError: .* so they do nothing. .*"),
    "height": (TWO | {"--height": 96}, "", 3, r"PlanError: height = 96 .* half size .* of 64 pixels\. Nearest: 128\."),
    "width": (TWO | {"--width": 130}, "", 3, r"PlanError: width = 130 .* multiples of 64 pixels\. Nearest: 128\."),
    "too small": (TWO | {"--width": 32}, "", 3, r"PlanError: width = 32 .* Nearest: 64\."),
    "residency": (TWO | {"--residency": "lots"}, "", 2, "RequestError: Argument --residency: invalid choice: .*"),
    "parallel": (TWO | {"--parallel": "0x2"}, "", 2, "RequestError: parallel is '0x2'; it must be auto, or ranks .*"),
    "too many ranks": (TWO | {"--parallel": "3x2"}, "", 3, "PlanError: parallel is 3x2, .* 6 ranks, and there are .*"),
    "graphs": (TWO | {"--cuda-graph": "on"}, "", 6, "UnsupportedError: cuda_graph is on and the device is cpu; .*"),
    "profile beyond": (TWO, "--profile-steps 2-6", 2, "RequestError: --profile-steps 2-6 goes beyond the 5 steps .*"),
    "profile backwards": (TWO, "--profile-steps 2-1", 2, "RequestError: --profile-steps 2-1 must be two numbers .*"),
    "profile from 0": (TWO, "--profile-steps 0-1", 2, "RequestError: --profile-steps 0-1 must be two numbers .*"),
    "profile on the CPU": (TWO, "--profile-steps 1-2", 2, "RequestError: --profile-steps .* the device is the CPU. .*"),
    "frame beyond": ({}, "--image IN/image.png 9", 2, "RequestError: The image .* at frame 9; .* frames 0 to 8. .*"),
    "frame below 0": ({}, "--image IN/image.png -1", 2, "RequestError: The image .* at frame -1; frames count from 0."),
    "frame in words": ({}, "--image a first", 2, "RequestError: --image a first must be a file, and after it .*"),
    "frame a fraction": ({}, "--image a 1.5", 2, "RequestError: --image a 1.5 must be a file, and after it .*"),
    "frame enormous": ({}, f"--image a {'9' * 30}", 2, "RequestError: The image a is at frame 9+; .*"),
    "too strong": ({}, "--image a 0 1.1", 2, r"RequestError: The strength of the image a is 1.1; it .* 0\.\.1\."),
    "too weak": ({}, "--image a 0 -0.1", 2, "RequestError: The strength of the image a is -0.1; .*"),
    "strength nan": ({}, "--image a 0 nan", 2, "RequestError: The strength of the image a is nan; .*"),
    "two at one frame": ({}, "--image a 4 --image b 4", 2, "RequestError: Several images are at frame 4; .*"),
    "too many words": ({}, "--image a 4 1 b", 2, "RequestError: --image a 4 1 b must be a file, .*"),
    "image without a file": ({}, "--image", 2, "RequestError: Argument --image: expected at least one argument. .*"),
    "crf alone": ({"--image-crf": 0}, "", 2, "RequestError: image_crf is 0 and there is no image; leave it out."),
    "crf too large": ({"--image-crf": 52}, "--image a", 2, r"RequestError: image_crf is 52; it must lie in 0\.\.51\."),
    "crf below 0": ({"--image-crf": -1}, "--image a", 2, "RequestError: image_crf is -1; .*"),
    "video and audio": (CLIP | SOUND, "", 2, "RequestError: A video is given, and an audio file too; .*"),
    "video and image": (CLIP, "--image a", 2, "RequestError: A video is given, and an image too; .*"),
    "video and two stages": (TWO | CLIP, "", 3, "PlanError: A video is given .* Use --pipeline one-stage."),
    "blocks of a given sound": ({"--audio": "IN/sound.wav"}, "", 3, "PlanError: The audio is given and guidance .*"),
    "rescale of a given sound": (SOUND, "--audio-rescale-scale 1", 3, "PlanError: The audio is given and guidance .*"),
    "blocks of a given video": ({"--video": "IN/clip.mp4"}, "", 3, "PlanError: The video is given and guidance .*"),
    "video overwritten": (CLIP | {"--output-path": "IN/clip.mp4"}, "", 2, "R.*: --output-path .* made from. .*"),
    "image overwritten": ({"--output-path": "IN/clip.mp4"}, "--image IN/clip.mp4", 2, ".* is to be made from. .*"),
    "sound overwritten": (SOUND, "--report IN/sound.wav", 2, "RequestError: --report .* is to be made from. .*"),
    "LoRA overwritten": (TWO, "--save-latents IN/distilled_lora.safetensors", 2, ".* is a file of the model .*"),
    "upsampler overwritten": (TWO, "--save-decoded IN/upsampler.safetensors", 2, ".* is a file of the model .*"),
    "report nowhere": (TWO, "--report no/such.json", 2, "RequestError: no/such.json cannot be written: .* Create it.*"),
    "report a folder": (TWO, "--report OUT", 2, "RequestError: .*output is a folder. .*"),
    "report and clip": (TWO, "--report OUT/clip.mp4", 2, "RequestError: --output-path and --report both name .*"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str, inputs: Path, output: Path) -> None:
    changes, words, exit_code, message = ARGUMENTS[name]
    before = {file.name: file.stat().st_mtime_ns for file in inputs.iterdir()}
    assert_fails_cleanly(run_with(inputs, output, changes, words, 1), exit_code, message, output)
    assert {file.name: file.stat().st_mtime_ns for file in inputs.iterdir()} == before


ON_TWO_RANKS = (
    "upsampler cut",
    "upsampler temporal",
    "upsampler incomplete",
    "no LoRA",
    "height",
    "too many ranks",
    "frame beyond",
    "video overwritten",
    "report nowhere",
)


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_arguments_on_two_ranks(name: str, inputs: Path, output: Path) -> None:
    changes, words, exit_code, message = ARGUMENTS[name]
    assert_fails_cleanly(run_with(inputs, output, changes, words, 2), exit_code, message, output)


# What a file holds: name -> (flags changed, words at the end, exit code, message).
FILES: dict[str, tuple[dict[str, Value], str, int, str]] = {
    "LoRA of another model": (
        lora("of_another.safetensors"),
        "",
        4,
        r"WeightsError: .*lora_A\.weight' with shape \[4, 128\] .* has shape \[4, 64\], .* Use a LoRA of this model\.",
    ),
    "LoRA that matches nothing": (
        lora("nothing.safetensors"),
        "",
        4,
        r"WeightsError: .*: 0 weights; 68 skipped, not in this transformer \('diffusion_model\.layers\..*",
    ),
    "LoRA a checkpoint": (lora(NAME), "", 4, f"WeightsError: .*{NAME}.*: 0 weights; .* not recognised .*"),
    "LoRA a picture": (lora("image.png"), "", 4, "WeightsError: .*image.png promises a header of .*"),
    "LoRA absent": (lora("x.safetensors"), "", 4, "WeightsError: .*/x.safetensors does not exist; .*"),
    "LoRA a folder": (lora("folder.safetensors"), "", 4, "WeightsError: .* holds no .safetensors file.*"),
    "LoRA cut": (lora("cut_lora.safetensors"), "", 4, r"WeightsError: .* ends at byte \d+, its header promises .*"),
    "image absent": ({}, "--image IN/x.png", 2, "RequestError: The image file .*/x.png does not exist. Check .*"),
    "image a text": ({}, "--image IN/text.png", 2, "RequestError: The image file .* cannot be decoded .*"),
    "image a folder": ({}, "--image IN/folder.png", 2, "RequestError: The image file .*/folder.png is not a file. .*"),
    "image cut": ({}, "--image IN/cut.png 4", 2, "RequestError: The image file .*/cut.png cannot be decoded .*"),
    "image too wide": ({}, "--image IN/wide.png", 2, "RequestError: The frames of .* have 20000 x 16 pixels; .*"),
    "image a bomb": ({}, "--image IN/bomb.png", 2, "RequestError: .*/bomb.png cannot be decoded .* too large.*"),
    "second image absent": (TWO, "--image IN/image.png --image IN/x.png 4", 2, ".* file .*/x.png does not exist. .*"),
    "audio absent": (SOUND | {"--audio": "IN/x.wav"}, "", 2, "RequestError: The audio file .* does not exist. .*"),
    "audio a text": (SOUND | {"--audio": "IN/text.png"}, "", 2, "RequestError: The audio file .* be decoded .*"),
    "audio without a sound": (SOUND | {"--audio": "IN/clip.mp4"}, "", 2, "RequestError: .* holds no sound. Give .*"),
    "video too short": (CLIP | {"--video": "IN/short.mp4"}, "", 2, "RequestError: .* lasts 0.17 .* take 0.38. Ask .*"),
    "sharded on one rank": (TWO | {"--residency": "sharded"}, "", 3, "PlanError: --residency sharded .* one rank. .*"),
}  # fmt: skip

FILES_ON_TWO_RANKS = ("LoRA of another model", "LoRA that matches nothing", "LoRA cut", "image cut", "video too short")


@pytest.mark.parametrize(
    ("name", "num_ranks"), [*((name, 1) for name in FILES), *((name, 2) for name in FILES_ON_TWO_RANKS)]
)
def test_files(name: str, num_ranks: int, inputs: Path, output: Path) -> None:
    changes, words, exit_code, message = FILES[name]
    assert_fails_cleanly(run_with(inputs, output, changes, words, num_ranks), exit_code, message, output)


def test_what_is_odd_and_no_error(inputs: Path, output: Path) -> None:
    """A LoRA without a partner for one key, which the log counts; a file of several pictures, of which one is shown."""
    outcome = run_with(inputs, output, lora("unpaired.safetensors"), "--image IN/many.gif", 2)
    assert outcome.exit_codes == [0, 0]
    assert os.listdir(output) == ["clip.mp4"]
    assert re.findall(r"LoRA \S+unpaired\.safetensors, strength 1: (.*?) \('", outcome.stderr[0]) == [
        "67 weights; 1 unpaired"
    ]
    assert "unpaired" not in outcome.stderr[1]


# --- memory -----------------------------------------------------------------------------------------------------------


def have_memory(device: float, host: float, only_on: int | None, rank: int) -> None:
    """Pretend that so many MiB are free, on all ranks or one."""
    if only_on in (None, rank):
        setattr(components, "free_bytes", lambda _: int(device * 2**20))  # noqa: B010
        setattr(components, "available_bytes", lambda: int(host * 2**20))  # noqa: B010


ON_THE_DEVICE = r"\d\.\d MiB of weights and \d\.\d MiB to work with on each device, of \d\.\d MiB free"

# The demo's transformer has 0.8 MiB, of which 0.4 differ between the sets.
TIGHT: dict[str, tuple[int, float, float, int | None, str]] = {
    "resident": (1, 1.0, 1.0, None, f"{ON_THE_DEVICE}; --residency legacy would fit. Use that."),
    "snapshot": (1, 1.0, 1.0, None, rf"{ON_THE_DEVICE}; \d\.\d MiB on each host, of 1\.0 MiB free; .* legacy would .*"),
    "snapshot-low-vram": (1, 1.0, 1.0, None, rf"{ON_THE_DEVICE}; \d\.\d MiB on each host, .* legacy would fit. .*"),
    "sharded": (2, 1.0, 100.0, None, f"{ON_THE_DEVICE}; --residency snapshot would fit. Use that."),
    "legacy": (2, 0.5, 100.0, 1, f"{ON_THE_DEVICE}; .*; no other mode would fit either. Make a smaller clip, .*"),
}


@pytest.mark.parametrize("mode", TIGHT)
def test_a_residency_that_does_not_fit(mode: str, inputs: Path, output: Path) -> None:
    num_ranks, device, host, only_on, message = TIGHT[mode]
    prepare = functools.partial(have_memory, device, host, only_on)
    outcome = run_with(inputs, output, TWO | {"--residency": mode}, "", num_ranks, prepare)
    assert_fails_cleanly(outcome, 3, f"PlanError: --residency {mode} does not fit: {message}", output)


# --- LoRAs of a request -----------------------------------------------------------------------------------------------

STG = GuidanceRequest(stg_blocks=(1,))
REQUEST = Request(
    "a robot sings", height=64, width=64, num_frames=9, num_inference_steps=1, video=STG, audio=STG, seed=3
)


@pytest.fixture(scope="module")
def settings(inputs: Path) -> Settings:
    return Settings(
        inputs / NAME,
        inputs / "gemma",
        device="cpu",
        pipeline="two-stages",
        spatial_upsampler_path=inputs / "upsampler.safetensors",
        distilled_lora=Lora(inputs / "distilled_lora.safetensors"),
    )


def make(runtime: Runtime, *names: str) -> list[Tensor]:
    folder = runtime.settings.checkpoint_path.parent
    loras = tuple(Lora(folder / f"{name}.safetensors", 0.5) for name in names)
    result = runtime.generate(dataclasses.replace(REQUEST, loras=loras))
    return [tensor for stage in result.stages for tensor in (stage.video, stage.audio)]


def fail(runtime: Runtime, *names: str) -> str:
    with pytest.raises(WeightsError) as caught:
        make(runtime, *names)
    return str(caught.value)


BAD = ("of_another", "nothing", "cut_lora", "absent")
CUT, ABSENT = "ends at byte", "does not exist"
BAD_PARTS = (CUT, "Use a LoRA of this model", ": 0 weights; ", CUT, ABSENT, CUT, ABSENT)


def ask_for_bad_loras(
    rank: int, num_ranks: int, settings: Settings
) -> tuple[list[str], list[list[Tensor]], list[list[Tensor]]]:
    """Before anything is loaded, between two requests, and after one that is good; in the end on the last rank only."""
    with Runtime.load(settings) as runtime:
        messages = [fail(runtime, "cut_lora")]
        plain = [make(runtime)]
        messages += [fail(runtime, "style", bad) for bad in BAD]
        styled = [make(runtime, "style")]
        messages.append(fail(runtime, "cut_lora", "style"))
        alone = fail(runtime, "absent" if rank == num_ranks - 1 else "style")
        messages.append(alone.removeprefix(f"Rank {num_ranks - 1}: "))
        return messages, [*plain, make(runtime)], [*styled, make(runtime, "style")]


@pytest.mark.parametrize("mode", MODES)
def test_bad_loras_of_a_request_fail_on_all_ranks_and_the_next_request_runs(mode: str, settings: Settings) -> None:
    answers = run_ranks(ask_for_bad_loras, 2, dataclasses.replace(settings, residency=mode), timeout=120)
    for messages, plain, styled in answers:
        assert messages == answers[0][0]
        for message, part in zip(messages, BAD_PARTS, strict=True):
            assert part in message
        assert all(map(torch.equal, *plain))
        assert all(map(torch.equal, *styled))
        assert not torch.equal(plain[0][0], styled[0][0])


def ask_while_a_disk_fails(rank: int, num_ranks: int, settings: Settings) -> list[Any]:
    """The last rank cannot read factors, at first while it loads, then between two requests."""
    factors = {settings.checkpoint_path.parent / f"{name}.safetensors" for name in ("style", "distilled_lora")}
    said: list[str] = []
    with Runtime.load(settings) as runtime:
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                if rank == num_ranks - 1:
                    break_disk(patch, factors)
                with pytest.raises(LtxSpError) as caught:
                    make(runtime, "style")
            said.append(f"{type(caught.value).__name__}: {caught.value}")
            made = make(runtime)
        return [said, made, make(runtime, "style")]


def break_disk(patch: pytest.MonkeyPatch, files: set[Path]) -> None:
    real = os.preadv

    def preadv(descriptor: int, *others: Any) -> int:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")) in files:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *others)

    patch.setattr(os, "preadv", preadv)


def ask_while_all_is_well(rank: int, num_ranks: int, settings: Settings) -> list[list[Tensor]]:
    with Runtime.load(settings) as runtime:
        return [make(runtime), make(runtime, "style")]


@pytest.fixture(scope="module")
def undisturbed(settings: Settings) -> list[list[Tensor]]:
    (made, _) = run_ranks(ask_while_all_is_well, 2, settings, timeout=60)
    return list(made)


@pytest.mark.parametrize("mode", ["resident", "sharded", "snapshot"])
def test_a_disk_that_fails_one_rank_fails_all_in_one_sentence(
    mode: str, settings: Settings, undisturbed: list[list[Tensor]]
) -> None:
    changed = dataclasses.replace(settings, residency=mode, load_mode="stream")
    for said, plain, styled in run_ranks(ask_while_a_disk_fails, 2, changed, timeout=120):
        for message in said:
            assert re.fullmatch(
                r"WeightsError: (Rank 1: )?\S+ cannot be read \(Input/output error\)\. Check .*", message
            )
        assert all(map(torch.equal, plain, undisturbed[0]))
        assert all(map(torch.equal, styled, undisturbed[1]))


def break_merging(error: Exception, rank: int) -> None:
    """On rank 1."""

    def take(self: object, *_: object) -> None:
        raise error

    if rank == 1:
        setattr(LoraMerger, "take", take)  # noqa: B010


FAULTS = {
    "disk": (OSError(errno.EIO, os.strerror(errno.EIO), "/a/file"), 8, "Rank 1: /a/file: Input/output error. Look .*"),
    "memory": (MemoryError(), 8, "Rank 1: Out of memory: .*"),
    "weights": (WeightsError("A factor is broken."), 4, "WeightsError: Rank 1: A factor is broken."),
}


@pytest.mark.parametrize(
    ("mode", "fault"),
    [("resident", "disk"), ("sharded", "memory"), ("snapshot", "weights")],
)
def test_merging_that_fails_on_one_rank(mode: str, fault: str, inputs: Path, output: Path) -> None:
    error, exit_code, message = FAULTS[fault]
    outcome = run_with(inputs, output, TWO | {"--residency": mode}, "", 2, functools.partial(break_merging, error))
    assert_fails_cleanly(outcome, exit_code, message, output)
