"""argv -> Command: the flags, whose defaults come from the fields of ``Request`` and ``Settings``. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ltx_sp.errors import RequestError
from ltx_sp.request import CHOICES, DISTILLED_SIGMAS, GuidanceRequest, Image, Lora, Request, Settings

__all__ = ["Command", "parse"]


@dataclasses.dataclass(frozen=True)
class Command:
    """The parsed command line."""

    request: Request
    settings: Settings
    output_path: Path
    save_latents: Path | None
    save_decoded: Path | None
    phase_log: Path | None
    report: Path | None
    plan_ranks: int | None
    profile_steps: tuple[int, int] | None


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit, and says what may have been meant."""

    silent = False

    def print_help(self, file: Any = None) -> None:
        if not self.silent:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message[:1].upper()}{message[1:]}. {self._advice(message)}See --help for the flags.")

    def _advice(self, message: str) -> str:
        if unknown := re.match(r"unrecognized arguments: (-*[^\s=]*)", message):
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=2)
            if not unknown[1].startswith("-"):
                return "Put a text of several words into quotes. "
            return f"Did you mean {' or '.join(close)}? " if close else ""
        if lonely := re.match(r"argument (\S+): expected one argument", message):
            return f"A value that begins with a dash is joined by =, as in {lonely[1]}=-X. "
        return ""


