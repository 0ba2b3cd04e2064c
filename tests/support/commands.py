"""Command lines for the demo checkpoint, on ranks that the fork server starts, and what is to hold when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ltx_sp.generate import main
from tests.support.ranks import RankError, run_ranks

__all__ = ["Outcome", "Prepare", "Value", "arguments", "assert_fails_cleanly", "run_main", "run_mains"]

Value = str | int | float | Path | None
Prepare = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command left: the exit code of every rank, and ``stdout`` and ``stderr`` of every rank."""

    exit_codes: list[int]
    stdout: list[str]
    stderr: list[str]


def arguments(demo: Path, output: Path, changes: Mapping[str, Value] | None = None, *more: str | Path) -> list[str]:
    """A small clip of the demo checkpoint: two steps, 64 x 64 pixels, 9 frames.

    Args:
        changes: flags to set; None leaves one out.
        more: comes last.
    """
    flags: dict[str, Value] = {
        "--checkpoint-path": demo / "ltx-2.3-demo.safetensors",
        "--gemma-root": demo / "gemma",
        "--prompt": "a robot sings",
        "--height": 64,
        "--width": 64,
        "--num-frames": 9,
        "--num-inference-steps": 2,
        "--video-stg-blocks": 0,
        "--audio-stg-blocks": 0,
        "--device": "cpu",
        "--output-path": output,
    }
    flags |= changes or {}
    given = [(flag, str(value)) for flag, value in flags.items() if value is not None]
    return [*(word for pair in given for word in pair), *map(str, more)]


def run_main(argv: Sequence[str], num_ranks: int, folder: Path, prepare: Prepare | None = None) -> Outcome:
    """Call ``main(argv)`` on ranks that the fork server starts: as a program does, without torchrun.

    Args:
        folder: for the ranks' output.
        prepare: called with the rank before ``main``; must pickle.
    """
    return run_mains([list(argv)] * num_ranks, folder, prepare)


def run_mains(argvs: Sequence[Sequence[str]], folder: Path, prepare: Prepare | None = None) -> Outcome:
    """``run_main`` with arguments of its own for every rank."""
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(RankError):  # a rank that fails ends without an answer
        run_ranks(_main, len(argvs), argvs, folder, prepare, grace=30, init_group=False)
    read = {name: [_read(folder / f"{name}{rank}") for rank in range(len(argvs))] for name in ("code", "out", "err")}
    return Outcome([int(code or "-1") for code in read["code"]], read["out"], read["err"])


def _main(rank: int, num_ranks: int, argvs: Sequence[Sequence[str]], folder: Path, prepare: Prepare | None) -> None:
    with (folder / f"out{rank}").open("w") as out, (folder / f"err{rank}").open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        if num_ranks == 1:
            os.environ.pop("RANK")  # no torchrun
        if prepare is not None:
            prepare(rank)
        with _noting_exit(folder / f"code{rank}"):
            code = main(argvs[rank])
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / f"code{rank}").write_text(str(code))


@contextlib.contextmanager
def _noting_exit(file: Path) -> Iterator[None]:
    leave, first = os._exit, threading.Lock()

    def noting(code: int) -> None:
        first.acquire()  # two threads may want to leave at once, and one would find the other's file half written
        file.write_text(str(code))
        leave(code)

    os._exit = noting  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = leave


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def assert_fails_cleanly(outcome: Outcome, exit_code: int, message: str, output: Path) -> None:
    """One line on rank 0, which ``message`` matches; this exit code on all; no traceback; nothing in ``output``."""
    said = [[line for line in text.splitlines() if line.startswith("ltx_sp: ")] for text in outcome.stderr]
    assert [len(lines) for lines in said] == [1] + [0] * (len(said) - 1), outcome
    assert re.fullmatch(f"ltx_sp: {message}", said[0][0]), said[0][0]
    assert outcome.exit_codes == [exit_code] * len(said), outcome
    assert "Traceback" not in "".join(outcome.stderr), outcome
    assert not "".join(outcome.stdout)
    assert os.listdir(output) == []
