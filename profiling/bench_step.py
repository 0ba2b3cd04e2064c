"""Time this transformer beside diffusers' on the same weights and inputs, interleaved: a forward, and guided steps.

    python profiling/bench_step.py
    python profiling/bench_step.py --compile

One process, float32, text-to-video, LTX-2.3 of a size that takes about a second on two CPU cores. A guided step is all
four passes, guidance, rescaling and Euler's update; STG perturbs block 4 of 7, as near as seven blocks come to the
published 28 of 48 from below. Diffusers' is what its LTX2Pipeline does in one turn of
its loop: conditional and unconditional prompt in one forward, the perturbed and the isolated pass in one each. With
--compile both have their blocks compiled. A figure is the median over the rounds of ours / theirs within a round, since
machines drift. The outputs are compared too. Returns 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.denoise import EULER, steps_of
from ltx_sp.model.args import BlockSkips
from ltx_sp.model.attention import SdpaBackend, local_attends
from ltx_sp.model.dit import Transformer
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.recipes import Guidance
from ltx_sp.spec import LatentShape, TransformerSpec
from ltx_sp.weights.keymap import keymap
from profiling.models import Inputs, random_inputs, random_transformer, stream_inputs, transformer_spec
from profiling.steps import guided, make_denoiser, prompts_of

SHAPE = LatentShape(frames=4, height=16, width=24, audio_frames=32)
NUM_TEXT = 256
STG_BLOCK = 4
SIGMAS = (0.725, 0.421875)

Call = Callable[[], tuple[Tensor, Tensor]]
"""Gives what video and audio come to."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two ways to the same tensors, and what is asked of them.

    Args:
        limit: of ours / theirs, the median over the rounds; None where it is only told.
        tolerance: of the largest difference between the outputs, absolute.
    """

    title: str
    ours: Call
    theirs: Call
    limit: float | None
    tolerance: float


def make_spec() -> TransformerSpec:
    """Seven blocks, 512 wide."""
    return transformer_spec(num_heads=8, head_dim=64, audio_head_dim=32, num_layers=7)


def diffusers_twin(model: Transformer) -> Any:
    """Diffusers' transformer on the same weights: the tensors are shared."""
    from diffusers import LTX2VideoTransformer3DModel

    spec = model.spec
    newer = ("gated_attn", "audio_gated_attn", "cross_attn_mod", "audio_cross_attn_mod", "perturbed_attn")
    with torch.device("meta"):
        twin = LTX2VideoTransformer3DModel(
            num_attention_heads=spec.video.num_heads,
            attention_head_dim=spec.video.head_dim,
            cross_attention_dim=spec.video.context_dim,
            audio_num_attention_heads=spec.audio.num_heads,
            audio_attention_head_dim=spec.audio.head_dim,
            audio_cross_attention_dim=spec.audio.context_dim,
            num_layers=spec.num_layers,
            rope_type="split",
            use_prompt_embeddings=spec.caption_channels is not None,
            **({} if spec.caption_channels is None else {"caption_channels": spec.caption_channels}),
            **(dict.fromkeys(newer, True) if spec.prompt_modulation else {}),
        )
    names = keymap("diffusers", "transformer", {})
    weights = {names.to_checkpoint(name): value for name, value in model.state_dict().items()}
    twin.load_state_dict(weights, strict=True, assign=True)
    return twin.eval()


