"""Oracle: the kernel's own books, ``/proc`` and ``mincore``, and faults put where they would come from."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from ltx_sp.errors import LtxSpError
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.weights import host
from ltx_sp.weights.host import available_bytes, cached_share, huge_bytes, map_file, populate, shared_bytes
from ltx_sp.weights.index import TensorEntry
from tests.support.ranks import run_ranks
from tests.support.weights import CPU, mapping_of, open_files

MIB = 2**20


@pytest.mark.parametrize("num_bytes", [0, 1, 4097, 8 * MIB])
def test_fresh_memory_is_zero_and_can_be_written(num_bytes: int) -> None:
    memory = huge_bytes(num_bytes)
    assert memory.dtype == torch.uint8
    assert memory.numel() == num_bytes
    assert not memory.any()
    memory.fill_(7)
    assert bool((memory == 7).all())


def test_fresh_memory_asks_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("a kernel without huge pages")
    memory = huge_bytes(8 * MIB)
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            begin, end = (int(text, 16) for text in fields[0].split("-"))
            inside = begin <= memory.data_ptr() < end
        elif inside and fields[0] == "VmFlags:":
            flags = fields[1:]
    assert "hg" in flags


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
    with pytest.raises(OSError, match="Invalid argument"):
        mmap.mmap(-1, MIB).madvise(mmap.MADV_HUGEPAGE)
    assert not huge_bytes(MIB).any()


def _share(rank: int, num_ranks: int) -> tuple[int, int, list[int], int]:
    axis = Mesh.of_group(None, CPU).world
    before = open_files()
    memory = shared_bytes(3 * MIB, axis)
    begin, end = memory.numel() * rank // num_ranks, memory.numel() * (rank + 1) // num_ranks
    memory[begin:end] = rank + 1
    axis.gather_text("", label="written")
    seen, place = memory.unique().tolist(), mapping_of(memory)
    assert "memfd:ltx_sp" in place.name
    del memory
    assert "memfd:ltx_sp" not in Path("/proc/self/maps").read_text()
    return place.inode, len(seen), seen, len(open_files() - before)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_see_one_memory_and_leave_none(num_ranks: int) -> None:
    results = run_ranks(_share, num_ranks)
    assert len({inode for inode, _, _, _ in results}) == 1
    for _, _, seen, left in results:
        assert seen == list(range(1, num_ranks + 1))
        assert left == 0


def test_one_rank_shares_nothing() -> None:
    assert mapping_of(shared_bytes(MIB, Axis.alone())).inode == 0


def _fail_to_share(rank: int, num_ranks: int, function: str, failing: int) -> tuple[str, int]:
    axis = Mesh.of_group(None, CPU).world
    before = open_files()
    if rank == failing:

        def fail(*_: object) -> int:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

        setattr(os, function, fail)
    message = ""
    try:
        shared_bytes(MIB, axis)
    except (OSError, LtxSpError) as error:
        message = str(error)
    return message, len(open_files() - before)


@pytest.mark.parametrize(("function", "failing"), [("memfd_create", 0), ("ftruncate", 0), ("open", 0), ("open", 1)])
def test_where_one_rank_gets_no_shared_memory_all_hear_it(function: str, failing: int) -> None:
    for message, left in run_ranks(_fail_to_share, 2, function, failing, timeout=20):
        assert "Too many open files" in message
        assert left == 0


def test_a_mapped_file_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 64)
    with path.open("rb") as file:
        mapped = map_file(file.fileno(), 256 * 64)
    assert mapping_of(mapped).inode == path.stat().st_ino
    populate(mapped, 1, 256 * 64 - 1)
    mapped[300] = 0
    assert path.read_bytes() == bytes(range(256)) * 64


def test_what_a_file_no_longer_holds_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    with path.open("rb") as file:
        mapped = map_file(file.fileno(), 4 * mmap.PAGESIZE)
    os.truncate(path, mmap.PAGESIZE)
    populate(mapped, 0, mmap.PAGESIZE)
    with pytest.raises(OSError, match="Input/output error"):
        populate(mapped, 0, 2 * mmap.PAGESIZE)


@pytest.mark.parametrize(("code", "told"), [(errno.EFAULT, errno.EIO), (errno.ENOMEM, errno.ENOMEM), (errno.EINVAL, 0)])
def test_what_the_kernel_says_about_populating(monkeypatch: pytest.MonkeyPatch, code: int, told: int) -> None:
    def fail(address: int, length: int, advice: int) -> int:
        ctypes.set_errno(code)
        return -1

    memory = huge_bytes(100)
    monkeypatch.setattr(host, "_MADVISE", fail)
    if told:
        with pytest.raises(OSError, match=os.strerror(told)) as caught:
            populate(memory, 0, 100)
        assert caught.value.errno == told
    else:
        populate(memory, 0, 100)  # a kernel before 5.14: pages come in when they are touched


def write_group(folder: Path, limit: str, current: int, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups in which this process is in ``slice/job``."""
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/slice/job\n")
    monkeypatch.setattr(host, "_OWN_CONTROL_GROUP", tmp_path / "own")
    monkeypatch.setattr(host, "_CONTROL_GROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def test_memory_of_the_host(control_groups: Path) -> None:
    """Within what the kernel itself says a moment later; no control group limits it."""
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
    found = available_bytes()
    assert abs(found - int(line.split()[1]) * 1024) < 2**30
    write_group(control_groups / "slice/job", "max", 5)
    assert abs(available_bytes() - found) < 2**30


@pytest.mark.parametrize("limited", ["slice/job", "slice", ""])
def test_a_control_group_limits_those_inside(control_groups: Path, limited: str) -> None:
    for group in ("slice/job", "slice", ""):
        write_group(control_groups / group, "max", 0)
    write_group(control_groups / limited, str(10 * MIB), 8 * MIB, inactive_file=3 * MIB)
    assert available_bytes() == 5 * MIB
    write_group(control_groups / limited, str(10 * MIB), 12 * MIB)
    assert available_bytes() == 0


def test_a_container_may_not_see_its_own_control_group(control_groups: Path) -> None:
    write_group(control_groups, str(10 * MIB), MIB)
    assert available_bytes() == 9 * MIB


@pytest.mark.parametrize("damage", ["no file", "no numbers", "another kind"])
def test_control_groups_that_say_nothing_are_passed_over(
    control_groups: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    if damage == "no file":
        monkeypatch.setattr(host, "_OWN_CONTROL_GROUP", control_groups / "absent")
    elif damage == "no numbers":
        write_group(control_groups / "slice/job", "much", 0)
    else:
        host._OWN_CONTROL_GROUP.write_text("4:memory:/slice/job\n")
    assert available_bytes() > 64 * MIB


NUM_BYTES = 4 * MIB


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of which nothing is in the page cache."""
    path = tmp_path / "x"
    path.write_bytes(bytes(NUM_BYTES))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share([entry(path, 0, NUM_BYTES)]):
        pytest.skip("a file system that keeps its files in memory")
    return path


def entry(path: Path, start: int, end: int) -> TensorEntry:
    return TensorEntry("x", path, "U8", (end - start,), start, end)


def test_how_much_of_a_file_is_in_the_page_cache(cold: Path) -> None:
    halves = [entry(cold, 1, NUM_BYTES // 2), entry(cold, NUM_BYTES // 2, NUM_BYTES)]
    assert cached_share(halves) == 0.0
    with cold.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(NUM_BYTES // 2)
        share = cached_share(halves)
        assert share is not None
        assert 0.3 < share < 0.7
        file.read()
    assert cached_share(halves) == 1.0


def test_to_ask_reads_nothing(cold: Path) -> None:
    for _ in range(3):
        assert cached_share([entry(cold, 0, NUM_BYTES)]) == 0.0


@pytest.mark.parametrize("fault", ["nothing", "empty", "gone", "shorter", "remote"])
def test_where_it_cannot_be_asked_the_answer_is_none(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(NUM_BYTES))
    entries = [entry(path, 0, NUM_BYTES)]
    if fault == "nothing":
        entries = []
    elif fault == "empty":
        entries = [entry(path, 5, 5)]
    elif fault == "gone":
        path.unlink()
    elif fault == "shorter":
        os.truncate(path, 10)
    else:
        entries = [entry(Path("s3:/bucket/x"), 0, 10)]
    before = open_files()
    assert cached_share(entries) is None
    assert open_files() == before


def test_of_the_files_of_others_the_kernel_does_not_tell(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: cold.stat().st_uid + 1)
    assert cached_share([entry(cold, 0, NUM_BYTES)]) == 0.0, "who may write it may ask"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cached_share([entry(cold, 0, NUM_BYTES)]) is None
