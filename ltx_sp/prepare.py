"""What a request is steered by: files read on rank 0, encoded there, and given to every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ltx_sp.components import DECODERS, ENCODERS, Components
from ltx_sp.encode import encode_audio, encode_prompts, encode_video
from ltx_sp.handoff import Conditioning, Given, TextContext
from ltx_sp.observe import Observer
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.plan import Plan
from ltx_sp.read import read_audio, read_image, read_video
from ltx_sp.recipes import UNCONDITIONAL
from ltx_sp.spec import AUDIO_LATENT_CHANNELS, AUDIO_MEL_BINS, LATENT_CHANNELS, TEXT_TOKENS, ModelSpec, StreamSpec


@dataclasses.dataclass(frozen=True)
class Media:
    """The files of a request, read, on the host.

    Args:
        images: of each stage, the request's pictures at its size, ``[1, 3, 1, height, width]`` each.
        waveform: ``[2, samples]``, float32; None where sound is made.
        sample_rate: of the waveform, Hz.
        video: ``[1, 3, F, height, width]``, float32 in -1..1; None where frames are made.
    """

    images: tuple[tuple[Tensor, ...], ...] = ()
    waveform: Tensor | None = None
    sample_rate: int = 0
    video: Tensor | None = None

    def given(self) -> Given:
        """What of it the clip gets as it is."""
        frames = None
        if self.video is not None:
            frames = rearrange((self.video[0] + 1) / 2, "c f y x -> f y x c").contiguous()
        return Given(self.waveform, self.sample_rate, frames)


def read_media(plan: Plan) -> Media:
    """Read the files that a request names. Blocks the host. Rank 0 only.

    Raises:
        RequestError: one of them cannot be read, or does not hold what it must.
    """
    request = plan.request
    images = tuple(
        tuple(
            read_image(image.path, height=stage.height, width=stage.width, crf=plan.image_crf)
            for image in request.images
        )
        for stage in plan.stages
    )
    waveform, sample_rate, video = None, 0, None
    if request.audio_path is not None:
        waveform, sample_rate = read_audio(request.audio_path, seconds=request.num_frames / request.frame_rate)
    if request.video_path is not None:
        video = read_video(
            request.video_path,
            height=plan.height,
            width=plan.width,
            num_frames=request.num_frames,
            frame_rate=request.frame_rate,
        )
    return Media(images, waveform, sample_rate, video)


@dataclasses.dataclass(frozen=True)
class MediaLatents:
    """The files of a request as latents; see ``Conditioning``."""

    images: tuple[tuple[Tensor, ...], ...] = ()
    audio: Tensor | None = None
    video: Tensor | None = None


def encode_media(media: Media, plan: Plan, module: Callable[[str], nn.Module]) -> MediaLatents:
    """Encode what was read. Rank 0 only.

    Args:
        module: gives the loaded component of a name.
    """
    audio = video = None
    if media.waveform is not None:
        audio = encode_audio(
            media.waveform,
            media.sample_rate,
            audio_vae=module("audio_vae"),
            num_latents=plan.stages[0].shape.audio_frames,
        )
    if media.video is not None:
        video = encode_video(media.video, video_vae=module("video_vae"))
    images = tuple(
        tuple(encode_video(picture, video_vae=module("video_vae")) for picture in pictures) for pictures in media.images
    )
    return MediaLatents(images, audio, video)


def empty_media_latents(plan: Plan, dtype: torch.dtype, device: torch.device) -> MediaLatents:
    """Where the latents of rank 0 are received."""

    def video(frames: int, height: int, width: int) -> Tensor:
        return torch.empty((1, LATENT_CHANNELS, frames, height, width), dtype=dtype, device=device)

    shape, request = plan.stages[0].shape, plan.request
    audio_shape = (1, AUDIO_LATENT_CHANNELS, shape.audio_frames, AUDIO_MEL_BINS)
    return MediaLatents(
        images=tuple(
            tuple(video(1, stage.shape.height, stage.shape.width) for _ in request.images) for stage in plan.stages
        ),
        audio=None if request.audio_path is None else torch.empty(audio_shape, dtype=dtype, device=device),
        video=None if request.video_path is None else video(shape.frames, shape.height, shape.width),
    )


def empty_context(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> TextContext:
    """Where one of rank 0's contexts is received."""

    def empty(stream: StreamSpec) -> Tensor:
        width = spec.transformer.caption_channels or stream.context_dim
        return torch.empty((1, TEXT_TOKENS, width), dtype=dtype, device=device)

    return TextContext(empty(spec.transformer.video), empty(spec.transformer.audio))


def share_text(context: TextContext, world: Axis) -> TextContext:
    """Give every rank what rank 0 has encoded. Collective."""
    return TextContext(
        world.broadcast(context.video.contiguous(), label="text context"),
        world.broadcast(context.audio.contiguous(), label="text context"),
    )


def share_media(latents: MediaLatents, world: Axis) -> MediaLatents:
    """Give every rank what rank 0 has encoded. Collective."""

    def share(latent: Tensor | None) -> Tensor | None:
        return latent if latent is None else world.broadcast(latent.contiguous(), label="media")

    images = tuple(
        tuple(world.broadcast(picture.contiguous(), label="media") for picture in pictures)
        for pictures in latents.images
    )
    return MediaLatents(images, share(latents.audio), share(latents.video))


