"""Where sets of weights live. Oracles: the definition of a set, addresses of memory, and counts of copies and bytes."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ltx_sp.errors import PlanError
from ltx_sp.weights import backed as backing
from ltx_sp.weights.backed import Backed, spots_of
from ltx_sp.weights.index import TensorEntry
from ltx_sp.weights.lora import LoraPlan, Pair
from ltx_sp.weights.placement import Budget, Need, choose_residency, place_components, require_sense
from ltx_sp.weights.shelf import Shelf
from ltx_sp.weights.transfer import Ledger, Mover
from tests.support.sets import DISTILLED, LAYER_BYTES, LAYERS, MODES, RUN, TWO_SETS, WIDTH, Bench
from tests.support.weights import CPU, Part, same_bits

GIB = 2**30
SNAPSHOTS = ("snapshot", "snapshot-low-vram")


@pytest.fixture(autouse=True, params=[None, 3 * LAYER_BYTES], ids=["one segment", "small segments"])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(backing, "_SEGMENT_BYTES", request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sets", [TWO_SETS, ({}, {"distilled": 0.5}), ({"run": 0.5},), ({"distilled": 0.25}, {})])
def test_sets_are_what_they_are_by_definition(mode: str, sets: tuple[Mapping[str, float], ...]) -> None:
    bench = Bench()
    plans = bench.plans(*sets)
    residency = bench.make(mode, plans)
    bench.assert_holds(plans[0])
    for set_ in (*range(len(sets)), 0):
        residency.prefetch(set_)
        residency.enter(set_)
        bench.assert_holds(plans[set_])
    residency.close()
    assert not any(bench.ledger.held.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("set_", [0, 1])
def test_entering_the_set_in_use_does_nothing(mode: str, set_: int) -> None:
    bench = Bench()
    residency = bench.make(mode, bench.plans(*TWO_SETS))
    residency.enter(set_)
    before = bench.moved(), bench.addresses()
    residency.enter(set_)
    assert (bench.moved(), bench.addresses()) == before


@pytest.mark.parametrize("mode", MODES)
def test_requests_with_other_loras_leave_no_trace(mode: str) -> None:
    bench = Bench()
    plans = bench.plans(*TWO_SETS)
    styled = bench.plans({"run": 0.5, "style": 2.0}, {"run": 0.5, "style": 2.0, "distilled": 1.0})
    residency = bench.make(mode, plans)
    held = []
    for _ in range(3):
        for own in (styled, plans):
            bench.remake(residency, own)
            for set_ in (0, 1, 0):
                residency.enter(set_)
                bench.assert_holds(own[set_])
        held.append(dict(bench.ledger.held))
    assert held[0] == held[1] == held[2], "memory does not grow from request to request"


@pytest.mark.parametrize("mode", MODES)
def test_a_request_without_sets_to_switch(mode: str) -> None:
    """What no LoRA of the run changes comes back as the very tensors that were loaded."""
    bench = Bench()
    plans = bench.plans({})
    residency = bench.make(mode, plans)
    before = bench.addresses()
    bench.remake(residency, bench.plans({"style": 1.0}))
    bench.assert_holds(bench.plans({"style": 1.0})[0])
    bench.remake(residency, plans)
    bench.assert_holds(plans[0])
    assert bench.addresses() == before
    assert bench.ledger.held["host"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_module_without_parameters_is_no_error(mode: str) -> None:
    bench = Bench()
    bench.module, bench.loaded, bench.clean = nn.Sequential(nn.ReLU()), {}, {}
    residency = bench.make(mode, bench.plans({}, {}))
    for set_ in (1, 0):
        residency.prefetch(set_)
        residency.enter(set_)
    residency.rest()
    residency.evict()
    residency.close()


def test_resident_doubles_what_is_switched_and_copies_nothing_at_a_switch() -> None:
    bench = Bench()
    residency = bench.make("resident", bench.plans(*TWO_SETS))
    assert bench.ledger.held == {"device": len(DISTILLED) * LAYER_BYTES}
    first, before = bench.addresses(), bench.moved()
    residency.enter(1)
    second = bench.addresses()
    assert {name for name in first if first[name] != second[name]} == set(DISTILLED)
    residency.enter(0)
    assert bench.addresses() == first
    assert bench.moved() == before


def test_a_resident_switch_of_a_large_model_takes_less_than_a_millisecond() -> None:
    """1700 tensors, as many as the distilled LoRA of the 22B model touches. The target is 1 ms; here 5 are a fault."""
    bench = Bench()
    bench.module = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(1700))).requires_grad_(False)
    bench.clean = {name: tensor.clone() for name, tensor in bench.module.state_dict().items()}
    bench.loaded = dict(bench.module.named_parameters())
    entry = TensorEntry("factor", Path("x"), "F32", (2, 2), 0, 1)
    bench.stored[entry] = torch.ones(2, 2)
    residency = bench.make(
        "resident", (LoraPlan({}), LoraPlan({name: (Pair(entry, entry, 1.0),) for name in bench.loaded}))
    )
    seconds = []
    for set_ in itertools.islice(itertools.cycle((1, 0)), 20):
        began = time.perf_counter()
        residency.enter(set_)
        seconds.append(time.perf_counter() - began)
    print(f"\nswitch of {len(bench.loaded)} tensors: median {1e3 * statistics.median(seconds):.3f} ms")
    assert statistics.median(seconds) < 5e-3


@pytest.mark.parametrize("mode", SNAPSHOTS)
def test_the_snapshot_is_what_was_loaded_and_the_device_has_memory_of_its_own(mode: str) -> None:
    bench = Bench()
    residency = bench.make(mode, bench.plans(*TWO_SETS))
    loaded = {name: tensor.data_ptr() for name, tensor in bench.loaded.items()}
    for set_ in (0, 1):
        residency.enter(set_)
        assert not set(loaded.values()) & set(bench.addresses().values())
    assert residency.evict()
    touched = {*RUN, *DISTILLED}
    assert {name for name, address in bench.addresses().items() if address == loaded[name]} == loaded.keys() - touched
    # Of each set what is merged, and of what does not differ one.
    assert bench.ledger.held == {"host": (len(DISTILLED) + len(RUN)) * LAYER_BYTES, "device": 0}


@pytest.mark.parametrize("mode", SNAPSHOTS)
def test_eviction_copies_nothing_back_and_a_switch_only_what_is_switched(mode: str) -> None:
    bench = Bench()
    residency = bench.make(mode, bench.plans(*TWO_SETS))
    common = {name: tensor for name, tensor in bench.addresses().items() if name not in DISTILLED}
    before = bench.moved()
    for set_ in (1, 0, 1):
        residency.enter(set_)
    moved = bench.moved()
    assert moved["device_to_host"] == before["device_to_host"]
    assert moved["host_to_device"] - before["host_to_device"] == 3 * len(DISTILLED) * LAYER_BYTES
    assert moved.get("device_to_device", 0) == 0
    assert {name: bench.addresses()[name] for name in common} == common
    residency.evict()
    assert bench.moved() == moved
    residency.enter(1)
    bench.assert_holds(bench.plans(*TWO_SETS)[1])


@pytest.mark.parametrize("mode", SNAPSHOTS)
def test_what_is_evicted_is_gone(mode: str) -> None:
    bench = Bench()
    residency = bench.make(mode, bench.plans(*TWO_SETS))
    on_device = [weakref.ref(bench.module.get_parameter(name)) for name in DISTILLED]
    residency.enter(1)
    gc.collect()
    assert [ref() for ref in on_device] == [None] * len(DISTILLED)


WHOLE = sum(
    tensor.nbytes for tensor in nn.Sequential(*(nn.Linear(WIDTH, WIDTH, i == 3) for i in range(LAYERS))).parameters()
)
PADDING = 256 - WIDTH * 4


def test_low_memory_never_holds_both_sets() -> None:
    bench = Bench()
    residency = bench.make("snapshot-low-vram", bench.plans(*TWO_SETS))
    for set_ in (1, 0, 1, 0):
        residency.prefetch(set_)
        residency.enter(set_)
    residency.enter(1)
    residency.rest()
    residency.enter(0)
    assert bench.ledger.peak["device"] <= WHOLE + PADDING


def test_a_snapshot_is_prefetched_and_then_a_switch_copies_nothing() -> None:
    bench = Bench()
    residency = bench.make("snapshot", bench.plans(*TWO_SETS))
    before = bench.moved()["host_to_device"]
    residency.prefetch(1)
    residency.prefetch(1)
    ahead = bench.moved()["host_to_device"]
    assert ahead - before == len(DISTILLED) * LAYER_BYTES
    bench.assert_holds(bench.plans(*TWO_SETS)[0])
    residency.enter(1)
    assert bench.moved()["host_to_device"] == ahead
    bench.assert_holds(bench.plans(*TWO_SETS)[1])
    assert bench.ledger.held["device"] <= WHOLE + PADDING
    assert bench.ledger.peak["device"] <= WHOLE + PADDING + len(DISTILLED) * LAYER_BYTES


@pytest.mark.parametrize("room", [0, LAYER_BYTES, 4 * LAYER_BYTES, -5])
def test_a_snapshot_is_prefetched_as_far_as_there_is_room(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "_SEGMENT_BYTES", LAYER_BYTES)
    bench = Bench(room=lambda: room)
    residency = bench.make("snapshot", bench.plans(*TWO_SETS))
    before = bench.moved()["host_to_device"]
    residency.prefetch(1)
    ahead = bench.moved()["host_to_device"]
    assert ahead - before == max(0, room // LAYER_BYTES * LAYER_BYTES)
    residency.enter(1)
    assert bench.moved()["host_to_device"] - before == len(DISTILLED) * LAYER_BYTES
    bench.assert_holds(bench.plans(*TWO_SETS)[1])
    assert bench.ledger.peak["device"] <= WHOLE + PADDING + max(0, room)


@pytest.mark.parametrize("mode", SNAPSHOTS)
def test_what_was_fetched_ahead_gives_way_first(mode: str) -> None:
    bench = Bench()
    plans = bench.plans(*TWO_SETS)
    residency = bench.make(mode, plans)
    for active, other in ((0, 1), (1, 0)):
        residency.enter(active)
        before, addresses = bench.ledger.held["device"], bench.addresses()
        assert not residency.forget(), "nothing was fetched ahead"
        residency.prefetch(other)
        moved = bench.moved()
        assert residency.forget() == (mode == "snapshot")
        assert not residency.forget()
        assert (bench.ledger.held["device"], bench.addresses(), bench.moved()) == (before, addresses, moved)
        bench.assert_holds(plans[active])
        residency.enter(other)
        bench.assert_holds(plans[other])
    residency.prefetch(1)
    residency.evict()
    assert not residency.forget(), "an eviction forgets that too"
    assert bench.ledger.held["device"] == 0


@pytest.mark.parametrize("mode", sorted({*MODES} - {*SNAPSHOTS}))
def test_other_modes_fetch_nothing_ahead(mode: str) -> None:
    bench = Bench()
    residency = bench.make(mode, bench.plans(*TWO_SETS))
    residency.prefetch(1)
    assert not residency.forget()


def test_after_a_request_a_snapshot_goes_back_beside_what_follows() -> None:
    bench = Bench()
    residency = bench.make("snapshot", bench.plans(*TWO_SETS))
    residency.enter(1)
    residency.rest()
    before = bench.moved()
    residency.enter(0)
    assert bench.moved() == before, "everything was under way"
    bench.assert_holds(bench.plans(*TWO_SETS)[0])


def test_legacy_holds_clean_weights_and_factors_on_the_host_only() -> None:
    bench = Bench()
    residency = bench.make("legacy", bench.plans(*TWO_SETS))
    # The run's LoRA touches two of the switched weights; each factor has a place of 256 bytes.
    num_factors = 2 * (len(DISTILLED) + len({*DISTILLED} & {*RUN}))
    assert bench.ledger.held == {"host": len(DISTILLED) * LAYER_BYTES + num_factors * 256}
    addresses, before = bench.addresses(), bench.moved()
    for set_ in (1, 0):
        residency.enter(set_)
    assert bench.addresses() == addresses
    assert bench.moved()["device_to_host"] == before["device_to_host"]
    assert "device_to_device" not in bench.moved()


def test_a_set_that_is_not_there() -> None:
    bench = Bench()
    residency = bench.make("resident", bench.plans(*TWO_SETS))
    for call in (residency.enter, residency.prefetch):
        with pytest.raises(RuntimeError, match="set 2 of 2"):
            call(2)


def test_a_whole_module_goes_to_the_host_once_and_comes_and_goes() -> None:
    """Tied parameters stay tied, buffers of both kinds go too, nothing is copied back a second time."""
    part, ledger = Part(), Ledger()
    shelf = Shelf(Mover(CPU, ledger))
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    addresses = {spot.tensor.data_ptr() for spot in spots_of(part, buffers=True).values() if spot.tensor.numel()}
    shelf["part"] = part
    assert shelf.held_bytes(CPU) == sum(spot.tensor.nbytes for spot in spots_of(part, buffers=True).values())
    for number in range(3):
        shelf.put_on_host("part")
        assert shelf.is_away("part")
        if not number:
            down = ledger.num_bytes["device_to_host"]
        assert ledger.held["device"] == 0
        on_host = {spot.tensor.data_ptr() for spot in spots_of(part, buffers=True).values() if spot.tensor.numel()}
        assert not on_host & addresses
        shelf.bring("part")
        shelf.bring("part")
        assert not shelf.is_away("part")
        assert part.head.weight is part.embed.weight
        assert isinstance(part.head.weight, nn.Parameter)
        assert not isinstance(part.frequencies, nn.Parameter)
        assert all(same_bits(tensor, before[name]) for name, tensor in part.state_dict().items())
        assert torch.equal(part.frequencies, torch.arange(4.0))
    assert ledger.num_bytes["device_to_host"] == down
    shelf.free("part")
    assert not any(ledger.held.values())


def test_a_module_that_leaves_gives_back_the_memory_it_was_loaded_to() -> None:
    """Parameters are views of one stretch, as a load leaves them; one that is kept somewhere keeps all of it."""
    stretch = torch.randn(4, 64)
    module = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))).requires_grad_(False)
    for layer, row in zip(module, stretch, strict=True):
        layer.weight = nn.Parameter(row.view(8, 8), requires_grad=False)
    want = stretch.clone()
    loaded = StorageWeakRef(stretch.untyped_storage())
    del stretch, layer, row
    shelf = Shelf(Mover(CPU, Ledger()))
    shelf["part"] = module
    gc.collect()
    assert not loaded.expired()
    shelf.put_on_host("part")
    gc.collect()
    assert loaded.expired()
    for _ in range(2):
        shelf.bring("part")
        brought = StorageWeakRef(next(module.parameters()).untyped_storage())
        assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())
        assert torch.equal(torch.stack(list(module.parameters())).view(4, 64), want)
        shelf.put_on_host("part")
        gc.collect()
        assert brought.expired()


def test_neighbours_on_the_host_are_copied_at_once() -> None:
    ledger = Ledger()
    module = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    memory = torch.randn(5, 64)
    spots = spots_of(module, buffers=False)
    backed = Backed(spots, dict(zip(spots, memory.view(5, 8, 8), strict=True)), Mover(CPU, ledger))
    backed.fetch()
    backed.bind()
    one = ledger.copies["host_to_device"]
    assert one <= (1 if backing._SEGMENT_BYTES == GIB else 2)
    assert torch.equal(torch.stack(list(module.parameters())).view(5, 64), memory)
    apart = Backed(spots, {name: torch.randn(8, 8) for name in spots}, Mover(CPU, ledger))
    apart.fetch()
    assert ledger.copies["host_to_device"] - one == 5


NEED = Need(transformer=40 * GIB, switched=30 * GIB, num_sets=2, merged=30 * GIB, factors=8 * GIB, working=20 * GIB)
MANY = Need(
    transformer=40 * GIB, switched=30 * GIB, num_sets=2, merged=30 * GIB, factors=8 * GIB, working=20 * GIB, num_ranks=8
)


@pytest.mark.parametrize(
    ("need", "device", "host", "mode"),
    [
        (NEED, 140, 500, "resident"),
        (MANY, 140, 500, "resident"),
        (MANY, 80, 500, "sharded"),
        (NEED, 80, 500, "snapshot"),
        (NEED, 80, 60, "legacy"),
        (NEED, 80, 20, "legacy"),
        (NEED, 50, 500, "snapshot"),
        (MANY, 50, 20, "legacy"),
    ],
)
def test_auto_takes_the_best_mode_that_fits(need: Need, device: int, host: int, mode: str) -> None:
    chosen, reason = choose_residency("auto", need, Budget(device * GIB, host * GIB))
    assert chosen == mode
    assert f"{device}.0 GiB free" in reason
    assert ("no mode fits" in reason) == (device == 50 or host == 20)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_is_asked_for_is_taken_where_it_fits(mode: str) -> None:
    assert choose_residency(mode, MANY, Budget(200 * GIB, 500 * GIB))[0] == mode


def test_a_mode_that_does_not_fit_says_what_it_needs_and_what_would_fit() -> None:
    with pytest.raises(PlanError) as caught:
        choose_residency("resident", NEED, Budget(80 * GIB, 500 * GIB))
    for text in (
        "--residency resident does not fit",
        "70.0 GiB of weights",
        "20.0 GiB to work with",
        "80.0 GiB free",
        "--residency snapshot would fit",
    ):
        assert text in str(caught.value)
    with pytest.raises(PlanError, match="no other mode would fit either"):
        choose_residency("legacy", NEED, Budget(10 * GIB, 500 * GIB))
    with pytest.raises(PlanError, match=r"70\.0 GiB on each host, of 20\.0 GiB free"):
        choose_residency("snapshot", NEED, Budget(80 * GIB, 20 * GIB))


def test_sharded_on_one_rank_is_refused() -> None:
    with pytest.raises(PlanError, match="there is one rank"):
        require_sense("sharded", num_ranks=1, num_sets=2, pipeline="two-stages")
    for mode in ("auto", *MODES):
        require_sense(mode, num_ranks=2, num_sets=2, pipeline="two-stages")
        if mode != "sharded":
            require_sense(mode, num_ranks=1, num_sets=2, pipeline="two-stages")


def test_with_one_set_a_way_to_switch_is_refused() -> None:
    for mode in ("sharded", "legacy"):
        for num_ranks in (1, 2):
            with pytest.raises(
                PlanError, match=rf"--residency {mode} says .* pipeline one-stage has one\. Leave it out"
            ):
                require_sense(mode, num_ranks=num_ranks, num_sets=1, pipeline="one-stage")
    for mode in ("auto", "resident", *SNAPSHOTS):
        require_sense(mode, num_ranks=1, num_sets=1, pipeline="one-stage")


@pytest.mark.parametrize("num_ranks", [1, 8])
@pytest.mark.parametrize(
    ("device", "host", "mode"),
    [(140, 500, "resident"), (50, 500, "snapshot"), (50, 20, "resident"), (10, 20, "resident")],
)
def test_with_one_set_auto_takes_only_what_may_be_asked_for(device: int, host: int, mode: str, num_ranks: int) -> None:
    need = Need(transformer=40 * GIB, working=20 * GIB, num_ranks=num_ranks)
    assert choose_residency("auto", need, Budget(device * GIB, host * GIB))[0] == mode


def test_components_get_room_in_their_order() -> None:
    sizes = {"upsampler": 1, "video_vae": 4, "connectors": 3, "text_encoder": 24}
    assert place_components(sizes, Budget(100, 0), ()) == dict.fromkeys(sizes, "gpu")
    assert place_components(sizes, Budget(5, 100), ()) == {
        "upsampler": "gpu", "video_vae": "gpu", "connectors": "host", "text_encoder": "host",
    }  # fmt: skip
    assert place_components(sizes, Budget(-9, 3), ()) == {
        "upsampler": "host", "video_vae": "drop", "connectors": "drop", "text_encoder": "drop",
    }  # fmt: skip
    assert place_components(sizes, Budget(100, 100), ("text_encoder",))["text_encoder"] == "drop"
