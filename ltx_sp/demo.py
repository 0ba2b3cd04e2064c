"""Write a whole tiny checkpoint with random weights, in the published layout: python -m ltx_sp.demo DIR

It has every part that a published checkpoint has, under the same names, so that a generation can be
tried from end to end in seconds, without a GPU and without a download. What comes out is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx_sp.errors import LtxSpError, RequestError
from ltx_sp.model import upstream
from ltx_sp.model.dit import Transformer
from ltx_sp.spec import ModelSpec, parse_version, transformer_spec
from ltx_sp.weights.keymap import keymap

VERSIONS = ("2.0", "2.3")

_HIDDEN = 48  # width of the text encoder
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")

# Sizes that are too small for the model to be any good, and otherwise those of the published 19B and 22B.
# fmt: off
_TRANSFORMER: dict[str, Any] = {
    "_class_name": "AVTransformer3DModel", "num_layers": 2, "in_channels": 128, "out_channels": 128,
    "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64, "caption_channels": _HIDDEN,
    "audio_num_attention_heads": 4, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 32,
    "audio_out_channels": 128, "positional_embedding_type": "rope", "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048], "audio_positional_embedding_max_pos": [20],
    "rope_type": "split", "frequencies_precision": "float64", "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0, "norm_eps": 1e-6, "norm_elementwise_affine": False,
    "qk_norm": "rms_norm", "standardization_norm": "rms_norm", "activation_fn": "gelu-approximate",
    "attention_bias": True, "av_cross_ada_norm": True, "causal_temporal_positioning": True,
    "use_middle_indices_grid": True, "use_audio_video_cross_attention": True, "use_embeddings_connector": True,
    "connector_num_layers": 2, "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096], "connector_norm_output": True,
}
_TRANSFORMER_BY_VERSION: dict[str, dict[str, Any]] = {
    "2.0": {"connector_num_attention_heads": 4, "connector_attention_head_dim": _HIDDEN // 4},
    "2.3": {
        "apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True,
        "caption_projection_first_linear": False, "caption_projection_second_linear": False,
        "caption_proj_input_norm": False, "text_encoder_norm_type": "per_token_rms",
        "connector_num_attention_heads": 4, "connector_attention_head_dim": 16,
        "connector_apply_gated_attention": True,
        "audio_connector_num_attention_heads": 4, "audio_connector_attention_head_dim": 8,
    },
}

_VAE: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128,
    "patch_size": 4, "norm_layer": "pixel_norm", "latent_log_var": "uniform", "use_quant_conv": False,
    "causal_decoder": False, "timestep_conditioning": False, "decoder_base_channels": 8,
}
# Axes and multiplier of each resampling, with one residual block around each.
_DOWN = (("space_res", 1), ("time_res", 1), ("all_res", 1), ("all_res", 1))
_UP_BY_VERSION = {
    "2.0": (("all", 2), ("all", 2), ("all", 2)),
    "2.3": (("space", 2), ("time", 2), ("all", 1), ("all", 2)),
}

_AUDIO_VAE: dict[str, Any] = {
    "model": {"params": {"sampling_rate": 16000, "ddconfig": {
        "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "downsample_time": False,
        "in_channels": 2, "out_ch": 2, "ch": 128, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
        "dropout": 0.0, "mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height",
    }}},
    "preprocessing": {
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}

_GENERATOR: dict[str, Any] = {
    "stereo": True, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]],
}
_AMP = _GENERATOR | {
    "resblock": "AMP1", "activation": "snakebeta", "use_tanh_at_final": False, "use_bias_at_final": False,
}
_VOCODER_BY_VERSION: dict[str, dict[str, Any]] = {
    "2.0": _GENERATOR | {
        "resblock": "1", "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    },
    "2.3": {
        "vocoder": _AMP | {
            "upsample_initial_channel": 64,
            "upsample_rates": [5, 2, 2, 2, 2, 2], "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        },
        "bwe": _AMP | {
            "upsample_initial_channel": 32, "apply_final_activation": False,
            "upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "input_sampling_rate": 16000, "output_sampling_rate": 48000,
            "hop_length": 80, "n_fft": 512, "win_size": 512, "num_mels": 64,
        },
    },
}

GEMMA_CONFIG: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "vocab_size": len(_SPECIAL_TOKENS) + 256, "hidden_size": _HIDDEN,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 12, "sliding_window": 1024, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    },
}
# fmt: on


def demo_config(version: str) -> dict[str, Any]:
    """Give the configuration that goes into the checkpoint's metadata, section by section."""

    def blocks(resamplings: tuple[tuple[str, int], ...]) -> list[list[Any]]:
        listed: list[list[Any]] = [["res_x", {"num_layers": 1}]]
        for axes, multiplier in resamplings:
            options: dict[str, Any] = {"multiplier": multiplier}
            if version == "2.0" and not axes.endswith("_res"):
                options["residual"] = True
            listed += [[f"compress_{axes}", options], ["res_x", {"num_layers": 1}]]
        return listed

    vae = _VAE | {"encoder_blocks": blocks(_DOWN), "decoder_blocks": blocks(_UP_BY_VERSION[version])}
    if version != "2.0":
        vae["spatial_padding_mode"] = "zeros"
    return {
        "transformer": _TRANSFORMER | _TRANSFORMER_BY_VERSION[version],
        "scheduler": {"_class_name": "RectifiedFlowScheduler"},
        "vae": vae,
        "audio_vae": _AUDIO_VAE,
        "vocoder": _VOCODER_BY_VERSION[version],
    }


def write_demo(
    folder: Path,
    version: str = "2.3",
    seed: int = 0,
    *,
    config: Mapping[str, Any] | None = None,
    gemma_config: Mapping[str, Any] = GEMMA_CONFIG,
) -> Path:
    """Write ``ltx-<version>-demo.safetensors`` and ``gemma/`` into ``folder``; return the path of the former.

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

    with _whole_folder(folder) as unfinished:
        name = f"ltx-{version}-demo.safetensors"
        metadata = {"config": json.dumps(config), "model_version": f"{version}.0"}
        _save(weights, unfinished / name, metadata)
        gemma = unfinished / "gemma"
        gemma.mkdir()
        _save(text_encoder, gemma / "model.safetensors", {"format": "pt"})
        for file, content in (
            ("config.json", gemma_config),
            ("tokenizer.json", _tokenizer()),
            ("tokenizer_config.json", {f"{token[1:-1]}_token": token for token in _SPECIAL_TOKENS}),
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


def _tokenizer() -> dict[str, Any]:
    """Describe a tokenizer that spells every text in UTF-8 bytes, after a <bos>."""
    vocabulary = {token: place for place, token in enumerate(_SPECIAL_TOKENS)}
    vocabulary |= {f"<0x{byte:02X}>": len(_SPECIAL_TOKENS) + byte for byte in range(256)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary[token], "content": token, **flags, "special": True} for token in _SPECIAL_TOKENS
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
    print(f"checkpoint    {path}\ntext encoder  {path.parent / 'gemma'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
