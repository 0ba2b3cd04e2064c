"""Oracle: the tensors themselves. What differs in one bit differs in the fingerprint."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ltx_sp.errors import WeightsError
from ltx_sp.weights import verify
from ltx_sp.weights.host import map_file
from ltx_sp.weights.verify import digest, require_finite


def module_of(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def flipped(tensor: Tensor, bit: int) -> Tensor:
    copy = tensor.clone()
    copy.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    return copy


def swapped(tensor: Tensor, i: int, j: int) -> Tensor:
    copy = tensor.clone()
    copy[i], copy[j] = tensor[j], tensor[i]
    return copy


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_CHUNK", 8)


def test_equal_bits_have_equal_fingerprints() -> None:
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.tensor([True]), "d": torch.empty(0)}
    assert digest(module_of(**tensors)) == digest(module_of(**{name: t.clone() for name, t in tensors.items()}))
    assert digest(module_of(a=torch.tensor([math.nan]))) == digest(module_of(a=torch.tensor([math.nan])))
    assert digest(module_of()) != digest(module_of(a=torch.empty(0)))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_any_flipped_bit_is_seen(dtype: torch.dtype) -> None:
    """In every byte, also in those past the last whole word."""
    tensor = torch.randint(0, 100, (13,)).to(dtype)
    found = {digest(module_of(a=flipped(tensor, bit))) for bit in range(8 * tensor.nbytes)}
    assert len(found) == 8 * tensor.nbytes
    assert digest(module_of(a=tensor)) not in found


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_any_two_elements_that_change_places_are_seen(dtype: torch.dtype) -> None:
    tensor = torch.arange(37).to(dtype)
    whole = digest(module_of(a=tensor))
    for i, j in itertools.combinations(range(37), 2):
        assert digest(module_of(a=swapped(tensor, i, j))) != whole, (i, j)


def test_what_a_tensor_is_called_and_how_it_is_read_counts() -> None:
    bits = torch.arange(8, dtype=torch.int16)
    found = [
        digest(module_of(a=bits)),
        digest(module_of(b=bits)),
        digest(module_of(a=bits.view(2, 4))),
        digest(module_of(a=bits.view(torch.bfloat16))),
        digest(module_of(a=bits.view(torch.int32))),
        digest(module_of(a=bits.float())),
        digest(module_of(a=bits, b=bits)),
    ]
    assert len(set(found)) == len(found)


def test_a_tensor_may_begin_anywhere_in_a_file(tmp_path: Path) -> None:
    tensor = torch.randn(6).bfloat16()
    (tmp_path / "x").write_bytes(b"ab" + tensor.view(torch.uint8).numpy().tobytes())
    with (tmp_path / "x").open("rb") as file:
        mapped = map_file(file.fileno(), 14)[2:].view(torch.bfloat16)
    assert digest(module_of(a=mapped)) == digest(module_of(a=tensor))


def test_tensors_that_are_no_stretch_of_memory() -> None:
    tensor = torch.randn(6, 4)
    assert digest(module_of(a=tensor.t())) == digest(module_of(a=tensor.t().contiguous()))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted_and_named(dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(5, 9, dtype=dtype)
    module = module_of(good=tensor.clone(), steps=torch.arange(3), bad=tensor)
    require_finite(module, "transformer")
    for place in random.sample(range(45), 3):
        tensor.view(-1)[place] = value
    with pytest.raises(WeightsError, match="Parameter bad of transformer holds 3 values that are not finite, of 45;"):
        require_finite(module, "transformer")
