"""Everything that can be decided without a GPU, decided once. No torch.

A Plan is equal on every rank, which its digest proves, and can be printed on a laptop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np

from ltx_sp.errors import PlanError
from ltx_sp.request import DISTILLED_SIGMAS, GuidanceRequest, Request, Settings
from ltx_sp.spec import (
    SPATIAL_SCALE,
    TEMPORAL_SCALE,
    TEXT_TOKENS,
    LatentShape,
    ModelSpec,
    StreamSpec,
    TransformerSpec,
    decoder_reflects,
    latent_shape,
    nearest_valid,
)

_ELEMENT_SIZE = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The resolved guidance of one stream; see ``GuidanceRequest``."""

    cfg_scale: float = 1.0
    stg_scale: float = 0.0
    rescale_scale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    modality_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class VersionDefaults:
    """What a model version was tuned for."""

    num_inference_steps: int
    video: Guidance
    audio: Guidance


def version_defaults(spec: ModelSpec) -> VersionDefaults:
    """Steps and guidance of the reference pipelines for this version; the STG block is 28, 29 before 2.3."""
    newer = spec.version >= (2, 3)
    blocks = (28 if newer else 29,)
    return VersionDefaults(
        num_inference_steps=30 if newer else 40,
        video=Guidance(cfg_scale=3.0, stg_scale=1.0, rescale_scale=0.7, stg_blocks=blocks, modality_scale=3.0),
        audio=Guidance(cfg_scale=7.0, stg_scale=1.0, rescale_scale=0.7, stg_blocks=blocks, modality_scale=3.0),
    )


