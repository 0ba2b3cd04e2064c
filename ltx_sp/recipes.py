"""The recipes of the model family: sizes, steps, noise levels, guidance and strengths of each pipeline. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from ltx_sp.errors import PlanError
from ltx_sp.request import DISTILLED_SIGMAS, GuidanceRequest, Request
from ltx_sp.spec import LatentShape, ModelSpec

REFINING_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
"""The noise levels of every second stage."""


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The resolved guidance of one stream; see ``GuidanceRequest``."""

    cfg_scale: float = 1.0
    stg_scale: float = 0.0
    rescale_scale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    modality_scale: float = 1.0

    @property
    def is_guided(self) -> bool:
        """Whether any other pass has a say beside the conditional one."""
        return self.cfg_scale != 1 or self.stg_scale != 0 or self.modality_scale != 1


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a pipeline of a model version was tuned for.

    Args:
        height, width: of the clip, in pixels.
        num_inference_steps: of the first stage; None where its noise levels are fixed.
        image_crf: how strongly pictures are compressed first.
        lora_strengths: of the distilled LoRA in each stage; a stage for each.
        kept_audio: the stage whose sound is kept.
    """

    height: int
    width: int
    num_inference_steps: int | None
    video: Guidance
    audio: Guidance
    image_crf: int
    lora_strengths: tuple[float, ...]
    kept_audio: int = 0


def pipeline_defaults(spec: ModelSpec, pipeline: str) -> Defaults:
    """What the reference pipelines of this model version do; the STG block is 28, 29 before 2.3."""
    newer = spec.version >= (2, 3)
    blocks = (28 if newer else 29,)
    guided = Defaults(
        height=512,
        width=768,
        num_inference_steps=30 if newer else 40,
        video=Guidance(cfg_scale=3.0, stg_scale=1.0, rescale_scale=0.7, stg_blocks=blocks, modality_scale=3.0),
        audio=Guidance(cfg_scale=7.0, stg_scale=1.0, rescale_scale=0.7, stg_blocks=blocks, modality_scale=3.0),
        image_crf=18 if spec.version >= (2, 5) else 33,
        lora_strengths=(0.0,),
    )
    if pipeline == "two-stages":
        return dataclasses.replace(guided, height=1024, width=1536, lora_strengths=(0.0, 1.0))
    if pipeline == "two-stages-hq":
        return dataclasses.replace(
            guided,
            height=1088,
            width=1920,
            num_inference_steps=15,
            video=Guidance(cfg_scale=3.0, rescale_scale=0.45, modality_scale=3.0),
            audio=Guidance(cfg_scale=7.0, rescale_scale=1.0, modality_scale=3.0),
            lora_strengths=(0.25, 0.5),
        )
    if pipeline == "distilled":
        return dataclasses.replace(
            guided,
            height=1024,
            width=1536,
            num_inference_steps=None,
            video=Guidance(),
            audio=Guidance(),
            lora_strengths=(0.0, 0.0),
            kept_audio=1,
        )
    return guided


CONDITIONAL, UNCONDITIONAL, PERTURBED, ISOLATED = "conditional", "unconditional", "perturbed", "isolated"


def guidance_passes(video: Guidance, audio: Guidance) -> tuple[str, ...]:
    """The passes that a step needs: one is added when either stream wants it, and carries both."""
    passes = [CONDITIONAL]
    if video.stg_scale != 0 or audio.stg_scale != 0:
        passes.append(PERTURBED)
    if video.cfg_scale != 1 or audio.cfg_scale != 1:
        passes.append(UNCONDITIONAL)
    if video.modality_scale != 1 or audio.modality_scale != 1:
        passes.append(ISOLATED)
    return tuple(passes)


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """What one pass leaves out: the blocks, for each of the four attentions that guidance can perturb.

    A skipped self-attention passes its values through; a skipped cross-modal attention adds nothing.
    """

    video_self_blocks: tuple[int, ...] = ()
    audio_self_blocks: tuple[int, ...] = ()
    audio_to_video_blocks: tuple[int, ...] = ()
    video_to_audio_blocks: tuple[int, ...] = ()


def perturbation_of(name: str, video: Guidance, audio: Guidance, num_layers: int) -> Perturbation:
    """Give what the pass of a name leaves out."""
    if name == PERTURBED:
        return Perturbation(
            video_self_blocks=video.stg_blocks if video.stg_scale != 0 else (),
            audio_self_blocks=audio.stg_blocks if audio.stg_scale != 0 else (),
        )
    if name == ISOLATED:
        everywhere = tuple(range(num_layers))
        return Perturbation(audio_to_video_blocks=everywhere, video_to_audio_blocks=everywhere)
    return Perturbation()


@dataclasses.dataclass(frozen=True)
class Segment:
    """Passes of a step that go through a stretch of blocks together.

    Args:
        start, stop: its first block, and the one after its last.
        source: the place, among the segments of a rank, of the one that it goes on from; None: from the latents.
    """

    passes: tuple[str, ...]
    start: int
    stop: int
    source: int | None = None


def deal_passes(
    video: Guidance, audio: Guidance, num_layers: int, *, num_hands: int, max_batch_size: int
) -> tuple[tuple[Segment, ...], ...]:
    """Deal the passes of a step over the guidance axis: for each of its ranks, the segments in which they run.

    Up to its first perturbed block the perturbed pass is the conditional one: where a rank has both, they part there.

    Args:
        max_batch_size: passes in a segment; the isolated one is always by itself, for without cross-modal attention
            it costs a twelfth less.
    """
    passes = guidance_passes(video, audio)
    perturbed = perturbation_of(PERTURBED, video, audio, num_layers)
    parting = min((*perturbed.video_self_blocks, *perturbed.audio_self_blocks), default=0)
    bounds = [math.ceil(len(passes) * hand / num_hands) for hand in range(num_hands + 1)]
    return tuple(
        _segments(passes[start:stop], parting, num_layers, max_batch_size) for start, stop in itertools.pairwise(bounds)
    )


def _segments(passes: Sequence[str], parting: int, num_layers: int, max_batch_size: int) -> tuple[Segment, ...]:
    # The conditional pass first, for others may go on from its blocks; the perturbed one with whoever has room.
    mergeable = [name for name in (CONDITIONAL, UNCONDITIONAL, PERTURBED) if name in passes]
    batches = [tuple(mergeable[i : i + max_batch_size]) for i in range(0, len(mergeable), max_batch_size)]
    parts = parting > 0 and {CONDITIONAL, PERTURBED}.issubset(passes)
    segments = list[Segment]()
    for batch in batches:
        goes_on = parts and (CONDITIONAL in batch or PERTURBED in batch)
        if parts and CONDITIONAL in batch:
            segments.append(Segment(tuple(name for name in batch if name != PERTURBED), 0, parting))
        segments.append(Segment(batch, parting, num_layers, 0) if goes_on else Segment(batch, 0, num_layers))
    if ISOLATED in passes:
        segments.append(Segment((ISOLATED,), 0, num_layers))
    return tuple(segments)


def ltx2_sigmas(num_steps: int, num_tokens: int = 4096) -> tuple[float, ...]:
    """The LTX-2 schedule: ``num_steps + 1`` noise levels from 1 (to float32's precision) to 0.

    A line from 1 to 0, shifted by m (0.95 at 1024 tokens, 2.05 at 4096, linear beyond) as
    ``e^m / (e^m + 1/s - 1)``, then stretched so that the last level before 0 is 0.1. The one- and two-stage
    reference pipelines use m = 2.05 whatever the clip's size.
    """
    if num_steps == 1:
        return (1.0, 0.0)
    # In float32 and in the reference's order of operations, a reciprocal where it divides a scalar by a tensor
    # and one rounding per point of the line: guidance multiplies what the last bit changes by some thousands.
    shift = np.float32(math.exp(0.95 + (2.05 - 0.95) * (num_tokens - 1024) / (4096 - 1024)))
    steps = np.arange(num_steps, dtype=np.float64)
    slope = np.float64(np.float32(-1) / np.float32(num_steps))
    line = np.where(steps < (num_steps + 1) // 2, 1 + slope * steps, slope * (steps - num_steps)).astype(np.float32)
    shifted = np.float32(1) / (shift + (np.float32(1) / line - np.float32(1))) * shift
    rest = np.float32(1) - shifted
    stretched = np.float32(1) - rest / (rest[-1] / np.float32(1 - 0.1))
    return (*stretched.tolist(), 0.0)


def first_sigmas(request: Request, pipeline: str, defaults: Defaults, shape: LatentShape) -> tuple[float, ...]:
    """Choose the noise levels of the first stage.

    Raises:
        PlanError: steps are asked for where the levels are fixed.
    """
    if request.sigmas is not None:
        return request.sigmas
    if defaults.num_inference_steps is None:
        if request.num_inference_steps is not None:
            raise PlanError(
                f"num_inference_steps is {request.num_inference_steps} and the pipeline {pipeline} has its own noise "
                "levels. Leave it out, or give the levels with --sigmas."
            )
        return DISTILLED_SIGMAS
    steps = request.num_inference_steps or defaults.num_inference_steps
    # Only the HQ pipeline shifts the schedule by the clip's own size.
    return ltx2_sigmas(steps, shape.video_tokens) if pipeline == "two-stages-hq" else ltx2_sigmas(steps)


def resolve_guidance(request: Request, defaults: Defaults, num_layers: int) -> tuple[Guidance, Guidance]:
    """Choose the first stage's guidance of video and audio.

    Raises:
        PlanError: an STG block is not in the model, or something that is asked for would do nothing.
    """
    video, audio = defaults.video, defaults.audio
    if request.sigmas == DISTILLED_SIGMAS:
        # The distilled checkpoints have guidance trained into them.
        video, audio = Guidance(), Guidance()
    for stream, path, asked in (
        ("video", request.video_path, request.video),
        ("audio", request.audio_path, request.audio),
    ):
        if path is not None and asked != GuidanceRequest():
            raise PlanError(
                f"The {stream} is given and guidance for it too, which would do nothing: what is given is not made. "
                f"Leave out the guidance of the {stream}."
            )
    video = Guidance() if request.video_path is not None else video
    audio = Guidance() if request.audio_path is not None else audio
    return _resolve(request.video, video, num_layers, "video"), _resolve(request.audio, audio, num_layers, "audio")


def _resolve(asked: GuidanceRequest, default: Guidance, num_layers: int, stream: str) -> Guidance:
    def pick(value: float | None, otherwise: float) -> float:
        return otherwise if value is None else float(value)

    guidance = Guidance(
        cfg_scale=pick(asked.cfg_guidance_scale, default.cfg_scale),
        stg_scale=pick(asked.stg_guidance_scale, default.stg_scale),
        rescale_scale=pick(asked.rescale_scale, default.rescale_scale),
        stg_blocks=default.stg_blocks if asked.stg_blocks is None else asked.stg_blocks,
        modality_scale=pick(asked.modality_scale, default.modality_scale),
    )
    missing = [block for block in guidance.stg_blocks if not 0 <= block < num_layers]
    if missing and (guidance.stg_scale != 0 or asked.stg_blocks):
        raise PlanError(
            f"The {stream} STG block {missing[0]} is not in the model, whose blocks are 0 to {num_layers - 1}. "
            f"Choose one with --{stream}-stg-blocks, or turn STG off with --{stream}-stg-guidance-scale 0."
        )
    if guidance.stg_scale != 0 and not guidance.stg_blocks:
        raise PlanError(
            f"The {stream} STG guidance scale is {guidance.stg_scale:g} and there is no STG block. "
            f"Name one with --{stream}-stg-blocks, or turn STG off with --{stream}-stg-guidance-scale 0."
        )
    if guidance.stg_scale == 0 and asked.stg_blocks:
        raise PlanError(
            f"The {stream} STG blocks are given and its STG guidance scale is 0, so they do nothing. Leave them out, "
            f"or set --{stream}-stg-guidance-scale."
        )
    if asked.rescale_scale and not guidance.is_guided:
        raise PlanError(
            f"The {stream} rescale scale is {asked.rescale_scale:g} and the {stream} is unguided, so it does nothing. "
            "Leave it out."
        )
    return guidance
