"""Oracle: the safetensors library, on files that it wrote."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltx_sp.errors import WeightsError
from ltx_sp.weights.index import DTYPE_BYTES, FileStamp, read_index, read_object


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{seed}.weight": torch.randn(3, 5, generator=generator),
        f"{seed}.half": torch.randn(7, generator=generator).bfloat16(),
        f"{seed}.count": torch.tensor(seed),
        f"{seed}.empty": torch.empty(0, 4),
    }


def write_shards(folder: Path) -> dict[str, Tensor]:
    """Two shards and the index JSON that transformers and diffusers write."""
    shards = {f"model-0000{i}-of-00002.safetensors": some_tensors(i) for i in (1, 2)}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def test_an_entry_locates_the_bytes_that_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = some_tensors()
    save_file(tensors, path, metadata={"model_version": "2.3.0"})
    index = read_index(path)
    content = path.read_bytes()
    with safe_open(path, "pt") as reference:
        assert sorted(index.entries) == sorted(reference.keys())
    for name, tensor in tensors.items():
        entry = index.entries[name]
        assert entry.name == name
        assert entry.file == path
        assert entry.shape == tuple(tensor.shape)
        stored = tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []
        assert list(content[entry.start : entry.end]) == stored
        assert entry.stamp == FileStamp.of(path.stat())
    assert index.metadata == {"model_version": "2.3.0"}
    assert index.files == (path,)
    assert index.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_has_the_size_that_the_library_gives_it(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, 6 * DTYPE_BYTES[dtype]]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(6 * DTYPE_BYTES[dtype]))
    with safe_open(path, "pt") as reference:  # refuses a header whose sizes disagree
        assert reference.get_tensor("x").shape == (2, 3)
    assert read_index(path).entries["x"].dtype == dtype


def test_shards_are_found_through_their_index(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    save_file({"stray": torch.zeros(1)}, tmp_path / "stray.safetensors")
    index = read_index(tmp_path)
    assert index.entries.keys() == tensors.keys()
    assert [file.name for file in index.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert all(entry.file.name.startswith(f"model-0000{name[0]}") for name, entry in index.entries.items())


def test_shards_are_found_without_an_index(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "consolidated.safetensors")
    (tmp_path / "._model.safetensors").write_bytes(b"resource fork")
    assert read_index(tmp_path).entries.keys() == tensors.keys()
    assert [file.name[:6] for file in read_index(tmp_path).files] == ["model-"] * 2


def test_a_consolidated_file_alone_is_read(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "consolidated.safetensors")
    assert read_index(tmp_path).entries.keys() == some_tensors().keys()


def test_shards_may_be_links_to_elsewhere(tmp_path: Path) -> None:
    """As in the cache of huggingface_hub."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    tensors = write_shards(blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..") / "blobs" / blob.name)
    assert read_index(snapshot).entries.keys() == tensors.keys()


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "a.safetensors")
    save_file(some_tensors(), tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=r"a\.safetensors and .*b\.safetensors both hold tensor '0\."):
        read_index(tmp_path)


def test_an_index_that_gives_a_tensor_to_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["1.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors lacks tensor '1\.weight'"):
        read_index(tmp_path)


