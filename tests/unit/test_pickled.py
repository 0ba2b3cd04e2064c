"""Oracle: ``torch.load(weights_only=True)``, on files that ``torch.save`` wrote."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltx_sp.errors import WeightsError
from ltx_sp.weights import files
from ltx_sp.weights.index import DTYPE_BYTES, FileStamp, TensorEntry, read_index
from ltx_sp.weights.reader import TORCH_DTYPES


def some_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype) if name == "BOOL" else
        torch.randint(0, 100, (3, 5), generator=generator).to(dtype)
        for name, dtype in TORCH_DTYPES.items()
    }  # fmt: skip
    return state | {
        "count": torch.tensor(seed),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.randn(2, 3, generator=generator)),
        "one of many": torch.randn(4, 1, 6, generator=generator)[2],
        "strides that do not matter": torch.randn(6, 1, generator=generator).T,
    }


def require_equal(path: Path, state: dict[str, Tensor], entries: dict[str, TensorEntry]) -> None:
    content = path.read_bytes()
    assert list(entries) == list(state)
    for name, tensor in state.items():
        entry = entries[name]
        assert entry.name == name
        assert entry.file == path
        assert entry.shape == tuple(tensor.shape)
        assert TORCH_DTYPES[entry.dtype] == tensor.dtype
        assert entry.stamp == FileStamp.of(path.stat())
        stored = tensor.detach().contiguous().reshape(-1)
        assert content[entry.start : entry.end] == stored.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("suffix", files.PICKLED_SUFFIXES)
def test_an_entry_locates_the_bytes_that_torch_loads(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    torch.save(some_state(), path)
    index = read_index(path)
    assert index.files == (path,)
    assert index.metadata == {}
    require_equal(path, torch.load(path, weights_only=True), dict(index.entries))
    assert read_index(tmp_path).entries == index.entries


def test_every_dtype_of_the_index_is_known() -> None:
    assert TORCH_DTYPES.keys() == DTYPE_BYTES.keys()


def save_of_a_module(path: Path) -> None:
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    assert isinstance(state, OrderedDict)
    assert hasattr(state, "_metadata")
    torch.save(state, path)


def save_of_a_trainer(path: Path) -> None:
    module = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"epoch": 3, "optimizer": optimizer.state_dict(), "state_dict": module.state_dict()}, path)


def save_of_old(path: Path) -> None:
    """Without what later versions of torch added to the archive."""
    torch.save(some_state(), path)
    keep_records(path, lambda name: name.rpartition("/")[2] not in (".format_version", ".storage_alignment"))


def keep_records(path: Path, keep: Callable[[str], bool], **changes: bytes) -> None:
    """Write the archive anew, as Python does, with some records left out or with other content."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if keep(name):
                archive.writestr(name, changes.get(name.rpartition("/")[2], content))


@pytest.mark.parametrize("save", [save_of_a_module, save_of_a_trainer, save_of_old])
def test_what_else_is_in_the_file_does_no_harm(tmp_path: Path, save: Callable[[Path], None]) -> None:
    path = tmp_path / "model.pt"
    save(path)
    loaded = torch.load(path, weights_only=True)
    require_equal(path, loaded.get("state_dict", loaded), dict(read_index(path).entries))


def test_values_that_are_not_tensors_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2), "step": 3, "lr": 1e-4, "none": None, "config": {"x": [1, (2,)]}, 7: True}, path)
    assert list(read_index(path).entries) == ["a"]


def test_tied_tensors_have_the_same_bytes(tmp_path: Path) -> None:
    path, weight = tmp_path / "model.bin", torch.randn(4, 4)
    torch.save({"embed": weight, "head": weight, "again": weight.view(16)}, path)
    entries = read_index(path).entries
    assert len({(entry.start, entry.end) for entry in entries.values()}) == 1
    assert entries["again"].shape == (16,)