_HELP = {
    "checkpoint_path": "published .safetensors file, or a folder in the diffusers layout",
    "gemma_root": "folder of the Gemma 3 text encoder; a diffusers folder has its own",
    "prompt": "what to show and to be heard",
    "negative_prompt": "what to steer away from",
    "seed": "equal seeds give equal clips on any number of ranks, up to rounding",
    "height": "pixels, a multiple of 32, of 64 with two stages; left out, the pipeline's own: 512, 1024, HQ 1088",
    "width": "pixels, like the height; left out, the pipeline's own: 768, 1536, HQ 1920",
    "num_frames": "8k + 1",
    "frame_rate": "frames per second",
    "num_inference_steps": "denoising steps of the first stage; left out, the model version's own: 30, before 2.3 40, "
    "HQ 15",
    "image_crf": "how strongly H.264 compresses the images first, 0..51; 0 not at all; left out, as the model wants",
    "audio_path": "sound to make the clip for; the clip gets it, and no other",
    "video_path": "frames to make sound for; the clip gets them, and no others",
    "pipeline": "one stage; or one at half size, and after doubling a second one with a distilled LoRA (two-stages, "
    "two-stages-hq), or with a distilled checkpoint (distilled)",
    "spatial_upsampler_path": "the latent upsampler (x2), for pipelines of two stages",
    "residency": "where the weights of two stages live; auto chooses by memory and says why",
    "dtype": "of weights and latents",
    "device": "auto, cpu, cuda or cuda:N",
    "attention": "attention kernel",
    "video_to_audio": "merge partial attention by log-sum-exp, or gather keys and values",
    "parallel": "ranks for guidance passes x ranks for video tokens, such as 2x4; auto chooses by predicted time",
    "calibration": "what profiling/calibrate.py measured, for --parallel auto and batches; default: in the cache, else "
    "data sheets; with --plan-only an H200's",
    "max_batch_size": "guidance passes in one batch, at most; by default as many as time and memory suggest",
    "compile": "fuse operations with torch.compile: the first step of each size takes a minute, the others less",
    "cuda_graph": "replay steps from CUDA graphs; auto does where there is CUDA",
    "keep_text_encoder": "keep the text encoder beside the transformer instead of freeing it",
    "peer_timeout": "seconds of silence after which a rank counts as lost",
    "load_mode": "stream weights through small buffers, preload them into host memory, or map the files; auto maps on "
    "the CPU and streams elsewhere",
    "overlap_lora": "merge LoRAs only after all else is loaded: slower, to measure what overlapping gains",
    "verify_weights": "refuse weights that are not finite, and compare what the ranks hold",
}
_GUIDANCE_HELP = {
    "cfg_guidance_scale": "away from the negative prompt; 1 is off",
    "stg_guidance_scale": "away from a pass without self-attention in the STG blocks; 0 is off",
    "stg_blocks": "the STG blocks",
    "rescale_scale": "pull the spread back to the unguided one, 0..1",
    "modality_scale": "away from a pass in which picture and sound ignore each other; 1 is off",
}
_MODALITY_FLAGS = {"video": "--a2v-guidance-scale", "audio": "--v2a-guidance-scale"}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _make_parser(epilog: str, num_ranks: int) -> _Parser:
    parser = _Parser(
        prog="ltx_sp.generate",
        usage="torchrun --nproc_per_node=N -m ltx_sp.generate --checkpoint-path PATH --prompt TEXT [flags]",
        description="Make a video clip with sound from a prompt, with LTX-2, on any number of GPUs.",
        epilog=epilog,
        allow_abbrev=False,
    )
    fields = {field.name: field for cls in (Request, Settings) for field in dataclasses.fields(cls)}

    def add(group: argparse._ArgumentGroup, name: str, **options: Any) -> None:
        default = fields[name].default
        if default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = default
        shown = "" if default in (None, dataclasses.MISSING, False) else f" (default {default})"
        group.add_argument(_flag(name), help=_HELP[name] + shown, **options)

    model = parser.add_argument_group("model")
    add(model, "checkpoint_path", type=Path, metavar="PATH")
    add(model, "gemma_root", type=Path, metavar="DIR")
    model.add_argument(
        "--lora",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE", "STRENGTH"),
        help="a LoRA for the transformer, and one number, its strength (default 1.0); may be given several times",
    )
    model.add_argument(
        "--distilled-lora",
        nargs="+",
        metavar=("FILE", "FACTOR"),
        help="the distilled LoRA of two-stages (1.0 in the second stage) and two-stages-hq (0.25 and 0.5), and one "
        "number, a factor on these (default 1.0)",
    )
    add(model, "spatial_upsampler_path", type=Path, metavar="FILE")
    add(model, "load_mode", choices=CHOICES["load_mode"])
    model.add_argument("--no-overlap-lora", dest="overlap_lora", action="store_false", help=_HELP["overlap_lora"])
    add(model, "verify_weights", action="store_true")

    clip = parser.add_argument_group("clip")
    add(clip, "pipeline", choices=CHOICES["pipeline"])
    add(clip, "prompt", metavar="TEXT")
    add(clip, "negative_prompt", metavar="TEXT")
    for name in ("seed", "height", "width", "num_frames"):
        add(clip, name, type=int, metavar="N")
    add(clip, "frame_rate", type=float, metavar="X")

    given = parser.add_argument_group("given", "what the clip is to show and to be heard, from files")
    given.add_argument(
        "--image",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE", "FRAME"),
        help="a picture, the frame that shows it (default 0), and how much of it is kept, 0..1 (default 1.0); may be "
        "given several times",
    )
    add(given, "image_crf", type=int, metavar="N")
    for name in ("audio", "video"):
        given.add_argument(f"--{name}", dest=f"{name}_path", type=Path, metavar="FILE", help=_HELP[f"{name}_path"])

    steps = parser.add_argument_group("steps")
    add(steps, "num_inference_steps", type=int, metavar="N")
    sigmas_help = (
        "the noise levels themselves, falling from at most 1 to 0; or the word 'distilled' for the eight steps of "
        "the distilled checkpoints"
    )
    steps.add_argument("--sigmas", nargs="+", metavar="X", help=sigmas_help)

    guidance = parser.add_argument_group("guidance", "left out, each is the model version's default")
    for stream, modality_flag in _MODALITY_FLAGS.items():
        for name, text in _GUIDANCE_HELP.items():
            flag = modality_flag if name == "modality_scale" else f"--{stream}{_flag(name)[1:]}"
            kind: dict[str, Any] = {"type": float, "metavar": "X"}
            if name == "stg_blocks":
                kind = {"type": int, "nargs": "*", "metavar": "N"}
            guidance.add_argument(flag, dest=f"{stream}.{name}", help=f"{stream}: {text}", **kind)

    process = parser.add_argument_group("process")
    for name in ("dtype", "attention", "video_to_audio", "residency", "cuda_graph"):
        add(process, name, choices=CHOICES[name])
    add(process, "device", metavar="NAME")
    add(process, "parallel", metavar="GxP")
    add(process, "calibration", type=Path, metavar="FILE")
    add(process, "max_batch_size", type=int, metavar="N")
    add(process, "compile", action="store_true")
    add(process, "keep_text_encoder", action="store_true")
    add(process, "peer_timeout", type=float, metavar="S")

    output = parser.add_argument_group("output")
    plan_help = (
        "print what would be done on RANKS ranks (default: as many as torchrun started), and stop; needs neither a "
        "GPU nor torchrun"
    )
    for flag, text in (
        ("--output-path", ".mp4, .mov or .mkv (default output.mp4)"),
        ("--save-latents", "also save the latents: safetensors with video_latent and audio_latent"),
        ("--save-decoded", "also save frames and waveform before compression: safetensors"),
        ("--phase-log", "append one JSON line per phase of rank 0"),
        ("--report", "also save the closing table of phases, as JSON"),
    ):
        default = Path("output.mp4") if flag == "--output-path" else None
        output.add_argument(flag, type=Path, default=default, metavar="FILE", help=text)
    output.add_argument(
        "--profile-steps",
        metavar="A-B",
        help="open the profiler's window for the steps A to B, counted from 1 over all stages: see docs/profiling.md",
    )
    output.add_argument("--plan-only", type=int, nargs="?", const=num_ranks, metavar="RANKS", help=plan_help)
    return parser


