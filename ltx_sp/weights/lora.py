"""LoRA files -> which factors to read, and the transformer's weights with all of them added.

No file is believed: every key is used, or reported with the reason why not, or refused. Pairs of several
files for one weight are added to it together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.weights.index import Index, TensorEntry, parse_object, quote
from ltx_sp.weights.keymap import keymap
from ltx_sp.weights.merge import Factor

__all__ = [
    "LoraMerger",
    "LoraPlan",
    "LoraReport",
    "Pair",
    "factors_of",
    "plan_loras",
    "switched_targets",
    "union",
]

# fmt: off
_ROLES = {
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up",
    ".alpha": "alpha",
}
# fmt: on
# Each changes what the two factors mean, or adds to what they add.
_OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", "lora_mid", "hada_", "loha_", "lokr_")
_BIASES = (".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_DIFFUSERS_PREFIX = "transformer."
_CONNECTORS = (
    "connectors.",
    "text_embedding_projection.",
    "video_embeddings_connector.",
    "audio_embeddings_connector.",
)
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_DIFFUSERS = keymap("diffusers", "transformer", {})

_FLOATING = ("BF16", "F16", "F32", "F64")
_MAX_SCALE = 2.0**100  # far from where float32 ends


@dataclasses.dataclass(frozen=True)
class LoraReport:
    """What one file holds and what of it is used.

    Args:
        applied: number of weights that it changes.
        skipped: modules that it holds factors for and that are not changed, by reason.
        unpaired: keys whose counterpart is missing.
        unrecognised: keys that mean nothing here.
    """

    file: Path
    strength: float
    applied: int
    skipped: Mapping[str, tuple[str, ...]]
    unpaired: tuple[str, ...]
    unrecognised: tuple[str, ...]

    def describe(self) -> str:
        """Say it in one line."""
        note = " (changes nothing)" if self.strength == 0 else ""
        return f"LoRA {self.file}, strength {self.strength:g}{note}: {self.counts()}"

    def counts(self) -> str:
        """Say how much of it is used, and what is not."""
        what = [f"{self.applied} weights"]
        what += [_count(names, f"skipped, {reason}") for reason, names in self.skipped.items()]
        what += [_count(self.unpaired, "unpaired")] if self.unpaired else []
        what += [_count(self.unrecognised, "not recognised")] if self.unrecognised else []
        return "; ".join(what)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """What is to be added to a weight: ``scale * up @ down``, with the factors as stored."""

    down: TensorEntry
    up: TensorEntry
    scale: float


@dataclasses.dataclass(frozen=True)
class LoraPlan:
    """The pairs of all files by the parameter that they change, in the order of the model's parameters."""

    pairs: Mapping[str, tuple[Pair, ...]]

    @property
    def targets(self) -> tuple[str, ...]:
        """The parameters that will change."""
        return tuple(self.pairs)

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The factors to read, each once, weight by weight: in this order few are held at a time."""
        pairs = [pair for pairs in self.pairs.values() for pair in pairs]
        return tuple(dict.fromkeys(entry for pair in pairs for entry in (pair.down, pair.up)))

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


@dataclasses.dataclass
class _Module:
    """What a file holds for one parameter, by role, and the name of the module as stored."""

    stem: str
    by_role: dict[str, TensorEntry]


def plan_loras(
    loras: Sequence[tuple[Index, float]],
    shapes: Mapping[str, tuple[int, ...]],
    read_alphas: Callable[[Sequence[TensorEntry]], Mapping[TensorEntry, float]],
) -> tuple[LoraPlan, list[LoraReport]]:
    """Decide from the headers what is added to which parameter, and report on every file.

    Args:
        loras: the tensors of each file, and its strength. At strength 0 a file is checked and not read.
        shapes: of the transformer's parameters.
        read_alphas: called at most once, with all scalars that are needed.

    Raises:
        WeightsError: a file holds factors that do not fit their parameter, two of one kind, or none that apply.
        UnsupportedError: a file holds fp8, or something that is more than pairs of factors.
    """
    plans = [_match(index, strength, shapes) for index, strength in loras]
    scalars = [role["alpha"] for used, _ in plans for role in used.values() if "alpha" in role]
    alphas = read_alphas(scalars) if scalars else {}
    by_target: dict[str, list[Pair]] = {}
    for (index, strength), (used, _) in zip(loras, plans, strict=True):
        common = _metadata_alpha(index)
        for target, role in used.items():
            scale = _scale(role, strength, common, alphas)
            if scale:
                by_target.setdefault(target, []).append(Pair(role["down"], role["up"], scale))
    ordered = {target: tuple(by_target[target]) for target in shapes if target in by_target}
    return LoraPlan(ordered), [report for _, report in plans]


def union(plans: Sequence[LoraPlan], targets: Collection[str] | None = None) -> LoraPlan:
    """Everything that is to be read for several sets of weights, as one plan.

    Args:
        targets: leave out all others; None for all.
    """
    pairs: dict[str, tuple[Pair, ...]] = {}
    for plan in plans:
        for target in plan.targets:
            if targets is None or target in targets:
                pairs[target] = pairs.get(target, ()) + plan.pairs[target]
    return LoraPlan(pairs)


def switched_targets(plans: Sequence[LoraPlan]) -> tuple[str, ...]:
    """The parameters that are not the same in all sets of weights."""
    return tuple(
        target
        for target in union(plans).targets
        if any(plan.pairs.get(target) != plans[0].pairs.get(target) for plan in plans)
    )


class LoraMerger:
    """Has factors merged as soon as a weight's factors are complete, and keeps no others.

    Args:
        merge_target: called with a parameter's name and its factors when they are complete.
    """

    def __init__(self, plan: LoraPlan, merge_target: Callable[[str, Mapping[TensorEntry, Tensor]], None]):
        self._pairs, self._merge_target = plan.pairs, merge_target
        self._target = {
            entry: target for target, pairs in plan.pairs.items() for pair in pairs for entry in (pair.down, pair.up)
        }
        self._missing = {target: {e for p in pairs for e in (p.down, p.up)} for target, pairs in plan.pairs.items()}
        self._held: dict[TensorEntry, Tensor] = {}

    def take(self, entry: TensorEntry, factor: Tensor) -> None:
        """Take one of the plan's factors, in any order, each once; merge its weight if it was the last.

        Args:
            factor: on the parameter's device, dtype as stored. It is kept until its weight is merged.
        """
        target = self._target.get(entry)
        if target is None or entry not in self._missing.get(target, ()):
            raise RuntimeError(f"{entry.name} of {entry.file} was read and is not awaited")
        self._held[entry] = factor
        self._missing[target].remove(entry)
        if self._missing[target]:
            return
        del self._missing[target]
        entries = {entry for pair in self._pairs[target] for entry in (pair.down, pair.up)}
        self._merge_target(target, {entry: self._held.pop(entry) for entry in entries})

    def finish(self) -> None:
        """Raise RuntimeError unless every weight of the plan is merged. A failure is a fault of this package."""
        if self._missing:
            raise RuntimeError(f"factors of {len(self._missing)} weights never came: {', '.join(self._missing)[:200]}")


def factors_of(pairs: Sequence[Pair], tensors: Mapping[TensorEntry, Tensor]) -> list[Factor]:
    """The pairs with what was read for them."""
    return [Factor(tensors[pair.down], tensors[pair.up], pair.scale) for pair in pairs]


def _match(
    index: Index, strength: float, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, TensorEntry]], LoraReport]:
    """The pairs of one file that apply, by parameter and role, and the report on all that it holds."""
    modules, unrecognised = _modules(index)
    used: dict[str, dict[str, TensorEntry]] = {}
    skipped: dict[str, list[str]] = {}
    unpaired: list[str] = []
    for parameter, module in modules.items():
        if parameter not in shapes:
            is_connector = parameter.startswith(_CONNECTORS)
            reason = "for the connectors, which stay as they are" if is_connector else "not in this transformer"
            skipped.setdefault(reason, []).append(module.stem)
        elif {"down", "up"} <= module.by_role.keys():
            _require_fit(module.by_role, parameter, shapes[parameter])
            used[parameter] = module.by_role
        else:
            unpaired += [entry.name for entry in module.by_role.values()]
    report = LoraReport(
        index.files[0] if len(index.files) == 1 else index.files[0].parent,
        strength,
        len(used),
        {reason: tuple(stems) for reason, stems in skipped.items()},
        tuple(unpaired),
        tuple(unrecognised),
    )
    if not used:
        raise WeightsError(
            f"LoRA {report.file}: {report.counts()}. It must hold at least one pair of factors for this transformer. "
            "Pass a LoRA of this model."
        )
    return used, report


def _modules(index: Index) -> tuple[dict[str, _Module], list[str]]:
    """What a file holds, by parameter, whether it is one of the model or not; and the keys that mean nothing."""
    modules: dict[str, _Module] = {}
    unrecognised: list[str] = []
    for name, entry in index.entries.items():
        _require_plain(entry)
        suffix = next((suffix for suffix in _ROLES if name.endswith(suffix)), None)
        if suffix is None:
            unrecognised.append(name)
            continue
        stem = name.removesuffix(suffix)
        module = modules.setdefault(_parameter(stem), _Module(stem, {}))
        other = module.by_role.setdefault(_ROLES[suffix], entry)
        if other is not entry:
            raise WeightsError(
                f"{entry.file} holds {quote(other.name)} and {quote(name)}, which say the same of one weight; there "
                "must be one. Remove one of them."
            )
    return modules, unrecognised


def _parameter(stem: str) -> str:
    """Name the parameter that a module's factors are for; one that no model has where they are for none."""
    for prefix in _PREFIXES:
        if stem.startswith(prefix):
            return f"{stem.removeprefix(prefix)}.weight"
    if stem.startswith(_DIFFUSERS_PREFIX):
        return _DIFFUSERS.to_parameter(f"{stem.removeprefix(_DIFFUSERS_PREFIX)}.weight") or f"{stem}.weight"
    return f"{stem}.weight"


