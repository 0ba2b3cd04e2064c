"""The command line: ``torchrun --nproc_per_node=N -m ltx_sp.generate ...``.

Exit codes: 0 done; 2 the request or the arguments; 3 the plan; 4 the weights; 5 ranks that differ; 6 something not
supported; 7 a lost rank; 8 out of memory or disk; 1 values that are not finite, or a defect of ltx_sp; 128 + N stopped
by signal N (130 Ctrl-C, 143 terminated). All ranks end with the code of the first that failed.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # What follows takes seconds to import, and an interrupt would end in a traceback of whatever was being imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from ltx_sp.arguments import Command, parse
from ltx_sp.cost import DEFAULT_MACHINE, read_machine
from ltx_sp.errors import LtxSpError, PeerLostError, RequestError
from ltx_sp.handoff import Result
from ltx_sp.observe import Observer, configure_logging, end_progress, log
from ltx_sp.parallel.liveness import Farewell, Liveness
from ltx_sp.parallel.mesh import (
    Store,
    environment_rank,
    environment_world_size,
    meet,
    resolve_device,
    start,
    start_store,
)
from ltx_sp.plan import Plan, make_plan
from ltx_sp.runtime import Runtime
from ltx_sp.weights.checkpoint import read_spec
from ltx_sp.window import CudaWindow, StepWindow, Window
from ltx_sp.write import check_place, check_writable, save_decoded, save_latents, tee_frames, write_clip

_DEFECT_EXIT, _RESOURCE_EXIT, _SIGNAL_EXIT = 1, 8, 128
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OWN_REASON_SECONDS = 1.0
_PUT_AWAY_SECONDS = 15.0
# What torch says, in a plain RuntimeError, where the host's memory does not suffice.
_NO_MEMORY = ("not enough memory", "t allocate memory", "Storage size calculation overflowed")


class _Stopped(BaseException):
    """A signal has come; raised in the main thread, past every ``except Exception``."""

    def __init__(self, number: int):
        self.number = number


class _NotWrittenError(Exception):
    """An output could not be written; says which, and the system's reason."""


