"""A module on meta + an index -> which stored tensor fills which parameter, and the proof that each did.

Everything that headers can tell (absent tensors, shapes, kinds of numbers) is settled here, before
the first data byte is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.weights.index import Index, TensorEntry, quote
from ltx_sp.weights.keymap import KeyMap
from ltx_sp.weights.reader import TORCH_DTYPES

__all__ = ["Fit", "Slot", "first_names", "fit"]

_Place = tuple[MutableMapping[str, Any], str]
"""A table of a module's parameters or buffers, and the name in it."""


@dataclasses.dataclass(eq=False, slots=True)
class Slot:
    """One tensor of the module, under all its names: tied parameters have several.

    Args:
        dtype: what the tensor becomes; None where it stays as stored.
    """

    current: Tensor
    names: list[str]
    dtype: torch.dtype | None
    loaded: Tensor | None = None


class Fit:
    """The pairs of one component.

    Args:
        pairs: each stored tensor with the slot that it fills, in the order of the index.
        unexpected: names that belong to the component and that its module has no place for.
    """

    def __init__(
        self,
        module: nn.Module,
        component: str,
        places: dict[str, _Place],
        slots: dict[str, Slot],
        pairs: list[tuple[TensorEntry, Slot]],
        unexpected: tuple[str, ...],
    ):
        self.component, self.pairs, self.unexpected = component, pairs, unexpected
        self._module, self._slots, self._places = module, slots, places

    def assign(self, entry: TensorEntry, slot: Slot, tensor: Tensor) -> None:
        """Put a loaded tensor into its places; parameters come out frozen. In place.

        Raises:
            WeightsError: the slot was filled from another stored tensor with other values.
        """
        if slot.loaded is not None:
            if not torch.equal(slot.loaded, tensor):
                raise WeightsError(
                    f"{entry.file} stores {' and '.join(slot.names)} with different values; in {self.component} they "
                    "are one parameter. Use a checkpoint of this model."
                )
            return
        is_parameter = isinstance(slot.current, nn.Parameter)
        slot.loaded = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for name in slot.names:
            table, leaf = self._places[name]
            table[leaf] = slot.loaded

    def finish(self, device: torch.device) -> None:
        """Move the buffers that no checkpoint holds to the device, and prove that everything else was loaded. In place.

        Raises:
            RuntimeError: it was not. A fault of this package.
        """
        tensor: Tensor
        state, others = _places(self._module)
        for table, leaf in others.values():
            table[leaf] = table[leaf].to(device)
        wrong = state.keys() ^ self._slots.keys()
        wrong |= {name for name, (table, leaf) in others.items() if table[leaf].is_meta}
        for name in state.keys() & self._slots.keys():
            table, leaf = state[name]
            slot, tensor = self._slots[name], table[leaf]
            is_loaded = tensor is slot.loaded and not tensor.is_meta and tensor.device == device
            if not is_loaded or slot.dtype not in (None, tensor.dtype):
                wrong.add(name)
        if wrong:
            raise RuntimeError(f"{self.component} is not completely loaded: {first_names(sorted(wrong))}")


def fit(module: nn.Module, index: Index, keymap: KeyMap, *, component: str, dtype: torch.dtype | None = None) -> Fit:
    """Pair the checkpoint's tensors with the module's parameters, from the headers alone.

    Args:
        module: with its parameters on meta.
        dtype: what floating tensors shall become; None leaves them as stored.

    Raises:
        WeightsError: a tensor is absent, or has another shape or kind of number.
        UnsupportedError: the checkpoint stores fp8.
    """
    places, others = _places(module)
    for name, (table, leaf) in others.items():
        if table[leaf].is_meta:
            raise RuntimeError(
                f"{type(module).__name__} was built with its non-persistent buffer {name} on meta; no checkpoint holds "
                "it. Compute it where the module is built."
            )
    slots = _slots(places, dtype)
    matched, unexpected = _match(slots, index, keymap, component)
    _require_all(slots, set(matched.values()), index, keymap, component)
    pairs = [(index.entries[name], slots[parameter]) for name, parameter in matched.items()]
    for entry, slot in pairs:
        _require_fit(entry, slot)
    _require_one_half(pairs)
    return Fit(module, component, places, slots, pairs, unexpected)


