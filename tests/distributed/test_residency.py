"""Sets of weights in every mode, on several ranks and hosts. Oracle: clean weights with all factors merged at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ltx_sp import Lora, PlanError, Request, Runtime, Settings, WeightsError
from ltx_sp.components import Components
from ltx_sp.demo import write_demo
from ltx_sp.request import GuidanceRequest
from ltx_sp.weights import policy as policies
from ltx_sp.weights.load import load as load_module
from ltx_sp.weights.verify import digest
from tests.support.ranks import run_ranks
from tests.support.sets import MODES, assert_holds, expected, open_components, two_stages


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_demo(tmp_path_factory.mktemp("demo") / "2.3")
    two_stages(path)
    return path


@contextmanager
def hosts_of(size: int, *, exchange: bool) -> Iterator[None]:
    """Let ranks exchange stripes or not, so many of them to a host."""
    choose = policies.choose_policy

    def forced(*args: Any, **kwargs: Any) -> policies.Policy:
        return choose(*args, **kwargs, exchange=exchange)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltx_sp.weights.transformer_sets.choose_policy", forced)
        patch.setattr("ltx_sp.weights.load._BUCKET_BYTES", 100_000)
        patch.setattr("ltx_sp.weights.residency._BUCKET_BYTES", 50_000)
        patch.setattr("ltx_sp.parallel.mesh._host_name", lambda: f"host {dist.get_rank() // size}")
        yield


def load(components: Components) -> None:
    with components._mesh.together(), components.loading(["transformer"]):
        pass
    components.enter(0)


def walk(rank: int, num_ranks: int, settings: Settings, size: int | None, exchange: bool) -> None:
    """Through both sets, with and without a request's LoRAs, there and back, more than once."""
    style = (Lora(settings.checkpoint_path.parent / "style.safetensors", -0.5),)
    with hosts_of(size, exchange=exchange) if size else nullcontext():
        components = open_components(settings)
        wanted = [expected(settings, set_) for set_ in range(2)]
        styled = [expected(settings, set_, style) for set_ in range(2)]
        load(components)
        module = components["transformer"]
        for loras, sets in (((), wanted), (style, styled), ((), wanted)):
            components.use_loras(loras)
            assert_holds(module, sets[0])
            components.prefetch(1)
            assert_holds(module, sets[0])
            for set_ in (1, 1, 0, 1):
                components.enter(set_)
                assert_holds(module, sets[set_])
            components.rest()
            components.enter(0)
            assert_holds(module, sets[0])
        components.close()
        assert not any(components.ledger.held.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("num_ranks", "changes", "size", "exchange"),
    [
        (1, {"load_mode": "preload", "dtype": "float32", "hq": True}, None, False),
        (2, {"load_mode": "stream", "hq": True}, 2, True),
        (2, {"load_mode": "preload"}, 2, False),
        (3, {"load_mode": "mmap", "overlap_lora": False}, None, False),
        (3, {"load_mode": "preload", "hq": True}, 2, True),
    ],
)
def test_every_mode_holds_the_same_sets(
    checkpoint: Path, mode: str, num_ranks: int, changes: dict[str, Any], size: int | None, exchange: bool
) -> None:
    if mode == "sharded" and num_ranks == 1:
        pytest.skip("sharded needs ranks")
    run_loras = (Lora(checkpoint.parent / "run.safetensors", 0.5),) if "load_mode" in changes else ()
    settings = two_stages(checkpoint, residency=mode, loras=run_loras, **changes)
    run_ranks(walk, num_ranks, settings, size, exchange, timeout=90)


