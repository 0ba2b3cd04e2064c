"""A path -> what model it holds, and where each component's tensors are.

Two layouts, told apart by what is there and not by names: the published one (safetensors whose
metadata carries the configuration, and the text encoder in a folder of its own) and diffusers' (a
folder with ``model_index.json`` and one folder per component). The latent upsampler has a path of its
own in both.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ltx_sp.errors import RequestError, UnsupportedError, WeightsError
from ltx_sp.model.published import upsampler_arguments
from ltx_sp.spec import ModelSpec, TransformerSpec, parse_version, transformer_spec, transformer_spec_from_diffusers
from ltx_sp.weights import keymap as keymaps
from ltx_sp.weights.index import Index, parse_object, quote, read_index, read_object

__all__ = ["Checkpoint", "open_checkpoint", "read_spec"]

# Component -> its section of the configuration; in the diffusers layout also its folder.
_PUBLISHED_SECTIONS = {
    "transformer": "transformer",
    "connectors": "transformer",
    "video_vae": "vae",
    "audio_vae": "audio_vae",
    "vocoder": "vocoder",
}
_DIFFUSERS_SECTIONS = _PUBLISHED_SECTIONS | {"connectors": "connectors"}

# Parameter names of the linear layers that read all hidden states of the text encoder at once: [out, in].
_TEXT_PROJECTIONS = ("text_proj_in.weight", "video_text_proj_in.weight", "audio_text_proj_in.weight")
_TOKENIZER_FILE = "tokenizer.json"
_APART = ("text_encoder", "upsampler")  # with a path and a configuration of their own
_UPSAMPLER_CLASSES = ("LatentUpsampler", "LTX2LatentUpsamplerModel")  # published, diffusers'
_PASS_UPSAMPLER = "Pass the file of a spatial upsampler of LTX-2 as --spatial-upsampler-path."
_PASS_GEMMA = "Pass the folder of the right Gemma as --gemma-root."


class _Sections(dict[str, Mapping[str, Any]]):
    """The sections by name; asking for one that the checkpoint lacks says so."""

    def __init__(self, sections: Mapping[str, Mapping[str, Any]], path: Path):
        super().__init__(sections)
        self._path = path

    def __missing__(self, name: str) -> Mapping[str, Any]:
        raise WeightsError(
            f"{self._path} has no configuration for {name} (only for {', '.join(self) or 'nothing'}). "
            f"Pass a checkpoint that holds {name}."
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its model, and where to read it from.

    Args:
        path: the file or folder that was opened.
        gemma_root: the folder of the text encoder's config and weights.
        gemma_config: its ``config.json``.
        tokenizer_root: the folder of the tokenizer's files.
        upsampler_path: the latent upsampler's file, or the folder of its weights; None where none was opened.
        upsampler_config: what it says of itself.
    """

    path: Path
    spec: ModelSpec
    gemma_root: Path
    gemma_config: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)
    tokenizer_root: Path
    _files: dict[Path, Index] = dataclasses.field(repr=False, compare=False)
    upsampler_path: Path | None = None
    upsampler_config: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def index(self, component: str) -> Index:
        """Index the tensors of ``component`` (one of ``keymap.COMPONENTS``), names as stored.

        Blocks the host, the first time that a component's files are asked for.

        Raises:
            WeightsError: the checkpoint does not hold the component, or its files are damaged.
        """
        keymap = self.keymap(component)
        index = self._all(component).select(lambda name: keymap.to_parameter(name) is not None)
        if not index.entries:
            raise WeightsError(
                f"{self._root(component)} holds no tensors of {component}. Pass a checkpoint that holds them."
            )
        return index

    def keymap(self, component: str) -> keymaps.KeyMap:
        """Build the map from this checkpoint's names of ``component`` to parameter names.

        Raises:
            WeightsError: the checkpoint does not hold the component.
        """
        sections = self.spec.sections
        if component not in _APART and self._section(component) not in sections:
            raise WeightsError(
                f"{self.path} holds no {component} (its configuration has {', '.join(sections) or 'nothing'}). "
                f"Pass a checkpoint that holds {component}."
            )
        names = self._all(component).entries if component in _APART else ()
        return keymaps.keymap(self.spec.layout, component, sections, names)

    def _section(self, component: str) -> str:
        table = _DIFFUSERS_SECTIONS if self.spec.layout == "diffusers" else _PUBLISHED_SECTIONS
        if component not in table:
            raise ValueError(f"no component {component!r}; there are {', '.join((*_APART, *table))}")
        return table[component]

    def _root(self, component: str) -> Path:
        if component == "text_encoder":
            return self.gemma_root
        if component == "upsampler":
            if self.upsampler_path is None:
                raise WeightsError(f"{self.path} was opened without a latent upsampler. {_PASS_UPSAMPLER}")
            return self.upsampler_path
        return self.path / self._section(component) if self.spec.layout == "diffusers" else self.path

    def _all(self, component: str) -> Index:
        """Everything that is stored where ``component`` is; read once."""
        root = self._root(component)
        if root not in self._files:
            self._files[root] = read_index(root)
        return self._files[root]


