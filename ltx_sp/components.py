"""The modules of a model on this rank: loaded in the background, side by side, put away, and brought back.

    loading thread   text encoder, connectors, transformer, decoders: one after the other, each at full speed
    merging thread                                          LoRA ------------------->
    main thread                            prompts --------------------------------->

While it runs, the loading thread alone exchanges anything with other ranks: the main thread waits for it before
its own next collective, so that all ranks meet in the same order.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from ltx_sp.model import upstream
from ltx_sp.model.dit import Transformer, build_transformer
from ltx_sp.observe import Observer, log
from ltx_sp.parallel.mesh import Mesh, together
from ltx_sp.request import Lora, Settings
from ltx_sp.weights.checkpoint import Checkpoint
from ltx_sp.weights.host import available_bytes, free_bytes
from ltx_sp.weights.jobs import Job, Loading
from ltx_sp.weights.load import OnBytes, check, load, read_tensors
from ltx_sp.weights.lora import LoraMerger, LoraPlan, LoraReport, union
from ltx_sp.weights.placement import Budget, place_components
from ltx_sp.weights.policy import Policy
from ltx_sp.weights.residency import Residency
from ltx_sp.weights.shelf import Shelf
from ltx_sp.weights.transfer import Ledger, Mover
from ltx_sp.weights.transformer_sets import TransformerSets
from ltx_sp.weights.verify import digest, require_finite

_BUILDERS: dict[str, Callable[[Checkpoint], nn.Module]] = {
    "text_encoder": lambda checkpoint: upstream.build_text_encoder(checkpoint.gemma_config),
    "connectors": lambda checkpoint: upstream.build_connectors(checkpoint.spec, checkpoint.gemma_config),
    "transformer": lambda checkpoint: build_transformer(checkpoint.spec.transformer),
    "video_vae": lambda checkpoint: upstream.build_video_vae(checkpoint.spec),
    "audio_vae": lambda checkpoint: upstream.build_audio_vae(checkpoint.spec),
    "vocoder": lambda checkpoint: upstream.build_vocoder(checkpoint.spec),
    "upsampler": lambda checkpoint: upstream.build_upsampler(checkpoint.upsampler_config),
}
ENCODERS = ("text_encoder", "connectors")
DECODERS = ("video_vae", "audio_vae", "vocoder")
COMPONENTS = tuple(name for name in _BUILDERS if name != "upsampler")
"""What every pipeline has; those of two stages have the upsampler too."""


class Components:
    """The modules of one checkpoint on this rank.

    Args:
        names: of all that the pipeline has.
        places: where each but the transformer is between its uses: ``gpu``, ``host`` or ``drop``.
        ledger: what has been copied since the start, and what is held besides what was loaded.
        before_moving: called before memory of the device is given back, to let go of what else would hold it.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, mesh: Mesh, observer: Observer):
        self._checkpoint, self._settings, self._mesh, self._observer = checkpoint, settings, mesh, observer
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._digest = ""
        self._policy: Policy | None = None
        self._working_bytes = 0
        self._first_budget: Budget | None = None
        self.names = (*COMPONENTS, *(["upsampler"] if settings.spatial_upsampler_path else []))
        self._dropped = () if settings.keep_text_encoder else ENCODERS
        self.places = dict.fromkeys(self.names, "gpu") | dict.fromkeys(self._dropped, "drop")
        self.ledger = Ledger(observer.moved)
        self._mover = Mover(mesh.device, self.ledger)
        self._shelf = Shelf(self._mover)
        self._sets = TransformerSets(checkpoint, settings, mesh, self._mover)
        self.before_moving: Callable[[], None] = lambda: None

    @property
    def num_sets(self) -> int:
        """Of the transformer's weights."""
        return self._sets.num_sets

    @property
    def mode(self) -> str:
        """Where the sets live; empty before that is chosen."""
        return self._sets.mode

    @property
    def epoch(self) -> int:
        """A number that grows whenever the transformer's weights come to lie elsewhere on this rank's device."""
        return self._sets.epoch

    def check(self) -> list[LoraReport]:
        """Prove from the headers that every component is whole and every LoRA fits. Blocks the host.

        Raises:
            WeightsError, UnsupportedError: one is not, or does not.
            PlanError: the residency that is asked for needs more ranks.
        """
        modules = {component: _BUILDERS[component](self._checkpoint) for component in self.names}
        for component, module in modules.items():
            check(module, self._checkpoint.index(component), self._checkpoint.keymap(component), component=component)
        return self._sets.check(modules["transformer"])

    def fingerprint(self) -> str:
        """What must be equal on every rank: names, dtypes and shapes of all stored tensors, and what is merged."""
        whole = hashlib.sha256()
        for component in self.names:
            for name, entry in self._checkpoint.index(component).entries.items():
                whole.update(f"{component} {name} {entry.dtype} {entry.shape}\n".encode())
        whole.update(self._sets.fingerprint().encode())
        return whole.hexdigest()

    def digest(self) -> str:
        """Fingerprint what the transformer holds, once for every time it is loaded. Blocks the host."""
        self._digest = self._digest or digest(self["transformer"])
        return self._digest

    def __getitem__(self, component: str) -> nn.Module:
        return self._shelf[component]

    def __contains__(self, component: str) -> bool:
        """Whether a component is there, on the device."""
        is_evicted = component == "transformer" and self._sets.is_evicted
        return component in self._shelf and not is_evicted and not self._shelf.is_away(component)

    def free(self, *components: str) -> None:
        """Let go of what these hold."""
        for component in components:
            if component == "transformer":
                self._move()
                self._sets.drop()
            self._shelf.free(component)
        self._collect()

    def _move(self) -> None:
        self.before_moving()
        self._sets.epoch += 1

    def close(self) -> None:
        """Let go of everything."""
        self.free(*self.names)

    def put_away(self, *components: str) -> None:
        """Leave these where they belong between their uses; ``loading`` brings them back."""
        leaving = [name for name in components if name in self and self.places[name] != "gpu"]
        for component in leaving:
            leave = self._shelf.free if self.places[component] == "drop" else self._shelf.put_on_host
            leave(component)
        if leaving:
            self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self._mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    def fit_together(self, components: Sequence[str], spare: int = 0) -> bool:
        """Whether the absent ones of these find room beside what is there, and ``spare`` bytes to work with."""
        missing = [name for name in components if name not in self]
        return 1.1 * sum(map(self._num_bytes, missing)) + spare <= free_bytes(self._mesh.device)

    def make_room(self, *components: str, spare: int = 0) -> None:
        """Put away what others hold, the transformer last, until these fit; it comes back when it is needed."""
        if self.fit_together(components, spare):
            return
        self._move()
        self._sets.forget()
        for victim in (*DECODERS, "upsampler", *ENCODERS, "transformer"):
            if self.fit_together(components, spare):
                return
            if victim in components or victim not in self:
                continue
            log.info("%s gives way to %s", victim, " and ".join(components))
            if victim != "transformer" and self.places[victim] == "host":
                self.put_away(victim)
            elif victim != "transformer" or not self._sets.evict():
                self.free(victim)
            self._collect()

    def _bring(self, components: Sequence[str]) -> None:
        """Bring back what is only on the host; the transformer comes when a set is entered."""
        for component in components:
            self._shelf.bring(component)

    def _room(self) -> int:
        return free_bytes(self._mesh.device) - self._working_bytes

    def _num_bytes(self, component: str) -> int:
        """What a component takes on the device."""
        if component == "transformer":
            return self._sets.num_bytes
        return self._checkpoint.index(component).num_bytes * (2 if self._dtype == torch.float32 else 1)

    def reserve(self, working_bytes: int) -> None:
        """Choose where weights live so that so much of each device is left to work with. Collective. Blocks the host.

        To be called before a request's loads. Where a larger working set needs another mode, the transformer is
        freed, and loads again.

        Raises:
            PlanError: on every rank, where the mode that is asked for does not fit.
        """
        if self.mode and working_bytes <= self._working_bytes:
            return
        wanted = max(working_bytes, self._working_bytes)
        before, need, device = self.mode, self._sets.need(wanted), self._mesh.device
        with self._mesh.together():
            own = [free_bytes(device), available_bytes()]
            if device.type == "cuda":  # as if nothing of the model were there
                snapshot = self._sets.num_snapshot_bytes
                own[0] += self._shelf.held_bytes(device, ["transformer"] * bool(snapshot)) + self.ledger.held["device"]
                own[1] += snapshot + self.ledger.held["host"]
        measured = [json.loads(text) for text in self._mesh.world.gather_text(json.dumps(own), label="residency")]
        budget = Budget(*map(min, zip(*measured, strict=True)))
        if device.type == "cpu":  # where ranks and the page cache may share what is loaded
            budget = self._first_budget = self._first_budget or budget
        reason = self._sets.choose(need, budget)
        self._working_bytes = wanted
        if self._mesh.is_main and self.mode != before:
            log.info("residency: %s (%s)", self.mode, reason)
        if before and self.mode != before:
            self.free("transformer")
        if device.type == "cuda":
            order = ("upsampler", *DECODERS, "connectors", "text_encoder")
            sizes = {name: self._num_bytes(name) for name in order if name in self.names}
            self.places = place_components(sizes, need.rest(self.mode, budget), self._dropped)

    @property
    def moves_weights(self) -> bool:
        """Whether a set lies elsewhere each time that it is entered."""
        return self._sets.kind.loads_to_host and self.num_sets > 1

    def enter(self, set_: int) -> None:
        """Let the transformer use a set of weights; nothing happens if it does. Collective. In place."""
        self._sets.enter(set_)

    def prefetch(self, set_: int) -> None:
        """Bring a set nearer beside what the device does, as far as mode and memory allow."""
        self._sets.prefetch(set_)

    def rest(self, spare: int = 0) -> None:
        """Go back to set 0; ``enter(0)`` must come before its use. Collective.

        Where weights move it happens beside what the device does, and only where decoders and ``spare`` have room too.
        """
        absent = [*DECODERS, "transformer"] if spare else ["transformer"]
        if not self.moves_weights or self.fit_together(absent, self._sets.need().switched + spare):
            self._sets.rest()

    def use_loras(self, loras: Sequence[Lora]) -> None:
        """Merge a request's LoRAs into every set, besides the run's own; without any, all is as it was.

        Collective. In place. Blocks the host. Nothing happens where these are in force. Before the transformer is
        there, its load merges them on the way. After an error in the merging it loads again, without them.

        Raises:
            WeightsError, UnsupportedError: on every rank, where a file is damaged, or is no LoRA for this transformer.
        """
        if tuple(loras) == self._sets.loras:
            return
        try:
            self._sets.use_loras(tuple(loras), self._policy, self._read_factors)
            self._digest = ""
        finally:
            if self._sets.residency is None and "transformer" in self._shelf:
                self.free("transformer")

    @contextmanager
    def loading(self, wanted: Sequence[str]) -> Iterator[Loading]:
        """Load in the background what this rank lacks of ``wanted``, in their order, and on leaving wait for its end.

        Collective along the host axis; along all ranks where ``reserve`` was not called and the transformer is wanted,
        which it then is on all. An exception that leaves the block stops the loads on all ranks of the host.
        """
        if "transformer" in wanted and not self.mode:
            self.reserve(0)
        policy = self._policy = self._policy or self._sets.choose_policy(
            max(self._checkpoint.index(name).num_bytes for name in self.names)
        )
        host = self._mesh.host
        with together(host):
            self._bring(wanted)
        own_lacks = [name for name in wanted if name not in self._shelf]
        lacks = [json.loads(text) for text in host.gather_text(json.dumps(own_lacks), label="weights")]
        if self._sets.kind.shares_host and any("transformer" in names for names in lacks):
            self.free("transformer")  # where one of them needs it the others fill memory for it
            lacks = [[*names, "transformer"] for names in lacks]
        own, any_ = set(lacks[host.rank]), {name for names in lacks for name in names}
        jobs = [n for n in self.names if n in own or (n in any_ and self._sets.policy_for(n, policy).crew.size > 1)]
        if not jobs:
            yield Loading()
            return
        awaited, total = union(self._sets.plans), sum(self._checkpoint.index(name).num_bytes for name in own)
        loading = Loading()
        try:
            if "transformer" in own:
                residency = self._sets.make(self._room, locks_pages=policy.mode != "mmap")
                awaited = residency.prepare(self._sets.plans, alone=policy.exchange.size == 1)
                total += awaited.num_bytes
            with self._observer.progress(total, "load weights", "B") as advance:

                def on_bytes(count: int) -> None:
                    loading.check()
                    advance(count)

                work = self._jobs(jobs, own, awaited, policy, on_bytes)
                meets = self._sets.kind.shares_host and "transformer" in own
                with together(host) if meets else nullcontext(), loading.running(work, self._mesh.device):
                    yield loading
            if "transformer" in own:
                self._sets.settle()
        except Exception:
            self.free(*own.intersection(["transformer"]))  # part of it may be merged
            raise

    def _jobs(
        self, names: Sequence[str], own: Collection[str], awaited: LoraPlan, policy: Policy, on_bytes: OnBytes
    ) -> list[Job]:
        jobs = []
        # Where ranks exchange, merging waits its turn among the exchanges; on a GPU it takes next to no time.
        merges_aside = policy.crew.size == 1 and self._mesh.device.type == "cpu"
        for name in names:
            tell = on_bytes if name in own else lambda count: on_bytes(0)
            own_policy = self._sets.policy_for(name, policy)
            jobs.append(Job(name, own_policy.crew, partial(self._load, name, own_policy, name in own, tell)))
            if name == "transformer" and union(self._sets.plans).targets:
                merge = partial(self._merge_loras, awaited, policy, name in own, tell)
                after = name if merges_aside else None
                jobs.append(Job("lora", policy.crew, merge, after, is_late=not self._settings.overlap_lora))
        return jobs

    def _load(self, component: str, policy: Policy, is_taker: bool, on_bytes: OnBytes) -> None:
        with together(policy.crew):
            module = _BUILDERS[component](self._checkpoint)
        residency = self._sets.residency if component == "transformer" and is_taker else None
        device = torch.device("cpu") if residency and residency.loads_to_host else self._mesh.device
        report = load(
            module,
            self._checkpoint.index(component),
            self._checkpoint.keymap(component),
            device=device,
            # The vocoder was trained to run in float32, and distorts in less.
            dtype=torch.float32 if component == "vocoder" else self._dtype,
            component=component,
            policy=policy,
            is_taker=is_taker,
            written=residency.written if residency else (),
            on_bytes=on_bytes,
        )
        if not is_taker:
            return
        if self._settings.verify_weights:
            require_finite(module, component)
        moved = self._count(report.num_bytes, device)
        if self._settings.compile and isinstance(module, Transformer):
            module.compile_blocks()
        if residency:
            residency.attach(module)
            self._digest = ""
        self._shelf[component] = module.eval()
        details = {"mode": report.mode, "bytes": report.num_bytes, "read_bytes": report.read_bytes}
        details["gib_per_s"] = round(report.num_bytes / 2**30 / max(report.seconds, 1e-9), 3)
        details["cached"] = None if report.cached is None else round(report.cached, 2)
        self._observer.record(f"load {component}", report.seconds, moved_bytes=moved, **details)

    def _merge_loras(self, awaited: LoraPlan, policy: Policy, is_taker: bool, on_bytes: OnBytes) -> None:
        if not is_taker and policy.exchange.size == 1:
            return
        began = time.perf_counter()
        self._read_factors(awaited, policy, self._sets.residency if is_taker else None, on_bytes)
        if is_taker:
            seconds = time.perf_counter() - began
            moved = self._count(awaited.num_bytes, self._mesh.device)
            details = {"bytes": awaited.num_bytes, "weights": len(awaited.targets)}
            self._observer.record("merge lora", seconds, moved_bytes=moved, **details)

    def _count(self, num_bytes: int, device: torch.device) -> int:
        """Count what a load has copied to a device, and return it; its own record tells the observer."""
        if device.type == "cpu":
            return 0
        self.ledger.copied("host_to_device", num_bytes, tells=False)
        return num_bytes

    def _read_factors(
        self, awaited: LoraPlan, policy: Policy, residency: Residency | None, on_bytes: OnBytes | None = None
    ) -> None:
        """Read factors, and merge each weight when its own are complete. Collective along ``policy.exchange``."""
        merger = None
        if residency is not None:
            merger = LoraMerger(awaited, residency.merge)
        done = merger.take if merger else None
        read_tensors(awaited.entries, device=self._mesh.device, policy=policy, done=done, on_bytes=on_bytes)
        if merger is not None:
            merger.finish()
