"""The modules that are not ours: text encoder, connectors, VAEs, vocoder and latent upsampler.

The only importer of diffusers and transformers. A builder reads the configuration that came with
the checkpoint and returns the module with its parameters on meta, so that nothing is allocated
before the weights are read, and with its buffers real: the persistent ones wait for their values
from the checkpoint, the others (rotary frequencies, resampling filters) are final.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.model.attention import SdpaBackend
from ltx_sp.model.published import (
    audio_vae_arguments,
    connector_arguments,
    need,
    refuse,
    upsampler_arguments,
    video_vae_arguments,
    vocoder_arguments,
)
from ltx_sp.model.rope import Rotation, rotate
from ltx_sp.spec import AUDIO_LATENT_CHANNELS, AUDIO_MEL_BINS, LATENT_CHANNELS, ModelSpec, audio_sampling

__all__ = [
    "build_audio_vae",
    "build_connectors",
    "build_text_encoder",
    "build_upsampler",
    "build_video_vae",
    "build_vocoder",
    "load_tokenizer",
    "output_sampling_rate",
    "text_config",
]

_Section = Mapping[str, Any]


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` without a device goes to meta: it is what parameters are made of, and buffers never are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _build(make: Callable[[], Any]) -> nn.Module:
    """Call ``make`` so that its module has parameters on meta, frozen, and real buffers."""
    with _EmptyOnMeta():
        module: nn.Module = make()
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            # Small parameters (registers, tables, norms) are not made of torch.empty.
            setattr(owner, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    return module.eval()


def _section(spec: ModelSpec, component: str) -> _Section:
    section: _Section | None = spec.sections.get(component)
    if not section:
        raise WeightsError(
            f"The checkpoint has no configuration for its {component}. Use a whole checkpoint: one file with "
            "transformer, vae, audio_vae and vocoder, or a diffusers folder."
        )
    return section


def _diffusers(section: _Section, component: str, *names: str) -> tuple[Any, dict[str, Any]]:
    """The class that a diffusers ``config.json`` names, one of ``names``, and the arguments it gives."""
    import diffusers
    from diffusers.pipelines.ltx2 import connectors, vocoder

    name = section.get("_class_name", names[0])
    if name not in names:
        raise UnsupportedError(f"The checkpoint's {component} is a {name}; ltx_sp implements {' or '.join(names)}.")
    found = next(getattr(home, name) for home in (diffusers, connectors, vocoder) if hasattr(home, name))
    return found, {key: value for key, value in section.items() if not key.startswith("_")}


def text_config(gemma_config: _Section) -> _Section:
    """Pick the language model's part of a Gemma folder's ``config.json``.

    Raises:
        UnsupportedError: the folder holds another model than Gemma 3.
    """
    section = gemma_config.get("text_config") or gemma_config
    model_type = gemma_config.get("model_type") or section.get("model_type")
    if model_type not in ("gemma3", "gemma3_text"):
        raise UnsupportedError(
            f"The text encoder's config.json says model_type = {model_type!r}; ltx_sp implements gemma3. "
            "Pass the folder of google/gemma-3-12b-it-qat-q4_0-unquantized."
        )
    return section


def build_text_encoder(gemma_config: _Section) -> nn.Module:
    """Build the language model of a Gemma 3 folder, without its head and its vision tower.

    Raises:
        UnsupportedError: the folder holds another model than Gemma 3.
        WeightsError: its configuration contradicts itself.
    """
    from transformers import Gemma3TextConfig, Gemma3TextModel

    section = text_config(gemma_config)
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        need(section, key, "text encoder")
    try:
        config = Gemma3TextConfig.from_dict(dict(section))
    except Exception as error:  # the library has a class of its own for this, and has changed it before
        raise WeightsError(
            f"The text encoder's config.json is refused by transformers ({_last_line(error)}). Fetch it again."
        ) from error
    config.use_cache = False
    return _build(lambda: Gemma3TextModel._from_config(config, attn_implementation="sdpa"))


def load_tokenizer(root: Path) -> Any:
    """Load the tokenizer of a Gemma folder.

    Raises:
        WeightsError: the folder has none, or a damaged one.
    """
    from transformers import PreTrainedTokenizerFast

    if not (root / "tokenizer.json").is_file():
        raise WeightsError(f"{root} holds no tokenizer.json. Fetch the whole Gemma folder, not only its weights.")
    # As the file describes it: AutoTokenizer would build Gemma's pipeline anew around the vocabulary.
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(root), local_files_only=True)
    except Exception as error:  # from three libraries: json, tokenizers and transformers
        raise WeightsError(
            f"The tokenizer in {root} cannot be read ({type(error).__name__}: {_last_line(error)}). Fetch "
            "tokenizer.json and tokenizer_config.json again."
        ) from error


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2].strip().rstrip(".")


def build_connectors(spec: ModelSpec, gemma_config: _Section) -> nn.Module:
    """Build the text projection and the two connectors.

    Args:
        gemma_config: the text encoder's; its depth decides how many hidden states the projection takes, which
            no published checkpoint says.
    """
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    language = text_config(gemma_config)
    num_states = int(need(language, "num_hidden_layers", "text encoder")) + 1
    hidden = int(need(language, "hidden_size", "text encoder"))
    if spec.layout == "diffusers":
        cls, arguments = _diffusers(_section(spec, "connectors"), "connectors", "LTX2TextConnectors")
        if (arguments.get("caption_channels"), arguments.get("text_proj_in_factor")) != (hidden, num_states):
            raise WeightsError(
                f"The connectors take {arguments.get('text_proj_in_factor')} states of width "
                f"{arguments.get('caption_channels')}; the text encoder gives {num_states} of width {hidden}. "
                "Pass the Gemma folder that belongs to this checkpoint."
            )
        return _rounding_as_reference(_build(lambda: cls.from_config(arguments)))
    arguments = connector_arguments(_section(spec, "transformer"), hidden, num_states)
    return _rounding_as_reference(_build(lambda: LTX2TextConnectors(**arguments)))


def _rounding_as_reference(connectors: nn.Module) -> nn.Module:
    from diffusers.models.transformers.transformer_ltx2 import LTX2Attention

    for module in connectors.modules():
        if isinstance(module, LTX2Attention):
            module.set_processor(_ConnectorAttention())
    return connectors


class _ConnectorAttention:
    """An attention processor that rotates in the tensors' own type, where diffusers' rotates in float32.

    With it bfloat16 gives the reference's bits. There is no mask: the connectors replace padding by registers.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert query_rotary_emb is not None, "the connectors' self-attention has positions"
        cos, sin = (table.transpose(1, 2).to(hidden_states.dtype) for table in query_rotary_emb)
        rotation = Rotation(cos, sin)
        q, k, v = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        out = SdpaBackend().attend(rotate(q, rotation), rotate(k, rotation), v)
        if attn.to_gate_logits is not None:
            out = out * (2 * torch.sigmoid(attn.to_gate_logits(hidden_states))).unsqueeze(-1)
        projected: Tensor = attn.to_out[0](out.flatten(2))
        return projected