def first_names(names: Collection[str]) -> str:
    """The first ten, and how many more there are."""
    head = ", ".join(list(names)[:10])
    return head if len(names) <= 10 else f"{head} and {len(names) - 10} more"


def _slots(places: dict[str, _Place], dtype: torch.dtype | None) -> dict[str, Slot]:
    """What is to be filled, by parameter name; tied names share a slot."""
    by_identity: dict[int, Slot] = {}
    slots: dict[str, Slot] = {}
    for name, (table, leaf) in places.items():
        tensor = table[leaf]
        slot = by_identity.get(id(tensor))
        if slot is None:
            slot = by_identity[id(tensor)] = Slot(tensor, [], dtype if tensor.is_floating_point() else None)
        slot.names.append(name)
        slots[name] = slot
    return slots


def _match(
    slots: dict[str, Slot], index: Index, keymap: KeyMap, component: str
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


def _require_all(slots: dict[str, Slot], found: set[str], index: Index, keymap: KeyMap, component: str) -> None:
    missing = [
        keymap.to_checkpoint(name)
        for name, slot in slots.items()
        if found.isdisjoint(slot.names) and name == slot.names[0]
    ]
    if missing:
        where = ", ".join(str(file) for file in index.files[:3]) or "The checkpoint"
        raise WeightsError(
            f"{where} lacks {len(missing)} of the tensors of {component}: {first_names(missing)}. All must be there. "
            "Fetch the checkpoint again, or use the one that fits this model."
        )


def _require_fit(entry: TensorEntry, slot: Slot) -> None:
    current = slot.current
    if entry.shape != current.shape:
        raise WeightsError(
            f"{entry.file} holds {quote(entry.name)} with shape {list(entry.shape)}; parameter {slot.names[0]} has "
            f"shape {list(current.shape)}. Use the checkpoint that fits this model."
        )
    stored = TORCH_DTYPES[entry.dtype]
    if stored != current.dtype and not (stored.is_floating_point and current.is_floating_point()):
        raise WeightsError(
            f"{entry.file} holds {quote(entry.name)} as {entry.dtype}; parameter {slot.names[0]} is {current.dtype}, "
            "and only floating-point numbers are converted. Use the bf16 checkpoint."
        )


def _require_one_half(pairs: Iterable[tuple[TensorEntry, Slot]]) -> None:
    """Refuse float16 beside bfloat16: no one publishes that, and of a wrong label nothing else would tell."""
    seen: dict[str, TensorEntry] = {}
    for entry, _ in pairs:
        seen.setdefault(entry.dtype, entry)
    if "F16" in seen and "BF16" in seen:
        f16, bf16 = seen["F16"], seen["BF16"]
        raise WeightsError(
            f"{f16.file} labels {quote(f16.name)} F16 and {bf16.file} labels {quote(bf16.name)} BF16; the tensors of a "
            "component must be stored as one of them, so one label is wrong. Fetch the checkpoint again."
        )


def _places(module: nn.Module) -> tuple[dict[str, _Place], dict[str, _Place]]:
    """Where each tensor is, in the order of the state dict: what a checkpoint holds, and the other buffers.

    As ``state_dict`` would say it, which takes ten times as long for modules of few and small parameters.
    """
    persistent: dict[str, _Place] = {}
    others: dict[str, _Place] = {}
    waiting = [("", module)]
    while waiting:
        prefix, owner = waiting.pop()
        tables: tuple[MutableMapping[str, Any], ...] = (owner._parameters, owner._buffers)
        for table in tables:
            for leaf, tensor in table.items():
                if tensor is not None:
                    is_other = table is owner._buffers and leaf in owner._non_persistent_buffers_set
                    (others if is_other else persistent)[prefix + leaf] = (table, leaf)
        waiting += [
            (f"{prefix}{name}.", child) for name, child in reversed(owner._modules.items()) if child is not None
        ]
    return persistent, others
