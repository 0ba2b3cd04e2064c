"""The life of a request: plan, load, encode, denoise, decode. Read this page first.

Every rank runs the same lines. Rank 0 alone encodes the prompts and decodes the clip; the transformer runs on all.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ltx_sp.components import COMPONENTS, DECODERS, ENCODERS, Components
from ltx_sp.decode import decode
from ltx_sp.denoise import denoise
from ltx_sp.encode import encode_prompts
from ltx_sp.handoff import Clip, Conditioning, Latents, TextContext
from ltx_sp.model import upstream
from ltx_sp.model.attention import Backend, choose_backend
from ltx_sp.model.dit import Transformer
from ltx_sp.observe import Observer, log
from ltx_sp.parallel.mesh import Mesh, ProcessGroup, join, resolve_device
from ltx_sp.plan import UNCONDITIONAL, Plan, make_plan
from ltx_sp.request import Request, Settings
from ltx_sp.spec import TEXT_TOKENS, ModelSpec, StreamSpec
from ltx_sp.weights.checkpoint import open_checkpoint
from ltx_sp.weights.merge import use_full_precision


@dataclasses.dataclass(frozen=True)
class Result:
    """What one request came to.

    Args:
        latents: the same on every rank.
        clip: on rank 0, and None elsewhere; its frames are decoded while it is iterated.
    """

    plan: Plan
    latents: Latents
    clip: Clip | None


class Runtime:
    """A model on this rank, ready for requests. Made by ``Runtime.load``; a context manager.

    One request at a time, the same ones in the same order on every rank.
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
    ):
        self.settings, self.mesh, self.spec = settings, mesh, spec
        self._tokenizer, self._backend, self._observer = tokenizer, backend, observer
        self._components = components
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._texts: dict[str, TextContext] = {}
        self._is_whole = False  # whether the decoders are there too

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
        mesh = join(group, device)
        observer = observer or Observer(mesh.world.rank, device)
        with mesh.together():
            checkpoint = open_checkpoint(settings.checkpoint_path, settings.gemma_root)
            components = Components(checkpoint, settings, mesh, observer)
            lora_reports = components.check()
            tokenizer = upstream.load_tokenizer(checkpoint.tokenizer_root)
            backend, reason = choose_backend(settings.attention, device, getattr(torch, settings.dtype))
        mesh.agree(_fingerprint(components, settings, backend), "checkpoint, settings or versions")
        if mesh.is_main:
            log.info(
                "LTX-2 version %s, %d layers", checkpoint.spec.version_name, checkpoint.spec.transformer.num_layers
            )
            log.info("attention: %s (%s)", backend.name, reason)
            for report in lora_reports:
                log.info("%s", report.describe())
        runtime = cls(settings, checkpoint.spec, components, tokenizer, mesh, backend, observer)
        if settings.keep_text_encoder:
            runtime._load(ENCODERS)
        return runtime

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights. The process group stays: whoever started it stops it."""
        self._components.free(*COMPONENTS)
        self._texts.clear()

    def plan(self, request: Request) -> Plan:
        """Decide the request without running it."""
        return make_plan(request, self.spec, self.settings, self.mesh.world.size)

    def generate(self, request: Request, *, on_progress: Callable[[int, int], None] | None = None) -> Result:
        """Make one clip. Collective. Blocks the host.

        Args:
            on_progress: called after each denoising step, on every rank, with (steps done, steps in all).

        Raises:
            PlanError: on every rank, before the first collective.
        """
        observer, mesh = self._observer, self.mesh
        with observer.phase("plan"):
            plan = self.plan(request)
            mesh.agree(plan.digest(), "plan")
        conditioning = self._prepare(plan)
        transformer = self._components["transformer"]
        assert isinstance(transformer, Transformer)
        with observer.phase("denoise"), observer.progress(plan.num_steps, "denoise", "step") as advance:

            def on_step(done: int, total: int) -> None:
                advance(1)
                if on_progress is not None:
                    on_progress(done, total)

            latents = denoise(
                plan, self.spec, transformer, self._backend, mesh, conditioning, dtype=self._dtype, on_step=on_step
            )
        if not self._is_whole:
            with mesh.together(), self._components.loading(DECODERS if mesh.is_main else ()):
                pass
        with mesh.together():
            return Result(plan, latents, self._decode(plan, latents) if mesh.is_main else None)

    def _prepare(self, plan: Plan) -> Conditioning:
        """Load what is absent, encode what is new on rank 0 meanwhile, and give it to every rank. Collective."""
        prompts = [plan.request.prompt]
        if UNCONDITIONAL in plan.passes:
            prompts.append(plan.request.negative_prompt)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        contexts = self._load(ENCODERS if new else (), new)
        if new:
            with self._observer.phase("share prompts"):
                known = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
                self._texts = known | {
                    prompt: self._share(context) for prompt, context in zip(new, contexts, strict=True)
                }
        texts = [self._texts[prompt] for prompt in prompts]
        return Conditioning(positive=texts[0], negative=texts[1] if len(texts) > 1 else None)

    def _load(self, encoders: Sequence[str], prompts: Sequence[str] = ()) -> list[TextContext]:
        """Load what a request needs and is absent, at once where it fits, and encode the prompts. Collective.

        Returns: each prompt's context: on rank 0 what it is, elsewhere where to receive it.
        """
        components, mesh = self._components, self.mesh
        with mesh.together():
            fits = mesh.is_main and components.fit_together([*encoders, "transformer", *DECODERS])
            if mesh.is_main and not fits:
                components.make_room(*encoders)
        self._is_whole = bool(mesh.world.gather_text("yes" if fits else "", label="weights")[0])
        if self._is_whole:
            stages = [[*encoders, "transformer", *DECODERS]]
        else:  # decoders come when they are needed
            stages = [list(encoders), ["transformer"]] if encoders else [["transformer"]]
        contexts = [self._empty_context() for _ in prompts]
        for stage in stages:
            wanted = stage if mesh.is_main else [name for name in stage if name == "transformer"]
            with mesh.together(), components.loading(wanted) as loading:
                if mesh.is_main and prompts and "text_encoder" in stage:
                    loading.wait(*ENCODERS)
                    contexts = self._encode(prompts)
        if self.settings.verify_weights:
            mesh.agree(components.digest(), "set of weights")
        return contexts

    def _encode(self, prompts: Sequence[str]) -> list[TextContext]:
        with self._observer.phase("encode prompts"):
            contexts = encode_prompts(
                prompts,
                tokenizer=self._tokenizer,
                text_encoder=self._components["text_encoder"],
                connectors=self._components["connectors"],
                device=self.mesh.device,
            )
        if not self.settings.keep_text_encoder:
            self._components.free(*ENCODERS)
        return contexts

    def _share(self, context: TextContext) -> TextContext:
        world = self.mesh.world
        return TextContext(
            world.broadcast(context.video.contiguous(), label="text context"),
            world.broadcast(context.audio.contiguous(), label="text context"),
        )

    def _empty_context(self) -> TextContext:
        """Where one of rank 0's contexts is received."""
        spec = self.spec.transformer

        def empty(stream: StreamSpec) -> Tensor:
            width = spec.caption_channels or stream.context_dim
            return torch.empty((1, TEXT_TOKENS, width), dtype=self._dtype, device=self.mesh.device)

        return TextContext(empty(spec.video), empty(spec.audio))

    def _decode(self, plan: Plan, latents: Latents) -> Clip:
        with self._observer.phase("decode sound"):
            return decode(
                latents,
                video_vae=self._components["video_vae"],
                audio_vae=self._components["audio_vae"],
                vocoder=self._components["vocoder"],
                frame_rate=plan.request.frame_rate,
            )


def _fingerprint(components: Components, settings: Settings, backend: Backend) -> str:
    """What must be equal on every rank, as a short text: tensors' names and shapes, settings, kernels, versions."""
    whole = hashlib.sha256(f"{backend.name} {torch.__version__} {components.fingerprint()}\n".encode())
    for field in dataclasses.fields(settings):
        if field.name not in ("checkpoint_path", "gemma_root", "loras", "device"):  # they differ from host to host
            whole.update(f"{field.name} {getattr(settings, field.name)}\n".encode())
    return whole.hexdigest()[:32]
