"""What a step costs a rank, counted from the model's sizes. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from ltx_sp.errors import RequestError
from ltx_sp.spec import TEXT_TOKENS, StreamSpec, TransformerSpec


@dataclasses.dataclass(frozen=True)
class Run:
    """Blocks of a step that some of a rank's passes go through together.

    Args:
        passes, blocks: how many.
        video_self, audio_self, audio_to_video, video_to_audio: in how many of the blocks that attention runs.
    """

    passes: int
    blocks: int
    video_self: int
    audio_self: int
    audio_to_video: int
    video_to_audio: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the plan expects one step to cost a rank; docs/performance.md has the formulas.

    Args:
        all_to_alls, all_gathers: on the token axis.
        received_bytes: by these, the mean over the ranks.
        x0_bytes: received in the one all-gather of the guidance axis; 0 where that has one rank.
        flops: floating-point operations, multiply and add counted apart.
        attention_flops: of these, video self-attention's.
        audio_flops: of these, those of the audio stream, which every rank has whole, but for projections of its text.
        audio_bytes: of weights that these read.
        weight_bytes: of the transformer.
        activation_bytes: largest working set of a block, estimated.
    """

    all_to_alls: int
    all_gathers: int
    received_bytes: int
    x0_bytes: int
    flops: int
    attention_flops: int
    audio_flops: int
    audio_bytes: int
    weight_bytes: int
    activation_bytes: int

    @property
    def collectives(self) -> int:
        """Of all kinds, on both axes."""
        return self.all_to_alls + self.all_gathers + (self.x0_bytes > 0)


@dataclasses.dataclass(frozen=True)
class Machine:
    """How fast a rank computes and exchanges: what the choice of a layout rests on, and nothing else.

    Args:
        flops: floating-point operations per second in products of the model's sizes.
        bytes_per_second: that a rank receives in an exchange.
        latency: seconds that an exchange takes at least.
        read_bytes_per_second: from the device's own memory.
        memory_bytes: of the device; 0 where passes are not to share their working memory.
    """

    flops: float
    bytes_per_second: float
    latency: float
    read_bytes_per_second: float
    memory_bytes: float


# Two thirds of what data sheets promise for dense bf16 products, for the links between GPUs and for memory: not
# measured. The first name that is part of the device's counts. On a CPU passes that share a batch gain nothing.
_DATA_SHEETS = {
    "B300": Machine(1.5e15, 6e11, 2e-5, 5.3e12, 2.8e11),
    "B200": Machine(1.5e15, 6e11, 2e-5, 5.3e12, 1.8e11),
    "H200": Machine(6.6e14, 3e11, 2e-5, 3.2e12, 1.4e11),
    "H100 PCIe": Machine(5e14, 4e10, 3e-5, 1.3e12, 8e10),
    "H100": Machine(6.6e14, 3e11, 2e-5, 2.2e12, 8e10),
    "A100": Machine(2.1e14, 2e11, 2e-5, 1e12, 4e10),
    "L40": Machine(2.4e14, 2e10, 3e-5, 5.8e11, 4.8e10),
    "cpu": Machine(5e10, 1e9, 2e-4, 1e10, 0),
}
DEFAULT_MACHINE = _DATA_SHEETS["H200"]


def machine_of(device_name: str) -> Machine:
    """Look a device up by its name; one that is not known counts as an H200."""
    return next((machine for name, machine in _DATA_SHEETS.items() if name in device_name), DEFAULT_MACHINE)