class _Ending:
    """How this process ends: the first reason counts, whichever thread has it, and one rank tells it."""

    def __init__(self, rank: int):
        self.liveness = Liveness(None, rank, 1, on_lost=self._on_lost)
        self.lost: Farewell | None = None
        self.written: list[Path] = []
        self.is_unwound = threading.Event()
        self._rank, self._farewell = rank, Farewell(0, "")
        self._lock, self._is_told = threading.Lock(), threading.Event()
        self._is_writing, self._signalled = False, -math.inf

    def join(self, store: Store | None, num_ranks: int) -> None:
        """End together with the other ranks from here on."""
        self.liveness = Liveness(store, self._rank, num_ranks, on_lost=self._on_lost)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within it a signal raises ``_Stopped`` in the main thread. One that was ignored stays so (nohup)."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Within it there is an unfinished file to put away, whoever ends the process."""
        self._is_writing = True
        try:
            yield
            self.written.append(path)
        except OSError as error:
            raise _NotWrittenError(f"{path} was not written: {error.strerror or error}.") from error
        finally:
            self._is_writing = False

    def end(self, farewell: Farewell) -> int:
        """Tell the user and the other ranks, once, and return the exit code. Blocks the host."""
        with self._lock:
            is_first = not self._farewell.exit_code
            if is_first:
                self._farewell = farewell
        if is_first:
            self.liveness.announce(farewell)
            if self.liveness.claim_last_word():
                self._tell(farewell.message)
            self.liveness.leave()
            self._is_told.set()
        if not self._is_told.wait(_PUT_AWAY_SECONDS):
            self._tell(self._farewell.message)  # the other thread waits for a store that does not answer
        return self._farewell.exit_code

    def _tell(self, message: str) -> None:
        with contextlib.suppress(OSError):  # stderr may be a full disk, or a pipe that nobody reads
            end_progress()
            if self._rank != 0:
                print(file=sys.stderr)  # ends the bar that rank 0 has left
            print(f"ltx_sp: {message}", file=sys.stderr, flush=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Once; a second later again, because a callback of some library may have swallowed the first.
        now = time.monotonic()
        if not self.is_unwound.is_set() and now - self._signalled > 1:
            self._signalled = now
            raise _Stopped(number)

    def _on_lost(self, lost: Farewell) -> NoReturn:
        self.lost = lost
        if lost.rank is not None:
            # Most often all ranks fail alike, and then this one is about to say so itself.
            self.is_unwound.wait(_OWN_REASON_SECONDS)
        if self._is_writing:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            self.is_unwound.wait(_PUT_AWAY_SECONDS)
        if self.is_unwound.is_set():
            self._is_told.wait(_PUT_AWAY_SECONDS)  # by the main thread, whose reason comes first
        os._exit(self.end(lost))


def _run(argv: Sequence[str] | None, rank: int, num_ranks: int, ending: _Ending, window: Window | None) -> None:
    store = start_store()
    ending.join(store, num_ranks)
    command = parse(argv, epilog=(__doc__ or "").partition("\n\n")[2], silent=rank != 0, num_ranks=num_ranks)
    if command.plan_ranks is not None:
        if rank == 0:
            spec = read_spec(command.settings.checkpoint_path)
            machine = DEFAULT_MACHINE
            if command.settings.calibration is not None:
                machine = read_machine(command.settings.calibration, machine)
            print(make_plan(command.request, spec, command.settings, command.plan_ranks, machine).describe())
            rates = command.settings.calibration or "of an H200's data sheet; a run goes by its own device's"
            print(f"{'rates':10} {rates}")
        return
    if rank == 0:
        _check_outputs(command)
    plan = make_plan(command.request, read_spec(command.settings.checkpoint_path), command.settings, num_ranks)
    steps = _window(command, plan, window, store)
    ending.liveness.start(command.settings.peer_timeout)
    device = resolve_device(command.settings.device)
    observer = Observer(rank, device, phase_log=command.phase_log if rank == 0 else None, show_progress=True)
    observer.note(ranks=num_ranks, pipeline=command.settings.pipeline)
    with start(device, store), Runtime.load(command.settings, observer=observer) as runtime:
        if rank == 0:
            for line in runtime.plan(command.request).describe().splitlines():
                log.info("%s", line)
        result = runtime.generate(command.request, window=steps)
        if rank == 0:
            _write(command, result, observer, ending)
        else:
            # Rank 0 still decodes; its failure would be this rank's too.
            ending.liveness.wait_for(0)
        ending.is_unwound.set()
        ending.liveness.leave()


def _write(command: Command, result: Result, observer: Observer, ending: _Ending) -> None:
    if command.save_latents is not None:
        with ending.writing(command.save_latents):
            save_latents(command.save_latents, result.latents)
    assert result.clip is not None
    clip = dataclasses.replace(result.clip, frames=observer.timed(result.clip.frames, "decode"))
    kept: list[torch.Tensor] = []
    if command.save_decoded is not None:
        clip, kept = tee_frames(clip)
    with (
        ending.writing(command.output_path),
        observer.phase("mux"),
        observer.progress(clip.num_frames, "decode", "frame") as advance,
    ):
        write_clip(clip, command.output_path, on_frames=advance)
    if command.save_decoded is not None:
        with ending.writing(command.save_decoded):
            save_decoded(command.save_decoded, kept, clip.waveform)
    if command.report is not None:
        with ending.writing(command.report):
            observer.write_report(command.report)
    for line in observer.report().splitlines():
        log.info("%s", line)
    log.info(
        "%s written: %d frames, %d Hz sound, %.1f s in all",
        command.output_path,
        clip.num_frames,
        clip.sample_rate,
        observer.seconds,
    )


def _window(command: Command, plan: Plan, window: Window | None, store: Store | None) -> StepWindow | None:
    """What a profiler is to see; None for nothing."""
    if command.profile_steps is None:
        return None
    first, last = command.profile_steps
    if last > plan.num_steps:
        raise RequestError(f"--profile-steps {first}-{last} goes beyond the {plan.num_steps} steps of this run.")
    if window is None:
        if resolve_device(command.settings.device).type != "cuda":
            raise RequestError(
                "--profile-steps tells a CUDA profiler and the device is the CPU. Use profiling/trace.py there."
            )
        window = CudaWindow()
    return StepWindow(window, first, last) if store is None else StepWindow(window, first, last, partial(meet, store))


def _check_outputs(command: Command) -> None:
    """Raise where an output could not be written, or would take the place of something else."""
    check_writable(command.output_path)
    flags = {
        "--output-path": command.output_path,
        "--save-latents": command.save_latents,
        "--save-decoded": command.save_decoded,
        "--phase-log": command.phase_log,
        "--report": command.report,
    }
    given = {flag: path for flag, path in flags.items() if path is not None}
    seen: dict[Path, str] = {}
    for flag, path in given.items():
        check_place(path)
        other = seen.setdefault(path.resolve(), flag)
        if other != flag:
            raise RequestError(f"{other} and {flag} both name {path}; each needs a file of its own.")
        for source, what in _sources(command):
            if path.exists() and path.resolve().is_relative_to(source.resolve()):
                raise RequestError(f"{flag} {path} is {what}. Choose another name.")


def _sources(command: Command) -> list[tuple[Path, str]]:
    """All files and folders that the run reads, and what they are."""
    settings, request = command.settings, command.request
    loras = [*settings.loras, *([settings.distilled_lora] if settings.distilled_lora else [])]
    model = [settings.checkpoint_path, settings.gemma_root, settings.spatial_upsampler_path]
    model += [lora.path for lora in loras]
    given = [request.audio_path, request.video_path, *(image.path for image in request.images)]
    return [(path, f"a file of the model in {path}") for path in model if path is not None] + [
        (path, "what the clip is to be made from") for path in given if path is not None
    ]


def _explain(error: BaseException, rank: int, ending: _Ending) -> Farewell:
    """Turn what ended the main thread into an exit code and a message."""
    if isinstance(error, _Stopped):
        # torchrun terminates the ranks that live once one has failed, and that one is the reason.
        lost = ending.lost or (None if error.number == signal.SIGINT else ending.liveness.find_failed())
        how = "Interrupted" if error.number == signal.SIGINT else f"Stopped by {signal.Signals(error.number).name}"
        written = ", ".join(map(str, ending.written))
        what = f"{written} had been written, nothing else." if written else "nothing was written."
        return lost or Farewell(_SIGNAL_EXIT + error.number, f"{how}; {what}")
    if isinstance(error, PeerLostError):
        return ending.liveness.wait_for_loss() or Farewell(error.exit_code, f"{type(error).__name__}: {error}")
    exit_code, message = _describe(error)
    if exit_code == _DEFECT_EXIT and not isinstance(error, LtxSpError):
        lost = ending.liveness.find_failed()
        if lost is not None and lost.exit_code == PeerLostError.exit_code:
            return lost  # whatever failed here, it was for want of that rank
        traceback.print_exception(error)
    return Farewell(exit_code, message if rank == 0 else f"Rank {rank}: {message}")


def _describe(error: BaseException) -> tuple[int, str]:
    first_line = str(error).partition("\n")[0]
    if isinstance(error, LtxSpError):
        return error.exit_code, f"{type(error).__name__}: {error}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in _NO_MEMORY):
        advice = (
            "Use more ranks, a smaller clip, fewer passes in a batch (--max-batch-size 1), --cuda-graph off, or "
            "--residency snapshot-low-vram."
        )
        return _RESOURCE_EXIT, f"Out of memory: {first_line or 'on the host'}. {advice}"
    if isinstance(error, _NotWrittenError):
        return _RESOURCE_EXIT, f"{first_line} Look at the disk and its free space, or choose another place."
    if isinstance(error, OSError):
        return _RESOURCE_EXIT, f"{error.filename or 'A file'}: {error.strerror or first_line}. Look at the disk."
    return _DEFECT_EXIT, f"{type(error).__name__}: {first_line}. This is a defect of ltx_sp; please report it."


def main(argv: Sequence[str] | None = None, *, window: Window | None = None) -> int:
    """Run the command line and return the exit code; among several ranks a bad end is the end of the process.

    Args:
        window: what records the steps of ``--profile-steps``; None for a CUDA profiler that watches the process.
    """
    rank, num_ranks = environment_rank(), environment_world_size()
    configure_logging(rank)
    ending = _Ending(rank)
    with ending.signals():
        try:
            _run(argv, rank, num_ranks, ending, window)
        except SystemExit as done:  # after --help
            return int(done.code or 0)
        except BaseException as error:
            ending.is_unwound.set()
            exit_code = ending.end(_explain(error, rank, ending))
            if num_ranks > 1:
                # Not by way of the interpreter, which would wait for exchanges that nobody will ever finish.
                sys.stdout.flush()
                os._exit(exit_code)
            return exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
