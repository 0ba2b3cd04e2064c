"""The life of a request: plan, load, encode, denoise, decode. Read this page first.

Every rank runs the same lines. Rank 0 alone encodes the prompts and decodes the clip; the transformer runs on all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ltx_sp.components import DECODERS, ENCODERS, Components
from ltx_sp.cost import Machine, machine_of, read_machine
from ltx_sp.decode import decode
from ltx_sp.denoise import denoise, make_sampler, make_walk
from ltx_sp.errors import LtxSpError, RequestError, UnsupportedError
from ltx_sp.graph import SideStream, StepGraphs
from ltx_sp.handoff import Clip, Conditioning, Latents, Result
from ltx_sp.model import upstream
from ltx_sp.model.attention import Backend, choose_backend, in_turn
from ltx_sp.model.dit import Transformer
from ltx_sp.model.streams import Streams
from ltx_sp.observe import Observer, log
from ltx_sp.parallel.mesh import Mesh, ProcessGroup, calibration_path, device_name, join, resolve_device
from ltx_sp.plan import Plan, make_plan
from ltx_sp.prepare import Media, Preparation, read_media
from ltx_sp.request import Request, Settings
from ltx_sp.spec import ModelSpec
from ltx_sp.start import start_streams
from ltx_sp.upsample import upsample
from ltx_sp.weights.checkpoint import open_checkpoint
from ltx_sp.weights.merge import use_full_precision
from ltx_sp.window import StepWindow

# Steps that take less than capturing them would gain.
_SHORT_STAGE = 5


class Runtime:
    """A model on this rank, ready for requests. Made by ``Runtime.load``; a context manager.

    One request at a time, the same ones in the same order on every rank. A clip is to be iterated before the next.
    """

    def __init__(
        self,
        settings: Settings,
        spec: ModelSpec,
        components: Components,
        tokenizer: Any,
        mesh: Mesh,
        backend: Backend,
        observer: Observer,
        machine: Machine,
    ):
        self.settings, self.mesh, self.spec = settings, mesh, spec
        self._backend, self._observer, self._machine = backend, observer, machine
        self._components = components
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._preparation = Preparation(
            components,
            tokenizer,
            spec,
            mesh,
            observer,
            dtype=self._dtype,
            verifies_weights=settings.verify_weights,
        )
        wants_graphs = mesh.device.type == "cuda" and settings.cuda_graph != "off"
        self._graphs: StepGraphs | None = None
        if wants_graphs:
            is_required = settings.cuda_graph == "on"
            # A compiled block is one piece: what it runs beside what is the compiler's.
            beside = in_turn if settings.compile else SideStream(mesh.device)
            self._graphs = StepGraphs(mesh.device, self._first_reason, is_required=is_required, beside=beside)
            components.before_moving = self._graphs.clear

    @classmethod
    def load(
        cls, settings: Settings, group: ProcessGroup | None = None, *, observer: Observer | None = None
    ) -> Runtime:
        """Open the checkpoint and prove from its headers that every component is whole and every LoRA fits.

        Collective. Blocks the host. The weights come in the first request, while its prompts are encoded; with
        ``keep_text_encoder`` they come now.

        Args:
            group: the ranks to run on; None for the default group, or for this process alone where none was started.

        Raises:
            LtxSpError: on every rank, where the files or the device of any are to blame.
        """
        device = resolve_device(settings.device)
        if device.type == "cuda":
            use_full_precision()
        elif settings.cuda_graph == "on":
            raise UnsupportedError(f"cuda_graph is on and the device is {device}; graphs need CUDA. Leave it out.")
        mesh = join(group, device)
        observer = observer or Observer(mesh.world.rank, device)
        with mesh.together():
            checkpoint = open_checkpoint(settings.checkpoint_path, settings.gemma_root, settings.spatial_upsampler_path)
            components = Components(checkpoint, settings, mesh, observer)
            lora_reports = components.check()
            tokenizer = upstream.load_tokenizer(checkpoint.tokenizer_root)
            backend, reason = choose_backend(settings.attention, device, getattr(torch, settings.dtype))
            machine = _machine(settings, device) if mesh.is_main else None
        mesh.agree(_fingerprint(components, settings, backend), "checkpoint, settings or versions")
        # Rank 0's counts, as machines and measurements may differ.
        numbers = json.dumps(dataclasses.astuple(machine) if machine else ())
        machine = Machine(*json.loads(mesh.world.gather_text(numbers, label="machine")[0]))
        if mesh.is_main:
            log.info(
                "LTX-2 version %s, %d layers", checkpoint.spec.version_name, checkpoint.spec.transformer.num_layers
            )
            log.info("attention: %s (%s)", backend.name, reason)
            for report in lora_reports:
                log.info("%s", report.describe())
        runtime = cls(settings, checkpoint.spec, components, tokenizer, mesh, backend, observer, machine)
        if settings.keep_text_encoder:
            runtime._preparation.bring(*ENCODERS)
        return runtime

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights. The process group stays: whoever started it stops it."""
        if self._graphs is not None:
            self._graphs.clear()
        self._components.close()
        self._preparation.forget()

    def plan(self, request: Request) -> Plan:
        """Decide the request without running it."""
        return make_plan(request, self.spec, self.settings, self.mesh.world.size, self._machine)

    def generate(
        self,
        request: Request,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        window: StepWindow | None = None,
    ) -> Result:
        """Make one clip. Collective. Blocks the host.

        Args:
            on_progress: called after each denoising step, on every rank, with (steps done, steps in all).
            window: opened for a profiler around some of the steps.

        Raises:
            PlanError: on every rank, before the first collective.
            RequestError: on every rank, before anything is loaded: a file that the request names is to blame.
            WeightsError: on every rank: one of its LoRAs is.
        """
        observer, mesh, components = self._observer, self.mesh, self._components
        plan, media, conditioning = self._make_ready(request)
        stages = self._denoise(plan, conditioning, on_progress, window)
        latents = Latents(stages[-1].video, stages[plan.kept_audio].audio)
        # Before decoders ask for room: what gives way on rank 0 comes back as set 0.
        with observer.phase("switch weights"), mesh.together():
            components.rest(spare=plan.decoding_bytes if mesh.is_main else 0)
        self._preparation.bring(*DECODERS, spare=plan.decoding_bytes)
        with mesh.together():
            clip = self._decode(plan, latents, media) if mesh.is_main else None
        with observer.phase("switch weights"):
            self._forget_loras()
        return Result(plan, latents, stages, clip)

    def _forget_loras(self) -> None:
        """Take a request's LoRAs out again; a failure is not the clip's, and the next request mends it. Collective."""
        try:
            self._components.use_loras(())
        except LtxSpError as error:
            if self.mesh.is_main:
                log.warning("The transformer loads again with the next request: %s", error)

    def prepare(self, request: Request) -> None:
        """Load the weights that a request needs, and encode its prompts, before it comes. Collective. Blocks the host.

        Raises:
            PlanError, RequestError, WeightsError: as ``generate``.
        """
        self._make_ready(request)

    def _make_ready(self, request: Request) -> tuple[Plan, Media, Conditioning]:
        observer, mesh, components = self._observer, self.mesh, self._components
        observer.begin()
        with observer.phase("validate input"):
            plan = self.plan(request)
            mesh.agree(plan.digest(), "plan")
            with mesh.together():
                media = read_media(plan) if mesh.is_main else Media()
        with observer.phase("prepare"):
            with mesh.together():
                components.put_away(*(name for name in components.names if name not in (*ENCODERS, "transformer")))
            components.reserve(plan.working_bytes)
            components.use_loras(request.loras)
            return plan, media, self._preparation.condition(plan, media)

    def _denoise(
        self,
        plan: Plan,
        conditioning: Conditioning,
        on_progress: Callable[[int, int], None] | None,
        window: StepWindow | None,
    ) -> tuple[Latents, ...]:
        """Walk through the stages, each with its weights; give what each came to. Collective."""
        observer, mesh, components = self._observer, self.mesh, self._components
        generator = torch.Generator().manual_seed(plan.request.seed)
        done = 0
        results: list[Latents] = []
        for number, stage in enumerate(plan.stages):
            initial = self._upsample(plan, results[-1]) if results else None
            set_ = min(number, components.num_sets - 1)
            with observer.phase("switch weights"):
                self._preparation.bring_transformer()  # it may have given way
                with mesh.together():
                    components.enter(set_)
                transformer = components["transformer"]
                assert isinstance(transformer, Transformer)
                epoch = self._epoch() if self._graphs is not None else 0
            with observer.phase("prepare latents"):
                start = start_streams(
                    plan,
                    number,
                    self.spec,
                    conditioning,
                    generator,
                    dtype=self._dtype,
                    device=mesh.device,
                    initial=initial,
                )
            with observer.phase("prepare sigmas"):
                whole = Streams(start[0].x_1TC, start[1].x_1TC)
                sampler, noises = make_sampler(stage.sampler, plan.request.seed, whole)
                walk = make_walk(sampler, stage.sigmas, noises, mesh.device)
            if window is not None:
                window.at(done)
            # Where weights move at every switch, a short stage is over before its graph pays.
            graphs = self._graphs if not components.moves_weights or len(walk.kinds) > _SHORT_STAGE else None
            began = done
            with observer.phase(stage.name), observer.progress(stage.num_steps, stage.name, "step") as advance:

                def on_step(
                    count: int, advance: Callable[[int], None] = advance, number: int = number, began: int = began
                ) -> None:
                    nonlocal done
                    done += count
                    advance(count)
                    if window is not None:
                        window.at(done)
                    if number + 1 < components.num_sets and done - began > count:
                        # Now that the working set has its memory, and a graph is captured, which waits for copies.
                        components.prefetch(number + 1)
                    if on_progress is not None:
                        on_progress(done, plan.num_steps)

                results.append(
                    denoise(
                        plan,
                        number,
                        transformer,
                        self._backend,
                        mesh,
                        conditioning,
                        walk,
                        *start,
                        graphs=graphs,
                        weights=(set_, epoch),
                        on_step=on_step,
                    )
                )
        return tuple(results)

    def _epoch(self) -> int:
        """A number that grows, on all ranks alike, whenever weights move on any. Collective. Blocks the host."""
        return sum(map(int, self.mesh.world.gather_text(str(self._components.epoch), label="weights")))

    def _first_reason(self, reason: str) -> str:
        """What any rank says, the first of them. Collective. Blocks the host."""
        return next(filter(None, self.mesh.world.gather_text(reason, label="capture")), "")

    def _upsample(self, plan: Plan, latents: Latents) -> Latents:
        """Double the picture's sides on rank 0, for every rank. Collective."""
        mesh = self.mesh
        self._preparation.bring("upsampler", "video_vae", spare=plan.decoding_bytes)
        with self._observer.phase("upsample"):
            batch, channels, frames, height, width = latents.video.shape
            with mesh.together():
                if mesh.is_main:
                    video = upsample(
                        latents.video,
                        upsampler=self._components["upsampler"],
                        video_vae=self._components["video_vae"],
                    )
                    self._components.put_away("upsampler", "video_vae")
                else:
                    video = latents.video.new_empty((batch, channels, frames, 2 * height, 2 * width))
            return Latents(mesh.world.broadcast(video.contiguous(), label="upsampled latents"), latents.audio)

    def _decode(self, plan: Plan, latents: Latents, media: Media) -> Clip:
        with self._observer.phase("decode"):
            return decode(
                latents,
                video_vae=self._components["video_vae"],
                audio_vae=self._components["audio_vae"],
                vocoder=self._components["vocoder"],
                frame_rate=plan.request.frame_rate,
                given=media.given(),
            )


