"""A module on meta + an index -> a module that holds its weights, with proof.

Everything that headers can tell (absent tensors, shapes, kinds of numbers) is settled before the
first data byte is read.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.weights.index import Index, TensorEntry, quote
from ltx_sp.weights.keymap import KeyMap
from ltx_sp.weights.reader import TORCH_DTYPES, read

__all__ = ["LoadReport", "check", "load"]

_log = logging.getLogger("ltx_sp")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What one load did.

    Args:
        num_tensors, num_bytes: as read from the files, before any cast.
        unexpected: checkpoint names that belong to the component and that its module has no place for.
    """

    component: str
    num_tensors: int
    num_bytes: int
    seconds: float
    unexpected: tuple[str, ...]


@dataclasses.dataclass
class _Slot:
    """One tensor of the module, under all its names: tied parameters have several."""

    current: Tensor
    names: list[str]
    dtype: torch.dtype | None
    loaded: Tensor | None = None


def load(
    module: nn.Module,
    index: Index,
    keymap: KeyMap,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    component: str,
    on_bytes: Callable[[int], None] | None = None,
) -> LoadReport:
    """Give every parameter and persistent buffer of ``module`` its tensor from the checkpoint, on ``device``.

    In place. Blocks the host. Parameters come out frozen, tied ones still tied. Non-persistent buffers
    are moved to ``device``. After an error the module is of no use.

    Args:
        dtype: floating tensors are cast to it; None leaves them as stored.
        on_bytes: called with the number of bytes read since the last call.

    Raises:
        WeightsError: a tensor is absent, has another shape or kind of number, or its file is damaged.
        UnsupportedError: the checkpoint stores fp8.
    """
    began = time.perf_counter()
    slots, by_entry, unexpected = _fit(module, index, keymap, component, dtype)
    waiting = dict(by_entry)
    for entry, host in read(list(by_entry), on_bytes=on_bytes):
        slot = slots[waiting.pop(entry)]
        # Copied even where nothing is cast: what is read is a view of a file that may change after this.
        tensor = torch.empty(host.shape, dtype=slot.dtype or host.dtype, device=device).copy_(host)
        if slot.loaded is None:
            _assign(module, slot, tensor)
        elif not torch.equal(slot.loaded, tensor):
            raise WeightsError(
                f"{entry.file} stores {' and '.join(slot.names)} with different values; in {component} they are one "
                "parameter. Use a checkpoint of this model."
            )
    for name, buffer in _non_persistent(module):
        _set(module, name, buffer.to(device))
    _prove(module, slots, waiting.values(), component)
    if unexpected:
        _log.warning(
            "%s: the checkpoint holds %d tensors that the model has no place for, and they are not used: %s",
            component,
            len(unexpected),
            _first([quote(name) for name in unexpected]),
        )
    num_bytes = sum(entry.num_bytes for entry in by_entry)
    return LoadReport(component, len(by_entry), num_bytes, time.perf_counter() - began, unexpected)


def check(module: nn.Module, index: Index, keymap: KeyMap, *, component: str) -> None:
    """Prove from the headers alone that ``load`` will find every tensor of ``module``, in its shape.

    Args:
        module: with its parameters on meta.

    Raises:
        WeightsError: a tensor is absent, or has another shape or kind of number.
        UnsupportedError: the checkpoint stores fp8.
    """
    _fit(module, index, keymap, component, None)


def _fit(
    module: nn.Module,
    index: Index,
    keymap: KeyMap,
    component: str,
    dtype: torch.dtype | None,
) -> tuple[dict[str, _Slot], dict[TensorEntry, str], tuple[str, ...]]:
    """Pair the checkpoint's tensors with the module's parameters: slots, parameter by entry, what is left over."""
    slots = _slots(module, dtype)
    matched, unexpected = _match(slots, index, keymap, component)
    _require_all(slots, set(matched.values()), index, keymap, component)
    by_entry = {index.entries[name]: parameter for name, parameter in matched.items()}
    for entry, parameter in by_entry.items():
        _require_fit(entry, slots[parameter].current, parameter)
    return slots, by_entry, unexpected


