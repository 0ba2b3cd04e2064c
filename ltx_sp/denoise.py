"""The sigma loop: noise in, latents out, sharded from the first step to the last.

Shapes: T all tokens of a stream, s this rank's, C = 128 channels, N position axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ltx_sp.graph import StepGraphs, TakeStep
from ltx_sp.handoff import Conditioning, Latents
from ltx_sp.model.args import BlockSkips, StreamInput, TextArgs, TransformerArgs, make_skips
from ltx_sp.model.attention import Backend, Beside, in_turn
from ltx_sp.model.dit import Hidden, Transformer
from ltx_sp.model.guidance import guide
from ltx_sp.model.samplers import Euler, EulerAncestral, Kind, Res2s, Sampler, State
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.collectives import Axis
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.parallel.parallelize import parallelize
from ltx_sp.parallel.ulysses import gather_tokens, shard_args, shard_tokens
from ltx_sp.plan import Plan
from ltx_sp.recipes import CONDITIONAL, UNCONDITIONAL, Guidance, Segment, perturbation_of
from ltx_sp.start import StreamStart, draws, unpatchify
from ltx_sp.window import mark

OnStep = Callable[[int], None]
"""Called after each step with the number of predictions of the clean latents that it took."""

Noise = Callable[[], Streams]
"""The next standard normal draw, of all tokens."""

EULER = Euler()

# Of the generators that samplers draw from while they walk, as the reference has them.
_RES2S_SEEDS = (9999, -1)  # at half steps and steps
_ANCESTRAL_SEED = 10000  # added to the clip's own


@dataclasses.dataclass(frozen=True)
class _Run:
    """A segment of a step, and what its blocks need.

    Args:
        places: of its passes in the batch that it goes on from.
        prompts: where each pass's prompt stands among those of this rank.
        skips: one per block.
    """

    segment: Segment
    places: tuple[int, ...]
    prompts: tuple[int, ...]
    skips: tuple[BlockSkips, ...]


class Denoiser:
    """The guided prediction of the clean latents, for one generation: ``x, sigma -> x0``. Collective.

    Everything that does not change from step to step is made here, once: position tables, text keys, skips.
    """

    def __init__(
        self,
        model: Transformer,
        backend: Backend,
        mesh: Mesh,
        video: StreamStart,
        audio: StreamStart | None,
        conditioning: Conditioning,
        *,
        segments: Sequence[Sequence[Segment]],
        video_guidance: Guidance,
        audio_guidance: Guidance,
        video_to_audio: str,
        beside: Beside = in_turn,
    ):
        """Prepare one generation.

        Args:
            segments: of each rank of the guidance axis, in the order in which they run.
        """
        self._model, self._mesh = model, mesh
        self._guidance = video_guidance, audio_guidance
        self._given = video.given, audio is not None and audio.given
        self._attends = parallelize(
            backend,
            mesh.tokens,
            num_tokens=video.positions_1NT2.shape[2],
            num_heads=model.spec.video.num_heads,
            video_to_audio=video_to_audio,
            beside=beside,
        )
        video_args = model.make_args(video.positions_1NT2, video.denoise_mask_1T1, video.keyframes_mask_1T1)
        self._video_args = shard_args(video_args, mesh.tokens)
        self._video_clean = shard_tokens(video.clean_1TC, mesh.tokens)
        self._audio_args: TransformerArgs | None = None
        if audio is not None:
            self._audio_args = model.make_args(audio.positions_1NT2, audio.denoise_mask_1T1)
            self._audio_clean = audio.clean_1TC
        own = segments[mesh.guidance.rank]
        # Only prompts that this rank's own passes have.
        negative = {name == UNCONDITIONAL for segment in own for name in segment.passes}
        self._prompts = [is_negative for is_negative in (False, True) if is_negative in negative]
        texts = [conditioning.negative if is_negative else conditioning.positive for is_negative in self._prompts]
        self._video_text = model.make_text(torch.cat([text.video for text in texts if text]), audio=False)
        self._audio_text = model.make_text(torch.cat([text.audio for text in texts if text]), audio=True)
        self._runs = [self._make_run(segment, own) for segment in own]
        # Whose passes stand where after the exchange.
        num_layers = model.spec.num_layers
        self._dealt = [[name for part in hand if part.stop == num_layers for name in part.passes] for hand in segments]

    def constants(self) -> list[Tensor]:
        """All tensors that steps read and do not change, the model's weights apart, in an order of their own."""
        audio = [self._audio_clean] if self._audio_args is not None else []
        texts = self._video_text, self._audio_text
        return list(_tensors((self._runs, texts, self._video_args, self._audio_args, self._video_clean, audio)))

    def _make_run(self, segment: Segment, own: Sequence[Segment]) -> _Run:
        def place(name: str) -> int:
            if segment.source is None:
                return 0
            before = own[segment.source].passes
            return before.index(name if name in before else CONDITIONAL)

        num_layers = self._model.spec.num_layers
        perturbations = [perturbation_of(name, *self._guidance, num_layers) for name in segment.passes]
        skips = make_skips(perturbations, num_layers, self._video_clean.device)
        return _Run(
            segment,
            places=tuple(map(place, segment.passes)),
            prompts=tuple(self._prompts.index(name == UNCONDITIONAL) for name in segment.passes),
            skips=skips[segment.start : segment.stop],
        )

    def __call__(self, x: Streams, sigma: Tensor) -> Streams:
        """Predict the clean latents, in x's type, what is given put back. Collective. Capturable.

        Args:
            sigma: 0-d float32 on the device: a captured step reads it anew at every replay.
        """
        video_0: dict[str, Tensor] = {}
        audio_0: dict[str, Tensor] = {}
        levels = [(torch.zeros_like(sigma) if given else sigma).view(1) for given in self._given]
        # Once for all passes of the step, as is what enters the first block.
        texts = (
            self._model.text_at(self._video_text, levels[0], audio=False),
            self._model.text_at(self._audio_text, levels[1], audio=True),
        )
        video, audio = StreamInput(x.video, levels[0], self._video_args), None
        if self._audio_args is not None:
            assert x.audio is not None
            audio = StreamInput(x.audio, levels[1], self._audio_args)
        stems: dict[int | None, Hidden] = {None: self._model.enter(video, audio)}
        for place, run in enumerate(self._runs):
            names = run.segment.passes
            with mark(f"pass {' + '.join(names)}"):
                hidden = self._through(run, stems[run.segment.source], texts)
                if run.segment.stop < self._model.spec.num_layers:
                    stems[place] = hidden
                    continue
                velocity_video, velocity_audio = self._model.leave(hidden)
            video_0.update(zip(names, _clean(video, velocity_video).split(1), strict=True))
            if audio is not None and velocity_audio is not None:
                audio_0.update(zip(names, _clean(audio, velocity_audio).split(1), strict=True))
        video_guidance, audio_guidance = self._guidance
        video_0, audio_0 = self._exchange(video_0, audio_0)
        tokens = self._mesh.tokens
        guided = guide(video_0, video_guidance, lambda moments: tokens.sum(moments, label="guidance: moments"))
        guided_audio = guide(audio_0, audio_guidance, lambda moments: moments) if audio_0 else None
        return self.keep(Streams(guided, guided_audio)).map(lambda x0, x: x0.to(x.dtype), x)

    def _exchange(
        self, video_0: dict[str, Tensor], audio_0: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Give every rank of the guidance axis the passes of all, both streams at once. Collective. Capturable."""
        axis = self._mesh.guidance
        if axis.size == 1:
            return video_0, audio_0
        shapes = [next(iter(x0.values())).shape for x0 in (video_0, audio_0) if x0]
        own = [torch.cat([x0[name].flatten() for x0 in (video_0, audio_0) if x0]) for name in video_0]
        # Ranks with fewer passes send the first again, which nobody looks at.
        most = max(map(len, self._dealt))
        rows = torch.stack(own + own[:1] * (most - len(own)))
        received = axis.gather(rows, label="guidance: x0")
        dealt = {name: received[rank, row] for rank, names in enumerate(self._dealt) for row, name in enumerate(names)}
        sizes = [shape.numel() for shape in shapes]
        split = {name: row.split(sizes) for name, row in dealt.items()}
        streams = [{name: parts[i].view(shape) for name, parts in split.items()} for i, shape in enumerate(shapes)]
        return streams[0], streams[1] if audio_0 else {}

    def keep(self, x: Streams) -> Streams:
        """Put back what is given, as far as its mask says. Capturable."""
        video = _keep(x.video, self._video_clean, self._video_args.denoise_mask_Bt1)
        if x.audio is None or self._audio_args is None:
            return Streams(video, None)
        return Streams(video, _keep(x.audio, self._audio_clean, self._audio_args.denoise_mask_Bt1))

    def _through(self, run: _Run, stem: Hidden, texts: tuple[TextArgs, TextArgs]) -> Hidden:
        video, audio = (dataclasses.replace(text, places=run.prompts) for text in texts)
        return self._model.through(stem.pick(run.places), (video, audio), self._attends, run.skips, run.segment.start)


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in dataclasses, tuples and lists, in order."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _clean(stream: StreamInput, velocity: Tensor) -> Tensor:
    timestep = stream.args.denoise_mask_Bt1 * stream.sigma_B[:, None, None]
    return (stream.x_BsC.float() - timestep * velocity.float()).to(stream.x_BsC.dtype)


def _keep(x: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    mixed = x * mask + clean.float() * (1 - mask)
    return torch.where(mask == 0, clean.to(mixed.dtype), mixed)


@dataclasses.dataclass(frozen=True)
class Walk:
    """A way down the noise levels, ready to be taken once.

    Args:
        rows: the numbers of each step, float64 on the device.
        noises: as many as the sampler takes at a step.
    """

    sampler: Sampler
    kinds: tuple[Kind, ...]
    rows: Tensor
    noises: Sequence[Noise] = ()


def make_walk(sampler: Sampler, sigmas: Sequence[float], noises: Sequence[Noise], device: torch.device) -> Walk:
    """Bring a sampler's schedule to the device."""
    schedule = sampler.schedule(sigmas)
    rows = torch.tensor(schedule.rows, dtype=torch.float64).to(device)
    return Walk(sampler, schedule.kinds, rows, noises)


def run(
    take: TakeStep,
    walk: Walk,
    video: StreamStart,
    audio: StreamStart | None,
    mesh: Mesh,
    *,
    on_step: OnStep | None = None,
) -> Streams:
    """Walk down the sigmas and gather the result: whole tokens on every rank.

    Collective. The latents stay sharded in between.
    """
    axis = mesh.tokens
    state = walk.sampler.begin(_shard(Streams(video.x_1TC, None if audio is None else audio.x_1TC), axis))
    for kind, row in zip(walk.kinds, walk.rows, strict=True):
        fresh = [_shard(noise(), axis) for noise in walk.noises[: kind.num_noises]]
        with mark(kind.name):
            state = take(kind, state, row, fresh)
        if on_step is not None:
            on_step(kind.num_predictions)
    x = state[0].map(torch.clone)  # the next clip's steps may use the same memory
    return Streams(gather_tokens(x.video, axis, num_tokens=video.x_1TC.shape[1], label="latents"), x.audio)


def steps_of(denoiser: Denoiser, sampler: Sampler) -> TakeStep:
    """A sampler's steps with a denoiser's predictions."""

    def take(kind: Kind, state: State, row: Tensor, noises: Sequence[Streams]) -> State:
        return sampler.step(kind, denoiser, state, row, noises, denoiser.keep)

    return take


def _shard(whole: Streams, axis: Axis) -> Streams:
    return Streams(shard_tokens(whole.video, axis), whole.audio)


def make_sampler(name: str, seed: int, whole: Streams) -> tuple[Sampler, list[Noise]]:
    """Give the sampler of a name, and what draws the noises that it wants.

    Args:
        seed: of the clip.
        whole: all tokens.
    """
    if name == "euler_ancestral":
        return EulerAncestral(), [draws(seed + _ANCESTRAL_SEED, whole, normalised=False)]
    if name == "res_2s":
        return Res2s(), [draws(seed, whole, normalised=True) for seed in _RES2S_SEEDS]
    return EULER, []


def denoise(
    plan: Plan,
    number: int,
    model: Transformer,
    backend: Backend,
    mesh: Mesh,
    conditioning: Conditioning,
    walk: Walk,
    video: StreamStart,
    audio: StreamStart,
    *,
    graphs: StepGraphs | None = None,
    weights: tuple[int, int] = (0, 0),
    on_step: OnStep | None = None,
) -> Latents:
    """Carry out one stage of the plan: equal latents on every rank, whatever their number. Collective.

    Args:
        graphs: None to run every step as it is.
        weights: which of the model's sets it uses, and a number that grows, on all ranks alike, whenever sets move.
    """
    stage = plan.stages[number]
    mesh = mesh.with_guidance(stage.layout[0])
    with torch.no_grad():  # inference tensors could not be changed by whoever gets the latents
        denoiser = Denoiser(
            model,
            backend,
            mesh,
            video,
            audio,
            conditioning,
            segments=stage.segments,
            video_guidance=stage.video_guidance,
            audio_guidance=stage.audio_guidance,
            video_to_audio=plan.video_to_audio,
            beside=in_turn if graphs is None else graphs.beside,
        )
        take = steps_of(denoiser, walk.sampler)
        if graphs is not None:
            # Noise levels and places of pictures are among what steps read.
            like = dataclasses.replace(stage, sigmas=(), appended=(0,) * len(stage.appended))
            set_, epoch = weights
            key = like, plan.dtype, video.given, audio.given, set_
            take = graphs.stage(key, epoch, take, denoiser.constants())
        del denoiser  # a stage that was captured before has its own
        tokens = run(take, walk, video, audio, mesh, on_step=on_step)
        return unpatchify(tokens, stage.shape)
