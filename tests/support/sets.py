"""Sets of weights for tests: LoRAs of a demo checkpoint, components that load them, and what they must hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltx_sp import Lora, Settings
from ltx_sp.components import Components
from ltx_sp.observe import Observer
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import Mesh, join
from ltx_sp.weights.checkpoint import open_checkpoint
from ltx_sp.weights.index import TensorEntry, read_index
from ltx_sp.weights.lora import LoraPlan, Pair, factors_of
from ltx_sp.weights.merge import Factor, merge
from ltx_sp.weights.residency import RESIDENCIES, Residency, Site
from ltx_sp.weights.transfer import Ledger, Mover

__all__ = [
    "DISTILLED",
    "LAYERS",
    "LAYER_BYTES",
    "MODES",
    "RUN",
    "STYLE",
    "TWO_SETS",
    "WIDTH",
    "Bench",
    "assert_holds",
    "expected",
    "open_components",
    "two_stages",
    "write_lora",
]

MODES = ("resident", "sharded", "snapshot", "snapshot-low-vram", "legacy")
PREFIX = "model.diffusion_model."

WIDTH = 16
LAYERS = 12
# In set 0 as in the checkpoint, in set 1 with the distilled LoRA, in both with the run's.
DISTILLED = tuple(f"{i}.weight" for i in range(0, LAYERS, 2))
RUN = ("0.weight", "1.weight", "2.weight")
LAYER_BYTES = WIDTH * WIDTH * 4
TWO_SETS: tuple[Mapping[str, float], ...] = ({"run": 0.5}, {"run": 0.5, "distilled": 1.0})

# Overlaps with the distilled LoRA, and changes weights that it leaves alone.
STYLE = ("attn2", "attn1.to_q", "proj_out")


def write_lora(checkpoint: Path, path: Path, parts: Sequence[str], *, rank: int, seed: int) -> Path:
    """Factors for the transformer's two-dimensional weights whose name has one of ``parts``."""
    generator, factors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, entry in read_index(checkpoint).entries.items():
        is_weight = name.startswith(PREFIX) and name.endswith(".weight") and len(entry.shape) == 2
        if is_weight and "embeddings_connector" not in name and any(part in name for part in parts):
            stem = name.removeprefix("model.").removesuffix(".weight")
            factors[f"{stem}.lora_A.weight"] = torch.randn(rank, entry.shape[1], generator=generator).bfloat16()
            factors[f"{stem}.lora_B.weight"] = torch.randn(entry.shape[0], rank, generator=generator).bfloat16() / 9
    save_file(factors, path)
    return path


def two_stages(checkpoint: Path, *, hq: bool = False, **changes: Any) -> Settings:
    """Settings of a pipeline of two stages for a demo checkpoint, with a distilled LoRA of its own."""
    folder = checkpoint.parent
    distilled = folder / "distilled_of_test.safetensors"
    if not distilled.exists():
        write_lora(checkpoint, distilled, ("attn1", "ff.net"), rank=5, seed=1)
        write_lora(checkpoint, folder / "run.safetensors", ("ff.net", "audio_attn1"), rank=3, seed=2)
        write_lora(checkpoint, folder / "style.safetensors", STYLE, rank=4, seed=3)
    settings = Settings(
        checkpoint,
        folder / "gemma",
        device="cpu",
        pipeline="two-stages-hq" if hq else "two-stages",
        spatial_upsampler_path=folder / "upsampler.safetensors",
        distilled_lora=Lora(distilled, 0.75),
    )
    return dataclasses.replace(settings, **changes)


def open_components(settings: Settings, mesh: Mesh | None = None) -> Components:
    """Components of this rank, checked, with nothing loaded."""
    mesh = mesh or join(None, torch.device("cpu"))
    checkpoint = open_checkpoint(settings.checkpoint_path, settings.gemma_root, settings.spatial_upsampler_path)
    components = Components(checkpoint, settings, mesh, Observer(mesh.world.rank, mesh.device))
    components.check()
    return components


def expected(settings: Settings, set_: int, loras: Sequence[Lora] = ()) -> dict[str, Tensor]:
    """What a set's parameters are by the definition: clean weights, all factors added at once."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    stored = load_file(settings.checkpoint_path)
    names = open_checkpoint(settings.checkpoint_path, settings.gemma_root).index("transformer").entries
    weights = {name.removeprefix(PREFIX): stored[name].to(dtype, copy=True) for name in names}
    strength = {"two-stages": (0.0, 1.0), "two-stages-hq": (0.25, 0.5), "one-stage": (0.0,)}[settings.pipeline][set_]
    merged = [(lora.path, lora.strength) for lora in (*settings.loras, *loras)]
    if settings.distilled_lora is not None:
        merged.append((settings.distilled_lora.path, strength * settings.distilled_lora.strength))
    factors: dict[str, list[Factor]] = {}
    for path, scale in merged:
        tensors = load_file(path)
        for name, down in tensors.items():
            if name.endswith(".lora_A.weight") and scale:
                stem = name.removesuffix(".lora_A.weight")
                up = tensors[f"{stem}.lora_B.weight"]
                target = f"{stem.removeprefix('diffusion_model.')}.weight"
                factors.setdefault(target, []).append(Factor(down, up, scale))
    for target, found in factors.items():
        merge(weights[target], found)
    return weights


def assert_holds(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Every parameter is, bit for bit, what it must be."""
    state = module.state_dict()
    assert state.keys() == weights.keys()
    wrong = [name for name, tensor in state.items() if not torch.equal(tensor.cpu(), weights[name])]
    assert wrong == []


