"""The command line: ``torchrun --nproc_per_node=N -m ltx_sp.generate ...``.

Exit codes: 0 done; 2 the request or the arguments; 3 the plan; 4 the weights; 5 ranks that differ; 6 something not
supported; 7 a lost rank; 8 out of memory or disk; 130 interrupted; 143 terminated. Anything else is a defect.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from ltx_sp.errors import LtxSpError, PeerLostError, RequestError
from ltx_sp.observe import Observer, configure_logging, log
from ltx_sp.parallel.liveness import Farewell, Liveness
from ltx_sp.parallel.mesh import environment_rank, environment_world_size, resolve_device, start, start_store
from ltx_sp.plan import make_plan
from ltx_sp.request import CHOICES, DISTILLED_SIGMAS, GuidanceRequest, Request, Settings
from ltx_sp.runtime import Result, Runtime
from ltx_sp.weights.checkpoint import read_spec
from ltx_sp.write import check_writable, save_decoded, save_latents, tee_frames, write_clip

_RESOURCE_EXIT, _INTERRUPT_EXIT, _TERMINATED_EXIT = 8, 130, 143


@dataclasses.dataclass(frozen=True)
class Command:
    """The parsed command line."""

    request: Request
    settings: Settings
    output_path: Path
    save_latents: Path | None
    save_decoded: Path | None
    phase_log: Path | None
    plan_ranks: int | None


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        if environment_rank() == 0:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message[:1].upper()}{message[1:]}. See --help for the flags.")


_HELP = {
    "checkpoint_path": "published .safetensors file, or a folder in the diffusers layout",
    "gemma_root": "folder of the Gemma 3 text encoder; a diffusers folder has its own",
    "prompt": "what to show and to be heard",
    "negative_prompt": "what to steer away from",
    "seed": "equal seeds give equal clips on any number of ranks",
    "height": "pixels, a multiple of 32",
    "width": "pixels, a multiple of 32",
    "num_frames": "8k + 1",
    "frame_rate": "frames per second",
    "num_inference_steps": "denoising steps; left out, the model version's own: 30, before 2.3 40",
    "dtype": "of weights and latents",
    "device": "auto, cpu, cuda or cuda:N",
    "attention": "attention kernel",
    "video_to_audio": "merge partial attention by log-sum-exp, or gather keys and values",
    "max_batch_size": "guidance passes per forward",
    "keep_text_encoder": "keep the text encoder beside the transformer instead of freeing it",
    "peer_timeout": "seconds of silence after which a rank counts as lost",
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


def make_parser() -> argparse.ArgumentParser:
    """The flags; defaults come from the fields of ``Request`` and ``Settings``."""
    parser = _Parser(
        prog="ltx_sp.generate",
        usage="torchrun --nproc_per_node=N -m ltx_sp.generate --checkpoint-path PATH --prompt TEXT [flags]",
        description="Make a video clip with sound from a prompt, with LTX-2, on any number of GPUs.",
        epilog=(__doc__ or "").partition("\n\n")[2],
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

    clip = parser.add_argument_group("clip")
    add(clip, "prompt", metavar="TEXT")
    add(clip, "negative_prompt", metavar="TEXT")
    for name in ("seed", "height", "width", "num_frames"):
        add(clip, name, type=int, metavar="N")
    add(clip, "frame_rate", type=float, metavar="X")

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
    for name in ("dtype", "attention", "video_to_audio"):
        add(process, name, choices=CHOICES[name])
    add(process, "device", metavar="NAME")
    add(process, "max_batch_size", type=int, metavar="N")
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
    ):
        default = Path("output.mp4") if flag == "--output-path" else None
        output.add_argument(flag, type=Path, default=default, metavar="FILE", help=text)
    output.add_argument("--plan-only", type=int, nargs="?", const=0, metavar="RANKS", help=plan_help)
    return parser


def parse(argv: Sequence[str] | None = None) -> Command:
    """Turn the arguments into a command.

    Raises:
        RequestError: they make no sense; the message says why.
    """
    values = vars(make_parser().parse_args(argv))
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
    plan_only = values["plan_only"]
    if plan_only is not None and plan_only < 0:
        raise RequestError(f"--plan-only {plan_only} is no number of ranks; give 1 or more.")
    return Command(
        request=Request(**pick(Request) | streams | {"sigmas": _sigmas(values["sigmas"])}),
        settings=Settings(**pick(Settings)),
        output_path=values["output_path"],
        save_latents=values["save_latents"],
        save_decoded=values["save_decoded"],
        phase_log=values["phase_log"],
        plan_ranks=None if plan_only is None else plan_only or environment_world_size(),
    )


def _sigmas(words: Sequence[str] | None) -> tuple[float, ...] | None:
    if words is None:
        return None
    if list(words) == ["distilled"]:
        return DISTILLED_SIGMAS
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise RequestError(f"--sigmas {' '.join(words)} must be numbers, or the word 'distilled'.") from None


def _generate(command: Command, liveness: Liveness, store: Any) -> None:
    rank = environment_rank()
    device = resolve_device(command.settings.device)
    observer = Observer(rank, device, phase_log=command.phase_log if rank == 0 else None, show_progress=True)
    with start(device, store), Runtime.load(command.settings, observer=observer) as runtime:
        if rank == 0:
            for line in runtime.plan(command.request).describe().splitlines():
                log.info("%s", line)
        result = runtime.generate(command.request)
        if rank == 0:
            _write(command, result, observer)
            liveness.leave(Farewell(0, ""))
        else:
            # Rank 0 still decodes; its failure would be this rank's too.
            farewell = liveness.wait_for(0)
            if farewell.exit_code:
                raise SystemExit(farewell.exit_code)


def _write(command: Command, result: Result, observer: Observer) -> None:
    if command.save_latents is not None:
        save_latents(command.save_latents, result.latents)
    clip = result.clip
    assert clip is not None
    kept: list[torch.Tensor] = []
    if command.save_decoded is not None:
        clip, kept = tee_frames(clip)
    with observer.phase("decode and write"), observer.progress(clip.num_frames, "decode", "frame") as advance:
        write_clip(clip, command.output_path, on_frames=advance)
    if command.save_decoded is not None:
        save_decoded(command.save_decoded, kept, clip.waveform)
    seconds = sum(record.seconds for record in observer.records)
    log.info(
        "%s written: %d frames, %d Hz sound, %.1f s in all",
        command.output_path,
        clip.num_frames,
        clip.sample_rate,
        seconds,
    )


def _check_outputs(command: Command) -> None:
    check_writable(command.output_path)
    for path in (command.save_latents, command.save_decoded, command.phase_log):
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise RequestError(f"{path} cannot be written. Create the folder {path.parent}, or choose another one.")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_TERMINATED_EXIT)


class _LastWord:
    """Says once, on one rank, why the run ends badly."""

    def __init__(self, rank: int):
        self._rank, self._lock, self._said = rank, threading.Lock(), False

    def say(self, message: str, *, on_any_rank: bool = False) -> None:
        with self._lock:
            if not self._said and (self._rank == 0 or on_any_rank):
                print(f"ltx_sp: {message}", file=sys.stderr, flush=True)
            self._said = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    rank = environment_rank()
    configure_logging(rank)
    last_word = _LastWord(rank)
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGINT, interrupt)

    def on_lost(lost: Farewell) -> None:
        if not interrupted:
            # A rank that fails with a reason of its own and is not rank 0 is told about by rank 0, which lives.
            last_word.say(lost.message, on_any_rank=rank == 0 or lost.exit_code == PeerLostError.exit_code)
        os._exit(_INTERRUPT_EXIT if interrupted else lost.exit_code)

    liveness = Liveness(None, rank, 1, timeout=1, on_lost=on_lost)
    exit_code, message = 0, ""
    try:
        command = parse(argv)
        if command.plan_ranks is not None:
            if rank == 0:
                spec = read_spec(command.settings.checkpoint_path)
                print(make_plan(command.request, spec, command.settings, command.plan_ranks).describe())
            return 0
        _check_outputs(command)
        store = start_store()
        liveness = Liveness(
            store, rank, environment_world_size(), timeout=command.settings.peer_timeout, on_lost=on_lost
        )
        liveness.start()
        _generate(command, liveness, store)
    except PeerLostError as error:
        lost = None if interrupted else liveness.diagnose()
        exit_code, message = (lost.exit_code, lost.message) if lost else (error.exit_code, str(error))
        if interrupted:
            exit_code, message = _INTERRUPT_EXIT, "Interrupted; nothing was written."
    except LtxSpError as error:
        exit_code, message = error.exit_code, f"{type(error).__name__}: {error}"
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or "on the host"
        advice = "Use more ranks, a smaller clip, or fewer passes per forward (--max-batch-size 1)."
        exit_code, message = _RESOURCE_EXIT, f"Out of memory: {reason}. {advice}"
    except OSError as error:
        exit_code, message = (
            _RESOURCE_EXIT,
            f"{error.filename or 'The output'} cannot be written: {error.strerror or error}.",
        )
    except KeyboardInterrupt:
        exit_code, message = _INTERRUPT_EXIT, "Interrupted; nothing was written."
    finally:
        # A thread that is still in the store when the interpreter ends aborts the process.
        liveness.stop()
    if exit_code:
        last_word.say(message)
        liveness.leave(Farewell(exit_code, message if rank == 0 else f"Rank {rank}: {message}"))
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
