"""Write a whole tiny checkpoint with random weights, in the published layout: python -m ltx_sp.demo DIR

It has every part that a published checkpoint has, under the same names, and beside it lie a latent
upsampler, a distilled LoRA and a picture, so that every pipeline can be tried from end to end in
seconds, without a GPU and without a download. What comes out is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import struct
import sys
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx_sp.demo_models import GEMMA_CONFIG, SPECIAL_TOKENS, VERSIONS, demo_config, upsampler_config
from ltx_sp.errors import LtxSpError, RequestError
from ltx_sp.model import upstream
from ltx_sp.model.dit import Transformer
from ltx_sp.spec import ModelSpec, parse_version, transformer_spec
from ltx_sp.weights.keymap import keymap

__all__ = ["GEMMA_CONFIG", "VERSIONS", "demo_config", "main", "write_demo"]

_LORA_RANK = 4


def write_demo(
    folder: Path,
    version: str = "2.3",
    seed: int = 0,
    *,
    config: Mapping[str, Any] | None = None,
    gemma_config: Mapping[str, Any] = GEMMA_CONFIG,
) -> Path:
    """Write ``ltx-<version>-demo.safetensors`` into ``folder``; return its path.

    Beside it go ``gemma/``, ``upsampler.safetensors``, ``distilled_lora.safetensors`` and ``image.png``.
    The same arguments always give the same bytes. The folder appears whole or not at all.

    Args:
        config, gemma_config: of a model of another size; None for ``demo_config(version)``.

    Raises:
        RequestError: no such version, or the folder holds something already.
    """
    if version not in VERSIONS:
        raise RequestError(f"There is no demo of version {version!r}. Choose one of {', '.join(VERSIONS)}.")
    config = config or demo_config(version)
    spec = ModelSpec(
        version=parse_version(version),
        layout="published",
        transformer=transformer_spec(config["transformer"]),
        sections=config,
    )
    with torch.device("meta"):
        transformer = Transformer(spec.transformer)
    modules = {
        "transformer": transformer,
        "connectors": upstream.build_connectors(spec, gemma_config),
        "video_vae": upstream.build_video_vae(spec),
        "audio_vae": upstream.build_audio_vae(spec),
        "vocoder": upstream.build_vocoder(spec),
    }
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for component, module in modules.items():
        weights |= _random_weights(component, module, config, generator)
    text_encoder = _random_weights("text_encoder", upstream.build_text_encoder(gemma_config), config, generator)
    about_upsampler = upsampler_config(version)
    upsampler = _random_weights("upsampler", upstream.build_upsampler(about_upsampler), config, generator)

    with _whole_folder(folder) as unfinished:
        name = f"ltx-{version}-demo.safetensors"
        metadata = {"config": json.dumps(config), "model_version": f"{version}.0"}
        _save(weights, unfinished / name, metadata)
        _save(upsampler, unfinished / "upsampler.safetensors", {"config": json.dumps(about_upsampler)})
        _save(_random_lora(transformer, generator), unfinished / "distilled_lora.safetensors", {"format": "pt"})
        (unfinished / "image.png").write_bytes(_png(_picture(height=192, width=256)))
        gemma = unfinished / "gemma"
        gemma.mkdir()
        _save(text_encoder, gemma / "model.safetensors", {"format": "pt"})
        for file, content in (
            ("config.json", gemma_config),
            ("tokenizer.json", _tokenizer()),
            ("tokenizer_config.json", {f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS}),
        ):
            (gemma / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder / name


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} exists and is not an empty folder. Give the demo a folder of its own.")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write bf16 tensors as safetensors. Not by its library, which puts the metadata in any order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.contiguous().view(torch.int16).numpy().astype("<i2").tobytes())


def _random_weights(
    component: str, module: nn.Module, sections: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw every parameter of ``module``, under checkpoint names; its persistent buffers go along as they are."""
    names = keymap("published", component, sections)
    drawn = {}
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            drawn[f"{path}.{name}" if path else name] = _draw(component, owner, name, parameter, generator)
    state = {name: drawn.get(name, tensor) for name, tensor in module.state_dict().items()}
    if component == "vocoder":
        state |= _spectrogram_bases(state)
    return {names.to_checkpoint(name): tensor.to(torch.bfloat16) for name, tensor in state.items()}