Factors = dict[TensorEntry, Tensor]


def _lora(names: Sequence[str], key: str, width: int) -> tuple[dict[str, tuple[TensorEntry, TensorEntry]], Factors]:
    """Entries of a LoRA by parameter, and what is stored for them."""
    entries = {
        name: tuple(
            TensorEntry(f"{name}.{part}", Path(key), "F32", shape, 0, 1)
            for part, shape in (("down", (2, width)), ("up", (width, 2)))
        )
        for name in names
    }
    stored = {entry: torch.randn(entry.shape) for pair in entries.values() for entry in pair}
    return entries, stored  # type: ignore[return-value]


class Bench:
    """A module, its LoRAs, and the ways to make a residency of them."""

    def __init__(
        self, *, room: Callable[[], int] = lambda: 2**60, device: torch.device | None = None, width: int = WIDTH
    ):
        self.device = device or torch.device("cpu")
        self.module = nn.Sequential(*(nn.Linear(width, width, bias=i == 3) for i in range(LAYERS)))
        self.module.requires_grad_(False)
        self.clean = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self.loaded = dict(self.module.named_parameters())
        self.stored: Factors = {}
        self._entries: dict[str, dict[str, tuple[TensorEntry, TensorEntry]]] = {}
        for key, names in (("distilled", DISTILLED), ("run", RUN), ("style", ("1.weight", "4.weight", "5.weight"))):
            self._entries[key], stored = _lora(names, key, width)
            self.stored |= stored
        self.ledger = Ledger()
        self.site = Site(Mover(self.device, self.ledger), Axis.alone(), Axis.alone(), room)

    def plans(self, *sets: Mapping[str, float]) -> tuple[LoraPlan, ...]:
        """Plans from each set's LoRAs and their scales."""
        made = []
        for scales in sets:
            pairs: dict[str, tuple[Pair, ...]] = {}
            for key, scale in scales.items():
                for name, (down, up) in self._entries[key].items():
                    pairs[name] = (*pairs.get(name, ()), Pair(down, up, scale))
            made.append(LoraPlan(pairs))
        return tuple(made)

    def make(self, mode: str, plans: Sequence[LoraPlan]) -> Residency:
        """As a load does it."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.loaded.items()}
        residency = RESIDENCIES[mode](self.site, shapes, torch.float32, plans)
        awaited = residency.prepare(plans, alone=True)
        if self.device.type == "cuda" and not residency.loads_to_host:
            self.module.to(self.device)
        for name in residency.written if self.device.type == "cpu" else ():  # as the loader would
            owner, leaf = self.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            owner.register_parameter(leaf, nn.Parameter(self.clean[name].clone(), requires_grad=False))
        residency.attach(self.module)
        self._merge(residency, awaited)
        residency.settle()
        return residency

    def remake(self, residency: Residency, plans: Sequence[LoraPlan]) -> None:
        """As for a request's LoRAs."""
        awaited = residency.prepare(plans, alone=True)
        for name in residency.stale():
            residency.clean(name, self.clean[name])
        self._merge(residency, awaited)
        residency.settle()

    def _merge(self, residency: Residency, awaited: LoraPlan) -> None:
        for name, pairs in awaited.pairs.items():
            residency.merge(name, {e: self.stored[e].to(self.device) for pair in pairs for e in (pair.down, pair.up)})

    def assert_holds(self, plan: LoraPlan) -> None:
        """Every parameter is, bit for bit, what it must be."""
        for name, tensor in self.module.state_dict().items():
            assert tensor.device.type == self.device.type
            assert torch.equal(tensor, self.weight(plan, name)), name

    def weight(self, plan: LoraPlan, name: str) -> Tensor:
        """By the definition."""
        weight: Tensor = self.clean[name].to(self.device, copy=True)
        if name in plan.pairs:
            stored = {entry: tensor.to(self.device) for entry, tensor in self.stored.items()}
            merge(weight, factors_of(plan.pairs[name], stored))
        return weight

    def addresses(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self.module.named_parameters()}

    def moved(self) -> dict[str, int]:
        return dict(self.ledger.num_bytes)
