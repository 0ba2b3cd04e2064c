"""What one forward costs a rank, counted from the model's sizes. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from ltx_sp.errors import RequestError
from ltx_sp.spec import TEXT_TOKENS, StreamSpec, TransformerSpec


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
class Machine:
    """How fast a rank computes and exchanges: what the choice of a layout rests on, and nothing else.

    Args:
        flops: floating-point operations per second in products of the model's sizes.
        bytes_per_second: that a rank receives in an exchange.
        latency: seconds that an exchange takes at least.
    """

    flops: float
    bytes_per_second: float
    latency: float


# Two thirds of what data sheets promise for dense bf16 products and for the links between GPUs: not measured. The first
# name that is part of the device's counts.
_DATA_SHEETS = {
    "B300": Machine(1.5e15, 6e11, 2e-5),
    "B200": Machine(1.5e15, 6e11, 2e-5),
    "H200": Machine(6.6e14, 3e11, 2e-5),
    "H100 PCIe": Machine(5e14, 4e10, 3e-5),
    "H100": Machine(6.6e14, 3e11, 2e-5),
    "A100": Machine(2.1e14, 2e11, 2e-5),
    "L40": Machine(2.4e14, 2e10, 3e-5),
    "cpu": Machine(5e10, 1e9, 2e-4),
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
        link = content["links"].get("all_to_all")
        numbers = [content["product_flops"]]
        numbers += [link["bytes_per_second"], link["latency"]] if link else []
        if not all(0 < float(number) < math.inf for number in numbers):
            raise ValueError("a number is not positive")
        machine = Machine(*map(float, numbers), *(() if link else (otherwise.bytes_per_second, otherwise.latency)))
    except OSError as error:
        raise RequestError(f"The calibration {path} cannot be read: {error.strerror}. Give another file.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RequestError(
            f"The calibration {path} is not what profiling/calibrate.py writes ({error}). Measure it again."
        ) from error
    return machine


def seconds(prediction: Prediction, machine: Machine) -> float:
    """Predict how long a forward takes."""
    return (
        prediction.flops / machine.flops
        + prediction.received_bytes / machine.bytes_per_second
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
    *,
    num_ranks: int,
    batch: int,
    element_size: int,
    video_to_audio: str,
) -> Prediction:
    """Count what one forward costs one rank; bytes and operations are means over the ranks."""
    p, s, a, layers = num_ranks, video_tokens, audio_tokens, spec.num_layers
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