def forwards(model: Transformer, twin: Any, inputs: Inputs) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Both forwards as callables that return (video, audio) velocities."""
    video, audio = stream_inputs(model, inputs, Mesh.alone().tokens)
    attends, skips = local_attends(SdpaBackend()), [BlockSkips()] * model.spec.num_layers
    timestep = torch.full(inputs.video.shape[:1], inputs.sigma * model.spec.timestep_scale)

    def ours() -> tuple[Tensor, Tensor]:
        out_video, out_audio = model(video, audio, attends, skips)
        assert out_audio is not None
        return out_video, out_audio

    def theirs() -> tuple[Tensor, Tensor]:
        out_video, out_audio = twin(
            hidden_states=inputs.video,
            audio_hidden_states=inputs.audio,
            encoder_hidden_states=inputs.video_context,
            audio_encoder_hidden_states=inputs.audio_context,
            timestep=timestep,
            sigma=timestep,
            video_coords=inputs.video_positions.expand(len(timestep), -1, -1, -1),
            audio_coords=inputs.audio_positions.expand(len(timestep), -1, -1, -1),
            return_dict=False,
        )
        return out_video, out_audio

    return {"ours": ours, "theirs": theirs}


def guided_step(model: Transformer, inputs: Inputs, guidance: Guidance, *, max_batch_size: int) -> Call:
    """One guided Euler step of ours, as a callable that returns the next (video, audio) latents."""
    denoiser = make_denoiser(model, inputs, Mesh.alone(inputs.video.device), guidance, max_batch_size=max_batch_size)
    schedule = EULER.schedule(SIGMAS)
    row = torch.tensor(schedule.rows[0], dtype=torch.float64, device=inputs.video.device)
    take = steps_of(denoiser, EULER)
    state = EULER.begin(Streams(inputs.video, inputs.audio))

    def step() -> tuple[Tensor, Tensor]:
        (x,) = take(schedule.kinds[0], state, row, [])
        assert x.audio is not None
        return x.video, x.audio

    return step


def diffusers_step(twin: Any, inputs: Inputs, guidance: Guidance, timestep_scale: float) -> Call:
    """The same step as diffusers' LTX2Pipeline takes it: its forwards, its masks, its arithmetic."""
    prompts, stg_blocks = prompts_of(inputs), list(guidance.stg_blocks)
    assert prompts.negative is not None
    device = inputs.video.device
    both_contexts = (
        torch.cat([prompts.negative.video, prompts.positive.video]),
        torch.cat([prompts.negative.audio, prompts.positive.audio]),
    )
    # Its connectors fill the prompts up with registers and then mask nothing; the mask is passed all the same.
    mask = torch.ones(both_contexts[0].shape[:2], dtype=torch.int64, device=device)
    sigma, sigma_next = (torch.tensor(value, device=device) for value in SIGMAS)
    timestep = sigma * timestep_scale

    def forward(number: int, contexts: tuple[Tensor, Tensor], **options: Any) -> list[Tensor]:
        """Both streams' predictions of the clean latents."""
        x = [torch.cat([tokens] * number) for tokens in (inputs.video, inputs.audio)]
        velocities = twin(
            hidden_states=x[0],
            audio_hidden_states=x[1],
            encoder_hidden_states=contexts[0],
            audio_encoder_hidden_states=contexts[1],
            timestep=timestep.expand(number),
            sigma=timestep.expand(number),
            encoder_attention_mask=mask[:number],
            audio_encoder_attention_mask=mask[:number],
            video_coords=inputs.video_positions.expand(number, -1, -1, -1),
            audio_coords=inputs.audio_positions.expand(number, -1, -1, -1),
            use_cross_timestep=True,
            return_dict=False,
            **options,
        )
        return [tokens - velocity.float() * sigma for tokens, velocity in zip(x, velocities, strict=True)]

    def step() -> tuple[Tensor, Tensor]:
        both = forward(2, both_contexts)
        positive = prompts.positive.video, prompts.positive.audio
        perturbed = forward(1, positive, spatio_temporal_guidance_blocks=stg_blocks)
        isolated = forward(1, positive, isolate_modalities=True)
        moved = []
        for stream, x in enumerate((inputs.video, inputs.audio)):
            unconditional, conditional = both[stream].chunk(2)
            x0 = conditional + (guidance.cfg_scale - 1) * (conditional - unconditional)
            x0 = x0 + guidance.stg_scale * (conditional - perturbed[stream])
            x0 = x0 + (guidance.modality_scale - 1) * (conditional - isolated[stream])
            dims = list(range(1, x0.ndim))
            ratio = conditional.std(dim=dims, keepdim=True) / x0.std(dim=dims, keepdim=True)
            x0 = guidance.rescale_scale * (x0 * ratio) + (1 - guidance.rescale_scale) * x0
            moved.append(x + (sigma_next - sigma) * ((x - x0) / sigma))
        return moved[0], moved[1]

    return step


