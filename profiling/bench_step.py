"""Time one forward of this transformer beside diffusers' on the same weights and inputs, interleaved.

    python profiling/bench_step.py

One process, float32, text-to-video, LTX-2.3 of a size that takes some hundred milliseconds on two CPU cores. The
figure is the median over the rounds of ours / theirs within a round, since machines drift. The outputs are compared
too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.model.args import BlockSkips
from ltx_sp.model.attention import SdpaBackend, local_attends
from ltx_sp.model.dit import Transformer
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.spec import LatentShape, TransformerSpec
from ltx_sp.weights.keymap import keymap
from profiling.models import Inputs, random_inputs, random_transformer, stream_inputs, transformer_spec

SHAPE = LatentShape(frames=4, height=16, width=24, audio_frames=32)
NUM_TEXT = 256


def make_spec() -> TransformerSpec:
    """Three blocks, 512 wide."""
    return transformer_spec(num_heads=8, head_dim=64, audio_head_dim=32, num_layers=3)


def diffusers_twin(model: Transformer) -> Any:
    """Diffusers' transformer with the same weights."""
    from diffusers import LTX2VideoTransformer3DModel

    spec = model.spec
    twin = LTX2VideoTransformer3DModel(
        num_attention_heads=spec.video.num_heads,
        attention_head_dim=spec.video.head_dim,
        cross_attention_dim=spec.video.context_dim,
        audio_num_attention_heads=spec.audio.num_heads,
        audio_attention_head_dim=spec.audio.head_dim,
        audio_cross_attention_dim=spec.audio.context_dim,
        num_layers=spec.num_layers,
        gated_attn=True,
        audio_gated_attn=True,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
        rope_type="split",
        use_prompt_embeddings=False,
    )
    names = keymap("diffusers", "transformer", {})
    twin.load_state_dict({names.to_checkpoint(name): value for name, value in model.state_dict().items()}, strict=True)
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


def main() -> int:
    """Print the table; return 1 if the outputs differ or ours takes more than 0.95 of theirs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="interleaved rounds (default 15)")
    rounds = parser.parse_args().rounds
    device = torch.device("cpu")
    model = random_transformer(make_spec(), dtype=torch.float32, device=device)
    inputs = random_inputs(model.spec, SHAPE, num_text=NUM_TEXT, dtype=torch.float32, device=device)
    calls = forwards(model, diffusers_twin(model), inputs)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        (video, audio), (twin_video, twin_audio) = calls["ours"](), calls["theirs"]()
        difference = max(float((video - twin_video).abs().max()), float((audio - twin_audio).abs().max()))
        for round_index in range(rounds + 2):
            for name in list(calls)[:: 1 if round_index % 2 else -1]:
                began = time.perf_counter()
                calls[name]()
                if round_index >= 2:
                    seconds[name].append(time.perf_counter() - began)
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
    median = statistics.median(ratios)
    for name, values in seconds.items():
        print(f"{name:7} median {statistics.median(values) * 1e3:7.1f} ms   best {min(values) * 1e3:7.1f} ms")
    print(f"ours / theirs: median {median:.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f} over {rounds} rounds")
    print(f"largest difference of the outputs: {difference:.1e}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {SHAPE.video_tokens} video tokens")
    return 0 if difference < 1e-4 and median <= 0.95 else 1


if __name__ == "__main__":
    raise SystemExit(main())
