"""Components that load side by side, with LoRAs, on several ranks and hosts. Oracle: self, one rank reading alone."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ltx_sp import Lora, RankMismatchError, Request, Runtime, Settings, WeightsError
from ltx_sp.components import COMPONENTS, DECODERS
from ltx_sp.demo import write_demo
from ltx_sp.request import GuidanceRequest
from ltx_sp.weights import policy as policies
from ltx_sp.weights.index import read_index
from ltx_sp.weights.load import load
from ltx_sp.weights.lora import LoraMerger
from ltx_sp.weights.verify import digest
from tests.support.ranks import run_ranks

OFF = GuidanceRequest(cfg_guidance_scale=1, stg_guidance_scale=0, modality_scale=1)
REQUEST = Request("a robot dancing", height=64, width=96, num_frames=9, num_inference_steps=1, video=OFF, audio=OFF)
MODES = ("stream", "preload", "mmap")


def write_lora(checkpoint: Path, path: Path, *, rank: int, seed: int) -> Path:
    """Factors for every two-dimensional weight of the transformer's blocks."""
    generator, factors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, entry in read_index(checkpoint).entries.items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        if "diffusion_model.transformer_blocks." in name and name.endswith(".weight") and len(entry.shape) == 2:
            factors[f"{stem}.lora_A.weight"] = torch.randn(rank, entry.shape[1], generator=generator).bfloat16()
            factors[f"{stem}.lora_B.weight"] = torch.randn(entry.shape[0], rank, generator=generator).bfloat16() / 9
    save_file(factors, path)
    return path


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("demo")
    checkpoint = write_demo(folder / "2.3")
    loras = (
        Lora(write_lora(checkpoint, folder / "one.safetensors", rank=3, seed=1), 0.5),
        Lora(write_lora(checkpoint, folder / "two.safetensors", rank=4, seed=2), -0.25),
    )
    return Settings(checkpoint, checkpoint.parent / "gemma", device="cpu", loras=loras)