def _machine(settings: Settings, device: torch.device) -> Machine:
    """How fast this rank's device is: as asked for, as measured once here, or as its data sheet has it."""
    name = device_name(device)
    machine = machine_of(name)
    if device.type == "cuda":
        machine = dataclasses.replace(machine, memory_bytes=torch.cuda.get_device_properties(device).total_memory)
    if settings.calibration is not None:
        return read_machine(settings.calibration, machine)
    kept = calibration_path(name)
    if os.path.exists(kept):  # Path's own fails where the folder may not be looked into
        try:
            machine = read_machine(kept, machine)
            log.info("layouts go by the rates in %s", kept)
        except RequestError as error:
            log.warning("%s Layouts go by the data sheet.", error)
    return machine


# They differ from host to host.
_PLACES = (
    "checkpoint_path", "gemma_root", "loras", "device", "spatial_upsampler_path", "distilled_lora", "calibration"
)  # fmt: skip


def _fingerprint(components: Components, settings: Settings, backend: Backend) -> str:
    """What must be equal on every rank, as a short text: tensors' names and shapes, settings, kernels, versions."""
    whole = hashlib.sha256(f"{backend.name} {torch.__version__} {components.fingerprint()}\n".encode())
    for field in dataclasses.fields(settings):
        if field.name not in _PLACES:
            whole.update(f"{field.name} {getattr(settings, field.name)}\n".encode())
    return whole.hexdigest()[:32]
