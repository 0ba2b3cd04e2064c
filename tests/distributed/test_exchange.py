"""Oracles: one rank for the weights, the kernel for what is read and held, and the formula for what is exchanged."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx_sp.parallel.collectives import Axis, Exchange
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.weights import load as loading
from ltx_sp.weights import reader
from ltx_sp.weights.index import TensorEntry, read_index
from ltx_sp.weights.load import LoadReport, load, read_tensors
from ltx_sp.weights.policy import Policy
from ltx_sp.weights.stripes import ALIGNMENT, ByteStream
from tests.support.ranks import run_ranks
from tests.support.weights import CPU, KEYMAP, mapping_of, on_meta, same_bits, saved_tensors, write_part

BUCKET = 2 * ALIGNMENT
HEAD = 256


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one rank brings back.

    Args:
        read_bytes: that the kernel was asked for.
        inodes: of what the parameters are in; 0 is memory of the rank itself.
    """

    state: dict[str, Tensor]
    report: LoadReport
    read_bytes: int
    exchanges: list[Exchange]
    counts: list[int]
    inodes: set[int]
    shared_kib: int


def _count_reads(patch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        sizes.append(real(descriptor, buffers, offset))
        return sizes[-1]

    patch.setattr(os, "preadv", preadv)


def _refuse(*_: Any) -> None:
    raise AssertionError("a rank that needs nothing took memory for it")


def _load(
    rank: int, num_ranks: int, folder: str, mode: str, exchange: bool, dtype: torch.dtype | None, idle: Sequence[int]
) -> Answer:
    patch, sizes, counts = pytest.MonkeyPatch(), list[int](), list[int]()
    patch.setattr(loading, "_BUCKET_BYTES", BUCKET)
    patch.setattr(reader, "SLOT_BYTES", BUCKET)
    mesh = Mesh.of_group(None, CPU)
    assert mesh.host.size == num_ranks
    index, module = read_index(Path(folder)), on_meta()
    _count_reads(patch, sizes)
    if rank in idle:
        patch.setattr("ltx_sp.weights.load._allocate", _refuse)
    policy = Policy(mode, host=mesh.host, exchange=mesh.host if exchange else Axis.alone())
    mesh.ledger.recording = True
    report = load(
        module,
        index,
        KEYMAP,
        device=CPU,
        dtype=dtype,
        component="part",
        policy=policy,
        is_taker=rank not in idle,
        on_bytes=counts.append,
    )
    mesh.ledger.recording = False
    mesh.world.gather_text("", label="hold")  # so that all hold what they have at once
    state = {} if rank in idle else {name: tensor.clone() for name, tensor in module.state_dict().items()}
    held = [tensor for tensor in module.state_dict().values() if not tensor.is_meta and tensor.numel()]
    answer = Answer(
        state, report, sum(sizes), mesh.ledger.exchanges, counts, {mapping_of(tensor).inode for tensor in held},
        _shared_kib(),
    )  # fmt: skip
    mesh.world.gather_text("", label="hold")
    return answer


def _shared_kib() -> int:
    """This rank's part of the memory that ranks share and that has no file: its pages, each divided by its holders."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = "memfd:ltx_sp" in line
        elif inside and fields[0] == "Pss:":
            found += int(fields[1])
    return found


@functools.cache
def wanted(dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = saved_tensors()
    tensors["part.head.weight"] = tensors["part.embed.weight"]
    return {
        name.removeprefix("part."): tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def assert_loaded(answer: Answer, dtype: torch.dtype | None) -> None:
    assert answer.state.keys() == wanted(dtype).keys()
    for name, tensor in wanted(dtype).items():
        assert same_bits(answer.state[name], tensor), name


def run(
    folder: Path,
    num_ranks: int,
    mode: str = "stream",
    *,
    exchange: bool = True,
    dtype: torch.dtype | None = None,
    layout: str = "shards",
    idle: Sequence[int] = (),
) -> list[Answer]:
    write_part(folder, saved_tensors(), layout)
    answers: list[Answer] = run_ranks(_load, num_ranks, str(folder), mode, exchange, dtype, idle, timeout=30)
    return answers


def source_of(folder: Path) -> ByteStream:
    """The line of bytes that all ranks divide."""
    entries = [entry for entry in read_index(folder).entries.values() if entry.name.startswith("part.")]
    return ByteStream(sorted(entries, key=lambda entry: (str(entry.file), entry.start)))


@pytest.mark.parametrize(
    ("num_ranks", "dtype"), [(1, torch.bfloat16), (2, None), (2, torch.bfloat16), (3, torch.bfloat16)]
)
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("mode", ["stream", "mmap", "preload"])
def test_ranks_hold_what_one_rank_holds(
    tmp_path: Path, mode: str, exchange: bool, num_ranks: int, dtype: torch.dtype | None
) -> None:
    for answer in run(tmp_path, num_ranks, mode, exchange=exchange, dtype=dtype):
        assert_loaded(answer, dtype)
        # Of what the others preload a rank knows only that it is about as much.
        slack = num_ranks * ALIGNMENT if mode == "preload" else 0
        assert abs(sum(answer.counts) - answer.report.num_bytes) <= slack


@pytest.mark.parametrize("layout", ["file", "unaligned"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_stripes_may_be_cut_in_any_layout(tmp_path: Path, num_ranks: int, layout: str) -> None:
    for dtype in (None, torch.float64):
        for answer in run(tmp_path, num_ranks, dtype=dtype, layout=layout):
            assert_loaded(answer, dtype)


@pytest.mark.parametrize(
    ("mode", "num_ranks"), [("stream", 1), ("stream", 2), ("stream", 3), ("stream", 4), ("mmap", 3)]
)
def test_each_rank_reads_its_stripe_and_exchanges_what_the_formula_says(
    tmp_path: Path, mode: str, num_ranks: int
) -> None:
    answers = run(tmp_path, num_ranks, mode)
    source = source_of(tmp_path)
    stripes = [source.stripe(rank, num_ranks) for rank in range(num_ranks)]
    num_rounds = max(len(source.chunks(begin, end, BUCKET)) for begin, end in stripes)
    assert num_rounds > 5
    for (begin, end), answer in zip(stripes, answers, strict=True):
        assert answer.report.read_bytes == end - begin
        assert answer.report.num_bytes == sum(answer.counts) == source.num_bytes
        assert abs(end - begin - source.num_bytes / num_ranks) <= ALIGNMENT
        if mode == "stream":
            assert answer.read_bytes == end - begin
        gathers = [exchange for exchange in answer.exchanges if exchange.label == "weights"]
        one = Exchange("weights", "all_gather", (num_ranks - 1) * (HEAD + BUCKET))
        assert gathers == ([one] * num_rounds if num_ranks > 1 else [])
        rest = {(exchange.label, exchange.num_bytes) for exchange in answer.exchanges} - {("weights", one.num_bytes)}
        assert rest == ({("together", 0)} if num_ranks > 1 else set())


@pytest.mark.parametrize("idle", [[0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("mode", ["stream", "mmap", "preload"])
def test_ranks_that_need_nothing_help_and_keep_nothing(tmp_path: Path, mode: str, idle: list[int]) -> None:
    for rank, answer in enumerate(run(tmp_path, 3, mode, idle=idle)):
        source = source_of(tmp_path)
        begin, end = source.stripe(rank, 3)
        assert answer.report.read_bytes == end - begin
        if rank in idle:
            assert answer.inodes == set()
            assert answer.shared_kib == 0
        else:
            assert_loaded(answer, None)


def test_ranks_that_need_nothing_help_to_preload_what_others_keep(tmp_path: Path) -> None:
    helper, taker = run(tmp_path, 2, "preload", exchange=False, idle=[0])
    assert helper.inodes == set()
    assert_loaded(taker, None)
    assert helper.read_bytes + taker.read_bytes == taker.report.num_bytes


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_preloading_reads_once_and_keeps_one_copy_per_host(tmp_path: Path, num_ranks: int) -> None:
    answers = run(tmp_path, num_ranks, "preload", exchange=False)
    num_bytes = source_of(tmp_path).num_bytes
    assert sum(answer.read_bytes for answer in answers) == num_bytes
    (inode,) = set.union(*(answer.inodes for answer in answers))
    assert inode > 0
    # Each tensor begins at a multiple of 256 bytes, and pages are whole.
    assert num_bytes / 1024 <= sum(answer.shared_kib for answer in answers) <= num_bytes / 1024 + 8


def test_mapping_keeps_no_copy_at_all(tmp_path: Path) -> None:
    inodes = set.union(*(answer.inodes for answer in run(tmp_path, 2, "mmap", exchange=False)))
    assert inodes == {path.stat().st_ino for path in tmp_path.iterdir()}


def _read(rank: int, num_ranks: int, folder: str, idle: int | None) -> tuple[dict[str, Tensor], int]:
    pytest.MonkeyPatch().setattr(loading, "_BUCKET_BYTES", BUCKET)
    host = Mesh.of_group(None, CPU).host
    entries = list(read_index(Path(folder)).entries.values())
    found: dict[str, Tensor] = {}
    counts: list[int] = []

    def done(entry: TensorEntry, tensor: Tensor) -> None:
        assert entry.name not in found
        found[entry.name] = tensor

    options: dict[str, Any] = {"device": CPU, "policy": Policy("stream", host, host), "on_bytes": counts.append}
    read_tensors(entries, done=None if rank == idle else done, **options)
    return found, sum(counts)


@pytest.mark.parametrize("idle", [None, 1])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_tensors_of_no_module_come_to_all_who_want_them(tmp_path: Path, num_ranks: int, idle: int | None) -> None:
    write_part(tmp_path, saved_tensors(), "unaligned")
    num_bytes = read_index(tmp_path).num_bytes
    for rank, (found, count) in enumerate(run_ranks(_read, num_ranks, str(tmp_path), idle, timeout=30)):
        assert count == num_bytes
        if rank == idle:
            assert found == {}
        else:
            for name, tensor in saved_tensors().items():
                assert same_bits(found[name], tensor), name
