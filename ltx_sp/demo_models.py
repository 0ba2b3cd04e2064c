"""The configurations of the demo's models: those of the published 19B and 22B, made tiny."""

from __future__ import annotations

from typing import Any

__all__ = ["GEMMA_CONFIG", "SPECIAL_TOKENS", "VERSIONS", "demo_config", "upsampler_config"]

VERSIONS = ("2.0", "2.3")
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")

_HIDDEN = 48  # width of the text encoder

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
        "model_type": "gemma3_text", "vocab_size": len(SPECIAL_TOKENS) + 256, "hidden_size": _HIDDEN,
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


def upsampler_config(version: str) -> dict[str, Any]:
    """Give the configuration that goes into the metadata of the latent upsampler's own file."""
    return {
        "_class_name": "LatentUpsampler",
        "in_channels": 128,
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": version == "2.0",
    }
