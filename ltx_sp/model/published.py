"""Published configuration sections -> the arguments of diffusers' constructors.

Plain dictionaries on both sides. What the sections state is passed on, what has no safe default
must be stated, and what is not implemented is refused by name; a library's defaults decide nothing.
"""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.spec import (
    AUDIO_LATENT_CHANNELS,
    AUDIO_LATENT_SCALE,
    AUDIO_MEL_BINS,
    LATENT_CHANNELS,
    SPATIAL_SCALE,
    TEMPORAL_SCALE,
)

Section = Mapping[str, Any]

# What a file may ask to be built, far above what any published one does.
_MAX_CHANNELS = 2**16
_MAX_BLOCKS = 256

_NORM_GROUPS = 32  # of the upsampler's group norms
_RESAMPLINGS = {"space": "spatial", "time": "temporal", "all": "spatiotemporal"}


def need(section: Section, key: str, component: str) -> Any:
    """Read a key that must be there."""
    if section.get(key) is None:
        raise WeightsError(
            f"The checkpoint's {component} configuration lacks {key!r}, which has no safe default. "
            "Fetch the checkpoint again, or convert it with its metadata."
        )
    return section[key]


def refuse(section: Section, component: str, implemented: Mapping[str, Sequence[Any]]) -> None:
    """Raise UnsupportedError where a key is there with none of its implemented values."""
    for key, values in implemented.items():
        if key in section and section[key] not in values:
            raise UnsupportedError(
                f"The checkpoint's {component} wants {key} = {reprlib.repr(section[key])}; ltx_sp implements "
                f"{' or '.join(map(repr, values))}."
            )


def connector_arguments(section: Section, hidden: int, num_states: int) -> dict[str, Any]:
    """Read ``config.transformer`` for ``LTX2TextConnectors``.

    Args:
        hidden: width of the text encoder's states.
        num_states: states that it gives for each token: one per layer, and the embedding.
    """
    name = "transformer"
    refuse(section, name, {"connector_norm_output": (True,), "rope_type": ("split",)})
    refuse(section, name, {"frequencies_precision": ("float64",), "connector_ff_bias": (True,)})
    caption_channels = int(need(section, "caption_channels", name))
    if caption_channels != hidden:
        raise WeightsError(
            f"The checkpoint was trained on text states of width {caption_channels}; the text encoder gives {hidden}. "
            "Pass the Gemma folder that belongs to this checkpoint."
        )
    # From 2.3 on each stream has its own projection, before its connector; in 2.0 both share one, and
    # the transformer projects what the connectors return.
    per_stream = bool(section.get("caption_proj_before_connector", False))
    norm = str(section.get("text_encoder_norm_type") or ("per_token_rms" if per_stream else "")).lower()
    if norm != ("per_token_rms" if per_stream else ""):
        raise UnsupportedError(
            f"The checkpoint's transformer wants text_encoder_norm_type = {norm!r} with caption_proj_before_connector "
            f"= {per_stream}; ltx_sp implements 'per_token_rms' with True, and none with False."
        )
    heads = int(need(section, "connector_num_attention_heads", name))
    head_dim = int(need(section, "connector_attention_head_dim", name))
    audio_heads = int(section.get("audio_connector_num_attention_heads") or heads)
    audio_head_dim = int(section.get("audio_connector_attention_head_dim") or head_dim)
    layers = int(need(section, "connector_num_layers", name))
    registers = int(need(section, "connector_num_learnable_registers", name))
    gated = bool(section.get("connector_apply_gated_attention", False))
    return {
        "caption_channels": caption_channels,
        "text_proj_in_factor": num_states,
        "video_connector_num_attention_heads": heads,
        "video_connector_attention_head_dim": head_dim,
        "video_connector_num_layers": layers,
        "video_connector_num_learnable_registers": registers,
        "video_gated_attn": gated,
        "audio_connector_num_attention_heads": audio_heads,
        "audio_connector_attention_head_dim": audio_head_dim,
        "audio_connector_num_layers": int(section.get("audio_connector_num_layers") or layers),
        "audio_connector_num_learnable_registers": registers,
        "audio_gated_attn": gated,
        "connector_rope_base_seq_len": int(need(section, "connector_positional_embedding_max_pos", name)[0]),
        "rope_theta": float(need(section, "positional_embedding_theta", name)),
        "rope_double_precision": True,
        "causal_temporal_positioning": False,
        "rope_type": "split",
        "per_modality_projections": per_stream,
        "video_hidden_dim": heads * head_dim,
        "audio_hidden_dim": audio_heads * audio_head_dim,
        "proj_bias": per_stream,
    }