def parse(argv: Sequence[str] | None = None, *, epilog: str = "", silent: bool = False, num_ranks: int = 1) -> Command:
    """Turn the arguments into a command. Where a flag is given twice the later one counts.

    Args:
        epilog: what ends the help.
        num_ranks: what ``--plan-only`` means without a number.
        silent: let ``--help`` print nothing, because another rank prints it.

    Raises:
        RequestError: they make no sense; the message says why.
        SystemExit: with 0, after ``--help``.
    """
    parser = _make_parser(epilog, num_ranks)
    parser.silent = silent
    values = vars(parser.parse_args(argv))
    for path in ("save_latents", "save_decoded"):
        if values[path] is not None and values[path].suffix != ".safetensors":
            raise RequestError(f"--{path.replace('_', '-')} {values[path]} must end in .safetensors.")

    def pick(cls: type) -> dict[str, Any]:
        return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}

    streams = {}
    for stream in ("video", "audio"):
        given = {field.name: values[f"{stream}.{field.name}"] for field in dataclasses.fields(GuidanceRequest)}
        blocks = given["stg_blocks"]
        streams[stream] = GuidanceRequest(**given | {"stg_blocks": None if blocks is None else tuple(blocks)})
    distilled, plan_only = values["distilled_lora"], values["plan_only"]
    if plan_only is not None and plan_only < 1:
        raise RequestError(f"--plan-only {plan_only} is no number of ranks; give 1 or more.")
    return Command(
        request=Request(
            **pick(Request)
            | streams
            | {"sigmas": _sigmas(values["sigmas"]), "images": tuple(_image(words) for words in values["image"])}
        ),
        settings=Settings(
            **pick(Settings)
            | {
                "loras": tuple(_lora("--lora", words) for words in values["lora"]),
                "distilled_lora": distilled and _lora("--distilled-lora", distilled),
            }
        ),
        output_path=values["output_path"],
        save_latents=values["save_latents"],
        save_decoded=values["save_decoded"],
        phase_log=values["phase_log"],
        report=values["report"],
        plan_ranks=plan_only,
        profile_steps=_steps(values["profile_steps"]),
    )


def _lora(flag: str, words: Sequence[str]) -> Lora:
    path, strength = (*words, "1.0")[:2]
    try:
        number = float(strength)
    except ValueError:
        number = None
    if number is None or len(words) > 2:
        raise RequestError(f"{flag} {' '.join(words)} must be a file, and after it a number or nothing.")
    return Lora(Path(path), number)


def _image(words: Sequence[str]) -> Image:
    path, frame, strength = (*words, *("0", "1.0")[len(words) - 1 :])[:3]
    try:
        image = int(frame), float(strength)
    except ValueError:
        image = None
    if image is None or len(words) > 3:
        raise RequestError(
            f"--image {' '.join(words)} must be a file, and after it the number of a frame and a strength, or the "
            "first of them, or nothing."
        )
    return Image(Path(path), *image)


def _steps(word: str | None) -> tuple[int, int] | None:
    if word is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})-([1-9]\d{0,5})", word)
    if match is None or int(match[1]) > int(match[2]):
        raise RequestError(f"--profile-steps {word} must be two numbers of steps, the first not larger, such as 3-5.")
    return int(match[1]), int(match[2])


def _sigmas(words: Sequence[str] | None) -> tuple[float, ...] | None:
    if words is None:
        return None
    if list(words) == ["distilled"]:
        return DISTILLED_SIGMAS
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise RequestError(f"--sigmas {' '.join(words)} must be numbers, or the word 'distilled'.") from None