def test_a_shard_without_its_end_is_refused_with_both_lengths(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    full = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(WeightsError) as caught:
        read_index(tmp_path)
    assert str(caught.value) == f"{shard} ends at byte {full - 10}, its header promises {full}. Fetch it again."


def test_selections_keep_whole_names_and_only_the_files_in_use(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = read_index(tmp_path).select(lambda name: name.startswith("2."))
    assert sorted(index.entries) == ["2.count", "2.empty", "2.half", "2.weight"]
    assert [file.name for file in index.files] == ["model-00002-of-00002.safetensors"]
    assert index.num_bytes == 15 * 4 + 7 * 2 + 8
    assert index.select(lambda name: False).files == ()


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    """64 GiB, none of them on disk: reading them would take minutes."""
    size = 2**36
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    began = time.perf_counter()
    assert read_index(path).num_bytes == size
    assert time.perf_counter() - began < 2


def test_an_object_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": {"b": [1, 2.5, null]}}')
    assert read_object(tmp_path / "config.json") == {"a": {"b": [1, 2.5, None]}}


def make_files(folder: Path, *names: str) -> None:
    """Files that hold one tensor each, named like the file."""
    for name in names:
        tensor = {name: torch.ones(2)}
        if name.endswith(".safetensors"):
            save_file(tensor, folder / name)
        else:
            torch.save(tensor, folder / name)


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (("b.safetensors", "a.safetensors", "model.bin", "model.pt"), ("a.safetensors", "b.safetensors")),
        (("pytorch_model.bin", "model.pth", "model.pt"), ("pytorch_model.bin",)),
        (("a.pth", "b.pt"), ("a.pth", "b.pt")),
        (("pytorch_model.bin", "training_args.bin", "optimizer.bin", "scheduler.bin"), ("pytorch_model.bin",)),
        (("training_args.bin", "rng_state_0.pth", "optimizer.pt", "scaler.pt", "model.pt"), ("model.pt",)),
        (("consolidated.00.pth", "model.pth"), ("model.pth",)),
        (("consolidated.00.pth",), ("consolidated.00.pth",)),
        ((".hidden.safetensors", "model.bin"), ("model.bin",)),
    ],
)
def test_the_files_of_a_folder(tmp_path: Path, present: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    make_files(tmp_path, *present)
    index = read_index(tmp_path)
    assert index.files == tuple(tmp_path / name for name in chosen)
    assert sorted(index.entries) == list(chosen)


@pytest.mark.parametrize("present", [(), ("optimizer.bin", "training_args.bin"), ("model.ckpt",), ("README.md",)])
def test_a_folder_without_weights_is_refused(tmp_path: Path, present: tuple[str, ...]) -> None:
    make_files(tmp_path, *present)
    with pytest.raises(WeightsError, match=r"holds no \.safetensors file, nor one in \.bin, \.pth, \.pt; it must hold"):
        read_index(tmp_path)


def test_an_index_json_of_safetensors_comes_first(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    make_files(tmp_path, "pytorch_model.bin", "other.safetensors")
    (tmp_path / "pytorch_model.bin.index.json").write_text("damaged")
    assert read_index(tmp_path).entries.keys() == tensors.keys()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_left_as_it_was(tmp_path: Path, was_enabled: bool) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    try:
        (gc.enable if was_enabled else gc.disable)()
        read_index(tmp_path)
        assert gc.isenabled() == was_enabled
        with pytest.raises(WeightsError):
            read_index(tmp_path / "absent")
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


class FakeStore(ModuleType):
    """Stands for ``ltx_sp.weights.remote``: one object, and what was asked of it."""

    def __init__(self, path: Path, content: bytes):
        super().__init__("ltx_sp.weights.remote")
        self.path, self.content = path, content
        self.reads: list[tuple[int, int]] = []

    def is_remote(self, path: Path) -> bool:
        return path.parts[0] == "s3:"

    def remote_stamp(self, path: Path) -> FileStamp:
        assert path == self.path
        return FileStamp(len(self.content), 7)

    def read_remote(self, path: Path, offset: int, buffers: Sequence[memoryview]) -> None:
        assert path == self.path
        for buffer in buffers:
            self.reads.append((offset, len(buffer)))
            buffer[:] = self.content[offset : offset + len(buffer)]
            offset += len(buffer)


def test_a_remote_file_is_indexed_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    local, path = read_index(tmp_path / "model.safetensors"), Path("s3://bucket/model.safetensors")
    store = FakeStore(path, (tmp_path / "model.safetensors").read_bytes())
    monkeypatch.setitem(sys.modules, store.__name__, store)
    monkeypatch.setattr("ltx_sp.weights.remote", store, raising=False)
    index = read_index(path)
    assert index.files == (path,)
    assert index.metadata == local.metadata
    for name, entry in index.entries.items():
        assert entry == dataclasses.replace(local.entries[name], file=path, stamp=FileStamp(len(store.content), 7))
    assert max(offset + length for offset, length in store.reads) == min(
        entry.start for entry in index.entries.values()
    )


@pytest.mark.parametrize(("content", "match"), [(b"", "is empty"), (b"1234", "has 4 bytes"), (b"\xff" * 9, "promises")])
def test_a_broken_remote_file_is_refused(content: bytes, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("s3://bucket/model.safetensors")
    store = FakeStore(path, content)
    monkeypatch.setitem(sys.modules, store.__name__, store)
    monkeypatch.setattr("ltx_sp.weights.remote", store, raising=False)
    with pytest.raises(WeightsError, match=f"^s3:/bucket/model.safetensors {match}"):
        read_index(path)
