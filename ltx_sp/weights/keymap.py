"""Checkpoint names <-> parameter names, one map per component and layout.

No torch. The transformer's parameters carry the published names, so its published map only strips
a prefix and its diffusers map renames; the other components are diffusers' modules, so with them
it is the other way round. ``to_parameter`` answers only for names that ``to_checkpoint`` leads back
to, and None for everything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ltx_sp.errors import UnsupportedError, WeightsError

COMPONENTS = ("transformer", "connectors", "video_vae", "audio_vae", "vocoder", "text_encoder", "upsampler")

_TRANSFORMER = "model.diffusion_model."
_CONNECTORS = (
    (_TRANSFORMER + "video_embeddings_connector", "video_connector"),
    (_TRANSFORMER + "audio_embeddings_connector", "audio_connector"),
    ("text_embedding_projection.aggregate_embed", "text_proj_in"),
    ("text_embedding_projection.video_aggregate_embed", "video_text_proj_in"),
    ("text_embedding_projection.audio_aggregate_embed", "audio_text_proj_in"),
)
_CONNECTOR_PARTS = (("transformer_1d_blocks", "transformer_blocks"), ("q_norm", "norm_q"), ("k_norm", "norm_k"))

# Our name on the left, diffusers' on the right, whole dotted parts.
_TRANSFORMER_PARTS = (
    ("patchify_proj", "proj_in"),
    ("audio_patchify_proj", "audio_proj_in"),
    ("adaln_single", "time_embed"),
    ("audio_adaln_single", "audio_time_embed"),
    ("prompt_adaln_single", "prompt_adaln"),
    ("audio_prompt_adaln_single", "audio_prompt_adaln"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    ("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
    ("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)

_VOCODER_PARTS = (
    ("ups", "upsamplers"),
    ("resblocks", "resnets"),
    ("conv_pre", "conv_in"),
    ("conv_post", "conv_out"),
    ("act_post", "act_out"),
)

_STATISTICS = (
    ("per_channel_statistics.mean-of-means", "latents_mean"),
    ("per_channel_statistics.std-of-means", "latents_std"),
)

# The first is how the published Gemma 3 files spell it, the others how later versions of
# transformers save it. The text encoder is the language model alone, whose names are bare.
_LANGUAGE_MODEL = ("language_model.model.", "model.language_model.", "model.")
_NOT_LANGUAGE_MODEL = ("language_model", "vision_tower", "vision_model", "multi_modal_projector", "audio_tower")

# The same in both layouts. Some files carry the kernel of a blur that doubling has no use for.
_UPSAMPLER = ("initial_conv", "initial_norm", "res_blocks", "upsampler", "post_upsample_res_blocks", "final_conv")
_UPSAMPLER_UNUSED = "upsampler.blur_down.kernel"

_Rename = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """The names of one component: in a checkpoint, and in the module that is loaded from it."""

    component: str
    _encode: Callable[[str], str] = dataclasses.field(repr=False, compare=False)
    _decode: _Rename = dataclasses.field(repr=False, compare=False)

    def to_checkpoint(self, parameter: str) -> str:
        """Name the checkpoint tensor that fills ``parameter`` (a key of the module's state dict)."""
        return self._encode(parameter)

    def to_parameter(self, name: str) -> str | None:
        """Name the parameter that checkpoint tensor ``name`` fills; None where it is none of this component's."""
        return self._decode(name)


def _bijection(component: str, encode: Callable[[str], str], decode: _Rename) -> KeyMap:
    """Build a map whose ``decode`` also accepts spellings that ``encode`` never produces, and drop those."""

    def to_parameter(name: str) -> str | None:
        parameter = decode(name)
        return parameter if parameter is not None and encode(parameter) == name else None

    return KeyMap(component, encode, to_parameter)


def keymap(layout: str, component: str, sections: Mapping[str, Mapping[str, Any]], names: Iterable[str] = ()) -> KeyMap:
    """Build the map for ``component`` of a checkpoint in ``layout`` (``"published"`` or ``"diffusers"``).

    Args:
        sections: ``ModelSpec.sections``; the video VAE's table follows its list of blocks.
        names: what the file holds, for the text encoder, whose spelling varies: its names go both ways in the
            spelling found there. Without them all spellings are read, and the published one is written.

    Raises:
        WeightsError: the configuration lacks what the table is derived from.
    """
    if component not in COMPONENTS:
        raise ValueError(f"no component {component!r}; there are {', '.join(COMPONENTS)}")
    if layout not in ("published", "diffusers"):
        raise ValueError(f"no layout {layout!r}; there are published and diffusers")
    if component == "text_encoder":
        return _text_encoder(names)
    if component == "upsampler":
        return _upsampler()
    if layout == "diffusers":
        return _of_parts("transformer", _TRANSFORMER_PARTS) if component == "transformer" else _identity(component)
    if component == "transformer":
        return _published_transformer()
    if component == "connectors":
        return _published_connectors()
    if component == "video_vae":
        return _published_video_vae(sections.get("vae") or {})
    if component == "audio_vae":
        return _prefixed("audio_vae", "audio_vae.", _paired(_STATISTICS))
    return _prefixed("vocoder", "vocoder.", _vocoder_renames())


def _identity(component: str) -> KeyMap:
    return KeyMap(component, lambda parameter: parameter, lambda name: name)


def _replace_parts(pairs: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    table = dict(pairs)
    return lambda name: ".".join(table.get(part, part) for part in name.split("."))


def _swapped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(right, left) for left, right in pairs]


def _of_parts(component: str, pairs: tuple[tuple[str, str], ...]) -> KeyMap:
    return _bijection(component, _replace_parts(pairs), _replace_parts(_swapped(pairs)))


def _replace_head(pairs: Iterable[tuple[str, str]]) -> _Rename:
    """Replace the first head that matches up to a dot or the end; None where none does."""
    table = tuple(pairs)

    def rename(name: str) -> str | None:
        for old, new in table:
            if name == old or name.startswith(old + "."):
                return new + name[len(old) :]
        return None

    return rename


def _paired(pairs: tuple[tuple[str, str], ...]) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Both directions of renames that leave every other name alone: to the checkpoint, to the parameter."""
    encode, decode = _replace_head(_swapped(pairs)), _replace_head(pairs)
    return lambda parameter: encode(parameter) or parameter, lambda name: decode(name) or name


def _prefixed(component: str, prefix: str, renames: tuple[Callable[[str], str], Callable[[str], str]]) -> KeyMap:
    encode, decode = renames

    def to_parameter(name: str) -> str | None:
        return decode(name.removeprefix(prefix)) if name.startswith(prefix) and not _unused(name) else None

    return _bijection(component, lambda parameter: prefix + encode(parameter), to_parameter)


def _unused(name: str) -> bool:
    """Whether ``name`` is a statistic that the published files carry and no model reads."""
    _, found, statistic = name.rpartition("per_channel_statistics.")
    return bool(found) and statistic not in ("mean-of-means", "std-of-means")


def _published_transformer() -> KeyMap:
    connectors = tuple(head + "." for head, _ in _CONNECTORS)

    def to_parameter(name: str) -> str | None:
        if not name.startswith(_TRANSFORMER) or name.startswith(connectors):
            return None
        return name.removeprefix(_TRANSFORMER)

    return KeyMap("transformer", lambda parameter: _TRANSFORMER + parameter, to_parameter)


def _published_connectors() -> KeyMap:
    to_head, to_published_head = _replace_head(_CONNECTORS), _replace_head(_swapped(_CONNECTORS))
    to_parts, to_published_parts = _replace_parts(_CONNECTOR_PARTS), _replace_parts(_swapped(_CONNECTOR_PARTS))

    def to_parameter(name: str) -> str | None:
        renamed = to_head(name)
        return None if renamed is None else to_parts(renamed)

    def to_checkpoint(parameter: str) -> str:
        renamed = to_published_head(to_published_parts(parameter))
        if renamed is None:
            raise KeyError(parameter)
        return renamed

    return _bijection("connectors", to_checkpoint, to_parameter)


def _published_video_vae(section: Mapping[str, Any]) -> KeyMap:
    """Derive the table from the lists of blocks.

    The published autoencoder numbers every block of a side in the order in which they run: residual
    blocks at even places, resamplings at odd ones. diffusers pairs each resampling with residual
    blocks, those before it when going down and those after it when going up; the pair that is left
    over, at the latent end, is its middle block.
    """
    lists = {}
    for key in ("encoder_blocks", "decoder_blocks"):
        if not section.get(key):
            raise WeightsError(
                f"The checkpoint's vae configuration lacks {key!r}, which decides how its tensors are named. "
                "Fetch the checkpoint again, or convert it with its metadata."
            )
        lists[key] = len(section[key])
        if lists[key] % 2 == 0:
            raise UnsupportedError(
                f"The checkpoint's vae has {lists[key]} {key}; ltx_sp implements an odd number: residual blocks "
                "with one resampling between each two."
            )
    pairs = list(_STATISTICS)
    last = lists["encoder_blocks"] - 1
    for i in range(last + 1):
        block = f"encoder.down_blocks.{i}"
        if i == last:
            pairs.append((f"{block}.res_blocks", "encoder.mid_block.resnets"))
        elif i % 2:
            pairs.append((block, f"encoder.down_blocks.{i // 2}.downsamplers.0"))
        else:
            pairs.append((f"{block}.res_blocks", f"encoder.down_blocks.{i // 2}.resnets"))
    for i in range(lists["decoder_blocks"]):
        block = f"decoder.up_blocks.{i}"
        if i == 0:
            pairs.append((f"{block}.res_blocks", "decoder.mid_block.resnets"))
        elif i % 2:
            pairs.append((block, f"decoder.up_blocks.{i // 2}.upsamplers.0"))
        else:
            pairs.append((f"{block}.res_blocks", f"decoder.up_blocks.{i // 2 - 1}.resnets"))
    return _prefixed("video_vae", "vae.", _paired(tuple(pairs)))


def _vocoder_renames() -> tuple[Callable[[str], str], Callable[[str], str]]:
    to_published, to_ours = _replace_parts(_swapped(_VOCODER_PARTS)), _replace_parts(_VOCODER_PARTS)
    # Only the low-pass filter behind a downsampling sits one level deeper in the published file.
    return (
        lambda parameter: to_published(parameter).replace("downsample.filter", "downsample.lowpass.filter"),
        lambda name: to_ours(name).replace("downsample.lowpass.filter", "downsample.filter"),
    )


def _text_encoder(names: Iterable[str]) -> KeyMap:
    found = {prefix for name in names for prefix in _LANGUAGE_MODEL if _is_language_model(name, prefix)}
    prefixes = tuple(prefix for prefix in _LANGUAGE_MODEL if prefix in found)[:1] or _LANGUAGE_MODEL

    def to_parameter(name: str) -> str | None:
        for prefix in prefixes:
            if _is_language_model(name, prefix):
                return name.removeprefix(prefix)
        return None

    return KeyMap("text_encoder", lambda parameter: prefixes[0] + parameter, to_parameter)


def _upsampler() -> KeyMap:
    def to_parameter(name: str) -> str | None:
        is_own = name.partition(".")[0] in _UPSAMPLER and name != _UPSAMPLER_UNUSED
        return name if is_own else None

    return KeyMap("upsampler", lambda parameter: parameter, to_parameter)


def _is_language_model(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and not name.removeprefix(prefix).startswith(_NOT_LANGUAGE_MODEL)
