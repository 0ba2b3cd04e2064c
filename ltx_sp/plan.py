"""Everything that can be decided without a GPU, decided once. No torch.

A Plan is equal on every rank, which its digest proves, and can be printed on a laptop.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from ltx_sp.cost import DEFAULT_MACHINE, Machine
from ltx_sp.errors import PlanError
from ltx_sp.recipes import (
    REFINING_SIGMAS,
    Guidance,
    first_sigmas,
    guidance_passes,
    pipeline_defaults,
    resolve_guidance,
)
from ltx_sp.request import Request, Settings
from ltx_sp.spec import (
    SPATIAL_SCALE,
    TEMPORAL_SCALE,
    ModelSpec,
    decoder_reflects,
    latent_shape,
    nearest_valid,
)
from ltx_sp.stage import ELEMENT_SIZE, Stage, Walk, check_parallel, make_stage, size_text


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
        return 4 * 128 * ELEMENT_SIZE[self.dtype] * cells + 2 * 3 * 4 * frames * self.height * self.width

    @property
    def working_bytes(self) -> int:
        """The largest working set of any stage, estimated."""
        return max(stage.working_bytes for stage in self.stages)

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
            ("model", f"LTX-2 version {version}, {self.dtype}, {size_text(weight_bytes)} of transformer weights"),
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
        working = size_text(self.working_bytes)
        weights = f"{size_text(weight_bytes)} weights"
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
    first = Walk(
        "denoise",
        first_sigmas(request, settings.pipeline, defaults, shape),
        "res_2s" if is_hq else "euler_ancestral" if is_ancestral else "euler",
        video,
        audio,
    )
    check_parallel(settings.parallel, num_ranks, is_guided=len(guidance_passes(video, audio)) > 1)
    stages = [make_stage(first, shape, request, spec, settings, num_ranks, machine)]
    if num_stages > 1:
        refining = Walk("refine", REFINING_SIGMAS, "res_2s" if is_hq else "euler", Guidance(), Guidance())
        full = dataclasses.replace(shape, height=2 * shape.height, width=2 * shape.width)
        stages.append(make_stage(refining, full, request, spec, settings, num_ranks, machine))
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