def open_checkpoint(checkpoint_path: Path, gemma_root: Path | None, upsampler_path: Path | None = None) -> Checkpoint:
    """Recognise the checkpoint at a path and read what it says about its model.

    Blocks the host.

    Args:
        gemma_root: the text encoder's folder; a diffusers folder has its own.
        upsampler_path: the latent upsampler's file, its diffusers folder, or a folder that has this as
            ``latent_upsampler``.

    Raises:
        WeightsError: it is damaged, not an LTX-2 checkpoint, or its text encoder does not fit; or the upsampler is
            none of LTX-2.
        UnsupportedError: its model needs something that is not implemented.
        RequestError: it has no text encoder and ``gemma_root`` is None.
    """
    if os.path.isfile(checkpoint_path / "model_index.json"):  # not Path.is_file, which may raise
        checkpoint = _open_diffusers(checkpoint_path, gemma_root)
    else:
        checkpoint = _open_published(checkpoint_path, gemma_root)
    _require_fitting_gemma(checkpoint)
    return checkpoint if upsampler_path is None else _with_upsampler(checkpoint, upsampler_path)


def read_spec(checkpoint_path: Path) -> ModelSpec:
    """Read what the checkpoint at a path says about its model, without its text encoder. Blocks the host.

    Raises:
        WeightsError: it is damaged or not an LTX-2 checkpoint.
        UnsupportedError: its model needs something that is not implemented.
    """
    if os.path.isfile(checkpoint_path / "model_index.json"):
        return _diffusers_spec(checkpoint_path)
    return _published_spec(checkpoint_path, read_index(checkpoint_path))


def _published_spec(path: Path, index: Index) -> ModelSpec:
    if "config" not in index.metadata:
        raise WeightsError(
            f"{path} carries no `config` in its metadata; an LTX-2 checkpoint does. Pass the checkpoint itself, "
            "not a LoRA or an upsampler."
        )
    config = parse_object(index.metadata["config"], f"The `config` metadata of {path}")
    sections = _Sections({name: section for name, section in config.items() if isinstance(section, dict)}, path)
    return ModelSpec(
        version=parse_version(index.metadata.get("model_version")),
        layout="published",
        transformer=_transformer(transformer_spec, sections, path),
        sections=sections,
    )


def _open_published(path: Path, gemma_root: Path | None) -> Checkpoint:
    index = read_index(path)
    spec = _published_spec(path, index)
    if gemma_root is None:
        raise RequestError(f"{path} comes without its text encoder. {_PASS_GEMMA}")
    return _with_gemma(path, spec, {path: index}, gemma_root, (gemma_root,))


def _diffusers_spec(path: Path) -> ModelSpec:
    pipeline = read_object(path / "model_index.json").get("_class_name")
    if not str(pipeline).startswith("LTX2"):
        raise WeightsError(
            f"{path} holds the diffusers pipeline {quote(pipeline)}; ltx_sp runs LTX2 pipelines. "
            "Pass a checkpoint of the LTX-2 family."
        )
    configs = {name: path / name / "config.json" for name in _DIFFUSERS_SECTIONS.values()}
    sections = _Sections(
        {name: read_object(config) for name, config in configs.items() if os.path.isfile(config)}, path
    )
    transformer = _transformer(transformer_spec_from_diffusers, sections, path)
    if transformer.caption_channels is not None:
        version = (2, 0)
    else:
        version = (2, 5) if transformer.keyframes_embedding else (2, 3)
    return ModelSpec(version, "diffusers", transformer, sections)


def _open_diffusers(path: Path, gemma_root: Path | None) -> Checkpoint:
    spec = _diffusers_spec(path)
    own_tokenizer = path / "tokenizer"
    if gemma_root is not None:
        return _with_gemma(path, spec, {}, gemma_root, (gemma_root, own_tokenizer))
    if not os.path.isdir(path / "text_encoder"):
        raise RequestError(f"{path} comes without its text encoder. {_PASS_GEMMA}")
    return _with_gemma(path, spec, {}, path / "text_encoder", (own_tokenizer, path / "text_encoder"))


