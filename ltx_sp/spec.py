"""What a checkpoint says about its model, and the arithmetic between pixels, latents and tokens.

No torch. A ``ModelSpec`` comes from the checkpoint's own metadata and never from a library's
defaults: keys that this code does not know are tolerated, values that it does not implement are
refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ltx_sp.errors import UnsupportedError, WeightsError

LATENT_CHANNELS = 128
TEMPORAL_SCALE = 8
SPATIAL_SCALE = 32
AUDIO_LATENT_CHANNELS = 8
AUDIO_MEL_BINS = 16
AUDIO_LATENT_SCALE = 4
TEXT_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """The transformer's numbers for one modality.

    Args:
        max_pos: extent of each position axis that maps to the whole RoPE range: seconds, then pixels.
        ff_bias: whether the feed-forward linears carry a bias.
    """

    num_heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    context_dim: int
    max_pos: tuple[int, ...]
    ff_bias: bool = True

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class TransformerSpec:
    """The audio-video transformer, as its checkpoint describes it.

    Args:
        timestep_scale: multiplies sigma in [0, 1] before the sinusoidal embedding.
        gate_timestep_scale: the same for the gates of the cross-modal attentions
            (``av_ca_timestep_scale_multiplier``).
        prompt_modulation: text attention is modulated (rows 6 to 8 of the block's table, and the prompt table).
        prompt_adaln: the prompt's modulation also depends on sigma, so text keys change every step.
        caption_channels: width of the connectors' output where the transformer projects it itself
            (2.0); None where the projection precedes the connectors.
    """

    num_layers: int
    video: StreamSpec
    audio: StreamSpec
    rope_theta: float
    norm_eps: float
    timestep_scale: float
    gate_timestep_scale: float
    gated_attention: bool
    prompt_modulation: bool
    prompt_adaln: bool
    caption_channels: int | None
    keyframes_embedding: bool

    @property
    def cross_width(self) -> int:
        """Inner width of the cross-modal attentions: the audio heads' in both directions."""
        return self.audio.width

    @property
    def cross_max_pos(self) -> int:
        """Extent in seconds of the time axis that both cross-modal tables share."""
        return max(self.video.max_pos[0], self.audio.max_pos[0])


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model as one checkpoint holds it.

    Args:
        version: ``(2, 3, 0)`` and the like; ``()`` where the checkpoint does not say, which compares
            below every version.
        layout: ``"published"`` (one safetensors file, original names) or ``"diffusers"`` (a folder).
        sections: the untouched configuration by component (``transformer``, ``vae``, ``audio_vae``,
            ``vocoder``, and ``connectors`` in the diffusers layout).
    """

    version: tuple[int, ...]
    layout: str
    transformer: TransformerSpec
    sections: Mapping[str, Mapping[str, Any]] = dataclasses.field(hash=False, compare=False)

    @property
    def version_name(self) -> str:
        return ".".join(map(str, self.version)) or "unversioned (taken as 2.0)"


@dataclasses.dataclass(frozen=True)
class LatentShape:
    """The size of one clip in latent space.

    Args:
        frames, height, width: video latent cells; one token each, in that order, row-major.
        audio_frames: audio latent frames, 25 per second; one token each.
    """

    frames: int
    height: int
    width: int
    audio_frames: int

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width


def latent_shape(num_frames: int, height: int, width: int, frame_rate: float, spec: ModelSpec) -> LatentShape:
    """Latent cells of a clip of ``num_frames`` frames of ``height`` x ``width`` pixels at ``frame_rate`` per second.

    The caller has checked that the sizes fit the VAE (``num_frames`` = 8k + 1, sides multiples of 32).
    """
    return LatentShape(
        frames=(num_frames - 1) // TEMPORAL_SCALE + 1,
        height=height // SPATIAL_SCALE,
        width=width // SPATIAL_SCALE,
        audio_frames=round(num_frames / frame_rate * audio_latents_per_second(spec)),
    )


def audio_latents_per_second(spec: ModelSpec) -> float:
    """25 in every published model: sampling rate / hop length / 4."""
    sampling_rate, hop_length = audio_sampling(spec)
    return sampling_rate / hop_length / AUDIO_LATENT_SCALE


def audio_sampling(spec: ModelSpec) -> tuple[int, int]:
    """Sampling rate in Hz and hop length in samples of the mel spectrogram behind the audio latents."""
    section = spec.sections.get("audio_vae") or {}
    if "sample_rate" in section:
        return int(section["sample_rate"]), int(section["mel_hop_length"])
    params = section.get("model", {}).get("params", {})
    stft = section.get("preprocessing", {}).get("stft", {})
    return int(params.get("sampling_rate", 16000)), int(stft.get("hop_length", 160))


def decoder_reflects(spec: ModelSpec) -> bool:
    """Whether the video VAE's decoder pads by reflection, which takes two latent cells each way (2.0's does)."""
    section = spec.sections.get("vae") or {}
    mode = section.get("spatial_padding_mode") or section.get("decoder_spatial_padding_mode") or "reflect"
    return bool(section) and mode == "reflect"


def parse_version(text: str | None) -> tuple[int, ...]:
    """``"2.3.0"`` -> ``(2, 3, 0)``; ``()`` for nothing or nonsense. A pre-release suffix is ignored."""
    numbers = []
    for part in (text or "").replace("-", ".").split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def nearest_valid(value: int, step: int, offset: int = 0) -> int:
    """The number of the form ``step * k + offset``, k >= 1 (or 0 with an offset), closest to ``value``."""
    k = math.floor((value - offset) / step + 0.5)
    return step * max(k, 0 if offset else 1) + offset


# What the published `config.transformer` must say where it says anything: other values exist in
# other model families, and are not implemented here.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "rope_type": ("split",),
    "frequencies_precision": ("float64",),
    "positional_embedding_type": ("rope",),
    "qk_norm": ("rms_norm",),
    "standardization_norm": ("rms_norm",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "causal_temporal_positioning": (True,),
    "use_middle_indices_grid": (True,),
    "av_cross_ada_norm": (True,),
    "use_audio_video_cross_attention": (True,),
    "use_embeddings_connector": (True,),
    "caption_projection_first_linear": (False,),
    "caption_projection_second_linear": (False,),
    "caption_proj_input_norm": (False,),
    "adaptive_norm": ("single_scale_shift",),
}

_IMPLEMENTED_DIFFUSERS: dict[str, tuple[Any, ...]] = {
    "rope_type": ("split",),
    "rope_double_precision": (True,),
    "qk_norm": ("rms_norm_across_heads",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_out_bias": (True,),
    "norm_elementwise_affine": (False,),
    "patch_size": (1,),
    "patch_size_t": (1,),
    "audio_patch_size": (1,),
    "audio_patch_size_t": (1,),
    "causal_offset": (1,),
    "audio_ff_bias": (True,),
}


def _refuse_unimplemented(section: Mapping[str, Any], implemented: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in implemented.items():
        if key in section and section[key] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise UnsupportedError(
                f"The checkpoint's transformer wants {key} = {section[key]!r}; ltx_sp implements {expected}. "
                "Use a checkpoint of the LTX-2 family."
            )


class _Section:
    """Reads one configuration section; a key without a default must be there."""

    def __init__(self, section: Mapping[str, Any], name: str):
        self._section, self._name = section, name

    def need(self, key: str) -> Any:
        if self._section.get(key) is None:
            raise WeightsError(
                f"The checkpoint's {self._name} configuration lacks {key!r}, which has no safe default. "
                "Fetch the checkpoint again, or convert it with its metadata."
            )
        return self._section[key]

    def get(self, key: str, default: Any) -> Any:
        value = self._section.get(key)
        return default if value is None else value


def transformer_spec(section: Mapping[str, Any]) -> TransformerSpec:
    """Read the published ``config.transformer`` section.

    Raises:
        WeightsError: a key that decides the numerics is absent.
        UnsupportedError: a key has a value that this code does not implement.
    """
    _refuse_unimplemented(section, _IMPLEMENTED)
    read = _Section(section, "transformer")
    need, get = read.need, read.get
    for key in ("rope_type", "frequencies_precision"):
        need(key)
    prompt_modulation = bool(get("cross_attention_adaln", False))
    spec = TransformerSpec(
        num_layers=int(need("num_layers")),
        video=StreamSpec(
            num_heads=int(need("num_attention_heads")),
            head_dim=int(need("attention_head_dim")),
            in_channels=int(need("in_channels")),
            out_channels=int(need("out_channels")),
            context_dim=int(need("cross_attention_dim")),
            max_pos=tuple(need("positional_embedding_max_pos")),
            ff_bias=bool(get("ff_bias", True)),
        ),
        audio=StreamSpec(
            num_heads=int(need("audio_num_attention_heads")),
            head_dim=int(need("audio_attention_head_dim")),
            in_channels=int(get("audio_in_channels", need("audio_out_channels"))),
            out_channels=int(need("audio_out_channels")),
            context_dim=int(need("audio_cross_attention_dim")),
            max_pos=tuple(need("audio_positional_embedding_max_pos")),
        ),
        rope_theta=float(need("positional_embedding_theta")),
        norm_eps=float(need("norm_eps")),
        timestep_scale=float(need("timestep_scale_multiplier")),
        gate_timestep_scale=float(need("av_ca_timestep_scale_multiplier")),
        gated_attention=bool(get("apply_gated_attention", False)),
        prompt_modulation=prompt_modulation,
        prompt_adaln=prompt_modulation and bool(get("use_prompt_adaln_single", True)),
        caption_channels=None if get("caption_proj_before_connector", False) else int(need("caption_channels")),
        keyframes_embedding=bool(get("use_keyframes_abs_pos_embedding", False)),
    )
    return _checked(spec)


# Published key -> the key that says the same in a diffusers config.json, where the names differ.
_DIFFUSERS_NAMES = {
    "positional_embedding_theta": "rope_theta",
    "av_ca_timestep_scale_multiplier": "cross_attn_timestep_scale_multiplier",
}


def transformer_spec_from_diffusers(section: Mapping[str, Any]) -> TransformerSpec:
    """Read ``transformer/config.json`` of a diffusers folder (``LTX2VideoTransformer3DModel``).

    Raises:
        WeightsError: a key that decides the numerics is absent.
        UnsupportedError: a key has a value that this code does not implement.
    """
    _refuse_unimplemented(section, _IMPLEMENTED_DIFFUSERS)
    need = _Section(section, "transformer").need
    for video, audio in (("gated_attn", "audio_gated_attn"), ("cross_attn_mod", "audio_cross_attn_mod")):
        if bool(section.get(video, False)) != bool(section.get(audio, False)):
            raise UnsupportedError(
                f"The checkpoint's transformer sets {video} and {audio} differently; "
                "ltx_sp implements both on or both off."
            )
    need("rope_double_precision")
    published = {key: value for key, value in section.items() if key != "qk_norm"}
    published |= {name: need(own) for name, own in _DIFFUSERS_NAMES.items()}
    published |= {
        "out_channels": section.get("out_channels") or need("in_channels"),
        "audio_out_channels": section.get("audio_out_channels") or need("audio_in_channels"),
        "frequencies_precision": "float64",
        "positional_embedding_max_pos": [need("pos_embed_max_pos"), need("base_height"), need("base_width")],
        "audio_positional_embedding_max_pos": [need("audio_pos_embed_max_pos")],
        "apply_gated_attention": section.get("gated_attn", False),
        "cross_attention_adaln": section.get("cross_attn_mod", False),
        "caption_proj_before_connector": not section.get("use_prompt_embeddings", True),
    }
    return transformer_spec(published)


def _checked(spec: TransformerSpec) -> TransformerSpec:
    if spec.video.num_heads != spec.audio.num_heads:
        raise UnsupportedError(
            f"The checkpoint's transformer has {spec.video.num_heads} video heads and {spec.audio.num_heads} audio "
            "heads; the cross-modal attentions need as many of each."
        )
    if len(spec.video.max_pos) != 3 or len(spec.audio.max_pos) != 1:
        raise UnsupportedError(
            f"The checkpoint's transformer has {len(spec.video.max_pos)} video and {len(spec.audio.max_pos)} audio "
            "position axes; ltx_sp implements 3 (time, height, width) and 1 (time)."
        )
    if min(spec.num_layers, spec.video.num_heads, spec.video.head_dim, spec.audio.head_dim) < 1:
        raise WeightsError(
            "The checkpoint's transformer configuration has a size below 1. Fetch the checkpoint again, "
            "or convert it with its metadata."
        )
    return spec
