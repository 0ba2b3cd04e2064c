"""Oracle: identity. What was saved is what the module holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.weights.index import TensorEntry, read_index
from ltx_sp.weights.keymap import KeyMap
from ltx_sp.weights.load import LoadReport, check, load
from ltx_sp.weights.reader import read

PREFIX = "part."
KEYMAP = KeyMap(
    "part", lambda parameter: PREFIX + parameter, lambda name: name[5:] if name.startswith(PREFIX) else None
)
CPU = torch.device("cpu")


class Part(nn.Module):
    """One of everything: parameters, a tied one, both kinds of buffers, an integer, a 0-d and an empty tensor."""

    mean: Tensor
    steps: Tensor
    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.ones(0, 4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)


def on_meta() -> Part:
    with torch.device("meta"):
        part = Part()
    part.frequencies = torch.arange(4.0)
    return part


def saved_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor for name, tensor in Part().state_dict().items() if name != "head.weight"}
    random = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    return {PREFIX + name: tensor for name, tensor in random.items()} | {PREFIX + "steps": torch.tensor([3, 1, 2])}


def load_part(
    folder: Path, tensors: dict[str, Tensor], module: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, LoadReport]:
    """Two files, so that reading order is not the module's."""
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, folder / "b.safetensors")
    save_file({name: tensors[name] for name in names[1::2]} | {"other.weight": torch.ones(1)}, folder / "a.safetensors")
    module = module or on_meta()
    settings: dict[str, Any] = {"device": CPU, "dtype": None, "component": "part"}
    return module, load(module, read_index(folder), KEYMAP, **(settings | options))


def test_every_tensor_arrives(tmp_path: Path) -> None:
    tensors = saved_tensors()
    module, report = load_part(tmp_path, tensors)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, tensors[PREFIX + name.replace("head.", "embed.")]), name
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(module.get_buffer("frequencies"), torch.arange(4.0))
    assert report.component == "part"
    assert report.num_tensors == len(tensors)
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.seconds > 0
    assert report.unexpected == ()


def test_floating_tensors_are_cast_and_integers_are_not(tmp_path: Path) -> None:
    tensors = saved_tensors()
    module, report = load_part(tmp_path, tensors, dtype=torch.bfloat16)
    state = module.state_dict()
    assert torch.equal(state["blocks.0.weight"], tensors["part.blocks.0.weight"].bfloat16())
    assert torch.float32 not in {tensor.dtype for tensor in state.values()}
    assert state["steps"].dtype == torch.int64
    assert module.get_buffer("frequencies").dtype == torch.float32
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_the_dtype_of_the_builder_does_not_matter(tmp_path: Path) -> None:
    module, _ = load_part(tmp_path, saved_tensors(), on_meta().bfloat16())
    assert module.get_parameter("blocks.0.weight").dtype == torch.float32


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    module, _ = load_part(tmp_path, saved_tensors())
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")


def test_tied_parameters_may_be_stored_twice_if_they_agree(tmp_path: Path) -> None:
    tensors = saved_tensors()
    tensors["part.head.weight"] = tensors["part.embed.weight"].clone()
    module, _ = load_part(tmp_path, tensors)
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
    tensors["part.head.weight"][0, 0] += 1
    with pytest.raises(WeightsError, match=r"embed\.weight and head\.weight with different values"):
        load_part(tmp_path, tensors)


def test_a_loaded_module_does_not_need_its_files(tmp_path: Path) -> None:
    tensors = saved_tensors()
    module, _ = load_part(tmp_path, tensors)
    for path in tmp_path.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(module.get_parameter("blocks.0.weight"), tensors["part.blocks.0.weight"])


def test_bytes_are_reported(tmp_path: Path) -> None:
    counts: list[int] = []
    _, report = load_part(tmp_path, saved_tensors(), on_bytes=counts.append)
    assert sum(counts) == report.num_bytes


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
    save_file(tensors | {"part.mean": torch.ones(5)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"'part\.mean' with shape \[5\]"):
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
    tensors = saved_tensors() | {"part.blocks.1.weight": torch.ones(4, 5)}
    with pytest.raises(WeightsError) as caught:
        load_part(tmp_path, tensors)
    for part in (".safetensors holds 'part.blocks.1.weight' with shape [4, 5]", "blocks.1.weight has shape [4, 4]"):
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
    tensors = saved_tensors() | {"part.blocks.0.weight": torch.ones(4, 4).to(dtype)}
    with pytest.raises(UnsupportedError, match=r"fp8 checkpoints are not implemented\. Use the bf16 checkpoint"):
        load_part(tmp_path, tensors)


def test_the_scales_of_fp8_are_refused(tmp_path: Path) -> None:
    tensors = saved_tensors() | {"part.blocks.0.weight_scale": torch.tensor(1.0)}
    with pytest.raises(UnsupportedError, match="weight_scale"):
        load_part(tmp_path, tensors)


def test_fp8_of_another_component_does_not_matter(tmp_path: Path) -> None:
    load_part(tmp_path, saved_tensors() | {"elsewhere.weight": torch.ones(4, 4).to(torch.float8_e5m2)})


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    save_file(saved_tensors() | {"PART.mean": torch.ones(4)}, tmp_path / "x.safetensors")
    either = KeyMap("part", lambda parameter: PREFIX + parameter, lambda name: name[5:])
    with pytest.raises(WeightsError, match=r"'PART\.mean' and 'part\.mean', which are both parameter mean"):
        load(on_meta(), read_index(tmp_path), either, device=CPU, dtype=None, component="part")


def test_a_non_persistent_buffer_on_meta_is_the_builders_fault(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = Part()
    with pytest.raises(RuntimeError, match="non-persistent buffer frequencies on meta"):
        load_part(tmp_path, saved_tensors(), module)


def test_a_tensor_that_the_reader_drops_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_one(entries: Sequence[TensorEntry], on_bytes: None) -> Iterator[tuple[TensorEntry, Tensor]]:
        return read(entries[:-1], on_bytes=on_bytes)

    monkeypatch.setattr("ltx_sp.weights.load.read", drop_one)
    for module in (on_meta(), Part()):
        with pytest.raises(RuntimeError, match="not completely loaded"):
            load_part(tmp_path, saved_tensors(), module)