def share(rank: int, num_ranks: int, settings: Settings) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltx_sp.weights.residency._BUCKET_BYTES", 50_000)
        components = open_components(settings)
        load(components)
        ledger, need = components.ledger, components._sets.need()
        padding = 2 * 256 * (need.switched // 50_000 + 1) + 16 * 100
        shards = 2 * need.switched / num_ranks
        assert shards <= ledger.held["device"] <= shards + padding
        assert ledger.peak["device"] == ledger.held["device"], "nothing more while it is built"
        components.enter(1)
        assert ledger.peak["device"] - ledger.held["device"] <= 2 * (50_000 + 256 * num_ranks)
        assert shards <= ledger.held["device"] <= shards + padding
        foreign = need.switched * (num_ranks - 1) / num_ranks
        assert foreign <= ledger.num_bytes["exchanged"] <= foreign + num_ranks * padding
        assert not ledger.num_bytes["host_to_device"]
        assert not ledger.num_bytes["device_to_host"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sharded_holds_a_share_of_each_set(checkpoint: Path, num_ranks: int) -> None:
    run_ranks(share, num_ranks, two_stages(checkpoint, residency="sharded"), timeout=60)


def meet_bad_files(rank: int, num_ranks: int, settings: Settings) -> list[str]:
    """A LoRA of another model, a file that is none, and one whose data ends early on one rank; then a good one."""
    folder = settings.checkpoint_path.parent
    components = open_components(settings)
    load(components)
    wanted, messages = expected(settings, 0), []
    style = Lora(folder / "style.safetensors", 2.0)
    for lora in (Lora(folder / "other.safetensors"), Lora(folder / "gemma" / "config.json")):
        with pytest.raises(WeightsError) as caught:
            components.use_loras([style, lora])
        messages.append(str(caught.value))
        assert "transformer" in components
        assert_holds(components["transformer"], wanted)
    with pytest.MonkeyPatch.context() as patch:
        if rank == num_ranks - 1:
            patch.setattr("ltx_sp.components.LoraMerger.take", broken)
        with pytest.raises(WeightsError) as caught:
            components.use_loras([style])
    messages.append(str(caught.value))
    assert "transformer" not in components
    assert not any(components.ledger.held.values())
    load(components)
    assert_holds(components["transformer"], wanted)
    components.use_loras([style])
    for set_ in (1, 0):
        components.enter(set_)
        assert_holds(components["transformer"], expected(settings, set_, [style]))
    return messages


def broken(self: object, *_: object) -> None:
    raise WeightsError("A factor is broken.")


@pytest.mark.parametrize(("mode", "num_ranks"), [("resident", 1), ("legacy", 2), ("snapshot", 3), ("sharded", 2)])
def test_a_bad_lora_fails_on_all_ranks_and_leaves_nothing(checkpoint: Path, mode: str, num_ranks: int) -> None:
    other = {"diffusion_model.proj_out.lora_A.weight": torch.ones(4, 3), "x.lora_B.weight": torch.ones(2, 4)}
    other["diffusion_model.proj_out.lora_B.weight"] = torch.ones(2, 4)
    save_file(other, checkpoint.parent / "other.safetensors")
    told = run_ranks(meet_bad_files, num_ranks, two_stages(checkpoint, residency=mode), timeout=90)
    for messages in told:
        assert "Use a LoRA of this model" in messages[0]
        assert "config.json" in messages[1]
        assert "A factor is broken." in messages[2]


def ask_before_loading(rank: int, num_ranks: int, settings: Settings) -> None:
    style = [Lora(settings.checkpoint_path.parent / "style.safetensors", 1.5)]
    components = open_components(settings)
    components.use_loras(style)
    assert "transformer" not in components
    load(components)
    records = len([record for record in components._observer.records if record.phase == "merge lora"])
    assert records == 1
    for loras in (style, []):
        before = dict(components.ledger.num_bytes)
        components.use_loras(loras)
        if loras:
            assert components.ledger.num_bytes == before, "what is in force is not done again"
        for set_ in (1, 0):
            components.enter(set_)
            assert_holds(components["transformer"], expected(settings, set_, loras))
    if rank == 0:
        components.free("transformer")
    components.use_loras(style)
    assert "transformer" not in components
    load(components)
    assert_holds(components["transformer"], expected(settings, 0, style))


@pytest.mark.parametrize(("mode", "num_ranks"), [("resident", 2), ("snapshot-low-vram", 2), ("legacy", 1)])
def test_loras_of_the_first_request_are_merged_while_it_loads(checkpoint: Path, mode: str, num_ranks: int) -> None:
    run_ranks(ask_before_loading, num_ranks, two_stages(checkpoint, residency=mode), timeout=90)


def free_one(rank: int, num_ranks: int, settings: Settings) -> None:
    """One rank's transformer gives way, however the mode does that; all come back to what they were."""
    components = open_components(settings)
    load(components)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltx_sp.components.free_bytes", lambda device: 0)
        if rank == 0:
            components.make_room("video_vae")
            assert "transformer" not in components
    before = components.ledger.num_bytes["host_to_device"]
    load(components)
    if rank == 1 and settings.residency == "snapshot":
        assert components.ledger.num_bytes["host_to_device"] == before
    for set_ in (0, 1):
        components.enter(set_)
        assert_holds(components["transformer"], expected(settings, set_))


@pytest.mark.parametrize("mode", MODES)
def test_the_transformer_gives_way_and_comes_back(checkpoint: Path, mode: str) -> None:
    run_ranks(free_one, 2, two_stages(checkpoint, residency=mode), timeout=90)


@pytest.mark.parametrize(
    ("place", "goes", "is_loaded_again"), [("gpu", False, False), ("host", True, False), ("drop", True, True)]
)
def test_components_go_where_they_belong(
    checkpoint: Path, place: str, goes: bool, is_loaded_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = open_components(two_stages(checkpoint))
    components.places["audio_vae"] = place
    with components.loading(["audio_vae"]):
        pass
    before = digest(components["audio_vae"])
    components.put_away("audio_vae")
    assert ("audio_vae" not in components) == goes
    loads: list[str] = []

    def counting(*args: Any, component: str, **kwargs: Any) -> Any:
        loads.append(component)
        return load_module(*args, component=component, **kwargs)

    monkeypatch.setattr("ltx_sp.components.load", counting)
    with components.loading(["audio_vae"]):
        pass
    assert "audio_vae" in components
    assert digest(components["audio_vae"]) == before
    assert loads == (["audio_vae"] if is_loaded_again else [])


def test_a_mode_that_does_not_fit_is_refused_before_anything_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltx_sp.components.free_bytes", lambda device: 10 * 2**20)
    components = open_components(two_stages(checkpoint, residency="resident"))
    components.reserve(2**20)
    assert components.mode == "resident"
    with pytest.raises(PlanError, match=r"--residency resident does not fit: .* of 10\.0 MiB free"):
        components.reserve(10 * 2**20)
    with pytest.raises(PlanError, match="there is one rank"):
        open_components(two_stages(checkpoint, residency="sharded"))


@pytest.mark.parametrize("mode", ["resident", "snapshot", "legacy"])
def test_what_is_loaded_is_not_counted_twice(checkpoint: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request needs more; what the first has loaded is no longer free, and is not needed once more."""
    components = open_components(two_stages(checkpoint, residency=mode, load_mode="preload"))
    need = components._sets.need()
    whole = need.device(mode) + need.host(mode)

    def left(*_: object) -> int:
        return int(1.2 * (whole + 2**20)) - (whole if "transformer" in components else 0)

    monkeypatch.setattr("ltx_sp.components.free_bytes", left)
    monkeypatch.setattr("ltx_sp.components.available_bytes", left)
    components.reserve(2**18)
    load(components)
    components.reserve(2**20)
    assert components.mode == mode
    assert "transformer" in components
    with pytest.raises(PlanError, match="does not fit"):
        components.reserve(2**20 + whole)


def test_on_the_cpu_auto_is_resident_and_says_so(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    components = open_components(two_stages(checkpoint))
    with caplog.at_level("INFO", "ltx_sp"):
        load(components)
    assert "residency: resident (on the CPU there is one memory)" in caplog.text
    assert components.num_sets == 2


OFF = GuidanceRequest(cfg_guidance_scale=1, stg_guidance_scale=0, modality_scale=1)
REQUEST = Request("a robot dancing", height=64, width=128, num_frames=9, num_inference_steps=1, video=OFF, audio=OFF)


def make_clips(rank: int, num_ranks: int, settings: Settings, modes: tuple[str, ...]) -> list[list[bytes]]:
    """By mode, the latents of three requests; the second has LoRAs of its own."""
    style = (Lora(settings.checkpoint_path.parent / "style.safetensors", 1.0),)
    made = []
    for mode in modes:
        with Runtime.load(dataclasses.replace(settings, residency=mode)) as runtime:
            requests = (REQUEST, dataclasses.replace(REQUEST, loras=style), REQUEST)
            results = [runtime.generate(request).latents for request in requests]
            made.append([latents.video.float().numpy().tobytes() for latents in results])
    return made


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_mode_gives_the_same_clips(checkpoint: Path, num_ranks: int) -> None:
    modes = tuple(mode for mode in (*MODES, "auto") if num_ranks > 1 or mode != "sharded")
    for made in run_ranks(make_clips, num_ranks, two_stages(checkpoint), modes, timeout=120):
        first, styled, again = made[0]
        assert first == again != styled
        assert all(clips == made[0] for clips in made)