def read_machine(path: Path, otherwise: Machine) -> Machine:
    """Read what ``profiling/calibrate.py`` has measured. Blocks the host.

    Args:
        otherwise: has what was not measured: exchanges, where one rank was alone.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measured = {"flops": content["product_flops"], "read_bytes_per_second": content["read_bytes_per_second"]}
        measured |= content["links"].get("all_to_all", {})
        if not all(0 < float(number) < math.inf for number in measured.values()) or content["memory_bytes"] < 0:
            raise ValueError("a number is not positive")
        measured["memory_bytes"] = content["memory_bytes"]
        machine = dataclasses.replace(otherwise, **{name: float(number) for name, number in measured.items()})
    except OSError as error:
        raise RequestError(f"The calibration {path} cannot be read: {error.strerror}. Give another file.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RequestError(
            f"The calibration {path} is not what profiling/calibrate.py writes ({error}). Measure it again."
        ) from error
    return machine


def seconds(prediction: Prediction, machine: Machine) -> float:
    """Predict how long a step takes, if nothing overlaps. The audio stream may be bound by reading its weights."""
    return (
        (prediction.flops - prediction.audio_flops) / machine.flops
        + max(prediction.audio_flops / machine.flops, prediction.audio_bytes / machine.read_bytes_per_second)
        + (prediction.received_bytes + prediction.x0_bytes) / machine.bytes_per_second
        + prediction.collectives * machine.latency
    )


def shares(total: int, parts: int) -> tuple[int, ...]:
    """Split ``total`` into ``parts`` sizes that differ by one at most, larger ones first."""
    size, rest = divmod(total, parts)
    return tuple(size + (part < rest) for part in range(parts))


def predict(
    spec: TransformerSpec,
    video_tokens: int,
    audio_tokens: int,
    runs: Sequence[Run],
    *,
    num_ranks: int,
    prompts: int,
    element_size: int,
    video_to_audio: str,
    x0_passes: int = 0,
    rescales: bool = False,
) -> Prediction:
    """Count what one step costs a rank; bytes and operations are means over the ranks of the token axis.

    Args:
        num_ranks: of the token axis.
        prompts: of the rank's passes, different ones.
        x0_passes: that the rank receives from others of the guidance axis.
        rescales: whether guidance rescales.
    """
    p, s, a = num_ranks, video_tokens, audio_tokens
    d, da, cross = spec.video.width, spec.audio.width, spec.cross_width
    own, own_keys = s / p, s / p if video_to_audio == "partial" else s

    # By what of a run says how often: multiply-adds of video and of audio, and the audio stream's weights.
    parts = {
        "blocks": (12 * d * d * own + 2 * own * TEXT_TOKENS * d, 12 * da * da * a + 2 * a * TEXT_TOKENS * da, 12 * da),
        "video_self": (2 * d * d * own + 2 * own * s * d, 0, 0),
        "audio_self": (0, 2 * da * da * a + 2 * a * a * da, 2 * da),
        "audio_to_video": (2 * d * cross * own + 2 * own * a * cross, 2 * da * cross * a, 2 * cross),
        "video_to_audio": (2 * d * cross * own + 2 * a * own_keys * cross, 2 * da * cross * a, 2 * cross),
    }
    times = {name: [(run.passes, getattr(run, name)) for run in runs] for name in parts}
    total = {name: sum(passes * number for passes, number in found) for name, found in times.items()}
    video, audio = (sum(total[name] * part[stream] for name, part in parts.items()) for stream in (0, 1))
    if spec.prompt_adaln:
        video += (
            prompts * spec.num_layers * 2 * TEXT_TOKENS * (spec.video.context_dim * d + spec.audio.context_dim * da)
        )

    exchanges, gathers = (2 * sum(run.video_self for run in runs), sum(run.video_to_audio for run in runs))
    exchanged = 4 * s * d * element_size * (p - 1) / p**2
    if video_to_audio == "partial":
        gathered = (p - 1) * a * (cross * element_size + 4 * spec.audio.num_heads)
    else:
        gathered = (p - 1) * shares(s, p)[0] * 2 * cross * element_size
    local, most = math.ceil(own), max(run.passes for run in runs)
    return Prediction(
        all_to_alls=exchanges if p > 1 else 0,
        all_gathers=gathers + rescales if p > 1 else 0,
        received_bytes=round(exchanged * total["video_self"] + gathered * total["video_to_audio"]),
        x0_bytes=x0_passes * (local + a) * spec.video.out_channels * element_size,
        flops=round(2 * (video + audio)),
        attention_flops=round(4 * own * s * d * total["video_self"]),
        audio_flops=round(2 * audio),
        audio_bytes=sum(number * parts[name][2] for name, found in times.items() for _, number in found)
        * (da * element_size),
        weight_bytes=num_parameters(spec) * element_size,
        activation_bytes=most * local * element_size * (d * 12) + 4 * 2 * (local * d // 2 + s * cross // 2),
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
