"""The command line where all goes well, and how what goes wrong becomes an exit code. Oracle: the documentation."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from ltx_sp.arguments import Command, parse
from ltx_sp.errors import RequestError
from ltx_sp.generate import __doc__ as documentation
from ltx_sp.generate import main
from ltx_sp.request import DISTILLED_SIGMAS, GuidanceRequest, Image, Lora, Request, Settings
from ltx_sp.runtime import Runtime
from ltx_sp.spec import ModelSpec
from tests.support.commands import arguments, run_main

PHASES = [
    "validate input",
    "load text_encoder",
    "load connectors",
    "load transformer",
    "load video_vae",
    "load audio_vae",
    "load vocoder",
    "prepare",
    "switch weights",
    "prepare latents",
    "prepare sigmas",
    "denoise",
    "switch weights",
    "decode",
    "switch weights",
    "decode",
    "mux",
]


def _parse(words: str = "") -> Command:
    return parse(["--checkpoint-path", "model", "--prompt", "a robot sings", *words.split()])


def test_defaults_are_those_of_the_dataclasses() -> None:
    command = _parse()
    assert command.request == Request("a robot sings")
    assert command.settings == Settings(Path("model"))
    assert command.output_path == Path("output.mp4")
    assert command.plan_ranks is None


def test_every_field_has_a_flag() -> None:
    command = _parse(
        "--gemma-root g --negative-prompt bad --seed 1 --height 32 --width 64 --num-frames 9 --frame-rate 25 "
        "--num-inference-steps 3 --device cpu --dtype float32 --attention sdpa --video-to-audio gather "
        "--max-batch-size 4 --keep-text-encoder --peer-timeout 5 --parallel 2x4 --calibration c "
        "--cuda-graph off --compile "
        "--pipeline two-stages --spatial-upsampler-path u --distilled-lora d 0.9 --residency snapshot "
        "--image i.png --image j.jpg 8 0.5 --image-crf 20 --audio s.wav "
        "--load-mode stream --lora a.safetensors --lora b.bin -0.5 --no-overlap-lora --verify-weights "
        "--video-cfg-guidance-scale 2 --video-stg-guidance-scale 3 --video-stg-blocks 4 5 "
        "--video-rescale-scale .5 --a2v-guidance-scale -6 "
        "--audio-cfg-guidance-scale 7 --audio-stg-guidance-scale 8 --audio-stg-blocks "
        "--audio-rescale-scale .9 --v2a-guidance-scale 1e1"
    )
    assert command.request == Request(
        "a robot sings", "bad", 1, 32, 64, 9, 25.0, 3, None,
        GuidanceRequest(2.0, 3.0, 0.5, (4, 5), -6.0), GuidanceRequest(7.0, 8.0, 0.9, (), 10.0),
        images=(Image(Path("i.png")), Image(Path("j.jpg"), 8, 0.5)), image_crf=20, audio_path=Path("s.wav"),
    )  # fmt: skip
    assert command.settings == Settings(
        Path("model"), Path("g"), "cpu", "float32", "sdpa", "gather", max_batch_size=4, keep_text_encoder=True,
        peer_timeout=5.0, load_mode="stream", loras=(Lora(Path("a.safetensors")), Lora(Path("b.bin"), -0.5)),
        overlap_lora=False, verify_weights=True, parallel="2x4", cuda_graph="off", compile=True,
        calibration=Path("c"), pipeline="two-stages",
        spatial_upsampler_path=Path("u"), distilled_lora=Lora(Path("d"), 0.9), residency="snapshot",
    )  # fmt: skip
    given = [*vars(command.request).items(), *vars(command.settings).items()]
    defaults = vars(Request("a robot sings")) | vars(Settings(Path("model")))
    # Two exclude others that are given; LoRAs for one request are for programs that make several.
    unset = ["prompt", "sigmas", "video_path", "loras", "checkpoint_path"]
    assert [name for name, value in given if value == defaults[name]] == unset
    assert _parse("--video v.mp4").request.video_path == Path("v.mp4")


@pytest.mark.parametrize(
    ("words", "sigmas"),
    [
        ("1 .5 0", (1.0, 0.5, 0.0)),
        ("0.995 1e-3 0", (0.995, 0.001, 0.0)),
        ("distilled", DISTILLED_SIGMAS),
    ],
)
def test_sigmas(words: str, sigmas: tuple[float, ...]) -> None:
    assert _parse(f"--sigmas {words}").request.sigmas == sigmas


def test_of_a_flag_given_twice_the_later_counts() -> None:
    assert _parse("--seed 1 --seed 2").request.seed == 2


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(RequestError, match="Did you mean --height"):
        _parse("--heigh 64")


@pytest.mark.parametrize(("words", "num_ranks"), [(["--plan-only"], 6), (["--plan-only", "3"], 3)])
def test_a_plan_is_for_as_many_ranks_as_there_are(words: list[str], num_ranks: int) -> None:
    assert parse(["--checkpoint-path", "model", "--prompt", "x", *words], num_ranks=6).plan_ranks == num_ranks


# Those that are not called like their fields.
FLAGS = {
    "loras": "lora",
    "overlap_lora": "no-overlap-lora",
    "images": "image",
    "audio_path": "audio",
    "video_path": "video",
}


def test_help_names_every_flag_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    for field in [*dataclasses.fields(Request), *dataclasses.fields(Settings)]:
        if field.name not in ("video", "audio"):
            flag = FLAGS.get(field.name, field.name.replace("_", "-"))
            assert f"--{flag} " in captured.out
    for code in ("2 the request", "3 the plan", "4 the weights", "5 ranks", "6 something", "7 a lost", "8 out of"):
        assert code in re.sub(r"\s+", " ", captured.out)
    assert "130 Ctrl-C" in (documentation or "")


def test_help_is_printed_once(tmp_path: Path) -> None:
    outcome = run_main(["--help"], 2, tmp_path)
    assert outcome.exit_codes == [0, 0]
    assert outcome.stdout[0].startswith("usage: ")
    assert [outcome.stdout[1], *outcome.stderr] == ["", "", ""]


def test_a_plan_needs_no_text_encoder(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(
        demo,
        tmp_path / "no" / "folder.mp4",
        {"--gemma-root": None, "--device": "cuda", "--parallel": "1x3"},
        "--plan-only",
        "3",
    )
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert not captured.err
    assert re.search(
        "^ranks +3 = 1 guidance x 3 token; each has 2 to 3 video tokens, 1 to 2 heads$", captured.out, re.M
    )


def test_a_plan_is_printed_once(demo: Path, tmp_path: Path) -> None:
    outcome = run_main(arguments(demo, tmp_path / "clip.mp4", {}, "--plan-only"), 2, tmp_path / "ranks")
    assert outcome.exit_codes == [0, 0]
    assert "ranks      2 = " in outcome.stdout[0]
    assert [outcome.stdout[1], *outcome.stderr] == ["", "", ""]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_clip(num_ranks: int, demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    clip, latents, decoded, log = (folder / name for name in ("c.mp4", "l.safetensors", "d.safetensors", "log"))
    clip.write_text("of an earlier run")
    more = ("--save-latents", latents, "--save-decoded", decoded, "--phase-log", log)
    outcome = run_main(arguments(demo, clip, {}, *more), num_ranks, tmp_path / "ranks")
    assert outcome.exit_codes == [0] * num_ranks, outcome
    assert outcome.stdout == [""] * num_ranks, "standard output is for plans"
    assert outcome.stderr[1:] == [""] * (num_ranks - 1)
    assert re.search(r"denoise: 100%\S* 2/2 \[00:\d\d<00:00, .*(step/s|s/step)\]", outcome.stderr[0])
    assert outcome.stderr[0].endswith(" s in all\n")

    assert sorted(os.listdir(folder)) == ["c.mp4", "d.safetensors", "l.safetensors", "log"]
    with av.open(str(clip)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    assert load_file(latents)["video_latent"].shape == (1, 128, 2, 2, 2)
    assert load_file(decoded)["frames"].shape == (9, 64, 64, 3)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    phases = [record["phase"] for record in records]
    assert phases.index("encode text") > phases.index("load connectors")
    phases = [phase for phase in phases if phase not in ("encode text", "connectors")]  # beside the loads that follow
    assert phases == PHASES
    loads = [record for record in records if record["phase"].startswith("load ")]
    assert all(record["bytes"] > 0 and record["gib_per_s"] >= 0 and record["mode"] == "mmap" for record in loads)
    assert all(record["rank"] == 0 and record["seconds"] >= 0 for record in records)


def test_signals_are_as_they_were(demo: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert main(arguments(demo, tmp_path / "clip.mp4", {"--height": 1})) == 3
    assert [signal.getsignal(number) for number in numbers] == before


# What may go wrong at any moment: raised where the model would run.
REASONS: list[tuple[BaseException, int, str]] = [
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 ..."),
        8,
        "Out of memory: CUDA .* Use",
    ),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 8, "Out of memory: Default.*"),
    (MemoryError(), 8, "Out of memory: on the host. Use more ranks, .*"),
    (
        OSError(errno.ENOSPC, "No space left on device", "phases"),
        8,
        "phases: No space left on device. Look at the disk.",
    ),
    (KeyError("hidden"), 1, "KeyError: 'hidden'. This is a defect of ltx_sp; please report it."),
]


@pytest.mark.parametrize(("error", "exit_code", "message"), REASONS)
def test_reasons(
    error: BaseException,
    exit_code: int,
    message: str,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Runtime, "generate", fail)
    assert main(arguments(demo, tmp_path / "clip.mp4")) == exit_code
    lines = capsys.readouterr().err.splitlines()
    assert re.match(f"ltx_sp: {message}", lines[-1])
    assert sum(line.startswith("ltx_sp: ") for line in lines) == 1
    assert any("Traceback" in line for line in lines) == (exit_code == 1), "of a defect only"
    assert os.listdir(tmp_path) == []


def test_the_plan_is_made_before_anything_is_loaded(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Runtime, "load", None)
    assert main(arguments(demo, tmp_path / "clip.mp4", {"--video-stg-blocks": 99}, "--keep-text-encoder")) == 3
    assert main(arguments(demo, tmp_path / "no/clip.mp4")) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_outputs_are_looked_at_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(path: Path) -> ModelSpec:
        raise AssertionError

    monkeypatch.setattr("ltx_sp.generate.read_spec", never)
    assert main(arguments(tmp_path, tmp_path / "no/clip.mp4")) == 2
