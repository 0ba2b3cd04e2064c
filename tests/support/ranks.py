"""Run a function on several gloo ranks, or the command line on several processes, and bring back what they answered.

A fork server that has torch loaded starts a rank in tens of milliseconds, where a fresh interpreter needs
seconds. Ranks meet through a file in a folder of their own, so test workers side by side never collide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import importlib
import io
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, context, process
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["CliResult", "RankError", "RunningCli", "run_cli", "run_ranks", "start_cli"]

# What a rank would otherwise import by itself, every time: torch's lazily loaded parts, what test modules import at
# their top, and the modules of ltx_sp that ranks run. Whatever is absent or broken is left to the test that uses it.
_PRELOAD = (
    "torch",
    "torch.distributed",
    "numpy",
    "pytest",
    "ltx_sp.parallel.mesh",
    "ltx_sp.parallel.parallelize",
    "ltx_sp.generate",
    # What ltx_sp.model.upstream imports when it is first needed.
    "diffusers.pipelines.ltx2.connectors",
    "diffusers.pipelines.ltx2.vocoder",
    "transformers.models.gemma3.modeling_gemma3",
)
_RUN_MARK = "LTX_SP_TEST_RUN"  # environment variable by which the processes of one command are found again


class RankError(AssertionError):
    """A rank raised, died or did not answer.

    Args:
        failures: what went wrong by rank, likeliest cause first: ranks that died, then those that raised, by the time
            of raising, then those that did not answer.
    """

    def __init__(self, failures: Mapping[int, str]):
        self.failures = dict(failures)
        super().__init__("\n".join(f"rank {rank} {what}" for rank, what in self.failures.items()))


@dataclasses.dataclass(frozen=True)
class CliResult:
    """What a finished command left: ``stdout`` and ``stderr`` as text, all ranks together."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


