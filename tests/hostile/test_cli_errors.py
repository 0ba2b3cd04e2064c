"""What a user may get wrong, on one rank and on two: one sentence, the documented exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Value, arguments, assert_fails_cleanly, run_main, run_mains
from tests.support.ranks import run_cli, start_cli

NAME = "ltx-2.3-demo.safetensors"
QUERY = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
VALUE = QUERY.replace("to_q", "to_v")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def copy(demo: Path, folder: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(demo, folder)
    return folder


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_transformer(header: dict[str, Any], **changes: object) -> None:
    config = json.loads(header["__metadata__"]["config"])
    config["transformer"] |= changes
    header["__metadata__"]["config"] = json.dumps(config)


# name -> (flags changed, exit code, message). OUT stands for the output's folder.
BAD_ARGUMENTS: dict[str, tuple[dict[str, Value], int, str]] = {
    "no prompt": ({"--prompt": None}, 2, r"RequestError: The following arguments are required: --prompt\..*"),
    "prompt of spaces": ({"--prompt": "  "}, 2, "RequestError: The prompt is empty; say .* with --prompt."),
    "no checkpoint": ({"--checkpoint-path": None}, 2, ".* are required: --checkpoint-path.*"),
    "unknown checkpoint": ({"--checkpoint-path": "no/such"}, 4, "WeightsError: no/such does not exist; .* Check .*"),
    "checkpoint a folder": ({"--checkpoint-path": "OUT"}, 4, "WeightsError: .*output holds no .safetensors file, .*"),
    "no gemma": ({"--gemma-root": None}, 2, "RequestError: .* without its text encoder.* --gemma-root."),
    "unknown gemma": ({"--gemma-root": "no/such"}, 4, "WeightsError: no/such/config.json does not exist; .*"),
    "height": ({"--height": 100}, 3, r"PlanError: height = 100 .* multiples of 32 pixels\. Nearest: 96\."),
    "width": ({"--width": 47}, 3, r"PlanError: width = 47 .* multiples of 32 pixels\. Nearest: 32\."),
    "frames": ({"--num-frames": 120}, 3, r"PlanError: num_frames = 120 .* 8k\+1 frames\. Nearest: 121\."),
    "no height": ({"--height": 0}, 2, "RequestError: height is 0; it must be at least 1."),
    "frames below zero": ({"--num-frames": -7}, 2, "RequestError: num_frames is -7; it must be at least 1."),
    "frame rate 0": ({"--frame-rate": 0}, 2, r"RequestError: frame_rate is 0.0; it must lie in 1\.\.240 .*"),
    "frame rate nan": ({"--frame-rate": "nan"}, 2, "RequestError: frame_rate is nan; .*"),
    "not a number": ({"--num-frames": "nine"}, 2, "RequestError: Argument --num-frames: invalid int value: 'nine'.*"),
    "no steps": ({"--num-inference-steps": 0}, 2, "RequestError: num_inference_steps is 0; .*"),
    "seed": ({"--seed": -1}, 2, r"RequestError: seed is -1; it must lie in 0\.\.2\^63 - 1\."),
    "dtype": ({"--dtype": "fp8"}, 2, r"RequestError: Argument --dtype: invalid choice: 'fp8' \(choose from .*"),
    "no such device": ({"--device": "tpu"}, 2, "RequestError: --device 'tpu' is no device. Use auto, .*"),
    "other device": ({"--device": "mps"}, 6, "UnsupportedError: --device 'mps' is not supported. Use auto, .*"),
    "attention": ({"--attention": "fa3"}, 6, "UnsupportedError: .*fa3 needs a CUDA device, this is cpu. Use .*"),
    "guidance nan": ({"--video-cfg-guidance-scale": "nan"}, 2, "RequestError: The video cfg_guidance_scale is nan; .*"),
    "guidance inf": (
        {"--v2a-guidance-scale": "inf"},
        2,
        r"RequestError: The audio modality_scale \(--v2a-guidance-scale\) is inf; .*",
    ),
    "rescale": ({"--video-rescale-scale": 2}, 2, r"RequestError: The video rescale_scale is 2\.0; .* 0\.\.1\."),
    "stg block": ({"--video-stg-blocks": 99}, 3, "PlanError: The video STG block 99 is not .* 0 to 1. Choose .*"),
    "stg block below 0": ({"--audio-stg-blocks": -1}, 3, "PlanError: The audio STG block -1 is not .*"),
    "no folder": ({"--output-path": "no/such.mp4"}, 2, "RequestError: no/such.mp4 .* there is no folder no. Create .*"),
    "output a folder": ({"--output-path": "OUT"}, 2, "RequestError: .*output does not end in .mp4, .*"),
    "suffix": ({"--output-path": "OUT/clip.gif"}, 2, "RequestError: .*/clip.gif does not end in .mp4, .*"),
    "name too long": ({"--output-path": f"OUT/{'a' * 245}.mp4"}, 2, "RequestError: .* cannot be written: File name .*"),
    "nowhere to write": ({"--output-path": "/proc/clip.mp4"}, 2, "RequestError: /proc/clip.mp4 cannot be written: .*"),
    "latents nowhere": ({"--save-latents": "no/l.safetensors"}, 2, "RequestError: no/l.safetensors cannot .*"),
    "latents suffix": ({"--save-latents": "OUT/l.pt"}, 2, "RequestError: --save-latents .*l.pt must end in .*"),
    "phase log nowhere": ({"--phase-log": "no/log"}, 2, "RequestError: no/log cannot be written: .*"),
    "peer timeout": ({"--peer-timeout": 0}, 2, "RequestError: peer_timeout is 0.0; it must be at least 1 second."),
    "batch size": ({"--max-batch-size": 0}, 2, "RequestError: max_batch_size is 0; it must be at least 1."),
    "misspelt flag": ({"--num-frame": 9}, 2, "RequestError: Unrecognized .*--num-frame 9. Did .*--num-frames.*"),
    "unknown flag": ({"--zzz": 9}, 2, "RequestError: Unrecognized arguments: --zzz 9. See --help for the flags."),
    "plan for none": ({"--plan-only": 0}, 2, "RequestError: --plan-only 0 is no number of ranks; give 1 or more."),
    "plan for too many": ({"--plan-only": 64}, 3, "PlanError: 64 ranks .* the model's 4 .* at most 4 ranks."),
    "plan of an unknown": ({"--plan-only": 1, "--checkpoint-path": "no/such"}, 4, "WeightsError: no/such does not .*"),
}  # fmt: skip


# A plan is made on one rank, and one rank is never too many.
ON_ONE_RANK = {name for name, (changes, *_) in BAD_ARGUMENTS.items() if "--plan-only" in changes}
ON_TWO_RANKS = {"more ranks than heads"}


def on_ranks(names: Iterable[str]) -> pytest.MarkDecorator:
    cases = [(name, 1) for name in names if name not in ON_TWO_RANKS]
    cases += [(name, 2) for name in names if name not in ON_ONE_RANK]
    return pytest.mark.parametrize(("name", "num_ranks"), cases)


@on_ranks(BAD_ARGUMENTS)
def test_arguments(name: str, num_ranks: int, demo: Path, tmp_path: Path, output: Path) -> None:
    changes, exit_code, message = BAD_ARGUMENTS[name]
    placed = {
        flag: value.replace("OUT", str(output)) if isinstance(value, str) else value for flag, value in changes.items()
    }
    argv = arguments(demo, output / "clip.mp4", placed)
    outcome = run_main(argv, num_ranks, tmp_path / "ranks")
    assert_fails_cleanly(outcome, exit_code, message, output)


MORE_ARGUMENTS: dict[str, tuple[str, str]] = {
    "sigmas not numbers": ("--sigmas 1 0.5 x", "RequestError: --sigmas 1 0.5 x must be numbers, or the word .*"),
    "sigmas do not fall": ("--sigmas 0.5 1 0", "RequestError: The sigmas are 0.5 1 0; they must fall strictly.*"),
    "sigmas below 0": ("--sigmas 1 -0.5", "RequestError: The sigmas are 1 -0.5; they must fall strictly.*"),
    "sigmas and steps": ("--num-inference-steps 2 --sigmas 1 0", "RequestError: Both sigmas and num_inference_.*"),
    "no sigmas": ("--sigmas", "RequestError: Argument --sigmas: expected at least one argument.*"),
    "no value": ("--height", "RequestError: Argument --height: expected one argument. A value .* as in --height=-X.*"),
    "prompt like a flag": ("--prompt -cat", "RequestError: Argument --prompt: expected one argument.* --prompt=-X.*"),
    "prompt without quotes": ("a cat", "RequestError: Unrecognized arguments: a cat. Put .* into quotes. .*"),
    "one file twice": ("--save-latents OUT/a.safetensors --save-decoded OUT/a.safetensors", ".* both name .*"),
    "checkpoint overwritten": ("--save-latents DEMO", "RequestError: --save-latents .* is a file of the model .*"),
    "gemma overwritten": ("--save-decoded GEMMA", "RequestError: --save-decoded .* is a file of the model .*"),
    "log is a folder": ("--phase-log OUT", "RequestError: .* is a folder. Give the output a file name."),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE_ARGUMENTS)
def test_more_arguments(name: str, demo: Path, tmp_path: Path, output: Path) -> None:
    words, message = MORE_ARGUMENTS[name]
    before = (demo / NAME).stat().st_mtime_ns
    places = {"OUT": output, "DEMO": demo / NAME, "GEMMA": demo / "gemma/model.safetensors"}
    for place, path in places.items():
        words = re.sub(rf"\b{place}\b", str(path), words)
    argv = arguments(demo, output / "clip.mp4", {"--num-inference-steps": None}, *words.split())
    assert_fails_cleanly(run_main(argv, 1, tmp_path / "ranks"), 2, message, output)
    assert (demo / NAME).stat().st_mtime_ns == before


def cut(num_bytes: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / NAME, num_bytes)


def header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: edit_header(folder / NAME, edit)


def gemma(file: str, edit: Callable[[dict[str, Any]], object] | str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "gemma" / file
        if isinstance(edit, str):
            path.write_text(edit)
        else:
            edit_json(path, edit)

    return damage


def poison(folder: Path) -> None:
    """Fill a weight with NaN."""
    file = folder / NAME
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8:end])[VALUE]["data_offsets"]
    data[end + start : end + stop] = b"\xff\x7f" * ((stop - start) // 2)
    file.write_bytes(data)


# name -> (damage, exit code, message)
DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "empty": (cut(0), 4, "WeightsError: .* is empty; .* Fetch it again."),
    "header cut": (cut(1000), 4, "WeightsError: .* promises a header of .* and has 1000 bytes in all; .*"),
    "data cut": (cut(20_000_000), 4, "WeightsError: .* ends at byte 20000000, its header promises .*"),
    "header not JSON": (
        lambda folder: (folder / NAME).write_bytes(b"\x08" + bytes(7) + b"{broken}"),
        4,
        "WeightsError: The header of .* is not a valid JSON object .*",
    ),
    "tensor missing": (
        header(lambda entries: entries.update(other=entries.pop(QUERY))),
        4,
        f"WeightsError: .* lacks 1 of the tensors of transformer: {QUERY}. .*",
    ),
    "tensor of another shape": (
        header(lambda entries: entries[QUERY].update(shape=[32, 128])),
        4,
        rf"WeightsError: .*'{QUERY}' with shape \[32, 128\]; parameter .* has shape \[64, 64\]. Use .*",
    ),
    "decoder tensor of another shape": (
        header(lambda entries: entries["vae.decoder.conv_in.conv.bias"].update(shape=[64, 1])),
        4,
        r"WeightsError: .*'vae.decoder.conv_in.conv.bias' with shape \[64, 1\]; .*",
    ),
    "no configuration": (
        header(lambda entries: entries.update(__metadata__={})),
        4,
        "WeightsError: .* carries no `config` in its metadata; .*",
    ),
    "gemma of another size": (
        gemma("config.json", lambda config: config["text_config"].update(hidden_size=64)),
        4,
        "WeightsError: .*gemma holds a Gemma with hidden size 64; .* needs 48. .* --gemma-root.",
    ),
    "gemma of another depth": (
        gemma("config.json", lambda config: config["text_config"].update(num_hidden_layers=3)),
        4,
        "WeightsError: .*gemma holds a Gemma with hidden size 48 and 3 layers; .* those of 2 layers. .*",
    ),
    "gemma against itself": (
        gemma("config.json", lambda config: config["text_config"].update(num_attention_heads=5)),
        4,
        "WeightsError: The text encoder's config.json is refused by transformers .*48.*5.*",
    ),
    "not a gemma": (
        gemma("config.json", '{"model_type": "llama"}'),
        4,
        "WeightsError: .*gemma holds a model of type 'llama'; .* needs Gemma 3. .*",
    ),
    "tokenizer broken": (
        gemma("tokenizer.json", "{"),
        4,
        "WeightsError: The tokenizer in .* cannot be read .* Fetch tokenizer.json .* again.",
    ),
    "more ranks than heads": (
        header(
            lambda entries: edit_transformer(
                entries,
                num_attention_heads=1,
                attention_head_dim=64,
                audio_num_attention_heads=1,
                audio_attention_head_dim=32,
            )
        ),
        3,
        "PlanError: 2 ranks are more than the model's 1 attention heads; .* Start at most 1 ranks.",
    ),
    "weights not finite": (poison, 1, "LtxSpError: Not all values of the decoded .* are finite. Check .*"),
}


# Passes that guidance needs could be dealt over ranks that have no heads.
UNGUIDED: dict[str, Value] = {
    "--sigmas": "distilled",
    "--num-inference-steps": None,
    "--video-stg-blocks": None,
    "--audio-stg-blocks": None,
}


@on_ranks(DAMAGE)
def test_damaged_files(name: str, num_ranks: int, demo: Path, tmp_path: Path, output: Path) -> None:
    damage, exit_code, message = DAMAGE[name]
    folder = copy(demo, tmp_path / "damaged")
    damage(folder)
    changes = UNGUIDED if name in ON_TWO_RANKS else {}
    outcome = run_main(arguments(folder, output / "clip.mp4", changes), num_ranks, tmp_path / "ranks")
    assert_fails_cleanly(outcome, exit_code, message, output)


# What one rank alone gets wrong ends all, in the words of rank 0.
ODD_ARGUMENTS: dict[str, tuple[dict[str, Value], int, str]] = {
    "another seed": ({"--seed": 11}, 5, "RankMismatchError: Rank 1 made another plan than rank 0. .* compare them."),
    "another dtype": ({"--dtype": "float32"}, 5, "RankMismatchError: Rank 1 made another .*settings.* than rank 0. .*"),
    "unknown checkpoint": ({"--checkpoint-path": "no/such"}, 4, "Rank 1: WeightsError: no/such does not exist; .*"),
    "unknown flag": ({"--zzz": 1}, 2, "Rank 1: RequestError: Unrecognized arguments: --zzz 1. .*"),
    "no such device": ({"--device": "mps"}, 6, "Rank 1: UnsupportedError: .*"),
}


@pytest.mark.parametrize("name", ODD_ARGUMENTS)
def test_one_rank_has_other_arguments(name: str, demo: Path, tmp_path: Path, output: Path) -> None:
    changes, exit_code, message = ODD_ARGUMENTS[name]
    argvs = [arguments(demo, output / "clip.mp4", given) for given in ({}, changes)]
    assert_fails_cleanly(run_mains(argvs, tmp_path / "ranks"), exit_code, message, output)


def test_an_output_that_only_another_host_lacks_is_no_error(demo: Path, tmp_path: Path, output: Path) -> None:
    argvs = [arguments(demo, path) for path in (output / "clip.mp4", Path("no/such.mp4"))]
    assert run_mains(argvs, tmp_path / "ranks").exit_codes == [0, 0]
    assert os.listdir(output) == ["clip.mp4"]


def assert_torchrun_reports(stderr: str, exit_code: int, message: str, num_ranks: int = 2) -> None:
    said = [line for line in stderr.splitlines() if line.startswith("ltx_sp: ")]
    assert len(said) == 1, stderr
    assert re.fullmatch(f"ltx_sp: {message}", said[0]), said
    assert re.findall(r"exitcode +: (-?\d+)", stderr) == [str(exit_code)] * num_ranks
    # torchrun reports its own call stack; ours has no place in it.
    assert not re.search(r'File ".*ltx_sp[/\\]', stderr)


@pytest.mark.parametrize("name", ["unknown checkpoint", "tensor of another shape", "more ranks than heads"])
def test_under_torchrun(name: str, demo: Path, tmp_path: Path, output: Path) -> None:
    folder, changes = demo, dict[str, Value]()
    if name in DAMAGE:
        damage, exit_code, message = DAMAGE[name]
        damage(folder := copy(demo, tmp_path / "damaged"))
        changes = UNGUIDED if name in ON_TWO_RANKS else {}
    else:
        changes, exit_code, message = BAD_ARGUMENTS[name]
    result = run_cli(arguments(folder, output / "clip.mp4", changes), 2)
    assert result.returncode == 1, "torchrun's own"
    assert not result.stdout
    assert_torchrun_reports(result.stderr, exit_code, message)
    assert os.listdir(output) == []


def test_one_rank_has_other_arguments_under_torchrun(demo: Path, tmp_path: Path, output: Path) -> None:
    script = tmp_path / "start.sh"
    script.write_text('#!/bin/sh\n[ "$RANK" = 1 ] && set -- "$@" --checkpoint-path no/such\nexec "$PYTHON" "$@"\n')
    script.chmod(0o755)
    argv = ["-m", "ltx_sp.generate", *arguments(demo, output / "clip.mp4")]
    with start_cli(argv, 2, {"PYTHON": sys.executable}, script=script) as running:
        stderr = running.finish().stderr
    assert_torchrun_reports(stderr, 4, "Rank 1: WeightsError: no/such does not exist; .*")
    assert os.listdir(output) == []