def video_vae_arguments(section: Section) -> dict[str, Any]:
    """Read ``config.vae`` for ``AutoencoderKLLTX2Video``."""
    need(section, "timestep_conditioning", "vae")
    refuse(section, "vae", {"dims": (3,), "norm_layer": ("pixel_norm",), "latent_log_var": ("uniform",)})
    refuse(section, "vae", {"use_quant_conv": (False,), "normalize_latent_channels": (False,)})
    patch_size = int(need(section, "patch_size", "vae"))
    down_layers, down = _alternating(section, "encoder_blocks", "_res")
    # The decoder's list runs from the pixels to the latents, against the order in which its blocks run.
    up_layers, up = _alternating(section, "decoder_blocks", "")
    for blocks in (down, up):
        kinds = [kind for kind, _ in blocks]
        spatial = patch_size * 2 ** sum(kind != "temporal" for kind in kinds)
        temporal = 2 ** sum(kind != "spatial" for kind in kinds)
        if (spatial, temporal) != (SPATIAL_SCALE, TEMPORAL_SCALE):
            raise UnsupportedError(
                f"The checkpoint's vae scales by {spatial} in space and {temporal} in time; ltx_sp implements "
                f"{SPATIAL_SCALE} and {TEMPORAL_SCALE}."
            )
    down_factors = [int(options["multiplier"]) for _, options in down]
    up_factors = [int(options["multiplier"]) for _, options in up]
    base = int(section.get("decoder_base_channels") or 128)  # the 2.0 file does not say
    # 2.0 has no padding mode at all, and pads its two sides differently.
    mode = section.get("spatial_padding_mode")
    return {
        "in_channels": int(need(section, "in_channels", "vae")),
        "out_channels": int(need(section, "out_channels", "vae")),
        "latent_channels": int(need(section, "latent_channels", "vae")),
        "block_out_channels": _running_products(LATENT_CHANNELS, down_factors),
        "down_block_types": ("LTX2VideoDownBlock3D",) * len(down),
        "layers_per_block": down_layers,
        "spatio_temporal_scaling": (True,) * len(down),
        "downsample_type": tuple(kind for kind, _ in down),
        "decoder_block_out_channels": _running_products(base, up_factors),
        "decoder_layers_per_block": up_layers,
        "decoder_spatio_temporal_scaling": (True,) * len(up),
        "decoder_inject_noise": (False,) * len(up_layers),
        # diffusers turns round every list of the decoder but this one.
        "upsample_type": tuple(kind for kind, _ in reversed(up)),
        "upsample_residual": tuple(bool(options.get("residual", False)) for _, options in up),
        "upsample_factor": tuple(up_factors),
        "timestep_conditioning": False,
        "patch_size": patch_size,
        "patch_size_t": 1,
        "resnet_norm_eps": 1e-6,
        "scaling_factor": float(section.get("scaling_factor") or 1.0),
        "encoder_causal": True,
        "decoder_causal": bool(need(section, "causal_decoder", "vae")),
        "encoder_spatial_padding_mode": mode or section.get("encoder_spatial_padding_mode") or "zeros",
        "decoder_spatial_padding_mode": mode or section.get("decoder_spatial_padding_mode") or "reflect",
        "spatial_compression_ratio": SPATIAL_SCALE,
        "temporal_compression_ratio": TEMPORAL_SCALE,
    }