def make_conditioning(texts: list[TextContext], media: MediaLatents) -> Conditioning:
    """Put together what the denoising is steered by."""
    return Conditioning(texts[0], texts[1] if len(texts) > 1 else None, media.images, media.audio, media.video)


class Preparation:
    """Makes a request ready: what it needs is loaded, what it is steered by is encoded and known to every rank.

    Args:
        verifies_weights: compare what the ranks hold.
    """

    def __init__(
        self,
        components: Components,
        tokenizer: Any,
        spec: ModelSpec,
        mesh: Mesh,
        observer: Observer,
        *,
        dtype: torch.dtype,
        verifies_weights: bool,
    ):
        self._components, self._tokenizer, self._spec = components, tokenizer, spec
        self._mesh, self._observer, self._dtype = mesh, observer, dtype
        self._verifies_weights = verifies_weights
        self._texts: dict[str, TextContext] = {}

    def forget(self) -> None:
        """Let go of encoded prompts."""
        self._texts.clear()

    def condition(self, plan: Plan, media: Media) -> Conditioning:
        """Load what is absent, encode what is new on rank 0 meanwhile, and give it to every rank. Collective."""
        prompts = [plan.request.prompt]
        if any(UNCONDITIONAL in stage.passes for stage in plan.stages):
            prompts.append(plan.request.negative_prompt)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        contexts, latents = self._load(plan, new, media)
        if new:
            known = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
            world = self._mesh.world
            shared = {prompt: share_text(context, world) for prompt, context in zip(new, contexts, strict=True)}
            self._texts = known | shared
        latents = share_media(latents, self._mesh.world)
        return make_conditioning([self._texts[prompt] for prompt in prompts], latents)

    def _load(self, plan: Plan, prompts: Sequence[str], media: Media) -> tuple[list[TextContext], MediaLatents]:
        """Load what a request needs and is absent, at once where it fits, and encode meanwhile. Collective.

        Returns: each prompt's context, and what was read: on rank 0 what it is, elsewhere where to receive it.
        """
        components, mesh, request = self._components, self._mesh, plan.request
        encoders = ENCODERS if prompts else ()
        vaes = ["video_vae"] if request.images or request.video_path is not None else []
        vaes += ["audio_vae"] if request.audio_path is not None else []
        later = [*DECODERS, *(["upsampler"] if len(plan.stages) > 1 else [])]
        everything = [*encoders, "transformer", *later]
        with mesh.together():
            fits = mesh.is_main and components.fit_together(everything, plan.working_bytes)
        if mesh.world.gather_text("yes" if fits else "", label="weights")[0]:
            groups = [everything]
        else:  # decoders come when they are needed
            groups = [group for group in (list(encoders), vaes, ["transformer"]) if group]
        contexts = [empty_context(self._spec, self._dtype, mesh.device) for _ in prompts]
        latents = empty_media_latents(plan, self._dtype, mesh.device)
        for group in groups:
            wanted = group if mesh.is_main else [name for name in group if name == "transformer"]
            with mesh.together():
                if len(groups) > 1:
                    spare = (
                        plan.working_bytes if "transformer" in group else plan.decoding_bytes if group == vaes else 0
                    )
                    components.make_room(*wanted, spare=spare)
            with mesh.together(), components.loading(wanted) as loading:
                if mesh.is_main and prompts and "text_encoder" in group:
                    loading.wait(*ENCODERS)
                    contexts = self._encode(prompts)
                if mesh.is_main and vaes and set(vaes) <= set(group):
                    loading.wait(*vaes)
                    with self._observer.phase("encode images"):
                        latents = encode_media(media, plan, components.__getitem__)
                    components.put_away(*vaes)
        if self._verifies_weights:
            with mesh.together():
                weights = components.digest()
            mesh.agree(weights, "set of weights")
        return contexts, latents

    def _encode(self, prompts: Sequence[str]) -> list[TextContext]:
        contexts = encode_prompts(
            prompts,
            tokenizer=self._tokenizer,
            text_encoder=self._components["text_encoder"],
            connectors=self._components["connectors"],
            device=self._mesh.device,
            phase=self._observer.phase,
        )
        self._components.put_away(*ENCODERS)
        return contexts

    def bring_transformer(self) -> None:
        """Have the transformer on every rank, whatever must give way to it. Collective."""
        with self._mesh.together():
            if "transformer" not in self._components:
                self._components.make_room("transformer")
        with self._mesh.together(), self._components.loading(["transformer"]):
            pass

    def bring(self, *names: str, spare: int = 0) -> None:
        """Have these on rank 0, and memory to work with, whatever must give way to them. Collective."""
        components, mesh = self._components, self._mesh
        with mesh.together():
            wanted = [name for name in names if mesh.is_main and name not in components]
            if wanted:
                components.make_room(*names, spare=spare)
        with mesh.together(), components.loading(wanted):
            pass
