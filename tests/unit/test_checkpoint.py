"""Oracle: the layouts as they are published, in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ltx_sp.errors import LtxSpError, RequestError, UnsupportedError, WeightsError
from ltx_sp.weights.checkpoint import open_checkpoint, read_spec

HIDDEN, LAYERS = 6, 2
FEATURES = HIDDEN * (LAYERS + 1)

TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "in_channels": 128,
    "out_channels": 128,
    "cross_attention_dim": 8,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 2,
    "audio_out_channels": 128,
    "audio_cross_attention_dim": 4,
    "audio_positional_embedding_max_pos": [20],
    "positional_embedding_theta": 10000.0,
    "norm_eps": 1e-6,
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "caption_channels": HIDDEN,
    "caption_proj_before_connector": True,
}
DIFFUSERS_TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "in_channels": 128,
    "out_channels": 128,
    "cross_attention_dim": 8,
    "pos_embed_max_pos": 20,
    "base_height": 2048,
    "base_width": 2048,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 2,
    "audio_in_channels": 128,
    "audio_cross_attention_dim": 4,
    "audio_pos_embed_max_pos": 20,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
    "timestep_scale_multiplier": 1000,
    "cross_attn_timestep_scale_multiplier": 1000,
    "rope_type": "split",
    "rope_double_precision": True,
    "use_prompt_embeddings": False,
}
GEMMA: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS},
}
BLOCKS = [["res_x", {}], ["compress_all", {}], ["res_x", {}]]
CONFIG: dict[str, Any] = {
    "transformer": TRANSFORMER,
    "vae": {"encoder_blocks": BLOCKS, "decoder_blocks": BLOCKS},
    "audio_vae": {"model": {}},
    "vocoder": {"vocoder": {}},
}
PUBLISHED_TENSORS = {
    "transformer": ["model.diffusion_model.proj_out.weight"],
    "connectors": [
        "model.diffusion_model.video_embeddings_connector.learnable_registers",
        "text_embedding_projection.video_aggregate_embed.weight",
    ],
    "video_vae": ["vae.encoder.conv_in.conv.weight", "vae.per_channel_statistics.mean-of-means"],
    "audio_vae": ["audio_vae.decoder.conv_in.conv.weight"],
    "vocoder": ["vocoder.conv_pre.weight"],
}
DIFFUSERS_TENSORS = {
    "transformer": ["proj_in.weight", "time_embed.linear.bias", "transformer_blocks.0.attn1.norm_q.weight"],
    "connectors": ["video_text_proj_in.weight", "video_connector.learnable_registers"],
    "vae": ["encoder.conv_in.conv.weight", "latents_mean"],
    "audio_vae": ["decoder.conv_in.conv.weight"],
    "vocoder": ["conv_in.weight"],
}


def write_gemma(folder: Path, config: Any = GEMMA, tokenizer: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    tensors = {"language_model.model.norm.weight": torch.ones(HIDDEN), "vision_tower.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def tensor_for(name: str, features: int = FEATURES) -> Tensor:
    return torch.ones(4, features) if "aggregate_embed" in name or "text_proj_in" in name else torch.ones(3)


def write_published(
    path: Path, config: Any = CONFIG, version: str | None = "2.3.0", *, tensors: Any = None, features: int = FEATURES
) -> Path:
    names = [name for part in (PUBLISHED_TENSORS if tensors is None else tensors).values() for name in part]
    metadata = {"config": config if isinstance(config, str) else json.dumps(config), "license": "free text"}
    metadata |= {} if version is None else {"model_version": version}
    save_file({name: tensor_for(name, features) for name in names}, path, metadata=metadata)
    return path


def write_diffusers(folder: Path, transformer: dict[str, Any] = DIFFUSERS_TRANSFORMER) -> Path:
    """A folder as ``save_pretrained`` writes it: the transformer in two shards with their index JSON."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTX2Pipeline"}))
    configs = {"transformer": transformer, "connectors": {"caption_channels": HIDDEN}}
    for part, names in DIFFUSERS_TENSORS.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(configs.get(part, {"part": part})))
        if part != "transformer":
            tensors = {name: tensor_for(name) for name in names}
            save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors")
    stem, names = "diffusion_pytorch_model", DIFFUSERS_TENSORS["transformer"]
    weight_map = {name: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        tensors = {name: tensor_for(name) for name in names if weight_map[name] == shard}
        save_file(tensors, folder / "transformer" / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "transformer" / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    write_gemma(folder / "text_encoder", tokenizer=False)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def test_a_published_file_gives_each_component_its_tensors(tmp_path: Path) -> None:
    gemma = write_gemma(tmp_path / "gemma")
    # The name says nothing, unless it is one of torch.save: a checkpoint is what it contains.
    checkpoint = open_checkpoint(write_published(tmp_path / "weights.ckpt"), gemma)
    assert checkpoint.spec.version == (2, 3, 0)
    assert checkpoint.spec.layout == "published"
    assert checkpoint.spec.transformer.num_layers == 2
    assert checkpoint.spec.sections["vae"] == CONFIG["vae"]
    assert checkpoint.gemma_root == checkpoint.tokenizer_root == gemma
    assert checkpoint.gemma_config == GEMMA
    for component, names in PUBLISHED_TENSORS.items():
        assert sorted(checkpoint.index(component).entries) == sorted(names), component
        for name in names:
            parameter = checkpoint.keymap(component).to_parameter(name)
            assert parameter is not None
            assert checkpoint.keymap(component).to_checkpoint(parameter) == name
    assert list(checkpoint.index("text_encoder").entries) == ["language_model.model.norm.weight"]
    assert checkpoint.keymap("text_encoder").to_parameter("language_model.model.norm.weight") == "norm.weight"


def test_a_diffusers_folder_gives_each_component_its_tensors(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "model")
    checkpoint = open_checkpoint(folder, None)
    assert checkpoint.spec.layout == "diffusers"
    assert checkpoint.spec.sections["vocoder"] == {"part": "vocoder"}
    assert checkpoint.gemma_root == folder / "text_encoder"
    assert checkpoint.tokenizer_root == folder / "tokenizer"
    for part, names in DIFFUSERS_TENSORS.items():
        index = checkpoint.index("video_vae" if part == "vae" else part)
        assert sorted(index.entries) == sorted(names), part
        assert {file.parent.name for file in index.files} == {part}
    assert len(checkpoint.index("transformer").files) == 2
    assert checkpoint.keymap("transformer").to_parameter("proj_in.weight") == "patchify_proj.weight"
    assert checkpoint.index("text_encoder").files == (folder / "text_encoder" / "model.safetensors",)


def test_a_diffusers_folder_may_borrow_a_gemma(tmp_path: Path) -> None:
    folder, gemma = write_diffusers(tmp_path / "model"), write_gemma(tmp_path / "gemma")
    checkpoint = open_checkpoint(folder, gemma)
    assert checkpoint.gemma_root == checkpoint.tokenizer_root == gemma
    (gemma / "tokenizer.json").unlink()
    assert open_checkpoint(folder, gemma).tokenizer_root == folder / "tokenizer"


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({}, (2, 3)),
        ({"use_prompt_embeddings": True, "caption_channels": HIDDEN}, (2, 0)),
        ({"use_keyframes_abs_pos_embedding": True}, (2, 5)),
    ],
)
def test_a_diffusers_folder_has_the_version_of_its_content(
    tmp_path: Path, changes: dict[str, Any], version: tuple[int, ...]
) -> None:
    folder = write_diffusers(tmp_path / "model", DIFFUSERS_TRANSFORMER | changes)
    assert open_checkpoint(folder, None).spec.version == version