def compare(comparisons: Sequence[Comparison], rounds: int) -> bool:
    """Time them, turn by turn, and print a row for each; whether all limits hold. Blocks the host."""
    passed = True
    with torch.inference_mode():
        for comparison in comparisons:
            calls: Mapping[str, Call] = {"ours": comparison.ours, "theirs": comparison.theirs}
            results = {name: call() for name, call in calls.items()}
            difference = max(float((ours - theirs).abs().max()) for ours, theirs in zip(*results.values(), strict=True))
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for index in range(rounds + 2):
                for name in list(calls)[:: 1 if index % 2 else -1]:
                    began = time.perf_counter()
                    calls[name]()
                    if index >= 2:
                        seconds[name].append(time.perf_counter() - began)
            ratios = sorted(ours / theirs for ours, theirs in zip(*seconds.values(), strict=True))
            median = statistics.median(ratios)
            print(f"\n{comparison.title}")
            for name, values in seconds.items():
                print(
                    f"    {name:7} median {statistics.median(values) * 1e3:7.1f} ms   best {min(values) * 1e3:7.1f} ms"
                )
            fast, equal = comparison.limit is None or median <= comparison.limit, difference <= comparison.tolerance
            limit = (
                "" if comparison.limit is None else f"; at most {comparison.limit:g}: {'met' if fast else 'NOT MET'}"
            )
            print(
                f"    ours / theirs: median {median:.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f} in {rounds} rounds{limit}"
            )
            print(
                f"    largest difference of the outputs: {difference:.1e}, at most {comparison.tolerance:.0e}: "
                f"{'met' if equal else 'NOT MET'}",
                flush=True,
            )
            passed = passed and fast and equal
    return passed


def make_comparisons(model: Transformer, twin: Any, inputs: Inputs, *, compiled: bool) -> list[Comparison]:
    """What is timed: the forward alone, and the guided step with its passes in turn and in one batch."""
    guidance, scale = guided(STG_BLOCK), model.spec.timestep_scale
    single = forwards(model, twin, inputs)
    theirs = diffusers_step(twin, inputs, guidance, scale)
    kind = ", both compiled" if compiled else ""
    return [
        Comparison(f"one forward{kind}", single["ours"], single["theirs"], 1.0 if compiled else 0.95, 1e-4),
        *(
            Comparison(
                f"guided step, four passes, ours {how}{kind}",
                guided_step(model, inputs, guidance, max_batch_size=size),
                theirs,
                limit,
                1e-4,
            )
            for how, size, limit in (
                ("one pass after the other (the default)", 1, 1.0 if compiled else 0.85),
                ("in one batch but for the isolated one", 4, None),
            )
        ),
    ]


def main() -> int:
    """Print the comparisons; return 1 if outputs differ or a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="interleaved rounds of each (default 15)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds} must be 1 or more")
    device = torch.device("cpu")
    model = random_transformer(make_spec(), dtype=torch.float32, device=device)
    inputs = random_inputs(model.spec, SHAPE, num_text=NUM_TEXT, dtype=torch.float32, device=device)
    twin = diffusers_twin(model)
    if given.compile:
        # Past the limit a block would run as it is, under the name of a compiled one.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        model.compile_blocks()
        twin.compile_repeated_blocks()
    import diffusers

    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, float32, "
        f"{model.spec.num_layers} blocks of width {model.spec.video.width}, {SHAPE.video_tokens} video tokens, "
        f"{NUM_TEXT} text tokens"
    )
    return 0 if compare(make_comparisons(model, twin, inputs, compiled=given.compile), given.rounds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