def _transformer(
    parse: Callable[[Mapping[str, Any]], TransformerSpec], sections: _Sections, path: Path
) -> TransformerSpec:
    section = sections["transformer"]
    try:
        return parse(section)
    except (TypeError, ValueError, OverflowError) as error:
        raise WeightsError(
            f"{path} has a transformer configuration with a value of the wrong kind ({error}). Fetch it again."
        ) from error


def _with_gemma(
    path: Path, spec: ModelSpec, files: dict[Path, Index], gemma_root: Path, tokenizer_roots: tuple[Path, ...]
) -> Checkpoint:
    config = read_object(gemma_root / "config.json")
    for root in tokenizer_roots:
        if os.path.isfile(root / _TOKENIZER_FILE):
            return Checkpoint(path, spec, gemma_root, config, root, files)
    raise WeightsError(
        f"There is no {_TOKENIZER_FILE} in {' or '.join(map(str, tokenizer_roots))}; the text encoder needs "
        "its tokenizer. Fetch the tokenizer files of that Gemma too."
    )


def _with_upsampler(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    folder = next((it for it in (path, path / "latent_upsampler") if os.path.isfile(it / "config.json")), None)
    if folder is not None:
        path, config = folder, read_object(folder / "config.json")
    else:
        index = read_index(path)
        if "config" not in index.metadata:
            raise WeightsError(
                f"{path} carries no `config` in its metadata; a latent upsampler does. {_PASS_UPSAMPLER}"
            )
        config = parse_object(index.metadata["config"], f"The `config` metadata of {path}")
        checkpoint._files[path] = index
    name = config.get("_class_name", _UPSAMPLER_CLASSES[0])
    if name not in _UPSAMPLER_CLASSES or "mid_channels" not in config:
        keys = ", ".join(map(quote, list(config)[:4])) or "nothing"
        what = quote(name) if "_class_name" in config else f"a model with the configuration of {keys}"
        raise WeightsError(f"{path} holds {what}; it must hold a latent upsampler of LTX-2. {_PASS_UPSAMPLER}")
    try:
        upsampler_arguments(config)  # for what it refuses, before anything is loaded
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error} {_PASS_UPSAMPLER}") from error
    return dataclasses.replace(checkpoint, upsampler_path=path, upsampler_config=config)


def _require_fitting_gemma(checkpoint: Checkpoint) -> None:
    config, root, spec = checkpoint.gemma_config, checkpoint.gemma_root, checkpoint.spec
    model_type = config.get("model_type")
    if spec.version < (2, 4) and model_type not in ("gemma3", "gemma3_text"):
        raise WeightsError(
            f"{root} holds a model of type {quote(model_type)}; LTX {spec.version_name} needs Gemma 3. {_PASS_GEMMA}"
        )
    text = config.get("text_config", config)
    hidden, layers = (text.get(key) if isinstance(text, dict) else None for key in ("hidden_size", "num_hidden_layers"))
    if not (isinstance(hidden, int) and isinstance(layers, int) and 0 < hidden < 2**31 and 0 < layers < 2**31):
        raise WeightsError(
            f"{root / 'config.json'} has hidden_size {quote(hidden)} and num_hidden_layers {quote(layers)}; both must "
            "be positive numbers. Fetch it again."
        )
    section = spec.sections.get("connectors" if spec.layout == "diffusers" else "transformer") or {}
    wanted = section.get("caption_channels") or hidden
    if hidden != wanted:
        raise WeightsError(
            f"{root} holds a Gemma with hidden size {hidden}; {checkpoint.path} needs {quote(wanted)}"
            f"{_published_name(wanted)}. {_PASS_GEMMA}"
        )
    for name, in_features in _text_projections(checkpoint).items():
        if in_features != hidden * (layers + 1):
            raise WeightsError(
                f"{root} holds a Gemma with hidden size {hidden} and {layers} layers; {name} of {checkpoint.path} "
                f"takes {in_features} values, those of {in_features / hidden - 1:g} layers{_published_name(hidden)}. "
                f"{_PASS_GEMMA}"
            )


def _text_projections(checkpoint: Checkpoint) -> dict[str, int]:
    """In-features of the text projections by stored name; none where they are in another file."""
    if checkpoint.spec.layout == "diffusers" and "connectors" not in checkpoint.spec.sections:
        return {}
    keymap, stored = checkpoint.keymap("connectors"), checkpoint._all("connectors").entries
    names = [keymap.to_checkpoint(parameter) for parameter in _TEXT_PROJECTIONS]
    return {name: stored[name].shape[-1] for name in names if name in stored and stored[name].shape}


def _published_name(hidden: object) -> str:
    return " (gemma-3-12b-it)" if hidden == 3840 else ""
