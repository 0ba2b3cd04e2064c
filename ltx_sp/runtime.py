"""The life of a request: plan, load, encode, denoise, decode. Read this page first.

Every rank runs the same lines. Rank 0 alone encodes the prompts and decodes the clip; the transformer runs on all.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

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
from ltx_sp.weights.checkpoint import Checkpoint, open_checkpoint
from ltx_sp.weights.load import check, load


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


_BUILDERS: dict[str, Callable[[Checkpoint], nn.Module]] = {
    "text_encoder": lambda checkpoint: upstream.build_text_encoder(checkpoint.gemma_config),
    "connectors": lambda checkpoint: upstream.build_connectors(checkpoint.spec, checkpoint.gemma_config),
    "transformer": lambda checkpoint: _build_transformer(checkpoint.spec),
    "video_vae": lambda checkpoint: upstream.build_video_vae(checkpoint.spec),
    "audio_vae": lambda checkpoint: upstream.build_audio_vae(checkpoint.spec),
    "vocoder": lambda checkpoint: upstream.build_vocoder(checkpoint.spec),
}


def _build_transformer(spec: ModelSpec) -> nn.Module:
    with torch.device("meta"):
        return Transformer(spec.transformer)


class Runtime:
    """A model on this rank, ready for requests. Made by ``Runtime.load``; a context manager.

    One request at a time, the same ones in the same order on every rank.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        tokenizer: Any,
        mesh: Mesh,
        backend: Backend,
        observer: Observer,
    ):
        self.settings, self.mesh, self.spec = settings, mesh, checkpoint.spec
        self._checkpoint, self._tokenizer, self._backend, self._observer = checkpoint, tokenizer, backend, observer
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._modules: dict[str, nn.Module] = {}
        self._texts: dict[str, TextContext] = {}

    @classmethod
    def load(
        cls, settings: Settings, group: ProcessGroup | None = None, *, observer: Observer | None = None
    ) -> Runtime:
        """Open the checkpoint, prove from its headers that every component is whole, and load it.

        Collective. Blocks the host. Without ``keep_text_encoder`` the transformer loads in the first request, after
        the prompts are encoded, because the two need not fit into one device together.

        Args:
            group: the ranks to run on; None for the default group, or for this process alone where none was started.

        Raises:
            LtxSpError: on every rank, where the files or the device of any are to blame.
        """
        device = resolve_device(settings.device)
        mesh = join(group, device)
        with mesh.together():
            checkpoint = open_checkpoint(settings.checkpoint_path, settings.gemma_root)
            for component, build in _BUILDERS.items():
                check(build(checkpoint), checkpoint.index(component), checkpoint.keymap(component), component=component)
            tokenizer = upstream.load_tokenizer(checkpoint.tokenizer_root)
            backend, reason = choose_backend(settings.attention, device, getattr(torch, settings.dtype))
        mesh.agree(_fingerprint(checkpoint, settings, backend), "checkpoint, settings or versions")
        if mesh.is_main:
            log.info(
                "LTX-2 version %s, %d layers", checkpoint.spec.version_name, checkpoint.spec.transformer.num_layers
            )
            log.info("attention: %s (%s)", backend.name, reason)
        runtime = cls(settings, checkpoint, tokenizer, mesh, backend, observer or Observer(mesh.world.rank, device))
        if settings.keep_text_encoder:
            with mesh.together():
                if mesh.is_main:
                    runtime._module("text_encoder")
                    runtime._module("connectors")
                runtime._module("transformer")
        return runtime

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights. The process group stays: whoever started it stops it."""
        self._free(*self._modules)
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
        conditioning = self._encode(plan)
        with mesh.together():
            transformer = self._module("transformer")
        assert isinstance(transformer, Transformer)
        with observer.phase("denoise"), observer.progress(plan.num_steps, "denoise", "step") as advance:

            def on_step(done: int, total: int) -> None:
                advance(1)
                if on_progress is not None:
                    on_progress(done, total)

            latents = denoise(
                plan, self.spec, transformer, self._backend, mesh, conditioning, dtype=self._dtype, on_step=on_step
            )
        with mesh.together():
            return Result(plan, latents, self._decode(plan, latents) if mesh.is_main else None)

    def _encode(self, plan: Plan) -> Conditioning:
        """Encode what is new on rank 0 and give it to every rank. Collective."""
        prompts = [plan.request.prompt]
        if UNCONDITIONAL in plan.passes:
            prompts.append(plan.request.negative_prompt)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            known = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
            self._texts = known | dict(zip(new, self._encode_new(new), strict=True))
        texts = [self._texts[prompt] for prompt in prompts]
        return Conditioning(positive=texts[0], negative=texts[1] if len(texts) > 1 else None)

    def _encode_new(self, prompts: Sequence[str]) -> list[TextContext]:
        observer, mesh = self._observer, self.mesh
        with mesh.together():
            contexts = self._encode_here(prompts) if mesh.is_main else self._empty_contexts(len(prompts))
        with observer.phase("share prompts"):
            return [
                TextContext(
                    mesh.world.broadcast(context.video.contiguous(), label="text context"),
                    mesh.world.broadcast(context.audio.contiguous(), label="text context"),
                )
                for context in contexts
            ]

    def _encode_here(self, prompts: Sequence[str]) -> list[TextContext]:
        self._make_room("text_encoder", "connectors")
        text_encoder, connectors = self._module("text_encoder"), self._module("connectors")
        with self._observer.phase("encode prompts"):
            contexts = encode_prompts(
                prompts,
                tokenizer=self._tokenizer,
                text_encoder=text_encoder,
                connectors=connectors,
                device=self.mesh.device,
            )
        del text_encoder, connectors
        if not self.settings.keep_text_encoder:
            self._free("text_encoder", "connectors")
        return contexts

    def _empty_contexts(self, count: int) -> list[TextContext]:
        """Where rank 0's contexts are received."""
        spec = self.spec.transformer

        def empty(stream: StreamSpec) -> Tensor:
            width = spec.caption_channels or stream.context_dim
            return torch.empty((1, TEXT_TOKENS, width), dtype=self._dtype, device=self.mesh.device)

        return [TextContext(empty(spec.video), empty(spec.audio)) for _ in range(count)]

    def _decode(self, plan: Plan, latents: Latents) -> Clip:
        video_vae, audio_vae, vocoder = map(self._module, ("video_vae", "audio_vae", "vocoder"))
        with self._observer.phase("decode sound"):
            return decode(
                latents,
                video_vae=video_vae,
                audio_vae=audio_vae,
                vocoder=vocoder,
                frame_rate=plan.request.frame_rate,
            )

    def _module(self, component: str) -> nn.Module:
        """Load a component on this rank, once."""
        if component not in self._modules:
            observer = self._observer
            module = _BUILDERS[component](self._checkpoint)
            index = self._checkpoint.index(component)
            with (
                observer.phase(f"load {component}"),
                observer.progress(index.num_bytes, f"load {component}", "B") as advance,
            ):
                load(
                    module,
                    index,
                    self._checkpoint.keymap(component),
                    device=self.mesh.device,
                    # The vocoder was trained to run in float32, and distorts in less.
                    dtype=torch.float32 if component == "vocoder" else self._dtype,
                    component=component,
                    on_bytes=advance,
                )
            self._modules[component] = module.eval()
        return self._modules[component]

    def _make_room(self, *components: str) -> None:
        """Free what other components hold, decoders first, until these fit; they load again when they are needed."""
        missing = [self._checkpoint.index(name).num_bytes for name in components if name not in self._modules]
        needed = 1.1 * sum(missing) * (2 if self._dtype == torch.float32 else 1)
        for victim in ("video_vae", "audio_vae", "vocoder", "transformer"):
            available = free_bytes(self.mesh.device)
            if available is None or available >= needed:
                return
            if victim in self._modules:
                log.info("%s gives way to %s: %.1f GB free", victim, " and ".join(components), available / 1e9)
                self._free(victim)

    def _free(self, *components: str) -> None:
        for component in components:
            self._modules.pop(component, None)
        gc.collect()
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Memory that a CUDA device has left; None elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _fingerprint(checkpoint: Checkpoint, settings: Settings, backend: Backend) -> str:
    """What must be equal on every rank, as a short text: tensors' names and shapes, settings, kernels, versions."""
    digest = hashlib.sha256(f"{backend.name} {torch.__version__}\n".encode())
    for component in _BUILDERS:
        for name, entry in checkpoint.index(component).entries.items():
            digest.update(f"{component} {name} {entry.dtype} {entry.shape}\n".encode())
    for field in dataclasses.fields(settings):
        if field.name not in ("checkpoint_path", "gemma_root", "device"):  # these may differ from host to host
            digest.update(f"{field.name} {getattr(settings, field.name)}\n".encode())
    return digest.hexdigest()[:32]
