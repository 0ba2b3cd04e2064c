"""Oracle: the rule. What is there and what is measured decide, and all ranks of a host decide alike."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltx_sp.errors import LtxSpError
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.weights import policy as policies
from ltx_sp.weights.index import read_index
from ltx_sp.weights.policy import Policy, choose_policy
from ltx_sp.weights.stripes import ByteStream
from tests.support.ranks import run_ranks
from tests.support.weights import CPU, fail_reads

CUDA = torch.device("cuda", 0)
GIB = 2**30
PROBE_BYTES = 2**18


def choose(asked: str, device: torch.device, *, preload_bytes: int = 0) -> Policy:
    return choose_policy(asked, device, Axis.alone(), ByteStream([]), preload_bytes=preload_bytes)


def sample_of(path: Path) -> ByteStream:
    return ByteStream(list(read_index(path).entries.values()))


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    save_file({f"{i}": torch.ones(50_000) for i in range(4)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("asked", "device", "mode", "reason"),
    [
        ("auto", CPU, "mmap", "parameters on the CPU can stay in the page cache"),
        ("auto", CUDA, "stream", "small buffers feed a GPU fastest"),
        ("stream", CPU, "stream", "as asked"),
        ("mmap", CUDA, "mmap", "as asked"),
        ("preload", CUDA, "preload", "as asked"),
    ],
)
def test_one_rank_decides_by_its_device(asked: str, device: torch.device, mode: str, reason: str) -> None:
    policy = choose(asked, device)
    assert policy.mode == mode
    assert policy.reason.startswith(reason)
    assert policy.host.size == policy.exchange.size == policy.crew.size == 1
    assert policy.num_threads >= 1


@pytest.mark.parametrize(("device", "mode"), [(CPU, "mmap"), (CUDA, "stream")])
@pytest.mark.parametrize(("available", "fits"), [(20, True), (19, False)])
def test_preload_gives_way_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, mode: str, available: int, fits: bool
) -> None:
    """A tenth of what is left stays free."""
    monkeypatch.setattr(policies, "available_bytes", lambda: available * GIB)
    policy = choose("preload", device, preload_bytes=18 * GIB)
    assert policy.mode == ("preload" if fits else mode)
    if not fits:
        want = f"preload needs 18.0 GiB of host memory and 19.0 are left; {mode} instead"
        assert policy.reason == want


def test_what_is_elsewhere_cannot_be_mapped() -> None:
    here, there = Path("/a/x.safetensors"), Path("s3:/bucket/x.safetensors")
    for mode in ("mmap", "stream", "preload"):
        policy = Policy(mode, num_threads=3, reason="why")
        assert policy.serving([here]) is policy
        served = policy.serving([here, there])
        assert served.mode == ("stream" if mode == "mmap" else mode)
        assert (served.num_threads, served.reason) == (3, "why")


def test_who_must_take_part() -> None:
    ledger, alone = Axis.alone().ledger, Axis.alone()
    host = Axis(0, 2, None, ledger)
    assert Policy("preload", host, alone).crew is host
    assert Policy("preload", host, host).crew is host
    assert Policy("stream", host, host).crew is host
    assert Policy("stream", host, alone).crew is alone
    assert Policy("mmap", host, alone).crew is alone


def _choose(
    rank: int,
    num_ranks: int,
    path: str,
    asked: str,
    available: list[int],
    seconds: list[list[float]],
    exchange: bool | None,
    device: str,
    is_far: bool,
) -> tuple[str, int, int, str]:
    """With memory and clock of this rank faked: ``seconds`` of the read, then of the gather."""
    axis = Mesh.of_group(None, CPU).world
    patch = pytest.MonkeyPatch()
    patch.setattr(policies, "_PROBE_BYTES", PROBE_BYTES)
    patch.setattr(policies, "is_remote", lambda path: is_far)
    patch.setattr(policies, "available_bytes", lambda: available[rank] * GIB)
    times = itertools.chain(seconds[rank])

    def measured(work: object) -> float:
        assert callable(work)
        work()
        return next(times)

    if seconds[rank]:
        patch.setattr(policies, "_seconds", measured)
    policy = choose_policy(
        asked, torch.device(device), axis, sample_of(Path(path)), preload_bytes=10 * GIB, exchange=exchange
    )
    return policy.mode, policy.exchange.size, policy.host.size, policy.reason


def choices(
    path: Path,
    asked: str = "stream",
    *,
    available: tuple[int, ...] = (99, 99),
    seconds: tuple[list[float], ...] = ([], []),
    exchange: bool | None = None,
    device: str = "cpu",
    is_far: bool = True,
) -> tuple[str, int, int, str]:
    """What all ranks chose, which must be one thing.

    Args:
        is_far: as if the file were in an object store, or else nothing is measured without a GPU.
    """
    results = run_ranks(
        _choose, len(available), str(path), asked, list(available), list(seconds), exchange, device, is_far, timeout=30
    )
    assert len(set(results)) == 1
    answer: tuple[str, int, int, str] = results[0]
    return answer


SLOW, FAST = 10.0, 1e-3


def test_an_exchange_that_is_faster_than_reading_everything_is_chosen(sample: Path) -> None:
    mode, exchange, host, reason = choices(sample, seconds=([SLOW, FAST], [SLOW, FAST]))
    assert (mode, exchange, host) == ("stream", 2, 2)
    # 256 KiB in a millisecond from the other rank, and in ten seconds from the file.
    assert reason == "as asked; 2 ranks exchange stripes (0.2 GiB/s by exchange, 0.0 from the page cache)"


def test_an_exchange_that_is_slower_is_not(sample: Path) -> None:
    mode, exchange, _, reason = choices(sample, seconds=([FAST, SLOW], [FAST, SLOW]))
    assert (mode, exchange) == ("stream", 1)
    assert reason.startswith("as asked; each of 2 ranks reads everything (0.0 GiB/s by exchange, 0.2 from")


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_measure_differently_agree(sample: Path, first: int) -> None:
    clocks = ([SLOW, FAST], [FAST, SLOW])
    _, exchange, _, _ = choices(sample, seconds=(clocks[first], clocks[1 - first]))
    assert exchange == (2 if first == 0 else 1), "the first rank decides"


def test_ranks_that_find_different_memory_agree(sample: Path) -> None:
    mode, _, _, reason = choices(sample, "preload", available=(99, 1), is_far=False)
    assert mode == "preload"
    assert reason.startswith("as asked; ")
    assert choices(sample, "preload", available=(1, 99), is_far=False)[0] == "mmap"


def test_on_the_cpu_nothing_is_exchanged_unless_asked_for(sample: Path) -> None:
    for mode in ("auto", "stream", "preload", "mmap"):
        assert choices(sample, mode, is_far=False)[1] == 1
    assert choices(sample, "auto")[:1] == ("stream",), "what is far cannot be mapped"
    assert choices(sample, "auto", exchange=True, is_far=False) == (
        "mmap", 2, 2, ("parameters on the CPU can stay in the page cache, where all ranks share them; "
        "stripes are exchanged"),
    )  # fmt: skip
    assert choices(sample, "stream", exchange=False, device="cuda:0") == (
        "stream", 1, 2, "as asked; each rank reads everything"
    )  # fmt: skip


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_is_really_measured_is_one_answer(sample: Path, num_ranks: int) -> None:
    _, exchange, host, reason = choices(sample, available=(99,) * num_ranks, seconds=([],) * num_ranks)
    assert exchange in (1, num_ranks)
    assert host == num_ranks
    assert "GiB/s by exchange" in reason


def test_what_is_too_small_to_be_measured_is_not_exchanged(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2 * PROBE_BYTES // 4 - 1)}, tmp_path / "x.safetensors")
    assert choices(tmp_path / "x.safetensors")[1:] == (1, 2, "as asked; too little for 2 ranks to exchange")


def _fail(rank: int, num_ranks: int, path: str, after: int) -> str:
    axis = Mesh.of_group(None, CPU).world
    sample, patch = sample_of(Path(path)), pytest.MonkeyPatch()
    patch.setattr(policies, "_PROBE_BYTES", PROBE_BYTES)
    patch.setattr(policies, "is_remote", lambda path: True)
    if rank == 1:
        fail_reads(patch, after=after)
    try:
        choose_policy("stream", CPU, axis, sample, preload_bytes=0)
    except LtxSpError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("after", [0, 1])
def test_a_disk_that_fails_while_it_is_measured_is_told_on_all_ranks(sample: Path, after: int) -> None:
    """In the first of the two reads, and in the second."""
    own = f"{sample} cannot be read (Input/output error). Check the file and the disk."
    assert run_ranks(_fail, 2, str(sample), after, timeout=20) == [f"Rank 1: {own}", own]