def test_files_are_indexed_once(tmp_path: Path) -> None:
    path = write_published(tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(path, write_gemma(tmp_path / "gemma"))
    assert checkpoint.index("text_encoder").entries
    path.unlink()
    (tmp_path / "gemma" / "model.safetensors").unlink()
    assert checkpoint.index("transformer").entries
    assert checkpoint.index("text_encoder").entries


def test_a_transformer_alone_opens_and_names_what_it_lacks(tmp_path: Path) -> None:
    config = {"transformer": TRANSFORMER, "vae": None, "audio_vae": None}
    tensors = {"transformer": PUBLISHED_TENSORS["transformer"]}
    path = write_published(tmp_path / "x.safetensors", config, "2.5.0", tensors=tensors)
    checkpoint = open_checkpoint(path, write_gemma(tmp_path / "gemma"))
    assert checkpoint.index("transformer").entries
    for component in ("connectors", "video_vae", "audio_vae", "vocoder"):
        with pytest.raises(WeightsError, match=rf"x\.safetensors holds no .*{component}"):
            checkpoint.index(component)
    with pytest.raises(WeightsError, match="no configuration for vae"):
        checkpoint.spec.sections["vae"]
    assert checkpoint.spec.sections.get("vae") is None


def test_a_published_file_needs_a_gemma_root(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--gemma-root"):
        open_checkpoint(write_published(tmp_path / "x.safetensors"), None)


def test_the_spec_needs_no_text_encoder(tmp_path: Path) -> None:
    path, folder = write_published(tmp_path / "x.safetensors"), write_diffusers(tmp_path / "model")
    assert read_spec(path) == open_checkpoint(path, write_gemma(tmp_path / "gemma")).spec
    assert read_spec(folder) == open_checkpoint(folder, None).spec
    assert read_spec(path).sections["vae"] == CONFIG["vae"]


def test_a_diffusers_folder_without_its_text_encoder_needs_a_gemma_root(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "model")
    (folder / "text_encoder").rename(tmp_path / "gemma")
    with pytest.raises(RequestError, match="--gemma-root"):
        open_checkpoint(folder, None)
    assert open_checkpoint(folder, tmp_path / "gemma").tokenizer_root == folder / "tokenizer"


@pytest.mark.parametrize("version", ["2.3.0", "2.0.0-rc1", None])
def test_another_model_than_gemma_3_is_refused_below_2_4(tmp_path: Path, version: str | None) -> None:
    gemma = write_gemma(tmp_path / "gemma", GEMMA | {"model_type": "gemma4_unified"})
    with pytest.raises(WeightsError, match=r"gemma holds a model of type 'gemma4_unified'.* needs Gemma 3"):
        open_checkpoint(write_published(tmp_path / "x.safetensors", version=version), gemma)
    assert open_checkpoint(write_published(tmp_path / "x.safetensors", version="2.4.0"), gemma)


def test_a_gemma_of_text_alone_is_accepted(tmp_path: Path) -> None:
    gemma = write_gemma(tmp_path / "gemma", GEMMA["text_config"])
    assert open_checkpoint(write_published(tmp_path / "x.safetensors"), gemma).index("text_encoder").entries


def test_a_gemma_of_another_width_is_refused(tmp_path: Path) -> None:
    gemma = write_gemma(tmp_path / "gemma", {"model_type": "gemma3_text", "hidden_size": 5, "num_hidden_layers": 2})
    match = r"gemma holds a Gemma with hidden size 5; .* needs 6\. Pass .*--gemma-root"
    with pytest.raises(WeightsError, match=match):
        open_checkpoint(write_published(tmp_path / "x.safetensors"), gemma)
    with pytest.raises(WeightsError, match=match):
        open_checkpoint(write_diffusers(tmp_path / "model"), gemma)


def test_a_gemma_of_another_depth_is_refused(tmp_path: Path) -> None:
    gemma = write_gemma(tmp_path / "gemma", {"model_type": "gemma3_text", "hidden_size": 6, "num_hidden_layers": 3})
    match = r"hidden size 6 and 3 layers; \S+ of .* takes 18 values, those of 2 layers"
    with pytest.raises(WeightsError, match=match):
        open_checkpoint(write_published(tmp_path / "x.safetensors"), gemma)
    with pytest.raises(WeightsError, match=match):
        open_checkpoint(write_diffusers(tmp_path / "model"), gemma)


def test_the_published_gemma_is_named(tmp_path: Path) -> None:
    config = CONFIG | {"transformer": TRANSFORMER | {"caption_channels": 3840}}
    with pytest.raises(WeightsError, match="gemma-3-12b-it"):
        open_checkpoint(write_published(tmp_path / "x.safetensors", config), write_gemma(tmp_path / "gemma"))


def test_a_gemma_without_tokenizer_is_refused(tmp_path: Path) -> None:
    gemma = write_gemma(tmp_path / "gemma", tokenizer=False)
    with pytest.raises(WeightsError, match=r"There is no tokenizer\.json in .*gemma"):
        open_checkpoint(write_published(tmp_path / "x.safetensors"), gemma)
    (gemma / "tokenizer.model").touch()  # SentencePiece alone is not enough: it is not read
    with pytest.raises(WeightsError, match=r"There is no tokenizer\.json"):
        open_checkpoint(tmp_path / "x.safetensors", gemma)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ("{not json", WeightsError, r"`config` metadata of .*x\.safetensors is not a valid JSON"),
        ("[" * 100_000, WeightsError, r"`config` metadata of .*x\.safetensors is not a valid JSON"),
        ("[1]", WeightsError, "is a JSON list"),
        ({}, WeightsError, "no configuration for transformer"),
        ({"transformer": 3}, WeightsError, "no configuration for transformer"),
        ({"transformer": TRANSFORMER | {"num_layers": "many"}}, WeightsError, "value of the wrong kind"),
        ({"transformer": TRANSFORMER | {"num_layers": [1]}}, WeightsError, "value of the wrong kind"),
        ({"transformer": TRANSFORMER | {"norm_eps": None}}, WeightsError, "norm_eps"),
        ({"transformer": TRANSFORMER | {"rope_type": "other"}}, UnsupportedError, "rope_type"),
    ],
)
def test_an_unusable_configuration_is_refused(tmp_path: Path, config: Any, error: type[LtxSpError], match: str) -> None:
    with pytest.raises(error, match=match):
        open_checkpoint(write_published(tmp_path / "x.safetensors", config), write_gemma(tmp_path / "gemma"))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("", r"gemma/config\.json is not a valid JSON object"),
        ("[]", r"gemma/config\.json is a JSON list"),
        (
            '{"model_type": ["gemma3"], "hidden_size": 6, "num_hidden_layers": 2}',
            r"gemma holds a model of type \['gemma3'",
        ),
        ('{"model_type": "gemma3", "text_config": 3}', "gemma/config.json has hidden_size None"),
        ('{"model_type": "gemma3"}', r"gemma/config\.json has hidden_size None"),
        ('{"model_type": "gemma3", "hidden_size": 0, "num_hidden_layers": 2}', "hidden_size 0"),
        ('{"model_type": "gemma3", "hidden_size": 6, "num_hidden_layers": %s}' % ("9" * 4000), "num_hidden_layers 99"),
    ],
)
def test_an_unusable_gemma_configuration_is_refused(tmp_path: Path, config: str, match: str) -> None:
    gemma = write_gemma(tmp_path / "gemma", config)
    with pytest.raises(WeightsError, match=match):
        open_checkpoint(write_published(tmp_path / "x.safetensors"), gemma)


