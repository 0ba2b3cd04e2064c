"""Oracle: the safetensors library."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_sp.errors import WeightsError
from ltx_sp.weights import reader
from ltx_sp.weights.index import DTYPE_BYTES, Index, read_index
from ltx_sp.weights.reader import TORCH_DTYPES, read


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small files take many runs."""
    monkeypatch.setattr(reader, "_RUN_BYTES", 6000)


def write_files(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        part = {f"{i}.{j}": torch.randn(j * 40, 3, generator=generator) for j in range(20)}
        part |= {f"{i}.scalar": torch.tensor(i + 0.5, dtype=torch.float64), f"{i}.large": torch.arange(5000 + i)}
        save_file(part, folder / f"{i}.safetensors")
        tensors |= part
    return tensors


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Equality that NaN and fp8 do not disturb."""
    raw = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right) if tensor.numel()]
    return left.dtype == right.dtype and left.shape == right.shape and (not raw or torch.equal(raw[0], raw[1]))


def read_all(index: Index, num_threads: int = 4) -> dict[str, Tensor]:
    return {entry.name: tensor.clone() for entry, tensor in read(list(index.entries.values()), num_threads=num_threads)}


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("num_threads", [1, 4])
def test_every_tensor_comes_once_and_as_the_library_reads_it(tmp_path: Path, num_threads: int) -> None:
    tensors = write_files(tmp_path)
    reference = {name: tensor for i in range(3) for name, tensor in load_file(tmp_path / f"{i}.safetensors").items()}
    entries = list(read_index(tmp_path).entries.values())
    found = [(entry.name, tensor.clone()) for entry, tensor in read(entries, num_threads=num_threads)]
    assert len(found) == len(tensors)
    for name, tensor in found:
        assert same_bytes(tensor, reference[name]), name
        assert same_bytes(tensor, tensors[name]), name


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    assert TORCH_DTYPES[dtype].itemsize == DTYPE_BYTES[dtype]
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (6 * DTYPE_BYTES[dtype],), dtype=torch.uint8)
    path = tmp_path / "x.safetensors"
    save_file({"x": raw.view(TORCH_DTYPES[dtype]).view(2, 3)}, path)
    assert same_bytes(read_all(read_index(path))["x"], load_file(path)["x"])


def test_tensors_need_not_be_aligned(tmp_path: Path) -> None:
    """Other writers than the safetensors library put tensors at odd bytes."""
    values = torch.arange(10, dtype=torch.float64)
    header = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
            "empty": {"dtype": "F32", "shape": [3, 0], "data_offsets": [1, 1]},
            "double": {"dtype": "F64", "shape": [10], "data_offsets": [1, 81]},
            "last": {"dtype": "F32", "shape": [0], "data_offsets": [81, 81]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    payload = b"\x07" + values.view(torch.uint8).numpy().tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + payload)
    found = read_all(read_index(path))
    assert torch.equal(found["double"], values)
    assert torch.equal(found["byte"], torch.tensor(7, dtype=torch.uint8))
    assert found["empty"].shape == (3, 0)
    assert found["last"].shape == (0,)


def test_a_file_of_nothing_but_empty_tensors(tmp_path: Path) -> None:
    save_file({"x": torch.empty(2, 0, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    assert read_all(read_index(tmp_path))["x"].shape == (2, 0)
    assert list(read([])) == []


@pytest.mark.usefixtures("short_runs")
def test_bytes_are_reported_as_they_come_on_the_callers_thread(tmp_path: Path) -> None:
    write_files(tmp_path)
    index = read_index(tmp_path)
    steps: list[tuple[int, int]] = []
    for _ in read(list(index.entries.values()), on_bytes=lambda count: steps.append((count, threading.get_ident()))):
        pass
    assert sum(count for count, _ in steps) == index.num_bytes
    assert len(steps) > 10
    assert {thread for _, thread in steps} == {threading.get_ident()}


@pytest.mark.usefixtures("short_runs")
def test_only_the_pages_of_what_is_asked_for_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    mapped = reader._map

    def spy(descriptor: int, origin: int, length: int) -> Tensor:
        lengths.append(length)
        return mapped(descriptor, origin, length)

    monkeypatch.setattr(reader, "_map", spy)
    path = tmp_path / "x.safetensors"
    save_file({f"{i:03}": torch.full((1000,), i, dtype=torch.uint8) for i in range(100)}, path)
    entries = read_index(path).entries
    assert sorted(tensor[0].item() for _, tensor in read([entries["099"], entries["050"]])) == [50, 99]
    assert len(lengths) == 2
    assert max(lengths) < 1000 + mmap.ALLOCATIONGRANULARITY


def test_what_is_read_does_not_change_the_file(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "x.safetensors")
    for _, tensor in read(list(read_index(tmp_path).entries.values())):
        tensor.zero_()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.ones(4))


@pytest.mark.parametrize("change", ["longer", "shorter", "newer"])
def test_a_file_that_changed_after_its_index_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4)}, path)
    index = read_index(path)
    content = path.read_bytes()
    if change == "newer":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        path.write_bytes(content + b"\0" if change == "longer" else content[:-1])
    with pytest.raises(WeightsError, match=r"x\.safetensors has changed since its header was read"):
        read_all(index)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("after", [0, 64])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, after: int) -> None:
    write_files(tmp_path)
    index = read_index(tmp_path)
    path = tmp_path / "1.safetensors"
    tensors = read(list(index.entries.values()), num_threads=1)
    for _ in range(after + 1):
        next(tensors)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(WeightsError, match=r"1\.safetensors has changed"):
        list(tensors)


def test_a_file_that_is_gone_is_named_and_the_cause_is_kept(tmp_path: Path) -> None:
    write_files(tmp_path)
    index = read_index(tmp_path)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1\.safetensors cannot be read") as caught:
        read_all(index)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_failing_disk_is_named_and_the_cause_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(address: int, length: int, advice: int) -> int:
        ctypes.set_errno(errno.EFAULT)
        return -1

    write_files(tmp_path)
    monkeypatch.setattr(reader, "_MADVISE", fail)
    with pytest.raises(WeightsError, match=r"\.safetensors cannot be read \(Bad address\)") as caught:
        read_all(read_index(tmp_path))
    assert isinstance(caught.value.__cause__, OSError)


def test_a_kernel_that_cannot_populate_still_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, length: int, advice: int) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    tensors = write_files(tmp_path)
    monkeypatch.setattr(reader, "_MADVISE", refuse)
    found = read_all(read_index(tmp_path))
    assert all(same_bytes(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.usefixtures("short_runs")
def test_stopping_early_leaves_no_thread(tmp_path: Path) -> None:
    write_files(tmp_path)
    before = threading.active_count()
    tensors = read(list(read_index(tmp_path).entries.values()))
    next(tensors)
    assert threading.active_count() > before
    tensors.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