class RunningCli:
    """A command line that runs, as ``start_cli`` gives it.

    Args:
        child: torchrun, or the only rank.
    """

    def __init__(self, child: subprocess.Popen[str], mark: str, folder: pathlib.Path):
        self.child, self._mark, self._folder, self._start = child, mark, folder, time.monotonic()

    @property
    def stderr(self) -> str:
        """What was written so far."""
        return (self._folder / "stderr").read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Wait until ``text`` is in stderr. Blocks the host."""
        deadline = time.monotonic() + timeout
        while text not in self.stderr:
            over = self.child.poll() is not None or time.monotonic() > deadline
            assert not over, f"{text!r} never came; stderr:\n{self.stderr}"
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """The process ids of torchrun's ranks, in their order."""
        found = {rank: pid for pid in _marked(self._mark) if (rank := _environment(pid).get(b"RANK")) is not None}
        return [found[rank] for rank in sorted(found, key=int)]

    def wait_for_end(self, pids: Sequence[int], timeout: float = 60.0) -> None:
        """Wait until none of these processes is left. Blocks the host."""
        deadline = time.monotonic() + timeout
        while left := set(pids).intersection(_marked(self._mark)):
            assert time.monotonic() < deadline, f"{left} still run; stderr:\n{self.stderr}"
            time.sleep(0.02)

    def finish(self, timeout: float = 60.0) -> CliResult:
        """Wait for the end. Blocks the host.

        Raises:
            AssertionError: it ran past ``timeout``.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(timeout)
        stdout, stderr = ((self._folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        if self.child.returncode is None:
            raise AssertionError(
                f"still running after {timeout:g} s\n--- stdout\n{stdout[-4000:]}\n--- stderr\n{stderr[-4000:]}"
            )
        return CliResult(self.child.returncode, stdout, stderr, time.monotonic() - self._start)


def run_ranks(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout: float = 60.0,
    grace: float = 3.0,
    init_group: bool = True,
) -> list[Any]:
    """Call ``fn(rank, num_ranks, *args)`` on every rank of a gloo group and return the results in rank order.

    Ranks see this process's environment and torchrun's variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
    ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``) and have one thread each.

    Args:
        fn: defined at the top of an importable module; what it returns must pickle.
        timeout: seconds for all ranks together; also the group's own.
        grace: seconds that the other ranks get to answer after one has failed.
        init_group: False leaves starting and stopping the process group to ``fn``.

    Raises:
        RankError: a rank raised, died or did not answer in time; by then no rank is left running.
    """
    server = _fork_server()
    deadline = time.monotonic() + timeout
    ranks: list[context.ForkServerProcess] = []
    pipes: dict[connection.Connection[Any, Any], int] = {}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        launch = _Launch(fn, args, num_ranks, timeout, init_group, folder, dict(os.environ), _free_port())
        try:
            for rank in range(num_ranks):
                receiver, sender = server.Pipe(duplex=False)
                child = server.Process(target=_rank_main, args=(rank, launch, sender), name=f"rank{rank}", daemon=True)
                child.start()
                sender.close()  # so that the end of the child ends the pipe
                ranks.append(child)
                pipes[receiver] = rank
            return _collect(ranks, pipes, deadline, timeout, grace, pathlib.Path(folder))
        finally:
            for child in ranks:
                child.kill()
            for child in ranks:
                child.join()
            for receiver in pipes:
                receiver.close()


def run_cli(
    args: Sequence[str | os.PathLike[str]],
    num_ranks: int = 1,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    *,
    module: str = "ltx_sp.generate",
    cwd: str | os.PathLike[str] | None = None,
) -> CliResult:
    """Run ``python -m ltx_sp.generate ARGS``, under torchrun for two ranks or more, and wait for it.

    Args:
        env: set on top of this process's environment.

    Raises:
        AssertionError: it ran past ``timeout``; it and all it started have been killed.
    """
    with start_cli(args, num_ranks, env, module=module, cwd=cwd) as running:
        return running.finish(timeout)


@contextlib.contextmanager
def start_cli(
    args: Sequence[str | os.PathLike[str]],
    num_ranks: int = 1,
    env: Mapping[str, str] | None = None,
    *,
    module: str = "ltx_sp.generate",
    script: str | os.PathLike[str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> Iterator[RunningCli]:
    """Start what ``run_cli`` runs; at the end of the block it and all that it started is killed.

    Args:
        script: an executable that each rank runs instead of ``python -m module``.
    """
    command = [sys.executable]
    if num_ranks > 1:
        # A rendezvous on port 0 takes whichever port is free at that moment: nothing to collide with.
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc_per_node={num_ranks}"]
    command += ["-m", module] if script is None else ["--no-python", os.fspath(script)]
    command += [os.fspath(arg) for arg in args]
    mark = uuid.uuid4().hex
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(env or {}), _RUN_MARK: mark}
    with tempfile.TemporaryDirectory(prefix="cli-") as name:
        folder = pathlib.Path(name)
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                # Whoever starts the tests in the background has them ignore Ctrl-C, and children inherit that.
                preexec_fn=_heed_interrupts,
            )
        try:
            yield RunningCli(child, mark, folder)
        finally:
            _kill_marked(mark)
            child.wait()


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What the ranks of one run have in common."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    num_ranks: int
    timeout: float
    init_group: bool
    folder: str
    environment: dict[str, str]
    port: int


@functools.cache
def _fork_server() -> context.ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([name for name in _PRELOAD if _imports(name)])
    return server


def _imports(name: str) -> bool:
    # The fork server survives a module that is not there, and dies of one that is broken.
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank_main(rank: int, launch: _Launch, sender: connection.Connection[Any, Any]) -> None:
    os.environ.clear()  # the fork server's own dates from the first run
    os.environ.update(launch.environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would resolve the host's name, which may have no address
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(launch.num_ranks),
        LOCAL_WORLD_SIZE=str(launch.num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(launch.port),
    )
    torch.set_num_threads(1)
    with _stack_file(launch.folder, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            if launch.init_group:
                store = dist.FileStore(f"{launch.folder}/store", launch.num_ranks)
                dist.init_process_group(
                    "gloo",
                    store=store,
                    rank=rank,
                    world_size=launch.num_ranks,
                    timeout=datetime.timedelta(seconds=launch.timeout),
                )
                dist.barrier()  # a rank that has nothing to do would close connections that others still make
            answer = _to_bytes((launch.fn(rank, launch.num_ranks, *launch.args), None, 0.0))
            if launch.init_group and dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:
            answer = _to_bytes((None, traceback.format_exc(), time.monotonic()))
        sender.send_bytes(answer)


def _to_bytes(value: Any) -> bytes:
    # Bytes, because a tensor in a pipe is a handle on memory that goes with its sender.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _stack_file(folder: str | pathlib.Path, rank: int) -> pathlib.Path:
    return pathlib.Path(folder) / f"stack{rank}"


def _collect(
    ranks: Sequence[process.BaseProcess],
    pipes: Mapping[connection.Connection[Any, Any], int],
    deadline: float,
    timeout: float,
    grace: float,
    folder: pathlib.Path,
) -> list[Any]:
    """Wait for one answer per rank. Blocks the host."""
    results: dict[int, Any] = {}
    dead: dict[int, str] = {}
    raised: dict[int, tuple[float, str]] = {}  # when, by the clock that all processes share
    waiting = dict(pipes)
    while waiting and (ready := connection.wait(list(waiting), deadline - time.monotonic())):
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank = waiting.pop(pipe)
            try:
                result, trace, moment = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except (EOFError, OSError):  # nothing, or half an answer
                dead[rank] = _cause_of_death(ranks[rank])
                continue
            if trace is None:
                results[rank] = result
            else:
                raised[rank] = moment, f"raised:\n{trace}"
        if dead or raised:
            deadline = min(deadline, time.monotonic() + grace)
    failures = dead | {rank: raised[rank][1] for rank in sorted(raised, key=lambda rank: raised[rank][0])}
    if waiting:
        waited = f"{grace:g} s after that" if failures else f"within {timeout:g} s"
        stacks = _stacks(ranks, sorted(waiting.values()), folder)
        failures |= {rank: f"did not answer {waited}; it was killed at:\n{stack}" for rank, stack in stacks.items()}
    if failures:
        raise RankError(failures)
    return [results[rank] for rank in range(len(ranks))]


def _cause_of_death(child: process.BaseProcess) -> str:
    child.join(5)
    code = child.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} before it answered"


def _stacks(ranks: Sequence[process.BaseProcess], silent: Sequence[int], folder: pathlib.Path) -> dict[int, str]:
    """Ask each silent rank where it is."""
    for rank in silent:
        pid = ranks[rank].pid
        if _stack_file(folder, rank).exists() and pid is not None:  # later than that, it handles the signal
            os.kill(pid, signal.SIGUSR1)
    time.sleep(0.2)
    files = {rank: _stack_file(folder, rank) for rank in silent}
    return {rank: file.read_text() if file.exists() else "its start\n" for rank, file in files.items()}


def _kill_marked(mark: str) -> None:
    """Kill every process with ``mark`` in its environment, and wait until they are gone. Blocks the host.

    A process group would not do: torchrun gives each rank a session of its own.
    """
    deadline = time.monotonic() + 5.0
    while (pids := _marked(mark)) and time.monotonic() < deadline:  # again: one may have started another meanwhile
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _marked(mark: str) -> list[int]:
    pids = [int(entry.name) for entry in pathlib.Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if _environment(pid).get(_RUN_MARK.encode()) == mark.encode()]


def _environment(pid: int) -> dict[bytes, bytes]:
    try:
        variables = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile, or not ours to read
        return {}
    return {name: value for name, _, value in (variable.partition(b"=") for variable in variables)}
