"""Oracle: the published layout. The same weights, saved by diffusers and transformers, give the same clip."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_sp import Request, Runtime, Settings
from ltx_sp.components import _BUILDERS
from ltx_sp.demo import write_demo
from ltx_sp.model.dit import Transformer
from ltx_sp.request import GuidanceRequest
from ltx_sp.weights.checkpoint import Checkpoint, open_checkpoint
from ltx_sp.weights.load import load
from profiling.bench_step import diffusers_twin

STG = GuidanceRequest(stg_blocks=(1,))
REQUEST = Request("a robot", "blurry", height=64, width=96, num_frames=9, num_inference_steps=1, video=STG, audio=STG)


def _load(checkpoint: Checkpoint, component: str) -> Any:
    module = _BUILDERS[component](checkpoint)
    load(
        module,
        checkpoint.index(component),
        checkpoint.keymap(component),
        device=torch.device("cpu"),
        dtype=None,
        component=component,
    )
    return module


def _save_transformer(checkpoint: Checkpoint, folder: Path) -> None:
    model = _load(checkpoint, "transformer")
    assert isinstance(model, Transformer)
    twin = diffusers_twin(model)
    # Weights that share memory would all go to one shard.
    twin.load_state_dict({name: value.clone() for name, value in twin.state_dict().items()}, assign=True)
    twin.save_pretrained(folder, max_shard_size="300KB")


def _save_text_encoder(checkpoint: Checkpoint, folder: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = {name: value for name, value in checkpoint.gemma_config.items() if name != "model_type"}
    config["vision_config"] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    gemma = Gemma3ForConditionalGeneration(Gemma3Config(**config | {"mm_tokens_per_image": 4})).to(torch.bfloat16)
    gemma.model.language_model.load_state_dict(_load(checkpoint, "text_encoder").state_dict())
    gemma.save_pretrained(folder, max_shard_size="100KB")


def _write_diffusers_folder(checkpoint: Checkpoint, folder: Path) -> None:
    for component, name in (
        ("connectors", "connectors"), ("video_vae", "vae"), ("audio_vae", "audio_vae"), ("vocoder", "vocoder"),
    ):  # fmt: skip
        _load(checkpoint, component).save_pretrained(folder / name)
    _save_transformer(checkpoint, folder / "transformer")
    _save_text_encoder(checkpoint, folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint.tokenizer_root / name, folder / "tokenizer" / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTX2Pipeline"}))


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_both_layouts_give_the_same_clip(tmp_path: Path, version: str) -> None:
    published = write_demo(tmp_path / "published", version)
    gemma = published.parent / "gemma"
    folder = tmp_path / "diffusers"
    folder.mkdir()
    _write_diffusers_folder(open_checkpoint(published, gemma), folder)
    for name in ("transformer", "text_encoder"):
        assert len(list((folder / name).glob("*-of-*.safetensors"))) > 1, "the point is to read shards"

    settings = Settings(published, gemma, device="cpu", dtype="float32")
    results = []
    for one in (settings, dataclasses.replace(settings, checkpoint_path=folder, gemma_root=None)):
        with Runtime.load(one) as runtime:
            result = runtime.generate(REQUEST)
            assert result.clip is not None
            results.append((result.latents, torch.cat(list(result.clip.frames)), result.clip.waveform))
    (latents, frames, waveform), (other_latents, other_frames, other_waveform) = results
    assert torch.equal(latents.video, other_latents.video)
    assert torch.equal(latents.audio, other_latents.audio)
    assert torch.equal(frames, other_frames)
    assert torch.equal(waveform, other_waveform)