CONDITIONAL, UNCONDITIONAL, PERTURBED, ISOLATED = "conditional", "unconditional", "perturbed", "isolated"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the plan expects one forward to cost, per rank; docs/performance.md has the formulas.

    Args:
        collectives: exchanges per forward.
        received_bytes: bytes from other ranks per forward, the mean over the ranks.
        flops: floating-point operations per forward and rank, multiply and add counted apart.
        weight_bytes: of the transformer.
        activation_bytes: largest working set of a block, estimated.
    """

    collectives: int
    received_bytes: int
    flops: int
    weight_bytes: int
    activation_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One generation, decided.

    Args:
        shape: the clip in latent space.
        sigmas: noise levels, from the first step's to 0.
        passes: of a guided step, in the order in which they run.
        batches: indices of the passes that share a forward.
        layout: (guidance axis, token axis): how many ranks each has.
        token_shares, head_shares: sizes per rank of the token axis.
    """

    request: Request
    version: tuple[int, ...]
    shape: LatentShape
    sigmas: tuple[float, ...]
    video_guidance: Guidance
    audio_guidance: Guidance
    passes: tuple[str, ...]
    batches: tuple[tuple[int, ...], ...]
    layout: tuple[int, int]
    token_shares: tuple[int, ...]
    head_shares: tuple[int, ...]
    dtype: str
    video_to_audio: str
    prediction: Prediction

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def digest(self) -> str:
        """A short fingerprint: equal exactly for equal plans."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:32]

    def describe(self) -> str:
        """The plan as a short text for people."""
        request, shape, cost = self.request, self.shape, self.prediction
        num_forwards = self.num_steps * len(self.batches)
        version = ".".join(map(str, self.version)) or "2.0 (checkpoint without version)"
        ranks = self.layout[0] * self.layout[1]
        lines = {
            "model": f"LTX-2 version {version}, {self.dtype}, {_size(cost.weight_bytes)} of transformer weights",
            "clip": f"{request.width}x{request.height}, {request.num_frames} frames at {request.frame_rate:g}/s: "
            f"{request.num_frames / request.frame_rate:.2f} s",
            "latent": f"{shape.frames}x{shape.height}x{shape.width} = {shape.video_tokens} video tokens, "
            f"{shape.audio_frames} audio tokens",
            "ranks": f"{ranks} = {self.layout[0]} guidance x {self.layout[1]} token; each has "
            f"{_spread(self.token_shares)} video tokens, {_spread(self.head_shares)} heads",
            "steps": f"{self.num_steps}: sigma {_sigmas(self.sigmas)}",
            "passes": f"{', '.join(self.passes)}: {len(self.batches)} forwards per step, {num_forwards} in all",
            "video": _guidance(self.video_guidance),
            "audio": _guidance(self.audio_guidance),
            "predicted": f"per forward and rank {cost.flops / 1e12:.3g} TFLOP, {cost.collectives} collectives, "
            f"{_size(cost.received_bytes)} received (video-to-audio: {self.video_to_audio})",
            "memory": f"per rank, while denoising, {_size(cost.weight_bytes)} weights and about "
            f"{_size(cost.activation_bytes)} working set",
        }
        return "\n".join(f"{name:10} {text}" for name, text in lines.items())


def make_plan(request: Request, spec: ModelSpec, settings: Settings, num_ranks: int = 1) -> Plan:
    """Decide one generation.

    Raises:
        PlanError: the sizes do not fit the video VAE, an STG block is not in the model, or there are more ranks
            than heads.
    """
    _check_sizes(request, spec)
    transformer = spec.transformer
    heads = transformer.video.num_heads
    if num_ranks > heads:
        raise PlanError(
            f"{num_ranks} ranks are more than the model's {heads} attention heads; every rank needs one. "
            f"Start at most {heads} ranks."
        )
    defaults = version_defaults(spec)
    if request.sigmas == DISTILLED_SIGMAS:
        # The distilled checkpoints have guidance trained into them.
        defaults = dataclasses.replace(defaults, video=Guidance(), audio=Guidance())
    video = _resolve(request.video, defaults.video, transformer.num_layers, "video")
    audio = _resolve(request.audio, defaults.audio, transformer.num_layers, "audio")
    passes = guidance_passes(video, audio)
    shape = latent_shape(request.num_frames, request.height, request.width, request.frame_rate, spec)
    if shape.audio_frames < 1:
        raise PlanError(
            f"{request.num_frames} frames at {request.frame_rate:g} per second last "
            f"{request.num_frames / request.frame_rate:.3f} s, less than one audio frame of 0.04 s. "
            "Ask for more frames."
        )
    token_shares, head_shares = shares(shape.video_tokens, num_ranks), shares(heads, num_ranks)
    batches = tuple(
        tuple(range(start, min(start + settings.max_batch_size, len(passes))))
        for start in range(0, len(passes), settings.max_batch_size)
    )
    return Plan(
        request=request,
        version=spec.version,
        shape=shape,
        sigmas=request.sigmas or ltx2_sigmas(request.num_inference_steps or defaults.num_inference_steps),
        video_guidance=video,
        audio_guidance=audio,
        passes=passes,
        batches=batches,
        layout=(1, num_ranks),
        token_shares=token_shares,
        head_shares=head_shares,
        dtype=settings.dtype,
        video_to_audio=settings.video_to_audio,
        prediction=predict(
            transformer,
            shape,
            num_ranks=num_ranks,
            batch=max(map(len, batches)),
            element_size=_ELEMENT_SIZE[settings.dtype],
            video_to_audio=settings.video_to_audio,
        ),
    )


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Split ``total`` into ``parts`` sizes that differ by one at most, larger ones first."""
    size, rest = divmod(total, parts)
    return tuple(size + (part < rest) for part in range(parts))


def guidance_passes(video: Guidance, audio: Guidance) -> tuple[str, ...]:
    """The passes that a step needs: one is added when either stream wants it, and carries both."""
    passes = [CONDITIONAL]
    if video.cfg_scale != 1 or audio.cfg_scale != 1:
        passes.append(UNCONDITIONAL)
    if video.stg_scale != 0 or audio.stg_scale != 0:
        passes.append(PERTURBED)
    if video.modality_scale != 1 or audio.modality_scale != 1:
        passes.append(ISOLATED)
    return tuple(passes)


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


