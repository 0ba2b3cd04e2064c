"""What records traces starts the right programs with the right arguments, and says so where it cannot.

Oracle: an ``nsys`` made for the test, which notes its arguments; torch.profiler itself for the window.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from profiling import trace
from profiling.kernel_traces import read_trace

ROOT = Path(__file__).parents[2]
NSYS = ROOT / "profiling" / "nsys.sh"
GENERATE = ["--profile-steps", "3-4", "--prompt", "a fox, two words"]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with an nsys that notes its arguments, one per line, and the environment's RANKS."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "nsys"
    script.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >"$NOTES"\nprintf "%s\\n" "$RANKS" "$NCCL_DEBUG" >"$NOTES.env"\nexit 5\n'
    )
    script.chmod(0o755)
    return folder


def run_nsys(
    tmp_path: Path, *arguments: str, path: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NSYS", "TORCHRUN"))}
    environment |= {"NOTES": str(tmp_path / "notes"), "RANKS": "2", "PYTHON": sys.executable}
    environment |= {"PATH": path or f"{tmp_path / 'bin'}:{os.environ['PATH']}", **(env or {})}
    return subprocess.run(
        [str(NSYS), *arguments], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )


def test_nsys_records_a_window_of_all_ranks(tools: Path, tmp_path: Path) -> None:
    ended = run_nsys(tmp_path, "--", *GENERATE)
    assert ended.returncode == 5, ended.stderr  # nsys's own
    words = (tmp_path / "notes").read_text().splitlines()
    split = words.index(sys.executable)
    assert words[0] == "profile"
    assert set(words[1:split]) == {
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--cuda-graph-trace=node",
        "--trace=cuda,nvtx",
        "--sample=none",
        "--cpuctxsw=none",
        "--export=sqlite",
        "--force-overwrite=true",
        "--output=ltx_sp-%h",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ltx_sp.generate"]
    assert words[split + 1 :] == [*torchrun, *GENERATE]
    assert (tmp_path / "notes.env").read_text().split() == ["2", "WARN"]  # from launch/env.sh


def test_nsys_takes_more_options_and_several_hosts(tools: Path, tmp_path: Path) -> None:
    env = {
        "NSYS_ARGS": "--gpu-metrics-devices=all --wait=all",
        "TORCHRUN_ARGS": "--nnodes=2 --rdzv-endpoint=host:29500",
        "REPORT": "two nodes",
    }
    assert run_nsys(tmp_path, *GENERATE, env=env).returncode == 5
    words = (tmp_path / "notes").read_text().splitlines()
    split = words.index(sys.executable)
    assert words[split - 3 : split] == ["--output=two nodes", "--gpu-metrics-devices=all", "--wait=all"]
    assert words[split + 3 : split + 6] == ["--nnodes=2", "--rdzv-endpoint=host:29500", "--nproc_per_node=2"]


def test_without_nsys_the_script_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("bash", "dirname", "nproc", "env"):
        (folder / name).symlink_to(shutil.which(name) or name)
    ended = run_nsys(tmp_path, "--", *GENERATE, path=str(folder))
    assert ended.returncode == 2
    assert ended.stderr.startswith("nsys: there is no nsys here. Install Nsight Systems")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--"], ["--", "--prompt", "steps"]])
def test_without_steps_nothing_would_be_recorded(arguments: list[str], tools: Path, tmp_path: Path) -> None:
    ended = run_nsys(tmp_path, *arguments)
    assert ended.returncode == 2
    assert "--profile-steps A-B" in ended.stderr
    assert not (tmp_path / "notes").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
def test_without_a_gpu_nsys_has_nothing_to_record(tools: Path, tmp_path: Path) -> None:
    ended = run_nsys(tmp_path, "--", *GENERATE, env={"RANKS": ""})
    assert ended.returncode == 2
    assert "PyTorch sees no GPU here" in ended.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content() -> None:
    subprocess.run(["shellcheck", "-x", str(NSYS)], check=True, cwd=ROOT)


def test_a_window_holds_what_runs_inside_it(tmp_path: Path) -> None:
    x = torch.ones(64, 64)
    window = trace.TorchWindow(tmp_path / "rank0.json.gz")
    torch.tanh(x)
    window.start()
    x @ x
    window.stop()
    torch.tanh(x)
    (track,) = read_trace(tmp_path / "rank0.json.gz")
    names = {activity.name for activity in track.activities}
    assert track.counts()["gemm"] >= 1
    assert "aten::tanh" not in names


def test_a_rank_generates_with_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltx_sp import generate

    calls: list[list[str]] = []

    def main(argv: list[str], *, window: Any) -> int:
        calls.append(argv)
        window.start()
        torch.ones(2).add(1)
        window.stop()
        return 3

    monkeypatch.setattr(generate, "main", main)
    monkeypatch.setenv("RANK", "1")
    assert trace.main([str(tmp_path), "--as-rank", "--", *GENERATE]) == 3
    assert calls == [GENERATE]
    assert [path.name for path in tmp_path.iterdir()] == ["rank1.json.gz"]


class Torchrun:
    """Stands for ``subprocess.run``: notes the command, and writes the traces of some ranks."""

    def __init__(self, folder: Path, ranks: list[int], returncode: int = 0):
        self.command: list[str] = []
        self._folder, self._ranks, self._returncode = folder, ranks, returncode

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.command = command
        for rank in self._ranks:
            trace.trace_path(self._folder, rank).write_bytes(b"{}")
        return subprocess.CompletedProcess(command, self._returncode)


def test_all_ranks_are_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = Torchrun(tmp_path / "out", [0, 1])
    monkeypatch.setattr(subprocess, "run", torchrun)
    assert trace.main([str(tmp_path / "out"), "--ranks", "2", "--host", "--", *GENERATE]) == 0
    own = [trace.__file__, str(tmp_path / "out"), "--as-rank", "--host", "--", *GENERATE]
    expected = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *own]
    assert torchrun.command == expected


def test_a_trace_that_was_not_written_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older one in its place does not count."""
    trace.trace_path(tmp_path, 1).write_bytes(b"{}")
    monkeypatch.setattr(subprocess, "run", Torchrun(tmp_path, [0]))
    assert trace.main([str(tmp_path), "--ranks", "2", "--", *GENERATE]) == 1
    assert "without rank1.json.gz" in capsys.readouterr().err


def test_the_exit_code_is_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Torchrun(tmp_path, [0], returncode=7))
    assert trace.main([str(tmp_path), "--ranks", "1", "--", *GENERATE]) == 7


@pytest.mark.parametrize(
    "words", [["--", "--prompt", "--profile-stepsize"], [], ["--ranks", "0", "--", *GENERATE], ["--ranks", "1"]]
)
def test_what_cannot_be_recorded_is_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        trace.main([str(tmp_path), *words])