def _slots(module: nn.Module, dtype: torch.dtype | None) -> dict[str, _Slot]:
    """What is to be filled, by parameter name; tied names share a slot."""
    for name, buffer in _non_persistent(module):
        if buffer.is_meta:
            raise RuntimeError(
                f"{type(module).__name__} was built with its non-persistent buffer {name} on meta; no checkpoint holds "
                "it. Compute it where the module is built."
            )
    by_identity: dict[int, _Slot] = {}
    slots: dict[str, _Slot] = {}
    for name, tensor in _state(module).items():
        slot = by_identity.setdefault(id(tensor), _Slot(tensor, [], dtype if tensor.is_floating_point() else None))
        slot.names.append(name)
        slots[name] = slot
    return slots


def _match(
    slots: dict[str, _Slot], index: Index, keymap: KeyMap, component: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The component's checkpoint names with the parameters that they fill, and those that fill none."""
    matched: dict[str, str] = {}
    unexpected: list[str] = []
    for name, entry in index.entries.items():
        parameter = keymap.to_parameter(name)
        if parameter is None:
            continue
        if entry.dtype.startswith("F8_") or name.endswith(".weight_scale"):
            raise UnsupportedError(
                f"{entry.file} stores {component} in fp8 (tensor {quote(name)}, {entry.dtype}); fp8 checkpoints "
                "are not implemented. Use the bf16 checkpoint."
            )
        if parameter in slots:
            matched[name] = parameter
        else:
            unexpected.append(name)
    filled: dict[str, str] = {}
    for name, parameter in matched.items():
        if parameter in filled:
            raise WeightsError(
                f"{index.entries[name].file} holds {quote(filled[parameter])} and {quote(name)}, which are both "
                f"parameter {parameter} of {component}; there must be one. Use a checkpoint of this model."
            )
        filled[parameter] = name
    return matched, tuple(sorted(unexpected))


def _require_all(
    slots: dict[str, _Slot],
    found: set[str],
    index: Index,
    keymap: KeyMap,
    component: str,
) -> None:
    missing = [
        keymap.to_checkpoint(name)
        for name, slot in slots.items()
        if found.isdisjoint(slot.names) and name == slot.names[0]
    ]
    if missing:
        where = ", ".join(str(file) for file in index.files[:3]) or "The checkpoint"
        raise WeightsError(
            f"{where} lacks {len(missing)} of the tensors of {component}: {_first(missing)}. All must be there. "
            "Fetch the checkpoint again, or use the one that fits this model."
        )


def _require_fit(entry: TensorEntry, current: Tensor, parameter: str) -> None:
    if entry.shape != tuple(current.shape):
        raise WeightsError(
            f"{entry.file} holds {quote(entry.name)} with shape {list(entry.shape)}; parameter {parameter} has shape "
            f"{list(current.shape)}. Use the checkpoint that fits this model."
        )
    stored = TORCH_DTYPES[entry.dtype]
    if stored != current.dtype and not (stored.is_floating_point and current.is_floating_point()):
        raise WeightsError(
            f"{entry.file} holds {quote(entry.name)} as {entry.dtype}; parameter {parameter} is {current.dtype}, and "
            "only floating-point numbers are converted. Use the bf16 checkpoint."
        )


def _assign(module: nn.Module, slot: _Slot, tensor: Tensor) -> None:
    slot.loaded = nn.Parameter(tensor, requires_grad=False) if isinstance(slot.current, nn.Parameter) else tensor
    for name in slot.names:
        _set(module, name, slot.loaded)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, tensor)


def _prove(module: nn.Module, slots: Mapping[str, _Slot], undelivered: Iterable[str], component: str) -> None:
    """Raise unless the module holds, under every name, what was loaded for it. A failure is a fault of this package."""
    state = _state(module)
    wrong = set(undelivered) | (state.keys() ^ slots.keys())
    wrong |= {name for name, slot in slots.items() if slot.loaded is None or state.get(name) is not slot.loaded}
    wrong |= {name for name, tensor in [*state.items(), *_non_persistent(module)] if tensor.is_meta}
    if wrong:
        raise RuntimeError(f"{component} is not completely loaded: {_first(sorted(wrong))}")


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under all their names, the objects themselves."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _non_persistent(module: nn.Module) -> list[tuple[str, Tensor]]:
    persistent = module.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in module.named_buffers(remove_duplicate=False) if name not in persistent]


def _first(names: Collection[str]) -> str:
    head = ", ".join(list(names)[:10])
    return head if len(names) <= 10 else f"{head} and {len(names) - 10} more"
