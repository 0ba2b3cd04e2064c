"""Everything that can be decided without a GPU, decided once. No torch.

A Plan is equal on every rank, which its digest proves, and can be printed on a laptop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

from ltx_sp.cost import DEFAULT_MACHINE, Machine, Prediction, predict, seconds, shares
from ltx_sp.errors import PlanError
from ltx_sp.recipes import (
    REFINING_SIGMAS,
    Guidance,
    deal_passes,
    first_sigmas,
    guidance_passes,
    pipeline_defaults,
    resolve_guidance,
)
from ltx_sp.request import Request, Settings
from ltx_sp.spec import (
    SPATIAL_SCALE,
    TEMPORAL_SCALE,
    LatentShape,
    ModelSpec,
    decoder_reflects,
    latent_shape,
    nearest_valid,
)

_ELEMENT_SIZE = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One walk down the noise levels, at one size.

    Args:
        shape: the clip in latent space.
        appended: pixel frames of the pictures that are appended to the video tokens, each a latent frame's worth.
        sigmas: noise levels, from the first step's to 0.
        sampler: ``euler``, ``euler_ancestral`` or ``res_2s``.
        passes: of a guided step, in the order in which they run.
        forwards: of each rank of the guidance axis, in turn: the indices of the passes that share a forward.
        layout: (guidance axis, token axis): how many ranks each has.
        token_shares, head_shares: sizes per rank of the token axis.
    """

    name: str
    shape: LatentShape
    appended: tuple[int, ...]
    sigmas: tuple[float, ...]
    sampler: str
    video_guidance: Guidance
    audio_guidance: Guidance
    passes: tuple[str, ...]
    forwards: tuple[tuple[tuple[int, ...], ...], ...]
    layout: tuple[int, int]
    token_shares: tuple[int, ...]
    head_shares: tuple[int, ...]
    prediction: Prediction

    @property
    def num_steps(self) -> int:
        """Predictions of the clean latents: one per step, with ``res_2s`` two, and one more at the end."""
        steps = len(self.sigmas) - 1
        return 2 * steps + 1 if self.sampler == "res_2s" else steps

    @property
    def height(self) -> int:
        """Of the clip at this stage, in pixels."""
        return self.shape.height * SPATIAL_SCALE

    @property
    def width(self) -> int:
        """Of the clip at this stage, in pixels."""
        return self.shape.width * SPATIAL_SCALE

    def describe(self) -> dict[str, str]:
        """The stage for people, a line each."""
        shape, cost = self.shape, self.prediction
        count = len(self.appended)
        appended = f" + {count} picture{'s' if count > 1 else ''}" if count else ""
        return {
            "latent": f"{shape.frames}x{shape.height}x{shape.width}{appended} = {sum(self.token_shares)} video tokens, "
            f"{shape.audio_frames} audio tokens",
            "ranks": f"{math.prod(self.layout)} = {self.layout[0]} guidance x {self.layout[1]} token; each has "
            f"{_spread(self.token_shares)} video tokens, {_spread(self.head_shares)} heads",
            "steps": f"{len(self.sigmas) - 1} of {self.sampler}: sigma {_sigmas(self.sigmas)}",
            "passes": f"{', '.join(self.passes)}: {len(self.forwards[0])} forwards per prediction and rank, "
            f"{self.num_steps * len(self.forwards[0])} in all",
            "video": _guidance(self.video_guidance),
            "audio": _guidance(self.audio_guidance),
            "predicted": f"per forward and rank {cost.flops / 1e12:.3g} TFLOP, {cost.collectives} collectives, "
            f"{_size(cost.received_bytes)} received",
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """One generation, decided.

    Args:
        height, width: of the clip, in pixels.
        stages: one, or one at half size and one at full size.
        lora_strengths: of the distilled LoRA in each stage.
        kept_audio: the stage whose sound is kept.
        image_crf: how strongly pictures are compressed first.
    """

    request: Request
    version: tuple[int, ...]
    pipeline: str
    height: int
    width: int
    stages: tuple[Stage, ...]
    lora_strengths: tuple[float, ...]
    kept_audio: int
    image_crf: int
    dtype: str
    video_to_audio: str

    @property
    def num_steps(self) -> int:
        """Of all stages; see ``Stage.num_steps``."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def decoding_bytes(self) -> int:
        """What encoding and decoding pictures take besides weights, estimated: a tile in the VAE, and its frames."""
        frames, side = min(self.request.num_frames, 80), 768
        cells = frames * min(self.height, side) * min(self.width, side) // 16
        return 4 * 128 * _ELEMENT_SIZE[self.dtype] * cells + 2 * 3 * 4 * frames * self.height * self.width

    @property
    def working_bytes(self) -> int:
        """The largest working set of any stage, estimated."""
        return max(stage.prediction.activation_bytes for stage in self.stages)

    def digest(self) -> str:
        """A short fingerprint: equal exactly for equal plans, wherever their files lie."""
        request = self.request
        nowhere = Path()
        placeless = dataclasses.replace(
            request,
            images=tuple(dataclasses.replace(image, path=nowhere) for image in request.images),
            loras=tuple(dataclasses.replace(lora, path=nowhere) for lora in request.loras),
            audio_path=request.audio_path and nowhere,
            video_path=request.video_path and nowhere,
        )
        return hashlib.sha256(repr(dataclasses.replace(self, request=placeless)).encode()).hexdigest()[:32]

    def describe(self) -> str:
        """The plan as a short text for people."""
        request = self.request
        weight_bytes = self.stages[0].prediction.weight_bytes
        version = ".".join(map(str, self.version)) or "2.0 (checkpoint without version)"
        seconds = request.num_frames / request.frame_rate
        clip = f"{self.width}x{self.height}, {request.num_frames} frames at {request.frame_rate:g}/s: {seconds:.2f} s"
        lines = [
            ("model", f"LTX-2 version {version}, {self.dtype}, {_size(weight_bytes)} of transformer weights"),
            ("clip", clip),
        ]
        if len(self.stages) > 1:
            strengths = " and ".join(f"{strength:g}" for strength in self.lora_strengths)
            lora = f", distilled LoRA {strengths}" if any(self.lora_strengths) else ""
            lines.append(("pipeline", f"{self.pipeline}{lora}; the sound is that of stage {self.kept_audio + 1}"))
        if request.images:
            at = ", ".join(f"{image.frame} ({image.strength:g})" for image in request.images)
            lines.append(("images", f"at frame {at}; H.264 at crf {self.image_crf} first"))
        for name, path in (("audio", request.audio_path), ("video", request.video_path)):
            if path is not None:
                lines.append(("given", f"{name}: {path}"))
        for number, stage in enumerate(self.stages, 1):
            if len(self.stages) > 1:
                lines.append((f"stage {number}", f"{stage.name}, {stage.width}x{stage.height}"))
            lines += stage.describe().items()
        lines.append(("exchange", f"video-to-audio by {self.video_to_audio}"))
        working = _size(self.working_bytes)
        weights = f"{_size(weight_bytes)} weights"
        if len(set(self.lora_strengths)) > 1:
            weights += ", up to as much again for the second stage (--residency),"
        lines.append(("memory", f"per rank, while denoising, {weights} and about {working} more"))
        return "\n".join(f"{name:10} {text}" for name, text in lines)


def make_plan(
    request: Request, spec: ModelSpec, settings: Settings, num_ranks: int = 1, machine: Machine = DEFAULT_MACHINE
) -> Plan:
    """Decide one generation.

    Args:
        machine: what the choice of layouts rests on.

    Raises:
        PlanError: the sizes do not fit the video VAE or the pipeline, an STG block is not in the model, an option
            would do nothing, or there are more ranks than heads.
    """
    defaults = pipeline_defaults(spec, settings.pipeline)
    num_stages = len(defaults.lora_strengths)
    height, width = request.height or defaults.height, request.width or defaults.width
    _check_sizes(request.num_frames, height, width, spec, settings.pipeline, num_stages)
    if request.video_path is not None and num_stages > 1:
        raise PlanError(
            f"A video is given and the pipeline {settings.pipeline} would make one; its second stage has nothing to "
            "do. Use --pipeline one-stage."
        )
    video, audio = resolve_guidance(request, defaults, spec.transformer.num_layers)
    half = 2 if num_stages > 1 else 1
    shape = latent_shape(request.num_frames, height // half, width // half, request.frame_rate, spec)
    if shape.audio_frames < 1:
        raise PlanError(
            f"{request.num_frames} frames at {request.frame_rate:g} per second last "
            f"{request.num_frames / request.frame_rate:.3f} s, less than one audio frame of 0.04 s. "
            "Ask for more frames."
        )
    is_hq = settings.pipeline == "two-stages-hq"
    is_ancestral = settings.pipeline == "distilled" and spec.version >= (2, 5)
    first = _Walk(
        "denoise",
        first_sigmas(request, settings.pipeline, defaults, shape),
        "res_2s" if is_hq else "euler_ancestral" if is_ancestral else "euler",
        video,
        audio,
    )
    _check_parallel(settings.parallel, num_ranks, is_guided=len(guidance_passes(video, audio)) > 1)
    stages = [_make_stage(first, shape, request, spec, settings, num_ranks, machine)]
    if num_stages > 1:
        refining = _Walk("refine", REFINING_SIGMAS, "res_2s" if is_hq else "euler", Guidance(), Guidance())
        full = dataclasses.replace(shape, height=2 * shape.height, width=2 * shape.width)
        stages.append(_make_stage(refining, full, request, spec, settings, num_ranks, machine))
    factor = settings.distilled_lora.strength if settings.distilled_lora else 1.0
    return Plan(
        request=request,
        version=spec.version,
        pipeline=settings.pipeline,
        height=height,
        width=width,
        stages=tuple(stages),
        lora_strengths=tuple(factor * strength for strength in defaults.lora_strengths),
        kept_audio=defaults.kept_audio,
        image_crf=defaults.image_crf if request.image_crf is None else request.image_crf,
        dtype=settings.dtype,
        video_to_audio=settings.video_to_audio,
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """How a stage denoises, whatever its size."""

    name: str
    sigmas: tuple[float, ...]
    sampler: str
    video_guidance: Guidance
    audio_guidance: Guidance


def _make_stage(
    walk: _Walk,
    shape: LatentShape,
    request: Request,
    spec: ModelSpec,
    settings: Settings,
    num_ranks: int,
    machine: Machine,
) -> Stage:
    appended = tuple(image.frame for image in request.images if image.frame)
    num_tokens = shape.video_tokens + len(appended) * shape.height * shape.width
    passes = guidance_passes(walk.video_guidance, walk.audio_guidance)

    def with_layout(num_hands: int) -> Stage:
        on_tokens = num_ranks // num_hands
        forwards = deal_passes(len(passes), num_hands, settings.max_batch_size)
        return Stage(
            **{field.name: getattr(walk, field.name) for field in dataclasses.fields(walk)},
            shape=shape,
            appended=appended,
            passes=passes,
            forwards=forwards,
            layout=(num_hands, on_tokens),
            token_shares=shares(num_tokens, on_tokens),
            head_shares=shares(spec.transformer.video.num_heads, on_tokens),
            prediction=predict(
                spec.transformer,
                num_tokens,
                shape.audio_frames,
                num_ranks=on_tokens,
                batch=max(map(len, forwards[0])),
                element_size=_ELEMENT_SIZE[settings.dtype],
                video_to_audio=settings.video_to_audio,
            ),
        )

    layouts = _layouts(settings.parallel, num_ranks, len(passes), spec.transformer.video.num_heads)
    return min(map(with_layout, layouts), key=lambda stage: len(stage.forwards[0]) * seconds(stage.prediction, machine))


def _check_parallel(parallel: str, num_ranks: int, *, is_guided: bool) -> None:
    if parallel == "auto":
        return
    guidance, tokens = map(int, parallel.split("x"))
    if guidance * tokens != num_ranks:
        raise PlanError(
            f"parallel is {parallel}, which is {guidance * tokens} ranks, and there are {num_ranks}. Choose two "
            "numbers whose product that is."
        )
    if guidance > 1 and not is_guided:
        raise PlanError(
            f"parallel is {parallel} and nothing is guided; a step has one pass. Leave it out, or use 1x{num_ranks}."
        )


def _layouts(parallel: str, num_ranks: int, num_passes: int, num_heads: int) -> list[int]:
    """Which sizes of the guidance axis come into question; fewer passes than that would leave ranks idle."""
    if parallel == "auto" or num_passes == 1:
        sizes = [size for size in range(1, num_passes + 1) if num_ranks % size == 0 and num_ranks // size <= num_heads]
        if not sizes:
            why = f", and no number of the {num_passes} guidance passes divides them" if num_passes > 1 else ""
            raise PlanError(
                f"{num_ranks} ranks are more than the model's {num_heads} attention heads; every rank needs one{why}. "
                f"Start at most {num_heads} ranks."
            )
        return sizes
    asked, on_tokens = map(int, parallel.split("x"))
    if asked > num_passes:
        raise PlanError(
            f"parallel is {parallel} and a step has {num_passes} guidance passes; {asked} ranks for them would leave "
            f"some idle. Use at most {num_passes}."
        )
    if on_tokens > num_heads:
        raise PlanError(
            f"parallel is {parallel}: {on_tokens} ranks are more than the model's {num_heads} attention heads; every "
            f"rank needs one. Use at most {num_heads}."
        )
    return [asked]


def _check_sizes(num_frames: int, height: int, width: int, spec: ModelSpec, pipeline: str, num_stages: int) -> None:
    step = SPATIAL_SCALE * num_stages
    smallest = max(step, 2 * SPATIAL_SCALE if decoder_reflects(spec) else SPATIAL_SCALE)
    if num_stages > 1:
        why = f"the pipeline {pipeline}, which starts at half size and makes multiples of {step} pixels"
    else:
        why = f"the video VAE, which makes multiples of {step} pixels"
    for name, value in (("height", height), ("width", width)):
        if value < smallest and value % step == 0:
            raise PlanError(
                f"{name} = {value} is too small for this model's video VAE, which needs {smallest} pixels. "
                f"Nearest: {smallest}."
            )
    for name, value, each, offset, rule in (
        ("height", height, step, 0, why),
        ("width", width, step, 0, why),
        ("num_frames", num_frames, TEMPORAL_SCALE, 1, f"the video VAE, which makes {TEMPORAL_SCALE}k+1 frames"),
    ):
        if (value - offset) % each:
            raise PlanError(f"{name} = {value} does not fit {rule}. Nearest: {nearest_valid(value, each, offset)}.")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _spread(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[-1]} to {sizes[0]}"


def _sigmas(sigmas: tuple[float, ...]) -> str:
    shown = [f"{sigma:.5g}" for sigma in sigmas]
    return " ".join(shown if len(shown) <= 9 else [*shown[:4], "...", *shown[-3:]])


def _guidance(guidance: Guidance) -> str:
    blocks = " ".join(map(str, guidance.stg_blocks))
    parts = [
        f"cfg {guidance.cfg_scale:g}" if guidance.cfg_scale != 1 else "",
        f"stg {guidance.stg_scale:g} (block {blocks})" if guidance.stg_scale != 0 else "",
        f"modality {guidance.modality_scale:g}" if guidance.modality_scale != 1 else "",
    ]
    named = ", ".join(part for part in parts if part)
    return f"{named}, rescale {guidance.rescale_scale:g}" if named else "unguided"
