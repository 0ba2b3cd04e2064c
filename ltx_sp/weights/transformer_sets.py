"""The transformer's sets of weights on this rank: which there are, in which mode they are held, which one is used."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ltx_sp.observe import log
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import Mesh, together
from ltx_sp.recipes import pipeline_defaults
from ltx_sp.request import Lora, Settings
from ltx_sp.weights.checkpoint import Checkpoint
from ltx_sp.weights.index import TensorEntry
from ltx_sp.weights.load import read_tensors
from ltx_sp.weights.lora import LoraPlan, LoraReport, switched_targets, union
from ltx_sp.weights.lora_sets import LoraSets
from ltx_sp.weights.placement import Budget, Need, choose_residency, require_sense
from ltx_sp.weights.policy import Policy, choose_policy
from ltx_sp.weights.residency import RESIDENCIES, Residency, Site
from ltx_sp.weights.stripes import ByteStream
from ltx_sp.weights.transfer import Mover

__all__ = ["TransformerSets"]

ReadFactors = Callable[[LoraPlan, Policy, Residency], None]
"""Reads the factors of a plan, and merges them. Collective along the policy's exchange."""


class TransformerSets:
    """Plans the sets from the headers, and makes the residency that holds them.

    There is one for each strength that the distilled LoRA has in any stage, in the order of the stages.

    Args:
        mode: empty before it is chosen.
        residency: None while the transformer is not there.
        is_evicted: the transformer's weights are on the host only.
        epoch: grows whenever a set comes to lie elsewhere on the device.
        loras: of the request, in force.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, mesh: Mesh, mover: Mover):
        self._checkpoint, self._settings, self._mesh, self._mover = checkpoint, settings, mesh, mover
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        strengths = pipeline_defaults(checkpoint.spec, settings.pipeline).lora_strengths
        self._strengths = list(dict.fromkeys(strengths))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._planner: LoraSets | None = None
        self.plans: tuple[LoraPlan, ...] = (LoraPlan({}),) * len(self._strengths)
        self.loras: tuple[Lora, ...] = ()
        self.mode = ""
        self.residency: Residency | None = None
        self.is_evicted = False
        self.epoch = 0

    @property
    def num_sets(self) -> int:
        return len(self._strengths)

    @property
    def kind(self) -> type[Residency]:
        """The chosen mode's; the simplest before."""
        return RESIDENCIES[self.mode or "resident"]

    def check(self, module: nn.Module) -> list[LoraReport]:
        """Plan the sets of a module, which may be on meta, and report on the LoRAs. Blocks the host.

        Raises:
            WeightsError, UnsupportedError: a LoRA is damaged, or not for this module.
            PlanError: the mode that is asked for needs more ranks, or more sets.
        """
        settings = self._settings
        require_sense(
            settings.residency, num_ranks=self._mesh.world.size, num_sets=self.num_sets, pipeline=settings.pipeline
        )
        self._shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self._planner = LoraSets(settings.loras, settings.distilled_lora, self._strengths, self._shapes, _read_scalars)
        self.plans = self._planner.base
        return self._planner.reports

    def fingerprint(self, plans: Sequence[LoraPlan] | None = None) -> str:
        """What must be equal on every rank of the LoRAs in force, or of others."""
        whole = hashlib.sha256()
        for set_, plan in enumerate(self.plans if plans is None else plans):
            for target, pairs in plan.pairs.items():
                for pair in pairs:
                    factors = f"{pair.down.dtype} {pair.down.shape} {pair.up.dtype}"
                    whole.update(f"{set_} {target} {pair.scale} {factors}\n".encode())
        return whole.hexdigest()

    def need(self, working_bytes: int = 0) -> Need:
        """What the sets take in each mode."""
        assert self._planner is not None
        base, host = self._planner.base, self._mesh.host
        sizes = {name: math.prod(shape) * self._dtype.itemsize for name, shape in self._shapes.items()}
        switched = set(switched_targets(base))
        return Need(
            transformer=sum(sizes.values()),
            switched=sum(sizes[name] for name in switched),
            num_sets=self.num_sets,
            merged=sum(sizes[n] for k, plan in enumerate(base) for n in plan.targets if k == 0 or n in switched),
            factors=union(base, switched).num_bytes,
            working=working_bytes,
            num_ranks=self._mesh.world.size,
            # Published checkpoints are in bf16: in float32 each rank has to convert them for itself.
            host_copies=1 if self._dtype == torch.bfloat16 else host.size,
        )

    @property
    def num_bytes(self) -> int:
        """What all ranks of this host that share the device's memory take there."""
        settings, need = self._settings, self.need()
        num_bytes = need.device(self.mode or "resident")
        if self._mesh.device.type == "cpu":
            is_shared = settings.load_mode in ("auto", "mmap") and settings.dtype == "bfloat16" and not need.merged
            num_bytes *= 1 if is_shared else self._mesh.host.size
        return num_bytes

    @property
    def num_snapshot_bytes(self) -> int:
        """What the transformer itself takes on the host now, where it is loaded there."""
        need = self.need()
        return need.host_copies * need.transformer if self.residency and self.kind.loads_to_host else 0

    def choose(self, need: Need, budget: Budget) -> str:
        """Choose the mode, and return the reason.

        Raises:
            PlanError: the mode that is asked for does not fit.
        """
        asked = self._settings.residency
        if asked == "auto" and self._mesh.device.type == "cpu":
            self.mode = "resident"
            return "on the CPU there is one memory"
        self.mode, reason = choose_residency(asked, need, budget)
        return reason

    def policy_for(self, component: str, policy: Policy) -> Policy:
        """How a component is loaded: what goes to the host and stays there, into memory that its ranks share."""
        if component != "transformer" or not self.kind.loads_to_host or self._mesh.device.type == "cpu":
            return policy
        mode = "mmap" if policy.mode == "mmap" else "preload"
        return dataclasses.replace(policy, mode=mode, exchange=Axis.alone())

    def choose_policy(self, largest_bytes: int) -> Policy:
        """Choose how weights are read, and say so. Collective along the host axis. Blocks the host.

        Args:
            largest_bytes: of any component.
        """
        sample = ByteStream(list(self._checkpoint.index("transformer").entries.values()))
        asked, mesh = self._settings.load_mode, self._mesh
        policy = choose_policy(asked, mesh.device, mesh.host, sample, preload_bytes=largest_bytes)
        if mesh.is_main:
            log.info("weights: %s (%s)", policy.mode, policy.reason)
        return policy

    def make(self, room: Callable[[], int], *, locks_pages: bool) -> Residency:
        """Make the residency that the transformer will have, with nothing in it."""
        assert self._planner is not None
        self.drop()
        site = Site(self._mover, self._mesh.host, self._mesh.world, room, locks_pages)
        self.residency = self.kind(site, self._shapes, self._dtype, self._planner.base)
        self.epoch += 1
        return self.residency

    def settle(self) -> None:
        """Let the transformer use set 0 as it is now, when all ranks have made their part."""
        self._there().settle()

    def enter(self, set_: int) -> None:
        """Let the transformer use a set; nothing happens if it does. Collective. In place."""
        residency = self._there()
        self.epoch += residency.loads_to_host and (self.is_evicted or set_ != residency.active)
        residency.enter(set_)
        self.is_evicted = False

    def prefetch(self, set_: int) -> None:
        """Bring a set nearer beside what the device does."""
        self._there().prefetch(set_)

    def rest(self) -> None:
        """Go back to set 0 beside what the device does. Collective."""
        residency = self._there()
        self.epoch += residency.loads_to_host and residency.active != 0
        residency.rest()

    def evict(self) -> bool:
        """Leave the device, where the mode allows it; says whether it does."""
        self.is_evicted = self.residency is not None and self.residency.evict()
        return self.is_evicted

    def forget(self) -> None:
        """Let go of what was brought nearer."""
        if self.residency is not None:
            self.residency.forget()

    def _there(self) -> Residency:
        if self.residency is None:
            raise RuntimeError("the transformer is not loaded")
        return self.residency

    def drop(self) -> None:
        """Give back what is held for the transformer."""
        self.is_evicted = False
        if self.residency is not None:
            self.residency.close()
            self.residency = None

    def use_loras(self, loras: tuple[Lora, ...], policy: Policy | None, read_factors: ReadFactors) -> None:
        """Have a request's LoRAs in force, besides the run's own. Collective. In place. Blocks the host.

        Where a rank lacks the transformer, and after an error in the merging, none has a residency.

        Raises:
            WeightsError, UnsupportedError: on every rank, where a file is damaged, or is no LoRA for this transformer.
        """
        assert self._planner is not None
        with self._mesh.together():
            plans, reports = self._planner.plan(loras)
        self._mesh.agree(self.fingerprint(plans), "set of LoRAs")
        if self._mesh.is_main:
            for report in reports:
                log.info("%s", report.describe())
        is_there = self._mesh.world.gather_text("yes" if self.residency else "", label="weights")
        if policy is None or not all(is_there):
            self.drop()
        else:
            try:
                self._rebuild(plans, self._there(), policy, read_factors)
            except Exception:
                self.drop()
                self.plans, self.loras = self._planner.base, ()
                raise
        self.plans, self.loras = plans, loras

    def _rebuild(
        self, plans: Sequence[LoraPlan], residency: Residency, policy: Policy, read_factors: ReadFactors
    ) -> None:
        """Make all sets anew from clean weights. Collective. What fails on one rank fails on all."""
        self.epoch += 1
        self.enter(0)
        with self._mesh.together():  # ranks write where others may still read
            self._mover.synchronize()
        with self._mesh.together():
            awaited = residency.prepare(plans, alone=policy.exchange.size == 1)
        with self._mesh.together():
            with together(policy.crew):
                self._read_clean(residency, policy)
            with together(policy.crew):
                read_factors(awaited, policy, residency)
        with self._mesh.together():
            residency.settle()

    def _read_clean(self, residency: Residency, policy: Policy) -> None:
        """Read weights that were merged in place once more. Collective along ``policy.exchange``."""
        index, keymap = self._checkpoint.index("transformer"), self._checkpoint.keymap("transformer")
        names = {index.entries[keymap.to_checkpoint(name)]: name for name in residency.stale()}
        read_tensors(
            list(names),
            device=self._mesh.device,
            policy=policy,
            done=lambda entry, tensor: residency.clean(names[entry], tensor),
        )


def _read_scalars(entries: Sequence[TensorEntry]) -> dict[TensorEntry, float]:
    values: dict[TensorEntry, float] = {}

    def keep(entry: TensorEntry, tensor: Tensor) -> None:
        values[entry] = float(tensor.reshape(-1)[0])

    read_tensors(entries, device=torch.device("cpu"), done=keep)
    return values