def test_a_large_archive_is_understood(tmp_path: Path) -> None:
    """Over 65 535 records the end of the directory has another form."""
    path = tmp_path / "model.bin"
    torch.save({str(i): torch.full((1,), i % 256, dtype=torch.uint8) for i in range(65_600)}, path)
    entries, content = read_index(path).entries, path.read_bytes()
    assert len(entries) == 65_600
    assert all(content[entries[str(i)].start] == i % 256 for i in range(0, 65_600, 997))


def test_offsets_beyond_4_gib_are_understood(tmp_path: Path) -> None:
    """Written with a hole of 5 GiB before the last storage, which is not on disk."""
    path, hole = tmp_path / "model.bin", 5 * 2**30
    torch.save({"first": torch.arange(4), "last": torch.arange(5)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            if name.endswith("/data/1"):
                archive.fp.seek(hole)  # type: ignore[union-attr]
                archive.start_dir = hole
            archive.writestr(name, content)
    assert path.stat().st_blocks * 512 < 2**20
    last = read_index(path).entries["last"]
    assert last.start > hole
    with path.open("rb") as written:
        written.seek(last.start)
        assert written.read(last.num_bytes) == torch.arange(5).numpy().tobytes()


def test_the_shards_of_an_index_json_are_read(tmp_path: Path) -> None:
    for i in (1, 2):
        torch.save({f"{i}.weight": torch.ones(i)}, tmp_path / f"pytorch_model-0000{i}-of-00002.bin")
    weight_map = {f"{i}.weight": f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"1.weight": torch.ones(9)}, tmp_path / "pytorch_model.fp32.bin")
    assert {name: entry.shape for name, entry in read_index(tmp_path).entries.items()} == {
        "1.weight": (1,),
        "2.weight": (2,),
    }


def test_torch_is_not_imported() -> None:
    program = "import sys, ltx_sp.weights.pickled; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "strides": (lambda: {"a": torch.ones(2, 3).T}, r"'a' of shape \(3, 2\) has strides \(1, 3\) and must be contig"),
    "expanded": (lambda: {"a": torch.ones(1).expand(3)}, r"strides \(0,\) and must be contiguous"),
    "shared in part": (
        lambda: {"a": (whole := torch.ones(4)), "b": whole[2:]},
        "tensors 'a' and 'b' share a part of their bytes",
    ),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "asks for 'torch._utils _rebuild_sparse_tensor'"),
    "quantised": (
        lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
        "asks for 'torch._utils _rebuild_qtensor'",
    ),
    "complex": (lambda: {"a": torch.ones(2, dtype=torch.complex64)}, "asks for 'torch ComplexFloatStorage'"),
    "other dtype": (lambda: {"a": torch.ones(2, dtype=torch.uint16)}, "asks for 'torch uint16'"),
    "negated": (
        lambda: {"a": torch.ones(2, dtype=torch.complex64).conj().imag},
        "rebuilds something that is no plain tensor",
    ),
    "without data": (lambda: {"a": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
    "with attributes": (lambda: {"a": with_attribute()}, "asks for 'torch._tensor _rebuild_from_type_v2'"),
    "another key": (lambda: {"model": {"a": torch.ones(2)}}, r"no value of its dict is a tensor \(it has 'model'\)"),
    "nothing": (dict, r"no value of its dict is a tensor \(it has nothing\)"),
    "a tensor": (lambda: torch.ones(2), "it holds a tensor and must hold a dict"),
    "a list": (lambda: [torch.ones(2)], "it holds a list and must hold a dict"),
    "a module": (lambda: nn.Linear(2, 3), "asks for 'torch.nn.modules.linear Linear'"),
}


def with_attribute() -> Tensor:
    tensor = torch.ones(2)
    tensor.note = "x"  # type: ignore[attr-defined]
    return tensor


@pytest.mark.filterwarnings("ignore:.*quantized.*:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, kind: str) -> None:
    make, match = REFUSED[kind]
    path = tmp_path / "model.pth"
    torch.save(make(), path)
    with pytest.raises(WeightsError, match=match) as caught:
        read_index(path)
    assert str(caught.value).startswith(f"{path} is not a plain state dict of torch.save: ")


def test_the_old_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(some_state(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="in the format from before 2020"):
        read_index(path)