def test_a_file_without_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"lora_A.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=r"lora\.safetensors carries no `config` in its metadata"):
        open_checkpoint(tmp_path / "lora.safetensors", write_gemma(tmp_path / "gemma"))


def test_another_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "model")
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(WeightsError, match="'WanPipeline'"):
        open_checkpoint(folder, None)


def test_a_diffusers_folder_without_a_component_names_it_when_asked(tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "model")
    for part in ("vae", "connectors"):
        (folder / part / "config.json").unlink()
    checkpoint = open_checkpoint(folder, None)
    for component in ("video_vae", "connectors"):
        with pytest.raises(WeightsError, match=f"model holds no {component} "):
            checkpoint.index(component)


UPSAMPLER: dict[str, Any] = {"_class_name": "LatentUpsampler", "mid_channels": 32, "num_blocks_per_stage": 1}
UPSAMPLER_TENSORS = ["final_conv.weight", "initial_conv.bias", "upsampler.0.weight"]


def write_upsampler(path: Path, config: Any = UPSAMPLER) -> Path:
    tensors = {name: torch.ones(3) for name in (*UPSAMPLER_TENSORS, "upsampler.blur_down.kernel")}
    metadata = None if config is None else {"config": config if isinstance(config, str) else json.dumps(config)}
    save_file(tensors, path, metadata=metadata)
    return path


