"""The modules of a model on this rank: loaded in the background, side by side, freed, and loaded again.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ltx_sp.model import upstream
from ltx_sp.model.dit import Transformer
from ltx_sp.observe import Observer, log
from ltx_sp.parallel.mesh import Mesh, together
from ltx_sp.request import Settings
from ltx_sp.spec import ModelSpec
from ltx_sp.weights.checkpoint import Checkpoint
from ltx_sp.weights.host import available_bytes
from ltx_sp.weights.index import TensorEntry, read_index
from ltx_sp.weights.load import check, load, read_tensors
from ltx_sp.weights.lora import LoraMerger, LoraPlan, LoraReport, plan_loras
from ltx_sp.weights.policy import Policy, choose_policy
from ltx_sp.weights.stripes import ByteStream
from ltx_sp.weights.verify import digest, require_finite

_BUILDERS: dict[str, Callable[[Checkpoint], nn.Module]] = {
    "text_encoder": lambda checkpoint: upstream.build_text_encoder(checkpoint.gemma_config),
    "connectors": lambda checkpoint: upstream.build_connectors(checkpoint.spec, checkpoint.gemma_config),
    "transformer": lambda checkpoint: _build_transformer(checkpoint.spec),
    "video_vae": lambda checkpoint: upstream.build_video_vae(checkpoint.spec),
    "audio_vae": lambda checkpoint: upstream.build_audio_vae(checkpoint.spec),
    "vocoder": lambda checkpoint: upstream.build_vocoder(checkpoint.spec),
}
COMPONENTS = tuple(_BUILDERS)
ENCODERS = ("text_encoder", "connectors")
DECODERS = ("video_vae", "audio_vae", "vocoder")


def _build_transformer(spec: ModelSpec) -> nn.Module:
    with torch.device("meta"):
        return Transformer(spec.transformer)


class Loading:
    """Loads under way: what each waits for is what it raises."""

    def __init__(self) -> None:
        self.done: dict[str, Future[None]] = {}
        self.failure: Exception | None = None

    def wait(self, *components: str) -> None:
        """Wait until these are loaded. Blocks the host."""
        for component in components:
            if component in self.done:
                self.done[component].result()

    def finish(self) -> None:
        """Wait for everything; of several failures the first is raised. Blocks the host."""
        self.wait(*self.done)


class Components:
    """The modules of one checkpoint on this rank."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, mesh: Mesh, observer: Observer):
        self._checkpoint, self._settings, self._mesh, self._observer = checkpoint, settings, mesh, observer
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._modules: dict[str, nn.Module] = {}
        self._lora_plan: LoraPlan | None = None
        self._digest = ""
        self._policy: Policy | None = None

    def check(self) -> list[LoraReport]:
        """Prove from the headers that every component is whole and every LoRA fits. Blocks the host.

        Raises:
            WeightsError, UnsupportedError: one is not, or does not.
        """
        for component, build in _BUILDERS.items():
            module = build(self._checkpoint)
            index, keymap = self._checkpoint.index(component), self._checkpoint.keymap(component)
            check(module, index, keymap, component=component)
            if component == "transformer":
                shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        if not self._settings.loras:
            return []
        loras = [(read_index(lora.path), lora.strength) for lora in self._settings.loras]
        self._lora_plan, reports = plan_loras(loras, shapes, _read_scalars)
        return reports

    def fingerprint(self) -> str:
        """What must be equal on every rank: names, dtypes and shapes of all stored tensors, and what is merged."""
        whole = hashlib.sha256()
        for component in COMPONENTS:
            for name, entry in self._checkpoint.index(component).entries.items():
                whole.update(f"{component} {name} {entry.dtype} {entry.shape}\n".encode())
        for target, pairs in self._lora_plan.pairs.items() if self._lora_plan else ():
            for pair in pairs:
                whole.update(f"{target} {pair.scale} {pair.down.dtype} {pair.down.shape} {pair.up.dtype}\n".encode())
        return whole.hexdigest()

    def digest(self) -> str:
        """Fingerprint what the transformer holds, once for every time it is loaded. Blocks the host."""
        self._digest = self._digest or digest(self["transformer"])
        return self._digest

    def __getitem__(self, component: str) -> nn.Module:
        return self._modules[component]

    def __contains__(self, component: str) -> bool:
        return component in self._modules

    def free(self, *components: str) -> None:
        """Let go of what these hold."""
        for component in components:
            self._modules.pop(component, None)
        gc.collect()
        if self._mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    def fit_together(self, components: Sequence[str]) -> bool:
        """Whether the absent ones of these find room beside what is there."""
        settings = self._settings
        missing = [name for name in components if name not in self]
        is_shared = settings.load_mode in ("auto", "mmap") and settings.dtype == "bfloat16" and not settings.loras
        if self._mesh.device.type == "cpu" and "transformer" in missing and not is_shared:
            missing += ["transformer"] * (self._mesh.host.size - 1)  # each rank of the host has its own
        return 1.1 * sum(map(self._num_bytes, missing)) <= free_bytes(self._mesh.device)

    def make_room(self, *components: str) -> None:
        """Free what others hold, decoders first, until these fit; they load again when they are needed."""
        for victim in (*DECODERS, "transformer"):
            if self.fit_together(components):
                return
            if victim in self:
                log.info("%s gives way to %s", victim, " and ".join(components))
                self.free(victim)

    def _num_bytes(self, component: str) -> int:
        return self._checkpoint.index(component).num_bytes * (2 if self._dtype == torch.float32 else 1)

    @contextmanager
    def loading(self, wanted: Sequence[str]) -> Iterator[Loading]:
        """Load in the background what this rank lacks of ``wanted``, in their order, and on leaving wait for its end.

        Collective along the host axis. An exception that leaves the block stops the loads on all ranks of the host.
        """
        policy = self._policy = self._policy or self._choose_policy()
        lacks = [json.loads(text) for text in self._gather(json.dumps([name for name in wanted if name not in self]))]
        crew = lacks if policy.crew.size > 1 else [lacks[self._mesh.host.rank]]
        jobs = [name for name in COMPONENTS if any(name in names for names in crew)]
        if not jobs:
            yield Loading()
            return
        own = set(lacks[self._mesh.host.rank])
        total = sum(self._checkpoint.index(name).num_bytes for name in own)
        total += self._lora_plan.num_bytes if self._lora_plan and "transformer" in own else 0
        loading = Loading()
        has_loras = self._lora_plan is not None and "transformer" in jobs
        is_late = has_loras and not self._settings.overlap_lora
        # Where ranks exchange, merging waits its turn among the exchanges; on a GPU it takes next to no time.
        merges_aside = policy.crew.size == 1 and self._mesh.device.type == "cpu"
        enter = partial(_enter_thread, self._mesh.device)
        loader = ThreadPoolExecutor(1, thread_name_prefix="ltx_sp-load", initializer=enter)
        merger = ThreadPoolExecutor(1, thread_name_prefix="ltx_sp-merge") if merges_aside else loader
        with self._observer.progress(total, "load weights", "B") as advance:

            def on_bytes(count: int) -> None:
                if loading.failure is not None:
                    raise loading.failure
                advance(count)

            def run(work: Callable[[], None]) -> None:
                try:
                    # Every job begins so, or a rank that failed between two of them would be waited for.
                    with together(policy.crew):
                        on_bytes(0)
                    work()
                except Exception as error:
                    loading.failure = loading.failure or error
                    raise

            def merge() -> None:
                if merges_aside:
                    loading.wait("transformer")
                self._merge_loras(policy, "transformer" in own, on_bytes)

            can_end = True
            try:
                for component in jobs:
                    work = partial(self._load, component, policy, component in own, on_bytes)
                    loading.done[component] = loader.submit(run, work)
                    if component == "transformer" and has_loras and not is_late:
                        loading.done["lora"] = merger.submit(run, merge)
                yield loading
                if is_late:
                    loading.done["lora"] = loader.submit(run, merge)
                loading.finish()
            except Exception as error:
                loading.failure = loading.failure or error
                if is_late and "lora" not in loading.done:
                    loader.submit(run, merge)  # to which ranks that have not failed come too
                raise
            except BaseException:
                loading.failure = loading.failure or RuntimeError("The run was stopped.")
                can_end = False  # it may be in an exchange that others have left
                raise
            finally:
                for executor in (loader, merger):
                    executor.shutdown(wait=can_end)

    def _gather(self, text: str) -> list[str]:
        return self._mesh.host.gather_text(text, label="weights")

    def _choose_policy(self) -> Policy:
        sample = ByteStream(list(self._checkpoint.index("transformer").entries.values()))
        largest = max(self._checkpoint.index(component).num_bytes for component in COMPONENTS)
        policy = choose_policy(
            self._settings.load_mode, self._mesh.device, self._mesh.host, sample, preload_bytes=largest
        )
        if self._mesh.is_main:
            log.info("weights: %s (%s)", policy.mode, policy.reason)
        return policy

    def _load(self, component: str, policy: Policy, is_taker: bool, on_bytes: Callable[[int], None]) -> None:
        with together(policy.crew):
            module = _BUILDERS[component](self._checkpoint)
        plan = self._lora_plan if component == "transformer" else None
        report = load(
            module,
            self._checkpoint.index(component),
            self._checkpoint.keymap(component),
            device=self._mesh.device,
            # The vocoder was trained to run in float32, and distorts in less.
            dtype=torch.float32 if component == "vocoder" else self._dtype,
            component=component,
            policy=policy,
            is_taker=is_taker,
            written=plan.targets if plan else (),
            on_bytes=on_bytes if is_taker else lambda count: on_bytes(0),
        )
        if is_taker:
            if self._settings.verify_weights:
                require_finite(module, component)
            self._modules[component] = module.eval()
            if component == "transformer":
                self._digest = ""
            self._observer.record(
                f"load {component}",
                report.seconds,
                mode=report.mode,
                bytes=report.num_bytes,
                read_bytes=report.read_bytes,
                gib_per_s=round(report.num_bytes / 2**30 / max(report.seconds, 1e-9), 3),
                cached=None if report.cached is None else round(report.cached, 2),
            )

    def _merge_loras(self, policy: Policy, is_taker: bool, on_bytes: Callable[[int], None]) -> None:
        plan, began = self._lora_plan, time.perf_counter()
        assert plan is not None
        if not is_taker and policy.exchange.size == 1:
            return
        merger = LoraMerger(plan, dict(self["transformer"].named_parameters())) if is_taker else None
        read_tensors(
            plan.entries,
            device=self._mesh.device,
            policy=policy,
            done=merger.take if merger else None,
            on_bytes=on_bytes if is_taker else lambda count: on_bytes(0),
        )
        if merger is not None:
            merger.finish()
            seconds = time.perf_counter() - began
            self._observer.record("merge lora", seconds, bytes=plan.num_bytes, weights=len(plan.targets))


def free_bytes(device: torch.device) -> int:
    """Memory that a device has left, what torch keeps for later included."""
    if device.type == "cpu":
        return available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _enter_thread(device: torch.device) -> None:
    """Make the device this thread's own; a new thread begins on the first, whatever the others use."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _read_scalars(entries: Sequence[TensorEntry]) -> dict[TensorEntry, float]:
    values: dict[TensorEntry, float] = {}

    def keep(entry: TensorEntry, tensor: Tensor) -> None:
        values[entry] = float(tensor.reshape(-1)[0])

    read_tensors(entries, device=torch.device("cpu"), done=keep)
    return values