def predict(
    spec: TransformerSpec, shape: LatentShape, *, num_ranks: int, batch: int, element_size: int, video_to_audio: str
) -> Prediction:
    """Count what one forward costs one rank; bytes and operations are means over the ranks."""
    p, s, a, layers = num_ranks, shape.video_tokens, shape.audio_frames, spec.num_layers
    d, da, cross = spec.video.width, spec.audio.width, spec.cross_width
    fraction = (p - 1) / p
    exchanged = 4 * fraction * s * d * element_size / p
    if video_to_audio == "partial":
        exchanged += (p - 1) * a * (cross * element_size + 4 * spec.audio.num_heads)
    else:
        exchanged += (p - 1) * shares(s, p)[0] * 2 * cross * element_size

    per_video_token = (4 * d * d + 8 * d * d) + 2 * d * d + 2 * d * cross + 2 * d * cross
    text = 2 * TEXT_TOKENS * (spec.video.context_dim * d + spec.audio.context_dim * da) if spec.prompt_adaln else 0
    per_audio_token = 12 * da * da + 2 * da * da + 4 * da * cross
    own_keys = s / p if video_to_audio == "partial" else s
    attention = 2 * (s / p) * (s * d + TEXT_TOKENS * d + a * cross) + 2 * a * (
        (a + TEXT_TOKENS) * da + own_keys * cross
    )
    flops = 2 * layers * ((s / p) * per_video_token + text + a * per_audio_token + attention)
    local = math.ceil(s / p)
    return Prediction(
        collectives=3 * layers if p > 1 else 0,
        received_bytes=round(layers * exchanged * batch),
        flops=round(flops * batch),
        weight_bytes=num_parameters(spec) * element_size,
        activation_bytes=batch * local * element_size * (d * 12) + 4 * 2 * (local * d // 2 + s * cross // 2),
    )


def num_parameters(spec: TransformerSpec) -> int:
    """Count the transformer's parameters."""

    def attention(query: int, context: int, inner: int) -> int:
        gate = (query + 1) * spec.video.num_heads if spec.gated_attention else 0
        return (query + 1) * inner + 2 * (context + 1) * inner + (inner + 1) * query + 2 * inner + gate

    def adaln(width: int, rows: int) -> int:
        return (256 + 1) * width + (width + 1) * width + (width + 1) * rows * width

    def stream(own: StreamSpec) -> tuple[int, int]:
        width, rows = own.width, 9 if spec.prompt_modulation else 6
        feed_forward = 8 * width * width + (5 * width if own.ff_bias else 0)
        block = attention(width, width, width) + attention(width, own.context_dim, width) + feed_forward
        block += (rows + 5 + (2 if spec.prompt_modulation else 0)) * width
        ends = (own.in_channels + 1) * width + (width + 1) * own.out_channels + 2 * width
        ends += adaln(width, rows) + adaln(width, 4) + adaln(width, 1) + (adaln(width, 2) if spec.prompt_adaln else 0)
        if spec.caption_channels is not None:
            ends += (spec.caption_channels + 1) * width + (width + 1) * width
        return block, ends

    (video_block, video_ends), (audio_block, audio_ends) = stream(spec.video), stream(spec.audio)
    cross = attention(spec.video.width, spec.audio.width, spec.cross_width)
    cross += attention(spec.audio.width, spec.video.width, spec.cross_width)
    keyframes = spec.video.width if spec.keyframes_embedding else 0
    return spec.num_layers * (video_block + audio_block + cross) + video_ends + audio_ends + keyframes


def _check_sizes(request: Request, spec: ModelSpec) -> None:
    smallest = 2 * SPATIAL_SCALE if decoder_reflects(spec) else SPATIAL_SCALE
    for name, value in (("height", request.height), ("width", request.width)):
        if value < smallest and value % SPATIAL_SCALE == 0:
            raise PlanError(
                f"{name} = {value} is too small for this model's video VAE, which needs {smallest} pixels. "
                f"Nearest: {smallest}."
            )
    for name, value, step, offset, rule in (
        ("height", request.height, SPATIAL_SCALE, 0, f"multiples of {SPATIAL_SCALE} pixels"),
        ("width", request.width, SPATIAL_SCALE, 0, f"multiples of {SPATIAL_SCALE} pixels"),
        ("num_frames", request.num_frames, TEMPORAL_SCALE, 1, f"{TEMPORAL_SCALE}k+1 frames"),
    ):
        if (value - offset) % step:
            raise PlanError(
                f"{name} = {value} does not fit the video VAE, which makes {rule}. "
                f"Nearest: {nearest_valid(value, step, offset)}."
            )


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
    guided = guidance.cfg_scale != 1 or guidance.stg_scale != 0 or guidance.modality_scale != 1
    if asked.rescale_scale and not guided:
        raise PlanError(
            f"The {stream} rescale scale is {asked.rescale_scale:g} and the {stream} is unguided, so it does nothing. "
            "Leave it out."
        )
    return guidance


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