@contextmanager
def exchanging(hosts_of: int, *, exchange: bool = True) -> Iterator[None]:
    """Let ranks exchange whatever the rates, or not, ``hosts_of`` of them to a host."""
    choose = policies.choose_policy

    def forced(*args: Any, **kwargs: Any) -> policies.Policy:
        return choose(*args, **kwargs, exchange=exchange)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltx_sp.weights.transformer_sets.choose_policy", forced)
        patch.setattr("ltx_sp.weights.load._BUCKET_BYTES", 100_000)
        patch.setattr("ltx_sp.parallel.mesh._host_name", lambda: f"host {dist.get_rank() // hosts_of}")
        yield


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a rank holds after a request: its transformer's digest, the latents' bytes, what it read of the files."""

    weights: str
    latents: bytes
    read_bytes: int


def run(rank: int, num_ranks: int, settings: Settings, hosts_of: int | None = None) -> Outcome:
    """One request. Ranks exchange within hosts of so many ranks; None to leave it to the policy."""
    with exchanging(hosts_of) if hosts_of else nullcontext(), Runtime.load(settings) as runtime:
        latents = runtime.generate(REQUEST).latents
        policy = runtime._components._policy
        assert policy is not None
        assert policy.mode == settings.load_mode
        if hosts_of:
            first = rank // hosts_of * hosts_of
            assert policy.exchange.size == min(hosts_of, num_ranks - first)
        (read_bytes,) = (
            record.details["read_bytes"] for record in runtime._observer.records if record.phase == "load transformer"
        )
        assert {name for name in COMPONENTS if name in runtime._components} == (
            {"transformer", *DECODERS} if rank == 0 else {"transformer"}
        )
        return Outcome(digest(runtime._components["transformer"]), latents.video.float().numpy().tobytes(), read_bytes)


@pytest.fixture(scope="module")
def alone(settings: Settings) -> Outcome:
    return run(0, 1, dataclasses.replace(settings, load_mode="stream"))


def test_loras_change_the_weights(settings: Settings, alone: Outcome) -> None:
    plain = run(0, 1, dataclasses.replace(settings, loras=(), load_mode="stream"))
    assert plain.weights != alone.weights
    assert plain.latents != alone.latents


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overlap", [True, False])
def test_every_mode_gives_the_same_bits(settings: Settings, alone: Outcome, mode: str, overlap: bool) -> None:
    outcome = run(0, 1, dataclasses.replace(settings, load_mode=mode, overlap_lora=overlap))
    assert (outcome.weights, outcome.latents) == (alone.weights, alone.latents)


@pytest.mark.parametrize(
    ("num_ranks", "mode", "overlap", "hosts_of"),
    [
        (2, "stream", True, None),
        (2, "stream", True, 2),
        (3, "stream", False, 3),
        (2, "preload", True, 2),
        (3, "preload", False, None),
        (2, "mmap", True, None),
        (3, "mmap", False, 3),
        (4, "stream", True, 2),
        (3, "preload", True, 2),
    ],
)
def test_ranks_hold_the_same_bits_as_one(
    settings: Settings, alone: Outcome, num_ranks: int, mode: str, overlap: bool, hosts_of: int | None
) -> None:
    way = dataclasses.replace(settings, load_mode=mode, overlap_lora=overlap, verify_weights=True)
    outcomes = run_ranks(run, num_ranks, way, hosts_of, timeout=120)
    assert {outcome.weights for outcome in outcomes} == {alone.weights}
    assert len({outcome.latents for outcome in outcomes}) == 1
    for rank, outcome in enumerate(outcomes):
        sharing = 1
        if hosts_of:
            sharing = min(hosts_of, num_ranks - rank // hosts_of * hosts_of)
        elif mode == "preload":
            sharing = num_ranks
        assert outcome.read_bytes == pytest.approx(alone.read_bytes / sharing, rel=0.02)


def fail_disk(patch: pytest.MonkeyPatch) -> None:
    """Let the fifth read fail, in the middle of a stripe."""
    preadv, count = os.preadv, itertools.count()

    def failing(*args: Any) -> int:
        if next(count) >= 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    patch.setattr("os.preadv", failing)


def failing_at(place: str, message: str) -> Callable[[pytest.MonkeyPatch], None]:
    def broken(*_: object, **__: object) -> None:
        raise WeightsError(message)

    return lambda patch: patch.setattr(place, broken)


def fail_verifying(patch: pytest.MonkeyPatch) -> None:
    """Between two components, when the others have gone on to the next."""

    def broken(module: object, component: str) -> None:
        if component == "transformer":
            raise WeightsError("The transformer is broken.")

    patch.setattr("ltx_sp.components.require_finite", broken)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "disk": (fail_disk, r".*safetensors cannot be read \(Input/output error\)\. Check the file and the disk\."),
    "encoding": (
        failing_at("ltx_sp.prepare.encode_prompts", "The tokenizer is broken."),
        r"The tokenizer is broken\.",
    ),
    "merging": (
        failing_at("ltx_sp.components.LoraMerger.take", "A factor is broken."),
        r"A factor is broken\.",
    ),
    "building": (
        failing_at("ltx_sp.components.build_transformer", "There is no room for the transformer."),
        r"There is no room for the transformer\.",
    ),
    # After the last exchange of a load, or before the first.
    "delivering": (
        failing_at("ltx_sp.weights.load.deliver", "There is no room for buffers."),
        r"There is no room for buffers\.",
    ),
    "verifying": (fail_verifying, r"The transformer is broken\."),
}


def meet_fault(rank: int, num_ranks: int, settings: Settings, hosts_of: int | None, fault: str, where: int) -> str:
    with (
        # Where they exchange, what may fail in a delivery is looked after inside it.
        exchanging(hosts_of, exchange=fault != "delivering") if hosts_of else nullcontext(),
        pytest.MonkeyPatch.context() as patch,
        Runtime.load(settings) as runtime,
    ):
        if rank == where:
            FAULTS[fault][0](patch)
        try:
            runtime.generate(REQUEST)
        except WeightsError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("fault", "where", "num_ranks", "mode", "hosts_of", "overlap"),
    [
        ("disk", 1, 3, "stream", 3, True),
        ("disk", 1, 2, "stream", None, True),
        ("disk", 3, 4, "preload", 2, True),
        ("encoding", 0, 3, "stream", 3, True),
        ("encoding", 0, 4, "stream", 2, False),
        ("encoding", 0, 2, "mmap", None, False),
        ("merging", 1, 3, "stream", 3, False),
        ("merging", 2, 4, "preload", 2, True),
        ("building", 1, 4, "preload", 2, True),
        ("building", 1, 3, "stream", 3, False),
        ("delivering", 1, 4, "preload", 2, True),
        ("verifying", 1, 4, "stream", 2, True),
        ("verifying", 1, 2, "mmap", None, True),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_alike(
    settings: Settings, fault: str, where: int, num_ranks: int, mode: str, hosts_of: int | None, overlap: bool
) -> None:
    # In float32 the parameters are converted, and so delivered, in every mode.
    way = dataclasses.replace(
        settings, load_mode=mode, overlap_lora=overlap, verify_weights=True, dtype="float32", keep_text_encoder=False
    )
    began = time.perf_counter()
    messages = run_ranks(meet_fault, num_ranks, way, hosts_of, fault, where, timeout=60)
    assert time.perf_counter() - began < 40
    assert re.fullmatch(FAULTS[fault][1], messages[where])
    assert {message for rank, message in enumerate(messages) if rank != where} == {f"Rank {where}: {messages[where]}"}


def test_an_interrupt_ends_the_load(settings: Settings) -> None:
    """Oracle: what loads after it, which is nothing."""
    loaded: list[str] = []

    def slow(*args: object, component: str, **kwargs: object) -> object:
        loaded.append(component)
        if component == "transformer":
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.5)
        return load(*args, component=component, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, Runtime.load(settings) as runtime:
        patch.setattr("ltx_sp.components.load", slow)
        with pytest.raises(KeyboardInterrupt):
            runtime.generate(REQUEST)
        time.sleep(1)
        assert loaded[-1] == "transformer"
        assert "transformer" not in runtime._components


def test_what_is_there_is_neither_loaded_nor_digested_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: list[object] = []

    def counting(module: torch.nn.Module) -> str:
        digests.append(module)
        return digest(module)

    monkeypatch.setattr("ltx_sp.components.digest", counting)
    with Runtime.load(dataclasses.replace(settings, verify_weights=True)) as runtime:
        runtime.generate(REQUEST)
        num_threads, records = threading.active_count(), runtime._observer.records
        num_records = len(records)
        runtime.generate(REQUEST)
        assert threading.active_count() == num_threads
        first, second = ({record.phase for record in part} for part in (records[:num_records], records[num_records:]))
        of_loading = {f"load {name}" for name in COMPONENTS} | {"merge lora", "encode text", "connectors"}
        assert first >= of_loading
        assert not second & of_loading
        assert "denoise" in second
    assert len(digests) == 1


def _free_and_reload(rank: int, num_ranks: int, settings: Settings) -> str:
    with exchanging(2), Runtime.load(settings) as runtime:
        runtime.generate(REQUEST)
        if rank == 0:
            runtime._components.free("transformer")
        runtime.generate(dataclasses.replace(REQUEST, seed=3))
        return digest(runtime._components["transformer"])


def test_ranks_help_one_that_has_to_load_again(settings: Settings, alone: Outcome) -> None:
    way = dataclasses.replace(settings, load_mode="stream")
    assert run_ranks(_free_and_reload, 2, way, timeout=60) == [alone.weights] * 2


def test_ranks_that_hold_other_weights_say_so(settings: Settings) -> None:
    way = dataclasses.replace(settings, load_mode="stream", verify_weights=True)
    for message in run_ranks(_flip_a_bit, 2, way, timeout=60):
        assert message.startswith("Rank 1 made another set of weights than rank 0.")


def _flip_a_bit(rank: int, num_ranks: int, settings: Settings) -> str:
    with pytest.MonkeyPatch.context() as patch, Runtime.load(settings) as runtime:

        def flip(self: LoraMerger) -> None:
            weight = next(runtime._components["transformer"].parameters())
            weight.detach().view(torch.int16).view(-1)[0] ^= 1

        if rank == 1:
            patch.setattr(LoraMerger, "finish", flip)
        try:
            runtime.generate(REQUEST)
        except RankMismatchError as error:
            return str(error)
    return "no error"