def write_upsampler_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """As ``save_pretrained`` writes it."""
    folder.mkdir(parents=True)
    config = config or {"_class_name": "LTX2LatentUpsamplerModel", "mid_channels": 32, "num_blocks_per_stage": 1}
    (folder / "config.json").write_text(json.dumps(config))
    write_upsampler(folder / "diffusion_pytorch_model.safetensors", None)
    return folder


@pytest.mark.parametrize("layout", ["published", "diffusers"])
@pytest.mark.parametrize("kind", ["file", "folder of one file", "diffusers folder", "its parent"])
def test_an_upsampler_is_opened_beside_either_layout(tmp_path: Path, layout: str, kind: str) -> None:
    (tmp_path / "u").mkdir()
    match kind:
        case "file" | "folder of one file":
            found = given = write_upsampler(tmp_path / "u" / "x.safetensors")
            if kind == "folder of one file":
                found = given = given.parent
        case "diffusers folder":
            found = given = write_upsampler_folder(tmp_path / "u" / "upsampler")
        case _:
            found, given = write_upsampler_folder(tmp_path / "u" / "latent_upsampler"), tmp_path / "u"
    if layout == "published":
        checkpoint = open_checkpoint(write_published(tmp_path / "m"), write_gemma(tmp_path / "gemma"), given)
    else:
        checkpoint = open_checkpoint(write_diffusers(tmp_path / "m"), None, given)
    assert checkpoint.upsampler_path == found
    assert checkpoint.upsampler_config["mid_channels"] == 32
    assert sorted(checkpoint.index("upsampler").entries) == UPSAMPLER_TENSORS  # doubling has no use for the kernel
    assert checkpoint.keymap("upsampler").to_parameter("upsampler.0.weight") == "upsampler.0.weight"
    assert not set(UPSAMPLER_TENSORS) & set(checkpoint.index("transformer").entries)