def _running_products(start: int, factors: Sequence[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(factors, lambda total, factor: total * factor, initial=start))[1:]


def _alternating(section: Section, key: str, suffix: str) -> tuple[tuple[int, ...], list[tuple[str, Section]]]:
    """Split a list of blocks into the depths of its residual blocks and the resamplings between them."""
    blocks = [(str(name), options or {}) for name, options in need(section, key, "vae")]
    expected = {f"compress_{axes}{suffix}": kind for axes, kind in _RESAMPLINGS.items()}
    layers, resamplings = [], []
    for place, (name, options) in enumerate(blocks):
        if place % 2 == 0 and name == "res_x":
            layers.append(int(need(options, "num_layers", f"vae {key}")))
            known = {"num_layers"}
        elif place % 2 and name in expected:
            need(options, "multiplier", f"vae {key}")
            resamplings.append((expected[name], options))
            known = {"multiplier", "residual"}
        else:
            raise UnsupportedError(
                f"The checkpoint's vae has {name!r} at place {place} of {key}; ltx_sp implements 'res_x' at even "
                f"places and {', '.join(map(repr, expected))} at odd ones."
            )
        unknown = sorted(option for option in set(options) - known if options[option])
        if unknown:
            raise UnsupportedError(
                f"The checkpoint's vae sets {unknown[0]!r} in block {place} of {key}: not implemented."
            )
    if len(blocks) % 2 == 0:
        raise UnsupportedError(
            f"The checkpoint's vae ends its {key} with a resampling; ltx_sp implements 'res_x' there."
        )
    return tuple(layers), resamplings


def audio_vae_arguments(section: Section, sampling_rate: int, hop_length: int) -> dict[str, Any]:
    """Read ``config.audio_vae`` for ``AutoencoderKLLTX2Audio``."""
    name = "audio_vae"
    params = section.get("model", {}).get("params", {})
    ddconfig = need(params, "ddconfig", name)
    preprocessing = section.get("preprocessing", {})
    refuse(ddconfig, name, {"norm_type": ("pixel",), "causality_axis": ("height",), "double_z": (True,)})
    refuse(ddconfig, name, {"z_channels": (AUDIO_LATENT_CHANNELS,), "downsample_time": (False,)})
    mel_bins = ddconfig.get("mel_bins") or preprocessing.get("mel", {}).get("n_mel_channels")
    if mel_bins != AUDIO_MEL_BINS * AUDIO_LATENT_SCALE:
        raise UnsupportedError(
            f"The checkpoint's audio_vae has {mel_bins} mel bins; ltx_sp implements "
            f"{AUDIO_MEL_BINS * AUDIO_LATENT_SCALE}."
        )
    return {
        "base_channels": int(need(ddconfig, "ch", name)),
        "output_channels": int(need(ddconfig, "out_ch", name)),
        "ch_mult": tuple(need(ddconfig, "ch_mult", name)),
        "num_res_blocks": int(need(ddconfig, "num_res_blocks", name)),
        "attn_resolutions": tuple(ddconfig.get("attn_resolutions") or ()),
        "in_channels": int(need(ddconfig, "in_channels", name)),
        "resolution": int(need(ddconfig, "resolution", name)),
        "latent_channels": AUDIO_LATENT_CHANNELS,
        "norm_type": "pixel",
        "causality_axis": "height",
        "dropout": 0.0,
        "mid_block_add_attention": bool(need(ddconfig, "mid_block_add_attention", name)),
        "sample_rate": sampling_rate,
        "mel_hop_length": hop_length,
        "is_causal": bool(preprocessing.get("stft", {}).get("causal", True)),
        "mel_bins": mel_bins,
        "double_z": True,
    }


def vocoder_arguments(section: Section, sampling_rate: int, hop_length: int) -> dict[str, Any]:
    """Read ``config.vocoder`` for ``LTX2Vocoder``, or ``LTX2VocoderWithBWE`` where it has a part ``bwe``.

    Args:
        sampling_rate, hop_length: of the mel spectrogram that it is given.
    """
    mel_channels = AUDIO_MEL_BINS * AUDIO_LATENT_SCALE
    if "bwe" not in section:
        arguments = _generator_arguments(section, "vocoder", mel_channels)
        arguments["output_sampling_rate"] = sampling_rate // hop_length * math.prod(arguments["upsample_factors"])
        return arguments
    bwe = section["bwe"]
    arguments = _generator_arguments(need(section, "vocoder", "vocoder"), "vocoder", mel_channels)
    extension = _generator_arguments(bwe, "vocoder's bwe", int(need(bwe, "num_mels", "vocoder's bwe")))
    # What it adds to the resampled waveform is a residual: only the sum is clamped.
    extension["final_act_fn"] = None
    arguments.update((f"bwe_{key}", value) for key, value in extension.items())
    renamed = {"filter_length": "n_fft", "hop_length": "hop_length", "window_length": "win_size"}
    renamed |= {"num_mel_channels": "num_mels"}
    renamed |= {key: key for key in ("input_sampling_rate", "output_sampling_rate")}
    arguments.update((ours, int(need(bwe, theirs, "vocoder's bwe"))) for ours, theirs in renamed.items())
    return arguments


def _generator_arguments(section: Section, name: str, mel_channels: int) -> dict[str, Any]:
    """Arguments of one generator: HiFi-GAN (resblock "1") or BigVGAN (resblock "AMP1")."""
    refuse(section, name, {"resblock": ("1", "AMP1"), "stereo": (True,)})
    snake = section.get("resblock", "1") == "AMP1"
    if snake:
        need(section, "activation", name)
        refuse(section, name, {"activation": ("snakebeta",)})
    final = None
    if section.get("apply_final_activation", True):
        final = "tanh" if section.get("use_tanh_at_final", True) else "clamp"
    return {
        "in_channels": 2 * mel_channels,
        "hidden_channels": int(need(section, "upsample_initial_channel", name)),
        "out_channels": 2,
        "upsample_kernel_sizes": list(need(section, "upsample_kernel_sizes", name)),
        "upsample_factors": list(need(section, "upsample_rates", name)),
        "resnet_kernel_sizes": list(need(section, "resblock_kernel_sizes", name)),
        "resnet_dilations": [list(dilations) for dilations in need(section, "resblock_dilation_sizes", name)],
        "act_fn": "snakebeta" if snake else "leaky_relu",
        "leaky_relu_negative_slope": 0.1,
        "antialias": snake,
        "antialias_ratio": 2,
        "antialias_kernel_size": 12,
        "final_act_fn": final,
        "final_bias": bool(section.get("use_bias_at_final", True)),
    }


def upsampler_arguments(section: Section) -> dict[str, Any]:
    """Read the configuration of a latent upsampler, published or diffusers', for ``LTX2LatentUpsamplerModel``."""
    name = "upsampler"
    refuse(section, name, {"temporal_upsample": (False,), "spatial_upsample": (True,), "dims": (3,)})
    refuse(section, name, {"in_channels": (LATENT_CHANNELS,)})
    refuse(section, name, dict.fromkeys(("spatial_scale", "rational_spatial_scale"), (2.0,)))
    refuse(section, name, dict.fromkeys(("rational_resampler", "use_rational_resampler"), (True, False)))
    channels, blocks = (need(section, key, name) for key in ("mid_channels", "num_blocks_per_stage"))
    if not _is_count(channels, _MAX_CHANNELS) or channels % _NORM_GROUPS:
        raise WeightsError(
            f"The upsampler has mid_channels = {reprlib.repr(channels)}; it must be a multiple of {_NORM_GROUPS} up to "
            f"{_MAX_CHANNELS}. Fetch its file again."
        )
    if not _is_count(blocks, _MAX_BLOCKS):
        raise WeightsError(
            f"The upsampler has num_blocks_per_stage = {reprlib.repr(blocks)}; it must be a number from 1 to "
            f"{_MAX_BLOCKS}. Fetch its file again."
        )
    return {
        "in_channels": LATENT_CHANNELS,
        "mid_channels": channels,
        "num_blocks_per_stage": blocks,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "rational_spatial_scale": 2.0,
        # Where it is not stated it is the plain one; the other's tensors have other names, so nothing is mistaken.
        "use_rational_resampler": bool(section.get("rational_resampler", section.get("use_rational_resampler", False))),
    }


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most  # `type` and not `isinstance`: True is an int
