"""Where this rank stands: guidance axis x token axis; starting, stopping and agreeing.

The one reader of torchrun's environment.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from ltx_sp import errors
from ltx_sp.errors import PeerLostError, RankMismatchError, RequestError, UnsupportedError
from ltx_sp.observe import log
from ltx_sp.parallel.collectives import COLLECTIVE_TIMEOUT, Axis, Ledger

ProcessGroup = dist.ProcessGroup
Store = dist.Store

_JOIN_TIMEOUT = datetime.timedelta(minutes=5)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The ranks of one job and this one among them.

    Args:
        world: all ranks.
        guidance: the passes of a guided step are dealt over this axis.
        tokens: the video tokens are sharded over this axis.
        host: the ranks of this host: weights are read once along it.
        device: where this rank computes.
        ledger: counts every collective of this rank.
    """

    world: Axis
    guidance: Axis
    tokens: Axis
    host: Axis
    device: torch.device
    ledger: Ledger
    _layouts: dict[int, tuple[Axis, Axis]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def alone(device: torch.device | str = "cpu") -> Mesh:
        """A mesh of one rank: the same program, its collectives identities."""
        axis = Axis.alone()
        return Mesh(axis, axis, axis, axis, torch.device(device), axis.ledger)

    @staticmethod
    def of_group(group: dist.ProcessGroup | None, device: torch.device, *, host_name: str | None = None) -> Mesh:
        """All ranks of an existing process group on the token axis; None is the default group. Collective.

        Args:
            host_name: equal on the ranks that share a host; None to find out.
        """
        ledger = Ledger()
        world = Axis(dist.get_rank(group), dist.get_world_size(group), group, ledger)
        guidance, tokens = world.split(world.size)
        hosts = world.gather_text(host_name or _host_name(), label="hosts")
        parts = [[rank for rank, name in enumerate(hosts) if name == host] for host in dict.fromkeys(hosts)]
        return Mesh(world, guidance, tokens, world.partition(parts), device, ledger)

    def with_guidance(self, size: int) -> Mesh:
        """The same ranks, ``size`` on the guidance axis, neighbours together on the token axis.

        Collective, and blocks the host, the first time for each size.

        Args:
            size: divides the number of ranks.
        """
        if size not in self._layouts:
            self._layouts[size] = self.world.split(self.world.size // size)
        guidance, tokens = self._layouts[size]
        return dataclasses.replace(self, guidance=guidance, tokens=tokens)

    @property
    def is_main(self) -> bool:
        return self.world.rank == 0

    def together(self) -> AbstractContextManager[None]:
        """Raise on every rank what is raised inside on any: ``together`` along ``world``. Collective."""
        return together(self.world)

    def agree(self, digest: str, what: str) -> None:
        """Make sure that every rank holds the same ``what``. Collective. Blocks the host.

        Raises:
            RankMismatchError: on every rank, naming the ranks that differ from rank 0.
        """
        digests = self.world.gather_text(digest, label="agree")
        odd = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
        if odd:
            raise RankMismatchError(
                f"Rank{'s' if len(odd) > 1 else ''} {', '.join(odd)} made another {what} than rank 0. "
                "All ranks need the same arguments, files and version of ltx_sp: compare them."
            )


@contextmanager
def together(axis: Axis) -> Iterator[None]:
    """Raise on every rank of an axis what is raised inside on any. Collective, after the block. Blocks the host.

    The block itself holds no collective that a rank could miss by failing: another would wait in it.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    try:
        told = axis.gather_text("" if own is None else f"{type(own).__name__}\n{own}", label="together")
    except PeerLostError:
        if own is not None:
            raise own from None
        raise
    if own is not None:
        raise own
    for rank, text in enumerate(told):
        name, _, message = text.partition("\n")
        if name:
            kind = getattr(errors, name, None)
            if kind is None:
                raise PeerLostError(f"Rank {axis.names[rank]} failed with {name}: {message.partition(chr(10))[0]}")
            # What one was told by another is told on as it is.
            raise kind(message if re.match(r"Rank \d+: ", message) else f"Rank {axis.names[rank]}: {message}")


def environment_rank() -> int:
    """This process's rank as torchrun says it; 0 where there is no torchrun."""
    return int(os.environ.get("RANK", "0"))


def _host_name() -> str:
    """What tells this host from others: the run of its kernel, and the processes that this one can see."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def environment_world_size() -> int:
    """The number of ranks as torchrun says it; 1 where there is no torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into this rank's device.

    Raises:
        RequestError: the name means nothing.
        UnsupportedError: a CUDA device is asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"--device {name!r} is no device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"--device {name!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedError(
                f"--device {name!r} needs a CUDA device and PyTorch sees none here. Use --device cpu, "
                "or install a CUDA build of PyTorch."
            )
        # Inside somebody else's job there may be no LOCAL_RANK; then the job has set the current device.
        index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UnsupportedError(
                f"This rank needs cuda:{index}, and this host has {torch.cuda.device_count()} CUDA devices. "
                "Start at most that many ranks per host."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """What the device is called: a GPU's name, or the processor's architecture and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.get_num_threads()} threads"


def calibration_path(name: str) -> Path:
    """Where ``profiling/calibrate.py`` keeps what it measured on devices of a name, in the cache folder."""
    # Not Path.home: a process may run for a user without one, and without a calibration nothing is missing.
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.environ.get("LTX_SP_CACHE") or Path(home) / "ltx_sp"
    return Path(cache) / f"calibration-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def start_store() -> dist.Store | None:
    """Join torchrun's key-value store; None where there is no torchrun. Blocks the host.

    Raises:
        RequestError: the environment speaks of ranks and no store answers.
    """
    if "RANK" not in os.environ:
        return None
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=_JOIN_TIMEOUT))
    except (RuntimeError, ValueError) as error:
        raise RequestError(
            f"The environment sets RANK = {environment_rank()} of {environment_world_size()}, as torchrun does, and "
            f"the ranks' store cannot be joined ({_reason(error)}). Start with torchrun, or unset RANK to run alone."
        ) from error
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return dist.PrefixStore("ltx_sp", store)


@contextmanager
def start(device: torch.device, store: dist.Store | None) -> Iterator[Mesh]:
    """Start the process group that torchrun describes, and stop it at a good end. Collective. Blocks the host.

    Without a store the process is alone, and no group is made. After a failure the group stays: to stop it could
    mean to wait for an exchange that never ends, and the process ends anyway.

    Raises:
        PeerLostError: the ranks do not reach each other.
    """
    if store is None:
        yield Mesh.alone(device)
        return
    # Making the group waits too, but keeps all threads of Python from running: signals and lost ranks go unnoticed.
    meet(store, "start")
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=environment_rank(),
            world_size=environment_world_size(),
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        raise PeerLostError(
            f"The ranks cannot be connected ({_reason(error)}). See that the hosts reach each other; "
            "NCCL_SOCKET_IFNAME, and GLOO_SOCKET_IFNAME on the CPU, choose the network interface."
        ) from error
    yield Mesh.of_group(None, device)
    dist.destroy_process_group()


def meet(store: dist.Store, place: str) -> None:
    """Wait until every rank that torchrun started is there, without an exchange. Blocks the host.

    Args:
        place: a name of which no other meeting has been.
    """
    try:
        store.add(place, 1)
        while store.add(place, 0) < environment_world_size():
            time.sleep(0.05)
    except RuntimeError as error:
        raise PeerLostError(
            f"The ranks' store was lost where all were to meet: {place} ({_reason(error)}). Start again."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what torch says, without where in its source it says it."""
    return str(error).partition("\n")[0].rpartition("] ")[2].rstrip(". ")


def join(group: dist.ProcessGroup | None, device: torch.device) -> Mesh:
    """The mesh of ``group`` (None: the default group), or of this process alone where no group was started.

    Collective.
    """
    if dist.is_available() and dist.is_initialized():
        return Mesh.of_group(group, device)
    if group is not None:
        raise RequestError("A process group was given and torch.distributed is not initialised. Initialise it first.")
    if environment_world_size() > 1:
        log.warning(
            "torchrun started %d ranks and no process group is initialised: each makes every clip by itself. "
            "Initialise torch.distributed before Runtime.load to share the work.",
            environment_world_size(),
        )
    return Mesh.alone(device)
