"""One walk down the noise levels, decided: at which size, by which steps, and which rank does what. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ltx_sp.cost import Machine, Prediction, Run, predict, seconds, shares
from ltx_sp.errors import PlanError
from ltx_sp.recipes import UNCONDITIONAL, Guidance, Segment, deal_passes, guidance_passes, perturbation_of
from ltx_sp.request import Request, Settings
from ltx_sp.spec import SPATIAL_SCALE, LatentShape, ModelSpec

ELEMENT_SIZE = {"bfloat16": 2, "float32": 4}

# Of a device's memory, what a block may work in for passes to share it: the rest is for weights.
_SHARE_OF_MEMORY = 0.1
# What a batch must save in predicted time: less is in the doubts of the prediction, and it takes memory.
_WORTH_A_BATCH = 1.01


@dataclasses.dataclass(frozen=True)
class Stage:
    """One walk down the noise levels, at one size.

    Args:
        shape: the clip in latent space.
        appended: pixel frames of the pictures that are appended to the video tokens, each a latent frame's worth.
        sigmas: noise levels, from the first step's to 0.
        sampler: ``euler``, ``euler_ancestral`` or ``res_2s``.
        passes: of a guided step.
        segments: of each rank of the guidance axis, in the order in which they run.
        layout: (guidance axis, token axis): how many ranks each has.
        token_shares, head_shares: sizes per rank of the token axis.
        predictions: for each rank of the guidance axis.
    """

    name: str
    shape: LatentShape
    appended: tuple[int, ...]
    sigmas: tuple[float, ...]
    sampler: str
    video_guidance: Guidance
    audio_guidance: Guidance
    passes: tuple[str, ...]
    segments: tuple[tuple[Segment, ...], ...]
    layout: tuple[int, int]
    token_shares: tuple[int, ...]
    head_shares: tuple[int, ...]
    predictions: tuple[Prediction, ...]

    @property
    def prediction(self) -> Prediction:
        """For the ranks that have most to do."""
        return max(self.predictions, key=lambda prediction: prediction.flops)

    @property
    def working_bytes(self) -> int:
        """The largest working set of a block on any rank, estimated."""
        return max(prediction.activation_bytes for prediction in self.predictions)

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
            "passes": _passes(self.segments),
            "video": _guidance(self.video_guidance),
            "audio": _guidance(self.audio_guidance),
            "predicted": f"per step and rank {cost.flops / 1e12:.3g} TFLOP, "
            f"{cost.collectives} collective{'' if cost.collectives == 1 else 's'}, "
            f"{size_text(cost.received_bytes + cost.x0_bytes)} received",
        }


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a stage denoises, whatever its size."""

    name: str
    sigmas: tuple[float, ...]
    sampler: str
    video_guidance: Guidance
    audio_guidance: Guidance


def make_stage(
    walk: Walk,
    shape: LatentShape,
    request: Request,
    spec: ModelSpec,
    settings: Settings,
    num_ranks: int,
    machine: Machine,
) -> Stage:
    """Decide who does what of a walk: the layout that is predicted to take the least time.

    Raises:
        PlanError: the layout that is asked for does not fit the ranks, the passes or the heads.
    """
    appended = tuple(image.frame for image in request.images if image.frame)
    num_tokens = shape.video_tokens + len(appended) * shape.height * shape.width
    guidances = walk.video_guidance, walk.audio_guidance
    passes = guidance_passes(*guidances)

    num_layers, element_size = spec.transformer.num_layers, ELEMENT_SIZE[settings.dtype]
    rescales = walk.video_guidance.rescale_scale != 0 and walk.video_guidance.is_guided

    def with_layout(num_hands: int, max_batch_size: int) -> Stage:
        on_tokens = num_ranks // num_hands
        hands = deal_passes(*guidances, num_layers, num_hands=num_hands, max_batch_size=max_batch_size)
        dealt = [{name for segment in hand for name in segment.passes} for hand in hands]
        predictions = tuple(
            predict(
                spec.transformer,
                num_tokens,
                shape.audio_frames,
                [_run(segment, *guidances, num_layers) for segment in hand],
                num_ranks=on_tokens,
                prompts=len({name == UNCONDITIONAL for name in names}),
                element_size=element_size,
                video_to_audio=settings.video_to_audio,
                x0_passes=(num_hands - 1) * max(map(len, dealt)),
                rescales=rescales,
            )
            for hand, names in zip(hands, dealt, strict=True)
        )
        return Stage(
            **{field.name: getattr(walk, field.name) for field in dataclasses.fields(walk)},
            shape=shape,
            appended=appended,
            passes=passes,
            segments=hands,
            layout=(num_hands, on_tokens),
            token_shares=shares(num_tokens, on_tokens),
            head_shares=shares(spec.transformer.video.num_heads, on_tokens),
            predictions=predictions,
        )

    stages = list[Stage]()
    for num_hands in _layouts(settings.parallel, num_ranks, len(passes), spec.transformer.video.num_heads):
        stages.append(with_layout(num_hands, settings.max_batch_size or 1))
        if settings.max_batch_size is None:
            merged = [with_layout(num_hands, size) for size in range(2, len(passes) + 1)]
            room = _SHARE_OF_MEMORY * machine.memory_bytes
            stages += [stage for stage in merged if stage.working_bytes <= room]

    def cost(stage: Stage) -> float:
        shares_batches = any(len(segment.passes) > 1 for hand in stage.segments for segment in hand)
        return seconds(stage.prediction, machine) * (_WORTH_A_BATCH if shares_batches else 1)

    return min(stages, key=cost)


def _run(segment: Segment, video: Guidance, audio: Guidance, num_layers: int) -> Run:
    """What the blocks of a segment compute: an attention runs where any of its passes has it."""
    perturbations = [perturbation_of(name, video, audio, num_layers) for name in segment.passes]

    def running(left_out: str) -> int:
        sets = [set(getattr(perturbation, left_out)) for perturbation in perturbations]
        return sum(block not in set.intersection(*sets) for block in range(segment.start, segment.stop))

    return Run(
        passes=len(segment.passes),
        blocks=segment.stop - segment.start,
        video_self=running("video_self_blocks"),
        audio_self=running("audio_self_blocks"),
        audio_to_video=running("audio_to_video_blocks"),
        video_to_audio=running("video_to_audio_blocks"),
    )


def check_parallel(parallel: str, num_ranks: int, *, is_guided: bool) -> None:
    """Refuse a layout that fits no stage.

    Raises:
        PlanError: it is of another number of ranks, or deals passes where there is one.
    """
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


def size_text(num_bytes: int) -> str:
    """A number of bytes for people."""
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


def _passes(hands: Sequence[Sequence[Segment]]) -> str:
    if len(hands) == 1:
        return _own_passes(hands[0])
    dealt = "; ".join(f"{number}: {_own_passes(own)}" for number, own in enumerate(hands))
    return f"dealt over the guidance axis, {dealt}"


def _own_passes(segments: Sequence[Segment]) -> str:
    """The passes of a rank: those that go on from another one with the block from which they do."""
    num_layers = max(segment.stop for segment in segments)
    texts = []
    for segment in segments:
        if segment.stop < num_layers:
            continue
        known = segment.passes if segment.source is None else segments[segment.source].passes
        names = [name if name in known else f"{name} from block {segment.start}" for name in segment.passes]
        texts.append(" + ".join(names))
    return ", ".join(texts)