def _draw(component: str, owner: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    shape = parameter.shape
    noise = torch.randn(shape, generator=generator)
    if name == "learnable_registers":
        return noise
    if name in ("alpha", "beta"):  # of the snake activations, as logarithms
        return torch.zeros(shape)
    if name == "bias":
        return 0.02 * noise
    if len(shape) == 1:  # norms; Gemma's add 1 to their weight
        return torch.zeros(shape) if component == "text_encoder" else torch.ones(shape)
    if isinstance(owner, nn.ConvTranspose1d):
        fan_in = shape[0] * shape[2] / owner.stride[0]
    elif isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        fan_in = math.prod(shape[1:])
    else:  # embeddings and tables
        fan_in = shape[-1]
    gain = 1.0
    if component == "vocoder" and isinstance(owner, nn.Conv1d) and shape[0] == 2:
        # White noise at full level is no pleasure to listen to. The snake activations of 2.3, whose last
        # layer has no bias, amplify.
        gain = 0.002 if owner.bias is None else 0.3
    return gain * noise / math.sqrt(fan_in)


def _spectrogram_bases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill in the bandwidth extension's short-time Fourier transform and its mel filters, where there are any."""
    if "mel_stft.mel_basis" not in state:
        return {}
    rows, _, window = state["mel_stft.stft_fn.forward_basis"].shape
    num_mels, num_frequencies = state["mel_stft.mel_basis"].shape
    angles = torch.arange(rows // 2)[:, None] * torch.arange(window) * (2.0 * math.pi / window)
    forward = (torch.cat([angles.cos(), -angles.sin()]) * torch.hann_window(window))[:, None]
    # Triangles whose corners are evenly spaced on the mel scale up to the Nyquist frequency of 8 kHz.
    top = 2595.0 * math.log10(1.0 + 8000.0 / 700.0)
    corners = 700.0 * (10.0 ** (torch.linspace(0.0, top, num_mels + 2) / 2595.0) - 1.0)
    frequencies = torch.linspace(0.0, 8000.0, num_frequencies)
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return {
        "mel_stft.stft_fn.forward_basis": forward,
        "mel_stft.stft_fn.inverse_basis": forward / window,
        "mel_stft.mel_basis": torch.minimum(rising, falling).clamp(min=0.0),
    }


def _random_lora(transformer: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a LoRA for every linear layer of the blocks that changes a weight by about a fifth of its size."""
    factors = {}
    for name, layer in transformer.named_modules():
        if name.startswith("transformer_blocks.") and isinstance(layer, nn.Linear):
            down = torch.randn(_LORA_RANK, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
            up = torch.randn(layer.out_features, _LORA_RANK, generator=generator) * 0.2 / math.sqrt(_LORA_RANK)
            factors[f"diffusion_model.{name}.lora_A.weight"] = down.to(torch.bfloat16)
            factors[f"diffusion_model.{name}.lora_B.weight"] = up.to(torch.bfloat16)
    return factors


def _picture(height: int, width: int) -> Tensor:
    """Paint a sun above the sea: ``[height, width, 3]``, uint8."""
    y = torch.arange(height)[:, None, None] / height
    x = torch.arange(width)[None, :, None] / height
    is_sun = (x - 0.5 * width / height) ** 2 + (y - 0.38) ** 2 < 0.18**2
    sun = torch.tensor([255.0, 230.0, 120.0])
    sky = torch.tensor([70.0, 120.0, 200.0]) + y * torch.tensor([250.0, 120.0, -60.0])
    sea = torch.tensor([20.0, 60.0, 110.0]) + (1.0 - y) * torch.tensor([200.0, 120.0, 60.0])
    picture = torch.where(y < 0.6, torch.where(is_sun, sun, sky), sea)
    return picture.clamp(0.0, 255.0).to(torch.uint8)


def _png(picture: Tensor) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = picture.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in picture)  # 0: a row as it is, not as a difference
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _tokenizer() -> dict[str, Any]:
    """Describe a tokenizer that spells every text in UTF-8 bytes, after a <bos>."""
    vocabulary = {token: place for place, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {f"<0x{byte:02X}>": len(SPECIAL_TOKENS) + byte for byte in range(256)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary[token], "content": token, **flags, "special": True} for token in SPECIAL_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocabulary["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": False,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ltx_sp.demo", description="Write a tiny random checkpoint.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to; created, or empty")
    parser.add_argument("--version", choices=VERSIONS, default="2.3", help="which model (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        path = write_demo(arguments.folder, arguments.version, arguments.seed)
    except LtxSpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    for what, file in (
        ("checkpoint", path.name),
        ("text encoder", "gemma"),
        ("upsampler", "upsampler.safetensors"),
        ("distilled LoRA", "distilled_lora.safetensors"),
        ("image", "image.png"),
    ):
        print(f"{what:14s}  {path.parent / file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