def build_video_vae(spec: ModelSpec) -> nn.Module:
    """Build the video autoencoder, with its encoder.

    Raises:
        UnsupportedError: the diffusion decoder of 2.5, or a block that no published file has.
    """
    section = _section(spec, "vae")
    name = section.get("_class_name", "CausalVideoAutoencoder")
    if name == "CausalDiffusionVAE":
        raise UnsupportedError(
            "The checkpoint's vae is a CausalDiffusionVAE: the 2.5 diffusion decoder is not implemented. "
            "Use the conv VAE file."
        )
    refuse(section, "vae", {"timestep_conditioning": (False,), "latent_channels": (LATENT_CHANNELS,)})
    if spec.layout == "diffusers":
        cls, arguments = _diffusers(section, "vae", "AutoencoderKLLTX2Video")
        return _build(lambda: cls.from_config(arguments))
    if name != "CausalVideoAutoencoder":
        raise UnsupportedError(f"The checkpoint's vae is a {name}; ltx_sp implements CausalVideoAutoencoder.")
    from diffusers import AutoencoderKLLTX2Video

    arguments = video_vae_arguments(section)
    return _build(lambda: AutoencoderKLLTX2Video(**arguments))


def build_audio_vae(spec: ModelSpec) -> nn.Module:
    """Build the audio autoencoder: latents <-> mel spectrogram."""
    from diffusers import AutoencoderKLLTX2Audio

    section = _section(spec, "audio_vae")
    if spec.layout == "diffusers":
        cls, arguments = _diffusers(section, "audio_vae", "AutoencoderKLLTX2Audio")
        module = _build(lambda: cls.from_config(arguments))
    else:
        arguments = audio_vae_arguments(section, *audio_sampling(spec))
        module = _build(lambda: AutoencoderKLLTX2Audio(**arguments))
    # diffusers sizes the statistics by the base channels, which are as many as the values of one latent
    # frame in every published model, but need not be.
    values = AUDIO_LATENT_CHANNELS * AUDIO_MEL_BINS
    module.register_buffer("latents_mean", torch.zeros(values))
    module.register_buffer("latents_std", torch.ones(values))
    return module


def build_vocoder(spec: ModelSpec) -> nn.Module:
    """Build the vocoder, with bandwidth extension from 2.3 on. To be loaded and run in float32."""
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

    section = _section(spec, "vocoder")
    if spec.layout == "diffusers":
        cls, arguments = _diffusers(section, "vocoder", "LTX2Vocoder", "LTX2VocoderWithBWE")
        if cls is LTX2VocoderWithBWE:
            # The model was trained to extend a clamped waveform; diffusers' own configuration leaves it open.
            arguments["final_act_fn"] = arguments.get("final_act_fn") or "clamp"
        return _build(lambda: cls.from_config(arguments))
    arguments = vocoder_arguments(section, *audio_sampling(spec))
    extended = "bwe" in section
    return _build(lambda: LTX2VocoderWithBWE(**arguments) if extended else LTX2Vocoder(**arguments))


def build_upsampler(config: _Section) -> nn.Module:
    """Build the latent upsampler, which doubles rows and columns.

    Args:
        config: of the upsampler's own file, published or diffusers'.

    Raises:
        UnsupportedError: it scales in time or by another factor, or has other latents.
        WeightsError: its configuration lacks a size, or states an impossible one.
    """
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    arguments = upsampler_arguments(config)
    module = _build(lambda: LTX2LatentUpsamplerModel(**arguments))
    if arguments["use_rational_resampler"]:
        # Doubling leaves nothing to blur away, and not every file has the kernel for it.
        module.get_submodule("upsampler").blur_down = nn.Identity()
    return module


def output_sampling_rate(vocoder: nn.Module) -> int:
    """Read the rate in Hz of the waveform that a vocoder of ``build_vocoder`` returns."""
    config: Any = vocoder.config
    return int(config.output_sampling_rate)