def test_without_an_upsampler_there_is_none(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_published(tmp_path / "x.safetensors"), write_gemma(tmp_path / "gemma"))
    assert checkpoint.upsampler_path is None
    for ask in (checkpoint.index, checkpoint.keymap):
        with pytest.raises(WeightsError, match=r"x\.safetensors was opened without .*--spatial-upsampler-path"):
            ask("upsampler")


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (None, WeightsError, r"u\.safetensors carries no `config` in its metadata"),
        ("{not json", WeightsError, r"`config` metadata of .*u\.safetensors is not a valid JSON"),
        ({}, WeightsError, "configuration of nothing; it must hold a latent upsampler"),
        (CONFIG, WeightsError, "configuration of 'transformer', 'vae'"),
        ({"_class_name": "LTXLatentUpsamplerModel", "mid_channels": 32}, WeightsError, "'LTXLatentUpsamplerModel'; it"),
        ({"_class_name": "LatentUpsampler"}, WeightsError, "holds 'LatentUpsampler'; it must"),
        ({"_class_name": ["x"] * 10_000, "mid_channels": 32}, WeightsError, r"holds \['x', .{,60}\.\.\.\]; it"),
        ({"\x1b[2J" * 99: 1}, WeightsError, r"configuration of '(\\x1b\[2J)+.{,40} characters\)"),
        (UPSAMPLER | {"spatial_scale": 1.5}, UnsupportedError, "spatial_scale = 1.5"),
        (UPSAMPLER | {"spatial_upsample": False, "temporal_upsample": True}, UnsupportedError, "temporal_upsample"),
        (UPSAMPLER | {"dims": 2}, UnsupportedError, "dims = 2"),
        (UPSAMPLER | {"in_channels": 16}, UnsupportedError, "in_channels = 16"),
        (UPSAMPLER | {"mid_channels": "many"}, WeightsError, "mid_channels = 'many'"),
    ],
)
def test_an_unusable_upsampler_is_refused_on_opening(
    tmp_path: Path, config: Any, error: type[LtxSpError], match: str
) -> None:
    paths = write_published(tmp_path / "x.safetensors"), write_gemma(tmp_path / "gemma")
    with pytest.raises(error, match=match):
        open_checkpoint(*paths, write_upsampler(tmp_path / "u.safetensors", config))


def test_what_is_no_upsampler_at_all_is_refused(tmp_path: Path) -> None:
    checkpoint, gemma = write_published(tmp_path / "x.safetensors"), write_gemma(tmp_path / "gemma")
    (tmp_path / "empty").mkdir()
    for path, match in (
        (checkpoint, r"x\.safetensors holds a model with the configuration of 'transformer'"),
        (gemma, "gemma holds a model with the configuration of 'model_type'"),
        (tmp_path / "absent", "absent does not exist"),
        (tmp_path / "empty", "empty holds no .safetensors file"),
        (gemma / "tokenizer.json", r"tokenizer\.json has 2 bytes"),
    ):
        with pytest.raises(WeightsError, match=match):
            open_checkpoint(checkpoint, gemma, path)


def test_an_upsampler_without_its_tensors_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "u.safetensors", metadata={"config": json.dumps(UPSAMPLER)})
    paths = write_published(tmp_path / "x.safetensors"), write_gemma(tmp_path / "gemma")
    with pytest.raises(WeightsError, match=r"u\.safetensors holds no tensors of upsampler"):
        open_checkpoint(*paths, tmp_path / "u.safetensors").index("upsampler")


def test_an_unknown_component_is_the_callers_fault(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_diffusers(tmp_path / "model"), None)
    with pytest.raises(ValueError, match="no component 'vae'"):
        checkpoint.index("vae")


@pytest.mark.parametrize("name", ["absent", "a\0b", "x" * 300])
def test_a_path_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=r"does not exist|cannot be read"):
        open_checkpoint(tmp_path / name, None)
    with pytest.raises(WeightsError, match=r"does not exist|cannot be read"):
        open_checkpoint(write_published(tmp_path / "x.safetensors"), tmp_path / name)