def _require_plain(entry: TensorEntry) -> None:
    parts = entry.name.split(".")
    if entry.name.endswith(_BIASES) or any(part.startswith(_OTHER_KINDS) for part in parts):
        raise UnsupportedError(
            f"{entry.file} holds {quote(entry.name)}; ltx_sp implements LoRAs that are pairs of factors (lora_A and "
            "lora_B) and nothing else, and half of one would be wrong. Use a plain LoRA."
        )


def _require_fit(role: Mapping[str, TensorEntry], parameter: str, shape: tuple[int, ...]) -> None:
    down, up = role["down"], role["up"]
    for entry in role.values():
        if entry.dtype.startswith("F8_"):
            raise UnsupportedError(
                f"{entry.file} holds {quote(entry.name)} in fp8 ({entry.dtype}); fp8 LoRAs are not implemented. Use "
                "one in bf16."
            )
    for entry in (down, up):
        if entry.dtype not in _FLOATING:
            raise WeightsError(
                f"{entry.file} holds {quote(entry.name)} as {entry.dtype}; a factor must be one of "
                f"{', '.join(_FLOATING)}. Use a LoRA in bf16."
            )
    rank = down.shape[0] if down.shape else 0
    if len(shape) != 2 or rank == 0 or down.shape != (rank, shape[1]) or up.shape != (shape[0], rank):
        raise WeightsError(
            f"{down.file} holds {quote(down.name)} with shape {quote(list(down.shape))} and {quote(up.name)} with "
            f"shape {quote(list(up.shape))}; parameter {parameter} has shape {list(shape)}, and they must be "
            "[rank, in] and [out, rank] of it. Use a LoRA of this model."
        )
    alpha = role.get("alpha", down)
    if alpha is not down and (alpha.shape not in ((), (1,)) or alpha.dtype == "BOOL"):
        raise WeightsError(
            f"{alpha.file} holds {quote(alpha.name)} as {alpha.dtype} with shape {quote(list(alpha.shape))}; it must "
            "be one number. Fetch it again."
        )


