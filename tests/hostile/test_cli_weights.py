"""What may be wrong with weights and LoRAs, from the command line: one sentence, the documented exit code, no trace."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_sp import components
from ltx_sp.weights.load import load
from tests.hostile.test_cli_errors import NAME, VALUE, copy, poison
from tests.support.commands import arguments, assert_fails_cleanly, run_main

STEM = "diffusion_model.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def factors(*, rank: int = 2, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {
        f"{STEM}.lora_A.weight": torch.ones(rank, width).to(dtype),
        f"{STEM}.lora_B.weight": torch.ones(64, rank).to(dtype),
    }


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def write_pickle(path: Path) -> None:
    torch.save({f"{STEM}.lora_A.weight": Payload(path.parent / "executed")}, path)


def write_bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.parent / "executed")))


def cut_short(path: Path) -> None:
    save_file(factors(), path)
    os.truncate(path, path.stat().st_size - 1)


def safetensors(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


# name -> (file name, how it is written, exit code, message)
BAD_LORAS: dict[str, tuple[str, Callable[[Path], object], int, str]] = {
    "absent": ("l.safetensors", lambda path: None, 4, r"WeightsError: .*l\.safetensors does not exist; .*"),
    "empty": ("l.safetensors", lambda path: path.write_bytes(b""), 4, r"WeightsError: .*l\.safetensors is empty; .*"),
    "cut": (
        "l.safetensors",
        cut_short,
        4,
        r"WeightsError: .*l\.safetensors ends at byte \d+, its header promises \d+\. .*",
    ),
    "no LoRA": ("l.safetensors", safetensors({"x": torch.ones(2)}), 4, r"WeightsError: .*l\.safetensors.* 0 weights.*"),
    "of another model": (
        "l.safetensors",
        safetensors(factors(width=128)),
        4,
        rf"WeightsError: .*'{STEM}\.lora_A\.weight' with shape '?\[2, 128\].*\[64, 64\].*",
    ),
    "one half": (
        "l.safetensors",
        safetensors({f"{STEM}.lora_A.weight": torch.ones(2, 64)}),
        4,
        r"WeightsError: .*1 unpaired.*",
    ),
    "fp8": ("l.safetensors", safetensors(factors(dtype=torch.float8_e4m3fn)), 6, "UnsupportedError: .* in fp8 .*"),
    "DoRA": (
        "l.safetensors",
        safetensors(factors() | {f"{STEM}.dora_scale": torch.ones(64)}),
        6,
        "UnsupportedError: .*dora_scale'; .*",
    ),
    "code in a pickle": ("l.bin", write_pickle, 4, r"WeightsError: .*l\.bin .*"),
    "code in a bare pickle": ("l.pth", write_bare_pickle, 4, r"WeightsError: .*l\.pth .*"),
}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", BAD_LORAS)
def test_bad_loras(name: str, num_ranks: int, demo: Path, tmp_path: Path, output: Path) -> None:
    file, write, exit_code, message = BAD_LORAS[name]
    write(tmp_path / file)
    argv = arguments(demo, output / "clip.mp4", {}, "--lora", tmp_path / file, "0.5")
    assert_fails_cleanly(run_main(argv, num_ranks, tmp_path / "ranks"), exit_code, message, output)
    assert not (tmp_path / "executed").exists()


ARGUMENTS: dict[str, tuple[str, str]] = {
    "strength": ("--lora a.safetensors nan", "RequestError: The strength of the LoRA a.safetensors is nan; .*"),
    "not a strength": ("--lora a.safetensors strong", "RequestError: --lora a.safetensors strong must be a file, .*"),
    "two strengths": ("--lora a.safetensors 1 2", "RequestError: --lora a.safetensors 1 2 must be a file, .*"),
    "no file": ("--lora", "RequestError: Argument --lora: expected at least one argument.*"),
    "nothing to overlap": ("--no-overlap-lora", r"RequestError: .*--no-overlap-lora\) and there is no LoRA; .*"),
    "mode": ("--load-mode fast", "RequestError: Argument --load-mode: invalid choice: 'fast' .*"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str, demo: Path, tmp_path: Path, output: Path) -> None:
    words, message = ARGUMENTS[name]
    outcome = run_main(arguments(demo, output / "clip.mp4", {}, *words.split()), 1, tmp_path / "ranks")
    assert_fails_cleanly(outcome, 2, message, output)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_weights_that_are_not_finite_are_found_where_that_is_asked_for(
    num_ranks: int, demo: Path, tmp_path: Path, output: Path
) -> None:
    folder = copy(demo, tmp_path / "damaged")
    poison(folder)
    outcome = run_main(arguments(folder, output / "clip.mp4", {}, "--verify-weights"), num_ranks, tmp_path / "ranks")
    parameter = VALUE.removeprefix("model.diffusion_model.").replace(".", r"\.")
    message = rf"WeightsError: Parameter {parameter} of transformer holds 4096 values .* not finite, of 4096; .*"
    assert_fails_cleanly(outcome, 4, message, output)


def change_meanwhile(file: Path, rank: int) -> None:
    def change_first(*args: object, **kwargs: object) -> object:
        os.utime(file, ns=(0, 1))
        return load(*args, **kwargs)  # type: ignore[arg-type]

    setattr(components, "load", change_first)  # noqa: B010


@pytest.mark.parametrize("load_mode", ["stream", "preload", "mmap"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_file_that_is_written_meanwhile(
    load_mode: str, num_ranks: int, demo: Path, tmp_path: Path, output: Path
) -> None:
    """It changes after its header was read, and before its data is."""
    folder = copy(demo, tmp_path / "changing")

    argv = arguments(folder, output / "clip.mp4", {"--load-mode": load_mode})
    outcome = run_main(argv, num_ranks, tmp_path / "ranks", functools.partial(change_meanwhile, folder / NAME))
    message = rf"(Rank 1: )?WeightsError: (Rank [01]: )?.*{NAME} has changed since its header was read .*"
    assert_fails_cleanly(outcome, 4, message, output)


@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_a_lora_of_torch_save_gives_the_same_clip(suffix: str, demo: Path, tmp_path: Path, output: Path) -> None:
    latents = []
    save_file(factors(), tmp_path / "l.safetensors")
    torch.save(factors(), tmp_path / f"l{suffix}")
    for file in ("l.safetensors", f"l{suffix}"):
        argv = arguments(demo, output / "clip.mp4", {"--save-latents": output / "l.safetensors"}, "--lora")
        assert run_main([*argv, str(tmp_path / file)], 1, tmp_path / file.replace(".", "-")).exit_codes == [0]
        latents.append(load_file(output / "l.safetensors")["video_latent"])
    assert torch.equal(*latents)
