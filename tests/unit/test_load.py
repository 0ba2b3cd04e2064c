"""Oracles: the safetensors library, and the kernel's map of this process for where parameters are."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.parallel.collectives import Axis, Ledger
from ltx_sp.weights import load as loading
from ltx_sp.weights import reader
from ltx_sp.weights.index import Index, read_index
from ltx_sp.weights.keymap import KeyMap
from ltx_sp.weights.load import LoadReport, check, load, read_tensors
from ltx_sp.weights.policy import Policy
from ltx_sp.weights.reader import Chunk, Ring
from ltx_sp.weights.stripes import ALIGNMENT, ByteStream
from tests.support.ranks import run_ranks
from tests.support.weights import (
    CPU,
    KEYMAP,
    PREFIX,
    Part,
    mapping_of,
    on_meta,
    same_bits,
    saved_tensors,
    write_part,
)

MODES = ("stream", "mmap", "preload")
LAYOUTS = ("file", "shards", "unaligned")
MIB = 2**20


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a small checkpoint take many buckets."""
    monkeypatch.setattr(loading, "_BUCKET_BYTES", 2 * ALIGNMENT)
    monkeypatch.setattr(reader, "SLOT_BYTES", 2 * ALIGNMENT)


def load_part(
    folder: Path,
    tensors: dict[str, Tensor],
    module: nn.Module | None = None,
    *,
    layout: str = "shards",
    mode: str = "stream",
    **options: Any,
) -> tuple[nn.Module, LoadReport]:
    write_part(folder, tensors, layout)
    module = module or on_meta()
    settings: dict[str, Any] = {"device": CPU, "dtype": None, "component": "part", "policy": Policy(mode)}
    return module, load(module, read_index(folder), KEYMAP, **(settings | options))


def stored(name: str) -> str:
    """The checkpoint's name of a parameter."""
    return PREFIX + name.replace("head.", "embed.")


