"""The load benchmark judges by its medians, and sees a loader that is wrong, slow to answer or late to touch.

Oracle: safetensors for what the written checkpoints hold; arithmetic by hand for the rest.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ltx_sp.parallel.collectives import Axis, Ledger
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.weights.index import read_index
from profiling import load_baselines as baselines
from profiling import load_checkpoints as checkpoints
from profiling import load_clock
from profiling.load import GROUPS, Bench, Check, Run, clone_limit, exit_code, parse, ratios
from profiling.load_baselines import Case, Job, Piece, Sample, Work

SHAPES = {f"blocks.{i}.weight": (64, 8 + i % 4) for i in range(40)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return checkpoints.write_checkpoint(tmp_path / "shards", SHAPES, checkpoints.UNEVEN)


def job(path: Path, rank: int = 0, num_ranks: int = 1) -> Job:
    axis = Axis(rank, num_ranks, None, Ledger())
    return Job(path, Mesh(axis, axis, axis, axis, torch.device("cpu"), axis.ledger))


def pieces(work: Work) -> Iterator[Piece]:
    found = work()
    assert not isinstance(found, Mapping)
    return found


def sample(began: float, ended: float, **figures: float) -> Sample:
    values = {"busy": 0.0, "own": 0.0, "stall": 0.0, "peak_bytes": 0, "fetched_bytes": 0, "resident": 1.0} | figures
    return Sample(began, ended, digests=None, **values)  # type: ignore[arg-type]


def test_a_check_goes_by_the_median() -> None:
    assert Check("x", (0.9, 5.0, 1.0), 1.0).passed
    assert not Check("x", (0.1, 1.1, 1.2), 1.0).passed
    assert "FAIL" in str(Check("x", (2.0,), 1.0))
    assert "pass" in str(Check("x", (1.0,), 1.0))


def test_a_figure_that_is_no_number_does_not_pass() -> None:
    assert not Check("x", (float("nan"),), 1.0).passed


def test_ratios_are_those_of_one_round() -> None:
    assert ratios([1.0, 6.0], [2.0, 3.0]) == (0.5, 2.0)
    assert ratios([1.0, 6.0], [2.0]) == (0.5, 3.0)
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    """A machine that slows down between rounds slows both."""
    ours, other = [1.0, 10.0, 3.0], [2.0, 20.0, 4.0]
    assert Check("x", ratios(ours, other), 1.0).median == 0.5


def test_the_limit_follows_the_mode_of_huge_pages() -> None:
    assert [clone_limit(mode) for mode in ("always", "madvise", "never")] == [0.9, 0.25, 0.25]


@pytest.mark.parametrize(("limits", "code"), [([1.0], 0), ([1.0, 0.5], 1), ([], 1)])
def test_exit_code(limits: Sequence[float], code: int) -> None:
    """Nothing measured is no success."""
    assert exit_code([Check("x", (1.0,), limit) for limit in limits]) == code


def test_a_run_lasts_from_the_first_rank_to_the_last() -> None:
    run = Run.of(
        [
            sample(10.0, 12.0, busy=3.0, own=1.0, stall=0.1, peak_bytes=5, fetched_bytes=7, resident=0.5),
            sample(9.5, 11.0, busy=2.9, own=0.5, stall=0.3, peak_bytes=4, fetched_bytes=8, resident=0.0),
        ]
    )
    assert run == Run(2.5, 0.6, 0.3, 5, 15, 0.5)


@pytest.mark.parametrize(
    "arguments",
    ["--only host,nothing", "--rounds 0", "--size-gib 0", "--ranks 0 1", "--only device", "--device tpu"],
)
def test_arguments_that_cannot_be_carried_out_are_refused(arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(arguments.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--device", "cuda", "--ranks", "1"])


def test_without_a_gpu_everything_else_is_measured() -> None:
    assert parse([]).only == [name for name in GROUPS if name != "device"]


def test_written_files_hold_what_their_headers_say(shards: Path) -> None:
    files = checkpoints.checkpoint_files(shards)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    expected = checkpoints.file_digests(shards)
    assert checkpoints.digests(tensors, shards) == expected
    assert len(set(expected.values())) == len(SHAPES)  # a tensor in the wrong place is seen
    assert read_index(shards).entries.keys() == SHAPES.keys()


def test_shards_are_uneven_and_complete(shards: Path) -> None:
    sizes = [Path(file).stat().st_size for file in checkpoints.checkpoint_files(shards)]
    assert len(sizes) == 8
    assert max(sizes) > 2 * min(sizes)
    weight_map = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == SHAPES.keys()


def test_the_default_checkpoint_is_what_the_report_says() -> None:
    shapes = checkpoints.model_shapes(2 * 2**30)
    num_bytes = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    assert len(shapes) == 1000
    assert 0.97 * 2 * 2**30 < num_bytes <= 2 * 2**30
    assert len(checkpoints.small_shapes(40_000)) == 40_000


def test_a_finished_checkpoint_is_not_written_again(shards: Path) -> None:
    file = Path(checkpoints.checkpoint_files(shards)[0])
    before = file.stat().st_mtime_ns
    assert checkpoints.write_checkpoint(shards, SHAPES, checkpoints.UNEVEN) == shards
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_read_every_byte_once(shards: Path, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "READ_BYTES", 1000)
    found = {file: bytearray() for file in checkpoints.checkpoint_files(shards)}
    for rank in range(num_ranks):
        for file, offset, data in pieces(baselines.read_reused(job(shards, rank, num_ranks))):
            assert offset == len(found[file])
            found[file] += data.numpy().tobytes()
    assert found == {file: Path(file).read_bytes() for file in found}


@pytest.mark.parametrize("contestant", [baselines.load_and_clone, baselines.read_huge, baselines.load_and_assign])
def test_what_others_keep_is_what_the_files_hold(shards: Path, contestant: baselines.Contestant) -> None:
    found = contestant(job(shards))()
    assert isinstance(found, Mapping)
    assert checkpoints.digests(found, shards) == checkpoints.file_digests(shards)


@pytest.mark.parametrize("contestant", [baselines.load_and_stage, baselines.read_reused, baselines.ours_passing])
def test_what_is_passed_on_is_what_the_files_hold(shards: Path, contestant: baselines.Contestant) -> None:
    found = baselines.assemble(pieces(contestant(job(shards))))
    digests = checkpoints.digests(found, shards)
    assert digests == checkpoints.file_digests(shards)


def test_every_page_is_touched_once() -> None:
    page = mmap.PAGESIZE
    memory = torch.frombuffer(mmap.mmap(-1, 8 * page), dtype=torch.uint8)
    parts = [memory[: page + 1], memory[page + 5 : page + 9], memory[4 * page - 1 : 4 * page], memory[7 * page :]]
    assert load_clock.touch(parts) == 4  # pages 0, 1, 3 and 7
    assert load_clock.touch([memory, memory[:0]]) == 8
    assert load_clock.touch([]) == 0


def test_a_thread_that_is_kept_from_running_notices() -> None:
    ticker = load_clock.Ticker()
    ctypes.PyDLL(None).usleep(80_000)  # unlike CDLL, it lets no other Python thread run
    assert ticker.stop() >= 0.07


def off_by_one_byte(job: Job) -> Work:
    """A loader that is wrong in one byte."""
    work = baselines.load_and_clone(job)

    def spoiled() -> Mapping[str, Tensor]:
        found = work()
        assert isinstance(found, Mapping)
        found["blocks.7.weight"].view(torch.uint8)[0, 0] ^= 1
        return found

    return spoiled


def test_a_wrong_loader_breaks_a_limit(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(parse(["--rounds", "1"]), tmp_path)
    contestants = {"right": baselines.load_and_clone, "wrong": off_by_one_byte}
    runs = bench.compare("spoiled", contestants, Case(shards))
    assert [(check.what, check.values) for check in bench.checks] == [
        ("wrong: tensors that differ from the file", (1,))
    ]
    assert exit_code(bench.checks) == 1
    assert {name: len(each) for name, each in runs.items()} == {"right": 1, "wrong": 1}
    assert "wrong: tensors that differ" in capsys.readouterr().out