def _scale(
    role: Mapping[str, TensorEntry], strength: float, common: float | None, alphas: Mapping[TensorEntry, float]
) -> float:
    down, rank = role["down"], role["down"].shape[0]
    alpha = alphas[role["alpha"]] if "alpha" in role else rank if common is None else common
    scale = strength * alpha / rank
    if not abs(scale) < _MAX_SCALE:  # nor is NaN
        raise WeightsError(
            f"{down.file} scales {quote(down.name)} by alpha / rank = {alpha:g} / {rank}, with strength {strength:g} "
            "that is no usable number. Use another strength, or fetch the LoRA again."
        )
    return scale


def _metadata_alpha(index: Index) -> float | None:
    """The alpha that diffusers put into the metadata, where other files have it beside the factors.

    Raises:
        UnsupportedError: it is not the same for all weights, or not a factor alpha / rank.
    """
    if _DIFFUSERS_METADATA not in index.metadata:
        return None
    what = f"The `{_DIFFUSERS_METADATA}` of {index.files[0]}"
    stored = parse_object(index.metadata[_DIFFUSERS_METADATA], what)
    config = {key.removeprefix(_DIFFUSERS_PREFIX): value for key, value in stored.items()}
    for key in ("alpha_pattern", "use_rslora", "use_dora", "lora_bias"):
        if config.get(key):
            raise UnsupportedError(
                f"{what} has {key} {quote(config[key])}; ltx_sp implements one alpha for all weights, divided by the "
                "rank. Use a plain LoRA."
            )
    alpha = config.get("lora_alpha")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < _MAX_SCALE:
        raise WeightsError(f"{what} has lora_alpha {quote(alpha)}; it must be a number. Fetch the LoRA again.")
    return float(alpha)


def _count(names: Sequence[str], what: str) -> str:
    first = ", ".join(quote(name) for name in names[:3])
    return f"{len(names)} {what} ({first}{', ...' if len(names) > 3 else ''})"
