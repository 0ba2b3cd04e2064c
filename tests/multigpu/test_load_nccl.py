"""Weights onto several CUDA devices, exchanged over NCCL. Oracle: the tensors that were saved."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import Mesh, resolve_device, start, start_store
from ltx_sp.weights import load as loading
from ltx_sp.weights.index import read_index
from ltx_sp.weights.load import LoadReport, load
from ltx_sp.weights.policy import Policy, choose_policy
from ltx_sp.weights.stripes import ALIGNMENT, ByteStream
from tests.support.ranks import run_ranks
from tests.support.weights import KEYMAP, fail_reads, on_meta, same_bits, saved_tensors, write_part


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one rank brings back.

    Args:
        uses_first: whether CUDA has started on the first device, which only its own rank may do.
    """

    state: dict[str, Tensor]
    report: LoadReport | None
    error: str
    threads_left: int
    uses_first: bool


def _load_once(mesh: Mesh, folder: Path, mode: str, exchange: bool, dtype: torch.dtype | None) -> Answer:
    module, threads, error = on_meta(), threading.active_count(), ""
    policy = Policy(mode, mesh.host, mesh.host if exchange else Axis.alone())
    report = None
    try:
        report = load(
            module, read_index(folder), KEYMAP, device=mesh.device, dtype=dtype, component="part", policy=policy
        )
    except Exception as failure:
        error = str(failure)
    torch.cuda.synchronize(mesh.device)
    state = {} if error else {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    uses_first: bool = torch._C._cuda_hasPrimaryContext(0)  # type: ignore[attr-defined]
    return Answer(state, report, error, threading.active_count() - threads, uses_first)


def _load(rank: int, num_ranks: int, folder: str, mode: str, exchange: bool, dtype: torch.dtype | None) -> Answer:
    """On a thread of its own, as a run does, so that nothing depends on what the main thread has set."""
    pytest.MonkeyPatch().setattr(loading, "_BUCKET_BYTES", 2 * ALIGNMENT)
    device = resolve_device("cuda")
    with (
        start(device, start_store()) as mesh,
        ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as pool,
    ):
        return pool.submit(_load_once, mesh, Path(folder), mode, exchange, dtype).result()


def _fail(rank: int, num_ranks: int, folder: str, bad: int, after: int) -> tuple[Answer, Answer]:
    """One load in which a rank's disk fails, and one after it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(loading, "_BUCKET_BYTES", 2 * ALIGNMENT)
    with start(resolve_device("cuda"), start_store()) as mesh:
        with patch.context() as faulty:
            if rank == bad:
                fail_reads(faulty, after=after)
            first = _load_once(mesh, Path(folder), "stream", True, None)
        return first, _load_once(mesh, Path(folder), "stream", True, None)


def _measure(rank: int, num_ranks: int, folder: str) -> tuple[int, str]:
    device = resolve_device("cuda")
    with start(device, start_store()) as mesh:
        sample = ByteStream(list(read_index(Path(folder)).entries.values()))
        policy = choose_policy("stream", device, mesh.host, sample, preload_bytes=0)
        return policy.exchange.size, policy.reason


def require_devices(num_ranks: int) -> None:
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")


def assert_loaded(answer: Answer, dtype: torch.dtype | None) -> None:
    assert answer.error == ""
    for name, tensor in saved_tensors().items():
        want = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert same_bits(answer.state[name.removeprefix("part.")], want), name


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("mode", ["stream", "mmap", "preload"])
def test_every_rank_holds_what_was_saved(tmp_path: Path, mode: str, exchange: bool, num_ranks: int) -> None:
    require_devices(num_ranks)
    write_part(tmp_path, saved_tensors(), "unaligned")
    num_bytes = sum(tensor.nbytes for tensor in saved_tensors().values())
    for dtype in (None, torch.bfloat16):
        answers = run_ranks(_load, num_ranks, str(tmp_path), mode, exchange, dtype, timeout=300, init_group=False)
        for rank, answer in enumerate(answers):
            assert_loaded(answer, dtype)
            assert answer.threads_left == 0
            assert answer.uses_first == (rank == 0)
            share = num_bytes / num_ranks if exchange or mode == "preload" else num_bytes
            assert answer.report is not None
            assert abs(answer.report.read_bytes - share) <= ALIGNMENT


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_disk_that_fails_on_one_rank_is_told_on_all(tmp_path: Path, bad: int, after: int) -> None:
    require_devices(2)
    write_part(tmp_path, saved_tensors())
    for rank, (failed, again) in enumerate(
        run_ranks(_fail, 2, str(tmp_path), bad, after, timeout=300, init_group=False)
    ):
        assert failed.error.startswith("" if rank == bad else f"Rank {bad}: ")
        assert "cannot be read (Input/output error)" in failed.error
        assert failed.threads_left == 0
        assert_loaded(again, None)


def test_an_exchange_is_measured(tmp_path: Path) -> None:
    require_devices(2)
    (tmp_path / "x").mkdir()
    write_part(tmp_path / "x", {"part.large": torch.ones(2**25, dtype=torch.float32)}, "file")
    answers = run_ranks(_measure, 2, str(tmp_path / "x"), timeout=300, init_group=False)
    assert len(set(answers)) == 1
    assert "GiB/s by exchange" in answers[0][1]