def library_reads(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def is_in_a_file(tensor: Tensor, folder: Path) -> bool:
    return mapping_of(tensor).inode in {path.stat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_tensor_arrives_as_the_library_reads_it(
    tmp_path: Path, mode: str, layout: str, dtype: torch.dtype | None
) -> None:
    tensors = saved_tensors()
    module, report = load_part(tmp_path, tensors, layout=layout, mode=mode, dtype=dtype)
    reference = tensors if layout == "unaligned" else library_reads(tmp_path)  # it copies what is not aligned
    for name, tensor in module.state_dict().items():
        want = reference[stored(name)]
        assert same_bits(tensor, want.to(dtype) if dtype and want.is_floating_point() else want), name
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(module.get_buffer("frequencies"), torch.arange(4.0))
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert (report.component, report.mode, report.unexpected) == ("part", mode, ())
    assert (report.num_tensors, report.num_bytes, report.read_bytes) == (len(tensors), num_bytes, num_bytes)
    assert report.seconds > 0
    assert report.cached is None or 0 <= report.cached <= 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_reported_once(tmp_path: Path, mode: str, dtype: torch.dtype | None, layout: str) -> None:
    counts: list[int] = []
    _, report = load_part(tmp_path, saved_tensors(), layout=layout, mode=mode, dtype=dtype, on_bytes=counts.append)
    assert sum(counts) == report.num_bytes
    assert len(counts) > 5


@pytest.mark.parametrize("mode", ["stream", "mmap"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_read_everything_begin_at_their_own_stripe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype | None, size: int
) -> None:
    """And end before it: nothing is left out."""
    first: list[tuple[int, int]] = []

    def read_into(source: ByteStream, memory: Tensor, offsets: Any, ranges: Any, **options: Any) -> int:
        first.append((ranges[0][0], source.num_bytes))
        return reader.read_into(source, memory, offsets, ranges, **options)

    def mapped(source: ByteStream, maps: Any, chunks: Any, **options: Any) -> Generator[Chunk]:
        chunks = list(chunks)
        if chunks:
            first.append((chunks[0][0], source.num_bytes))
        return reader.mapped(source, maps, chunks, **options)

    monkeypatch.setattr("ltx_sp.weights.load.read_into", read_into)
    monkeypatch.setattr("ltx_sp.weights.load.mapped", mapped)
    for rank in range(size):
        first.clear()
        policy = Policy(mode, host=Axis(rank, size, None, Ledger()))
        module, report = load_part(tmp_path, saved_tensors(), policy=policy, dtype=dtype)
        begin, num_bytes = first[0]
        assert abs(begin - num_bytes * rank / size) <= ALIGNMENT
        assert report.read_bytes == report.num_bytes
        for name, tensor in module.state_dict().items():
            want = saved_tensors()[stored(name)]
            assert same_bits(tensor, want.to(dtype) if dtype and want.is_floating_point() else want), name


def test_the_dtype_of_the_builder_does_not_matter(tmp_path: Path) -> None:
    module, _ = load_part(tmp_path, saved_tensors(), on_meta().bfloat16())
    assert module.get_parameter("blocks.0.weight").dtype == torch.float32
    assert module.get_parameter("blocks.1.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
def test_tied_parameters_may_be_stored_twice_if_they_agree(tmp_path: Path, mode: str) -> None:
    tensors = saved_tensors()
    tensors["part.head.weight"] = tensors["part.embed.weight"].clone()
    module, _ = load_part(tmp_path, tensors, mode=mode)
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
    assert same_bits(module.get_parameter("head.weight"), tensors["part.embed.weight"])
    tensors["part.head.weight"][0, 0] += 1
    with pytest.raises(WeightsError, match=r"embed\.weight and head\.weight with different values"):
        load_part(tmp_path, tensors, mode=mode)


def test_a_mapped_parameter_is_the_file_and_every_other_is_not(tmp_path: Path) -> None:
    """As stored and aligned it stays; converted, not aligned, or to be written it does not."""
    module, _ = load_part(tmp_path, saved_tensors(), layout="file", mode="mmap", written=["head.weight"])
    for name, tensor in module.state_dict().items():
        if tensor.numel():
            assert is_in_a_file(tensor, tmp_path) == (stored(name) != "part.embed.weight"), name
    module, _ = load_part(tmp_path, saved_tensors(), layout="file", mode="mmap", dtype=torch.bfloat16)
    for name, tensor in module.state_dict().items():
        if tensor.numel():
            as_stored = name.startswith("blocks.1") or name == "scale" or not tensor.is_floating_point()
            assert is_in_a_file(tensor, tmp_path) == as_stored, name


def test_a_mapped_parameter_is_aligned(tmp_path: Path) -> None:
    module, _ = load_part(tmp_path, saved_tensors(), layout="unaligned", mode="mmap")
    kinds = set()
    for tensor in module.state_dict().values():
        assert tensor.data_ptr() % tensor.itemsize == 0
        if tensor.numel():
            kinds.add(is_in_a_file(tensor, tmp_path))
    assert kinds == {True, False}, "the layout must have both"


@pytest.mark.parametrize("mode", ["stream", "preload"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_loaded_module_does_not_need_its_files(tmp_path: Path, mode: str, dtype: torch.dtype | None) -> None:
    tensors = saved_tensors()
    module, _ = load_part(tmp_path, tensors, mode=mode, dtype=dtype)
    for path in tmp_path.iterdir():
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    for name, tensor in module.state_dict().items():
        want = tensors[stored(name)]
        assert same_bits(tensor, want.to(dtype) if dtype and want.is_floating_point() else want), name
        if tensor.numel():
            assert not is_in_a_file(tensor, tmp_path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_into_parameters_stays_out_of_the_files(
    tmp_path: Path, mode: str, dtype: torch.dtype | None, layout: str
) -> None:
    module, _ = load_part(tmp_path, saved_tensors(), layout=layout, mode=mode, dtype=dtype)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for tensor in module.state_dict().values():
        tensor.fill_(1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("mode", MODES)
def test_no_parameter_overlaps_another(tmp_path: Path, mode: str) -> None:
    module, _ = load_part(tmp_path, saved_tensors(), mode=mode, dtype=torch.bfloat16)
    state = {tensor.data_ptr(): tensor for tensor in module.state_dict().values() if tensor.numel()}
    places = sorted((address, address + tensor.nbytes) for address, tensor in state.items())
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(places))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ["before", "meanwhile"])
def test_a_file_that_changes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, change: str
) -> None:
    tensors = saved_tensors()
    write_part(tmp_path, tensors)
    index, path = read_index(tmp_path), tmp_path / "a.safetensors"

    def touch(*_: Any) -> None:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    if change == "before":
        touch()
    with pytest.raises(WeightsError, match=r"a\.safetensors has changed since its header was read"):
        load(on_meta(), index, KEYMAP, device=CPU, dtype=None, component="part", policy=Policy(mode),
             on_bytes=touch if change == "meanwhile" else None)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["shorter", "gone"])
def test_a_file_that_is_not_there_any_more_is_named(tmp_path: Path, mode: str, how: str) -> None:
    write_part(tmp_path, saved_tensors())
    index, path = read_index(tmp_path), tmp_path / "a.safetensors"
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, 50)
    with pytest.raises(WeightsError, match=r"a\.safetensors (has changed|cannot be read)"):
        load(on_meta(), index, KEYMAP, device=CPU, dtype=None, component="part", policy=Policy(mode))


WIDTH, NUM_LINEARS = 5120, 6
NUM_BYTES = NUM_LINEARS * WIDTH * WIDTH * 4


def write_large(path: Path) -> None:
    """600 MB of zeros of which the disk holds the header alone."""
    size = WIDTH * WIDTH * 4
    header = {
        f"part.{i}.weight": {"dtype": "F32", "shape": [WIDTH, WIDTH], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(NUM_LINEARS)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + NUM_BYTES)


def memory_field(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _peak(rank: int, num_ranks: int, path: str, dtype: torch.dtype | None) -> tuple[int, int]:
    """How much more memory this process holds at its peak and at the end of a load."""
    with torch.device("meta"):
        module = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LINEARS))
    index = read_index(Path(path))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that there was
    before = memory_field("VmRSS")
    load(module, index, KEYMAP, device=CPU, dtype=dtype, component="part")
    return memory_field("VmHWM") - before, memory_field("VmRSS") - before


@pytest.mark.parametrize(("dtype", "num_bytes"), [(None, NUM_BYTES), (torch.bfloat16, NUM_BYTES // 2)])
def test_streaming_takes_little_more_memory_than_the_model(
    tmp_path: Path, dtype: torch.dtype | None, num_bytes: int
) -> None:
    write_large(tmp_path / "x.safetensors")
    ((peak, end),) = run_ranks(_peak, 1, str(tmp_path), dtype, init_group=False)
    assert num_bytes <= peak < num_bytes + 128 * MIB
    assert end < num_bytes + 16 * MIB


def test_absent_tensors_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    module = nn.ModuleList(nn.Linear(1, 1, device="meta") for _ in range(6))
    with pytest.raises(WeightsError) as caught:
        load_part(tmp_path, {"part.0.weight": torch.ones(1, 1)}, module)
    message = str(caught.value)
    assert "lacks 11 of the tensors of part: part.0.bias, part.1.weight" in message
    assert "part.5.weight and 1 more" in message
    assert "part.5.bias" not in message
    assert module.get_parameter("0.weight").is_meta, "nothing may be read before headers agree"


def test_headers_are_checked_without_loading(tmp_path: Path) -> None:
    tensors = saved_tensors()
    save_file(tensors, tmp_path / "x.safetensors")
    module = on_meta()
    check(module, read_index(tmp_path), KEYMAP, component="part")
    assert all(parameter.is_meta for parameter in module.parameters())
    save_file(tensors | {"part.mean": torch.ones(6)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"'part\.mean' with shape \[6\]"):
        check(module, read_index(tmp_path), KEYMAP, component="part")


def test_an_absent_buffer_is_an_absent_tensor(tmp_path: Path) -> None:
    tensors = saved_tensors()
    del tensors["part.mean"]
    with pytest.raises(WeightsError, match=r"lacks 1 of the tensors of part: part\.mean\. "):
        load_part(tmp_path, tensors)


def test_unexpected_tensors_are_returned_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {f"part.extra.{i:02}": torch.ones(1) for i in range(12)}
    with caplog.at_level(logging.WARNING, logger="ltx_sp"):
        _, report = load_part(tmp_path, saved_tensors() | extra)
    assert report.unexpected == tuple(extra)
    assert report.num_tensors == len(saved_tensors())
    (record,) = caplog.records
    assert record.name == "ltx_sp"
    assert "holds 12 tensors" in record.getMessage()
    assert "'part.extra.09' and 2 more" in record.getMessage()


def test_another_shape_is_refused_with_both_and_the_file(tmp_path: Path) -> None:
    tensors = saved_tensors() | {"part.blocks.1.weight": torch.ones(151, 150).bfloat16()}
    with pytest.raises(WeightsError) as caught:
        load_part(tmp_path, tensors)
    for part in (
        ".safetensors holds 'part.blocks.1.weight' with shape [151, 150]",
        "blocks.1.weight has shape [151, 149]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype"), [("mean", torch.int64), ("mean", torch.bool), ("steps", torch.float32), ("steps", torch.int32)]
)
def test_another_kind_of_number_is_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensors = saved_tensors()
    tensors[PREFIX + name] = tensors[PREFIX + name].to(dtype)
    with pytest.raises(WeightsError, match=rf"holds 'part\.{name}' as .*; parameter {name} is torch\."):
        load_part(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = saved_tensors() | {"part.blocks.0.weight": torch.ones(151, 149).to(dtype)}
    with pytest.raises(UnsupportedError, match=r"fp8 checkpoints are not implemented\. Use the bf16 checkpoint"):
        load_part(tmp_path, tensors)


def test_the_scales_of_fp8_are_refused(tmp_path: Path) -> None:
    tensors = saved_tensors() | {"part.blocks.0.weight_scale": torch.tensor(1.0)}
    with pytest.raises(UnsupportedError, match="weight_scale"):
        load_part(tmp_path, tensors)


def test_fp8_of_another_component_does_not_matter(tmp_path: Path) -> None:
    load_part(tmp_path, saved_tensors() | {"elsewhere.weight": torch.ones(151, 149).to(torch.float8_e5m2)})


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    save_file(saved_tensors() | {"PART.mean": torch.ones(5)}, tmp_path / "x.safetensors")
    either = KeyMap("part", lambda parameter: PREFIX + parameter, lambda name: name[5:])
    with pytest.raises(WeightsError, match=r"'PART\.mean' and 'part\.mean', which are both parameter mean"):
        load(on_meta(), read_index(tmp_path), either, device=CPU, dtype=None, component="part")


def test_a_non_persistent_buffer_on_meta_is_the_builders_fault(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = Part()
    with pytest.raises(RuntimeError, match="non-persistent buffer frequencies on meta"):
        load_part(tmp_path, saved_tensors(), module)


def test_float16_beside_bfloat16_is_refused(tmp_path: Path) -> None:
    tensors = saved_tensors()
    tensors["part.mean"] = tensors["part.mean"].half()
    with pytest.raises(WeightsError, match=r"labels 'part\.mean' F16 and .* labels 'part\..*' BF16; .* Fetch"):
        load_part(tmp_path, tensors)


def test_float16_alone_is_not(tmp_path: Path) -> None:
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in saved_tensors().items()}
    module, _ = load_part(tmp_path, tensors | {"elsewhere.weight": torch.ones(1).bfloat16()}, dtype=torch.bfloat16)
    assert same_bits(module.get_parameter("blocks.0.weight"), tensors["part.blocks.0.weight"].bfloat16())


def faulty_stream(fault: str) -> Any:
    """A reader that drops a chunk, or gives one again."""

    def stream(source: ByteStream, ring: Ring, chunks: Iterable[tuple[int, int]], **options: Any) -> Generator[Chunk]:
        parts = list(chunks)
        parts = parts[:-1] if fault == "drops" else [*parts, parts[0]]
        return reader.stream(source, ring, parts, **options)

    return stream


@pytest.mark.parametrize(("fault", "match"), [("drops", "came in part or not at all"), ("repeats", "came twice")])
def test_a_reader_that_drops_or_repeats_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, match: str
) -> None:
    monkeypatch.setattr("ltx_sp.weights.load.stream", faulty_stream(fault))
    with pytest.raises(RuntimeError, match=match):
        load_part(tmp_path, saved_tensors(), dtype=torch.float64)


@pytest.mark.parametrize("fault", ["meta", "dtype", "lost"])
def test_what_is_not_completely_loaded_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    real = loading._Load.run

    def run(work: loading._Load, is_taker: bool) -> list[Tensor]:
        tensors = real(work, is_taker)
        if fault == "meta":
            tensors[3] = tensors[3].to("meta")
        elif fault == "dtype":
            tensors[3] = tensors[3].double()
        return tensors

    def assign(*_: Any) -> None:
        pass

    monkeypatch.setattr(loading._Load, "run", run)
    if fault == "lost":
        monkeypatch.setattr("ltx_sp.weights.fit.Fit.assign", assign)
    for module in (on_meta(), Part()):
        with pytest.raises(RuntimeError, match="part is not completely loaded: "):
            load_part(tmp_path, saved_tensors(), module, dtype=torch.bfloat16)


def read_some(index: Index, **options: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def done(entry: Any, tensor: Tensor) -> None:
        assert entry.name not in found
        found[entry.name] = tensor

    read_tensors(list(index.entries.values()), device=CPU, done=done, **options)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_no_module_come_as_they_are(tmp_path: Path, mode: str, layout: str) -> None:
    tensors, counts = saved_tensors(), list[int]()
    write_part(tmp_path, tensors, layout)
    index = read_index(tmp_path)
    found = read_some(index, policy=Policy(mode), on_bytes=counts.append)
    assert sum(counts) == index.num_bytes
    assert found.keys() == index.entries.keys()
    assert [name for name in found if found[name].numel()] == [
        name for name, entry in index.entries.items() if entry.num_bytes
    ]
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor), name


def test_tensors_of_no_module_from_a_file_that_changes_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path, saved_tensors(), "file")
    index, path = read_index(tmp_path), tmp_path / "x.safetensors"
    with pytest.raises(WeightsError, match=r"x\.safetensors has changed"):
        read_some(index, on_bytes=lambda _: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)))
