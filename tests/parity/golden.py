"""The reference implementation's cases, read from any folder in the golden format, and run on a mesh.

A folder holds transformer checkpoints (``<name>.safetensors``) and what the reference computed with them:
``<name>_io.safetensors`` for single forwards (header metadata ``cases``), ``<prefix>-sampling_io.safetensors``
for whole loops (header metadata ``params``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ltx_sp.denoise import Denoiser, make_sampler, make_walk, run, steps_of
from ltx_sp.handoff import Conditioning, TextContext
from ltx_sp.model.args import StreamInput, make_skips
from ltx_sp.model.attention import SdpaBackend
from ltx_sp.model.dit import Transformer
from ltx_sp.model.samplers import GradientEstimation
from ltx_sp.model.streams import Streams
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.parallel.parallelize import parallelize
from ltx_sp.parallel.ulysses import gather_tokens, shard_args, shard_tokens
from ltx_sp.recipes import Guidance, Perturbation, deal_passes, guidance_passes
from ltx_sp.request import CHOICES
from ltx_sp.spec import LatentShape, transformer_spec
from ltx_sp.start import StreamStart, unpatchify

FORWARD_TOLERANCE = 1e-5
LOOP_TOLERANCE = 1e-4

_PREFIX = "model.diffusion_model."


@dataclasses.dataclass(frozen=True)
class Row:
    """One case on one number of ranks: the largest absolute differences from the reference.

    Args:
        outputs: what video and audio came to, as bytes of float32; of video alone where that is all there is.
    """

    case: str
    num_ranks: int
    strategy: str
    video: float
    audio: float | None
    tolerance: float
    outputs: tuple[bytes, ...] = ()

    @property
    def passed(self) -> bool:
        return self.video <= self.tolerance and (self.audio is None or self.audio <= self.tolerance)

    def __str__(self) -> str:
        audio = "      -" if self.audio is None else f"{self.audio:.1e}"
        verdict = "ok" if self.passed else "FAIL"
        return (
            f"{verdict:4} {self.case:42} ranks {self.num_ranks}  {self.strategy:7}  "
            f"video {self.video:.1e}  audio {audio}  (limit {self.tolerance:.0e})"
        )


def find_files(folder: Path) -> list[tuple[Path, Path, str]]:
    """List (checkpoint, io file, kind) under ``folder``; kind is ``forward`` or ``loop``."""
    found = []
    for io in sorted(folder.rglob("*_io.safetensors")):
        metadata = _metadata(io)
        kind = "forward" if "cases" in metadata else "loop" if "params" in metadata else None
        if kind is not None:
            found.append((_checkpoint_of(io), io, kind))
    return found


def _checkpoint_of(io: Path) -> Path:
    stem = io.name.removesuffix("_io.safetensors")
    exact = io.with_name(f"{stem}.safetensors")
    if exact.exists():
        return exact
    prefix = stem.removesuffix("-sampling")
    siblings = [
        path for path in sorted(io.parent.glob(f"{prefix}*.safetensors")) if not path.name.endswith("_io.safetensors")
    ]
    if len(siblings) != 1:
        raise SystemExit(
            f"{io.name} needs exactly one checkpoint named {prefix}*.safetensors beside it, found {len(siblings)}."
        )
    return siblings[0]


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def run_file(
    checkpoint: Path, io: Path, kind: str, mesh: Mesh, strategies: tuple[str, ...] = CHOICES["video_to_audio"]
) -> list[Row]:
    """Run every case of one io file on the mesh. Collective."""
    config = json.loads(_metadata(checkpoint)["config"])
    model = Transformer(transformer_spec(config["transformer"]))
    weights = load_file(checkpoint)
    own = {
        name.removeprefix(_PREFIX): tensor.float()
        for name, tensor in weights.items()
        if name.startswith(_PREFIX) and "embeddings_connector" not in name
    }
    model.load_state_dict(own, strict=True)
    model = model.to(mesh.device)
    tensors = {name: tensor.to(mesh.device) for name, tensor in load_file(io).items()}
    runner: Callable[..., list[Row]] = _forward_cases if kind == "forward" else _loop_cases
    with torch.inference_mode():
        return [
            row
            for strategy in strategies
            for row in runner(io.name.removesuffix(".safetensors"), model, tensors, _metadata(io), mesh, strategy)
        ]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours.double() - theirs.double()).abs().max()
    return float("inf") if not torch.isfinite(difference) else float(difference)


def _bytes(*outputs: Tensor | None) -> tuple[bytes, ...]:
    return tuple(output.float().cpu().numpy().tobytes() for output in outputs if output is not None)


_SKIPS = {
    "SKIP_VIDEO_SELF_ATTN": "video_self_blocks",
    "SKIP_AUDIO_SELF_ATTN": "audio_self_blocks",
    "SKIP_A2V_CROSS_ATTN": "audio_to_video_blocks",
    "SKIP_V2A_CROSS_ATTN": "video_to_audio_blocks",
}


def _forward_cases(
    name: str, model: Transformer, io: Mapping[str, Tensor], metadata: Mapping[str, str], mesh: Mesh, strategy: str
) -> list[Row]:
    rows = []
    sigma, num_tokens = io["in.sigma"], io["in.video"].shape[1]
    everywhere = tuple(range(model.spec.num_layers))
    attends = parallelize(
        SdpaBackend(),
        mesh.tokens,
        num_tokens=num_tokens,
        num_heads=model.spec.video.num_heads,
        video_to_audio=strategy,
    )
    for case, what in json.loads(metadata["cases"]).items():
        size = len(what["ptb"])
        passes = [
            Perturbation(**{_SKIPS[skip]: everywhere if blocks is None else tuple(blocks) for skip, blocks in entry})
            for entry in what["ptb"]
        ]

        def context(stream: str, case: str = case, size: int = size) -> Tensor:
            positive = io[f"in.{stream}_context"]
            if case != "batch":
                return positive.expand(size, -1, -1)
            return torch.cat([positive, io[f"in.{stream}_context_neg"], positive, positive])

        keyframes = io["in.keyframes_mask"] if what["keyframes"] else None
        video_args = shard_args(
            model.make_args(io["in.video_positions"], io[f"in.{case}.video_mask"], keyframes), mesh.tokens
        )
        audio_args = model.make_args(io["in.audio_positions"], io[f"in.{case}.audio_mask"])
        video_args = dataclasses.replace(video_args, text=model.make_text(context("video"), audio=False))
        audio_args = dataclasses.replace(audio_args, text=model.make_text(context("audio"), audio=True))
        video = StreamInput(
            shard_tokens(io["in.video"], mesh.tokens).expand(size, -1, -1), sigma.expand(size), video_args
        )
        audio = StreamInput(
            io["in.audio"].expand(size, -1, -1),
            torch.full((size,), float(what["audio_sigma"]), device=mesh.device),
            audio_args,
        )
        skips = make_skips(passes, model.spec.num_layers, mesh.device)
        out_video, out_audio = model(video, audio if what["audio"] else None, attends, skips)
        whole = gather_tokens(out_video, mesh.tokens, num_tokens=num_tokens, label="out")
        rows.append(
            Row(
                f"{name}/{case}",
                mesh.world.size,
                strategy,
                _difference(whole, io[f"out.{case}.video"]),
                None if out_audio is None else _difference(out_audio, io[f"out.{case}.audio"]),
                FORWARD_TOLERANCE,
                _bytes(whole, out_audio),
            )
        )
    return rows


def _guidance(params: Mapping[str, Any]) -> Guidance:
    if params.get("skip_step"):
        raise SystemExit(f"skip_step = {params['skip_step']} is not implemented; the golden data must have 0.")
    return Guidance(
        cfg_scale=params["cfg_scale"],
        stg_scale=params["stg_scale"],
        rescale_scale=params["rescale_scale"],
        stg_blocks=tuple(params["stg_blocks"]),
        modality_scale=params["modality_scale"],
    )


def _sampler(case: str) -> str:
    names = {"ancestral": "euler_ancestral", "res2s": "res_2s"}
    return next((name for prefix, name in names.items() if case.startswith(prefix)), "euler")


def _loop_cases(
    name: str, model: Transformer, io: Mapping[str, Tensor], metadata: Mapping[str, str], mesh: Mesh, strategy: str
) -> list[Row]:
    params = json.loads(metadata["params"])
    conditioning = Conditioning(
        positive=TextContext(io["in.video_context"], io["in.audio_context"]),
        negative=TextContext(io["in.video_context_neg"], io["in.audio_context_neg"]),
    )
    rows = []
    for case in sorted({key.split(".")[0] for key in io if key.endswith(".video.start")}):
        video_guidance = audio_guidance = Guidance()
        if "guided" in case:
            video_guidance, audio_guidance = _guidance(params["video"]), _guidance(params["audio"])
        if case == "res2s_guided":
            # The case is the HQ pipeline's, which runs without STG and with rescale factors of its own.
            video_guidance = dataclasses.replace(video_guidance, stg_scale=0.0, rescale_scale=0.45)
            audio_guidance = dataclasses.replace(audio_guidance, stg_scale=0.0, rescale_scale=1.0)
        passes = guidance_passes(video_guidance, audio_guidance)
        # As plans do it: no rank goes without a pass.
        layout = mesh if len(passes) >= mesh.guidance.size else mesh.with_guidance(1)
        together = case.endswith("_bs4")

        def start(stream: str, case: str = case) -> StreamStart:
            mask = io[f"{case}.{stream}.denoise_mask"]
            return StreamStart(
                io[f"{case}.{stream}.start"],
                io[f"{case}.{stream}.clean"],
                mask,
                io[f"{case}.{stream}.positions"],
                io.get(f"{case}.{stream}.keyframes_mask"),
                given=not mask.any(),
            )

        video, audio = start("video"), start("audio")
        denoiser = Denoiser(
            model,
            SdpaBackend(),
            layout,
            video,
            audio,
            conditioning,
            segments=deal_passes(
                video_guidance,
                audio_guidance,
                model.spec.num_layers,
                num_hands=layout.guidance.size,
                max_batch_size=len(passes) if together else 1,
            ),
            video_guidance=video_guidance,
            audio_guidance=audio_guidance,
            video_to_audio=strategy,
        )
        whole = Streams(video.x_1TC, audio.x_1TC)
        sampler, noises = make_sampler(_sampler(case), int(metadata["seed"]), whole)
        if case.startswith("gradient_est"):
            sampler = GradientEstimation()
        sigmas = io[f"{case}.sigmas"].tolist()
        out = run(steps_of(denoiser, sampler), make_walk(sampler, sigmas, noises, mesh.device), video, audio, layout)
        final = io[f"{case}.video.final"]
        frames, height, width = final.shape[2:]
        shape = LatentShape(frames, height, width, io[f"{case}.audio.final"].shape[2])
        latents = unpatchify(out, shape)
        rows.append(
            Row(
                f"{name}/{case}",
                mesh.world.size,
                strategy,
                _difference(latents.video, final),
                _difference(latents.audio, io[f"{case}.audio.final"]),
                LOOP_TOLERANCE,
                _bytes(latents.video, latents.audio),
            )
        )
    return rows
