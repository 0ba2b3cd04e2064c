"""A rank that dies, falls silent or is stopped: the others end within the timeout, name it, and leave nothing."""

from __future__ import annotations

import functools
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.commands import Value, arguments, assert_fails_cleanly, run_main
from tests.support.ranks import RunningCli, start_cli

ENDLESS: dict[str, Value] = {"--num-inference-steps": 2000, "--peer-timeout": 3}
DIED = "Rank {} died without a word. .*"
NO_TRACE_OF_OURS = re.compile(r'File ".*ltx_sp[/\\]')


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def told(running: RunningCli) -> list[str]:
    return [line for line in running.stderr.splitlines() if line.startswith("ltx_sp: ")]


def wait_for_steps(running: RunningCli) -> None:
    """Until denoising has begun, on every rank."""
    running.wait_for("/2000")
    time.sleep(0.3)


def assert_ended(running: RunningCli, message: str, output: Path, *, within: float) -> None:
    began = time.monotonic()
    running.finish(within + 20)
    assert time.monotonic() - began < within
    assert len(told(running)) == 1, running.stderr
    assert re.fullmatch(f"ltx_sp: {message}", told(running)[0])
    assert not NO_TRACE_OF_OURS.search(running.stderr), running.stderr
    assert os.listdir(output) == []


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_is_killed(dead: int, demo: Path, output: Path) -> None:
    with start_cli(arguments(demo, output / "clip.mp4", ENDLESS), 2) as running:
        wait_for_steps(running)
        os.kill(running.ranks()[dead], signal.SIGKILL)
        assert_ended(running, DIED.format(dead), output, within=8)
        codes = dict(re.findall(r"rank +: (\d).*\n +exitcode +: (-?\d+)", running.stderr))
        assert codes == {str(dead): "-9", str(1 - dead): "7"}


def test_a_rank_falls_silent(demo: Path, output: Path) -> None:
    with start_cli(arguments(demo, output / "clip.mp4", ENDLESS), 2) as running:
        wait_for_steps(running)
        stopped = running.ranks()[1]
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        running.wait_for("ltx_sp: ", timeout=10)
        assert 2 < time.monotonic() - began < 6, "the timeout is 3 s"
        os.kill(stopped, signal.SIGKILL)  # torchrun would ask it to end for 30 s
        assert_ended(running, r"Rank 1 has not answered for 3 s\. .* --peer-timeout .*", output, within=8)


def test_torchrun_is_killed(demo: Path, output: Path) -> None:
    with start_cli(arguments(demo, output / "clip.mp4", ENDLESS), 2) as running:
        wait_for_steps(running)
        ranks = running.ranks()
        running.child.kill()
        running.wait_for_end(ranks)
        assert_ended(running, "torchrun, which started this rank, is gone .* Start again.", output, within=8)


def test_interrupt_under_torchrun(demo: Path, output: Path) -> None:
    with start_cli(arguments(demo, output / "clip.mp4", ENDLESS), 2) as running:
        wait_for_steps(running)
        os.killpg(running.child.pid, signal.SIGINT)  # as a terminal does; the ranks have sessions of their own
        assert_ended(running, "Interrupted; nothing was written.", output, within=8)


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Stopped by SIGTERM")]
)
def test_signal_alone(number: signal.Signals, message: str, demo: Path, output: Path) -> None:
    with start_cli(arguments(demo, output / "clip.mp4", ENDLESS)) as running:
        wait_for_steps(running)
        running.child.send_signal(number)
        assert_ended(running, f"{message}; nothing was written.", output, within=8)
        assert running.child.returncode == 128 + number


def test_interrupt_while_torch_is_imported(demo: Path, output: Path) -> None:
    with start_cli(arguments(demo, output / "clip.mp4", ENDLESS)) as running:
        while "libtorch" not in Path(f"/proc/{running.child.pid}/maps").read_text():
            time.sleep(0.01)
        running.child.send_signal(signal.SIGINT)
        result = running.finish(20)
        assert result.returncode in (-signal.SIGINT, 130)
        assert "Traceback" not in result.stderr


# While rank 0 writes. The frames come from a generator of the test's own, which lets it be in the midst of the file.


def _frames(then: Any, *_: Any, **__: Any) -> Iterator[torch.Tensor]:
    yield torch.rand(1, 64, 64, 3)
    then()
    yield torch.rand(8, 64, 64, 3)


def _while_writing(then: Any, rank: int) -> None:
    pytest.MonkeyPatch().setattr("ltx_sp.decode.decode_frames", functools.partial(_frames, then))


def _raise_signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_while_writing(number: signal.Signals, num_ranks: int, demo: Path, tmp_path: Path, output: Path) -> None:
    prepare = functools.partial(_while_writing, functools.partial(_raise_signal, number))
    outcome = run_main(arguments(demo, output / "clip.mp4"), num_ranks, tmp_path / "ranks", prepare)
    assert_fails_cleanly(outcome, 128 + number, ".*; nothing was written.", output)


def test_an_interrupt_names_what_had_been_written(demo: Path, tmp_path: Path, output: Path) -> None:
    prepare = functools.partial(_while_writing, functools.partial(_raise_signal, signal.SIGINT))
    argv = arguments(demo, output / "clip.mp4", {"--save-latents": output / "latents.safetensors"})
    outcome = run_main(argv, 1, tmp_path / "ranks", prepare)
    assert "ltx_sp: Interrupted; " in outcome.stderr[0]
    assert "latents.safetensors had been written, nothing else." in outcome.stderr[0]
    assert os.listdir(output) == ["latents.safetensors"]


_DISK_BYTES = 16_000  # more than a rank says on stderr, less than a clip of noise


def _fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (_DISK_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_disk_full(num_ranks: int, demo: Path, tmp_path: Path, output: Path) -> None:
    prepare = functools.partial(_while_writing, _fill_disk)
    outcome = run_main(arguments(demo, output / "clip.mp4"), num_ranks, tmp_path / "ranks", prepare)
    assert_fails_cleanly(outcome, 8, ".*clip.mp4 was not written: File too large. Look at .*", output)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_folder_goes_away(num_ranks: int, demo: Path, tmp_path: Path, output: Path) -> None:
    (output / "folder").mkdir()
    prepare = functools.partial(_while_writing, functools.partial(shutil.rmtree, output / "folder"))
    outcome = run_main(arguments(demo, output / "folder" / "clip.mp4"), num_ranks, tmp_path / "ranks", prepare)
    assert_fails_cleanly(outcome, 8, ".*clip.mp4 was not written: No such file or directory. Look at .*", output)


def _die_while_rank_0_writes(flag: Path, rank: int) -> None:
    if rank == 0:
        _while_writing(functools.partial(_show_and_wait, flag), rank)
    else:
        pytest.MonkeyPatch().setattr("ltx_sp.parallel.liveness.Liveness.wait_for", functools.partial(_die, flag))


def _show_and_wait(flag: Path) -> None:
    flag.touch()
    time.sleep(20)


def _die(flag: Path, *_: Any) -> None:
    while not flag.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_dies_while_rank_0_writes(demo: Path, tmp_path: Path, output: Path) -> None:
    prepare = functools.partial(_die_while_rank_0_writes, tmp_path / "flag")
    outcome = run_main(arguments(demo, output / "clip.mp4"), 2, tmp_path / "ranks", prepare)
    assert outcome.exit_codes == [7, -1]
    assert re.search(f"^ltx_sp: {DIED.format(1)}$", outcome.stderr[0], re.M)
    assert os.listdir(output) == []
