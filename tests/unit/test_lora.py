"""LoRA files merged into weights. Oracles: the formula in float64, and for bits the same merge on one thread."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_sp.demo import demo_config
from ltx_sp.errors import UnsupportedError, WeightsError
from ltx_sp.model.dit import Transformer
from ltx_sp.request import Lora
from ltx_sp.spec import transformer_spec
from ltx_sp.weights import merge as merging
from ltx_sp.weights.index import Index, TensorEntry, read_index
from ltx_sp.weights.keymap import keymap
from ltx_sp.weights.lora import LoraMerger, LoraPlan, LoraReport, factors_of, plan_loras, switched_targets, union
from ltx_sp.weights.lora_sets import LoraSets
from ltx_sp.weights.merge import Factor, merge

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GATE = "transformer_blocks.0.attn1.to_gate_logits"
MISROUNDED = 1e-4

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    with torch.device("meta"):
        model = Transformer(transformer_spec(demo_config("2.3")["transformer"]))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.fixture(params=["bf16 products", "float32 blocks"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either kind of processor."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param == "bf16 products")


def read_alphas(entries: Sequence[TensorEntry]) -> dict[TensorEntry, float]:
    return {entry: float(load_file(entry.file)[entry.name].reshape(())) for entry in entries}


def pair(
    stem: str, shape: tuple[int, ...], rank: int = 4, names: tuple[str, str] = ("lora_A", "lora_B"), dtype: Any = BF16
) -> dict[str, Tensor]:
    down, up = torch.randn(rank, shape[1]).to(dtype), torch.randn(shape[0], rank).to(dtype)
    return {f"{stem}.{names[0]}.weight": down, f"{stem}.{names[1]}.weight": up}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Index:
    save_file(dict(tensors), path, metadata)
    return read_index(path)


def plan(path: Path, tensors: Mapping[str, Tensor], shapes: Shapes, strength: float = 1.0) -> tuple[LoraPlan, Any]:
    made, reports = plan_loras([(write(path, tensors), strength)], shapes, read_alphas)
    return made, reports[0]


def run(plan: LoraPlan, parameters: dict[str, Tensor], order: random.Random | None = None) -> LoraMerger:
    def merge_target(target: str, factors: Mapping[TensorEntry, Tensor]) -> None:
        merge(parameters[target], factors_of(plan.pairs[target], factors))

    merger, entries = LoraMerger(plan, merge_target), list(plan.entries)
    if order is not None:
        order.shuffle(entries)
    for entry in entries:
        merger.take(entry, load_file(entry.file)[entry.name])
    return merger


def exact(weight: Tensor, factors: Sequence[Factor]) -> Tensor:
    return weight.double() + sum(f.scale * (f.up_OR.double() @ f.down_RI.double()) for f in factors)


def misrounded(got: Tensor, want: Tensor) -> float:
    """Share of the elements that are not ``want`` rounded once."""
    return float((got != want.to(got.dtype)).double().mean())


def far_off(got: Tensor, want: Tensor, before: Tensor) -> int:
    """How many elements are more than a neighbour of ``want`` rounded.

    What is left of a weight that is all but cancelled may be off by float32's own error on the usual weight.
    """
    rounded = want.to(got.dtype)
    step = torch.nextafter(rounded, torch.where(got > rounded, torch.inf, -torch.inf).to(got.dtype))
    is_near = (got == rounded) | (got == step) | ((got.double() - want).abs() < 2**-20 * before.double().abs().mean())
    return int((~is_near).sum())


def case(out: int, features: int, ranks: Sequence[int], scales: Sequence[float], dtype: Any, weight_dtype: Any) -> Any:
    """A weight as of a trained layer, and factors that together change it by a quarter of its own size."""
    weight = (torch.randn(out, features) * 0.02).to(weight_dtype)
    size = 0.005 / sum(scale**2 for scale in scales) ** 0.5
    factors = [
        Factor((torch.randn(rank, features) / rank**0.5).to(dtype), (torch.randn(out, rank) * size).to(dtype), scale)
        for rank, scale in zip(ranks, scales, strict=True)
    ]
    return weight, factors


LORAS = [
    ([384], [0.7]),
    ([384], [-1.0]),
    ([384, 64], [0.8, 0.8]),
    ([384, 384, 384], [0.7, 1.0, -0.35]),
    ([16, 128, 33], [1.3, 1e-3, 2.0]),
]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("ranks", "scales"), LORAS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_rounded_once(ranks: list[int], scales: list[float], dtype: torch.dtype) -> None:
    weight, factors = case(1536, 1024, ranks, scales, dtype, BF16)
    before, want = weight.clone(), exact(weight, factors)
    assert misrounded(before, want) > 0.9
    merge(weight, factors)
    assert misrounded(weight, want) <= MISROUNDED
    assert far_off(weight, want, before) == 0


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize(("weight_dtype", "tolerance"), [(F32, 1e-7), (F16, 0)])
def test_other_weights(dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: float) -> None:
    weight, factors = case(300, 200, [64, 8], [0.7, -2.0], dtype, weight_dtype)
    want = exact(weight, factors)
    merge(weight, factors)
    if tolerance:
        assert (weight.double() - want).abs().max() <= tolerance * want.abs().max()
    else:
        assert misrounded(weight, want) <= 1e-3  # one step of float16 is an eighth of one of bfloat16


def test_the_official_order_would_be_found() -> None:
    """Scaling a factor in bf16, or rounding the product before it is added, misses the bar by far."""
    weight, [factor] = case(512, 512, [384], [0.7], BF16, BF16)
    want = exact(weight, [factor])
    rounded_factor = weight + (factor.up_OR * factor.scale) @ factor.down_RI
    rounded_product = weight + factor.scale * (factor.up_OR @ factor.down_RI)
    assert misrounded(rounded_factor, want) > 100 * MISROUNDED
    assert misrounded(rounded_product, want) > 100 * MISROUNDED


SIZES = [(1, 100, 3), (7, 13, 5), (17, 96, 96), (32, 100, 1152), (33, 4096, 384), (129, 257, 2048), (1030, 200, 16)]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("weight_dtype", [BF16, F32])
def test_same_bits_with_any_number_of_threads(
    size: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    out, features, rank = size
    before = torch.get_num_threads()
    weight, factors = case(out, features, [rank, 8], [0.7, 0.3], dtype, weight_dtype)
    results = []
    try:
        for num_threads in (1, 2, 3, 16):
            torch.set_num_threads(num_threads)
            results.append(weight.clone())
            merge(results[-1], factors)
            with ThreadPoolExecutor(1) as fresh:
                assert fresh.submit(torch.get_num_threads).result() == torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("offset", [1, 3, 32])
def test_a_view_of_a_larger_buffer(offset: int) -> None:
    """Bits do not depend on where the weight lies, and its neighbours stay as they are."""
    weight, factors = case(65, 96, [24], [0.5], BF16, BF16)
    buffer = torch.full((weight.numel() + 64,), 7.0, dtype=BF16)
    view = buffer[offset : offset + weight.numel()].view(weight.shape).copy_(weight)
    merge(weight, factors)
    merge(view, factors)
    assert torch.equal(view, weight)
    assert (buffer[:offset] == 7).all()
    assert (buffer[offset + weight.numel() :] == 7).all()


@pytest.mark.usefixtures("form")
def test_rows_beyond_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_STACKED_ROWS", 16)
    monkeypatch.setattr(merging, "_BLOCK_ELEMENTS", 16 * 48)
    weight, factors = case(100, 48, [20, 6], [0.5, 0.25], BF16, BF16)
    want = exact(weight, factors)
    merge(weight, factors)
    assert torch.equal(weight, want.bfloat16())


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_parameters_and_inference_tensors_are_merged(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        weight, factors = case(8, 8, [2], [1.0], dtype, dtype)
    before = weight.clone()
    merge(weight, factors)
    assert not torch.equal(weight, before)
    parameter = torch.nn.Parameter(before.clone(), requires_grad=True)
    merge(parameter, factors)
    assert torch.equal(parameter, weight)


@pytest.mark.usefixtures("form")
def test_scales_that_are_far_apart() -> None:
    """The scale of the larger rank is so small that the other divided by it is no number in float32."""
    weight, [small, large] = case(64, 96, [64, 8], [2.0**-70, 2.0**70], BF16, BF16)
    want = exact(weight, [small, large])
    merge(weight, [small, large])
    assert torch.equal(weight, want.bfloat16())


def test_bf16_products_only_where_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert merging._multiplies_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not merging._multiplies_bfloat16(torch.device("cpu"))
    assert merging._multiplies_bfloat16(torch.device("cuda"))
    weight, factors = case(8, 8, [2], [1.0], BF16, BF16)
    monkeypatch.setattr(merging, "_merge_fused", None)
    merge(weight, factors)


ACCURACY = """
import torch
from ltx_sp.weights.merge import Factor, merge
torch.manual_seed(0)
weight = (torch.randn(256, 512) * 0.02).bfloat16()
down, up = torch.randn(32, 512).bfloat16(), (torch.randn(256, 32) * 0.001).bfloat16()
want = (weight.double() + 0.7 * (up.double() @ down.double())).bfloat16()
merge(weight, [Factor(down, up, 0.7)])
print(float((weight != want).double().mean()))
"""


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"])
def test_accuracy_with_fewer_instructions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "AVX2" if name.startswith("ONEDNN") else "avx2")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", ACCURACY], cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= MISROUNDED


def _spell(name: str, spelling: str) -> str:
    stem = name.removesuffix(".weight")
    if spelling == "transformer.":
        return spelling + keymap("diffusers", "transformer", {}).to_checkpoint(f"{stem}.weight").removesuffix(".weight")
    return spelling + stem


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("spelling", ["model.diffusion_model.", "diffusion_model.", "transformer.", ""])
@pytest.mark.parametrize("seed", range(3))
def test_random_files_change_what_the_formula_says(spelling: str, seed: int, tmp_path: Path, shapes: Shapes) -> None:
    """Three files over one model, every factor name, alphas or none, factors in any order."""
    choose = random.Random(seed)
    linears = [name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")]
    parameters = {name: (torch.randn(shape) * 0.1).to(BF16) for name, shape in shapes.items()}
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    want = {name: parameter.double() for name, parameter in parameters.items()}
    loras = []
    for number in range(3):
        tensors: dict[str, Tensor] = {}
        strength = choose.choice([1.0, 0.6, -0.25])
        for name in choose.sample(linears, 20):
            words = choose.choice(
                [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_A.default", "lora_B.default")]
            )
            rank, stem = choose.randint(1, 9), _spell(name, spelling)
            found = pair(stem, shapes[name], rank, words)
            down, up = found.values()
            alpha = choose.choice([None, 0.5, 3])
            if alpha is not None:
                kind = choose.choice([F32, BF16]) if alpha == 0.5 else torch.int64
                found[f"{stem}.alpha"] = torch.tensor(choose.choice([alpha, [alpha]]), dtype=kind)
            want[name] += strength * (rank if alpha is None else alpha) / rank * (up.double() @ down.double())
            tensors |= found
        loras.append((write(tmp_path / f"{number}.safetensors", tensors), strength))
    made, reports = plan_loras(loras, shapes, read_alphas)
    assert [(r.applied, dict(r.skipped), r.unpaired, r.unrecognised) for r in reports] == [(20, {}, (), ())] * 3
    run(made, parameters, choose).finish()
    for name, parameter in parameters.items():
        assert misrounded(parameter, want[name]) <= 0.01, name  # rank 1 and a scale of 0.3 make many ties
        assert far_off(parameter, want[name], before[name]) == 0, name
    assert set(made.targets) < set(linears)


def test_all_names_of_the_model_are_reached(tmp_path: Path, shapes: Shapes) -> None:
    linears = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    assert len(linears) > 90
    for spelling in ("diffusion_model.", "transformer."):
        tensors = {k: v for name, shape in linears.items() for k, v in pair(_spell(name, spelling), shape, 1).items()}
        made, report = plan(tmp_path / f"{len(spelling)}.safetensors", tensors, shapes)
        assert made.targets == tuple(linears)
        assert report.applied == len(linears)


def test_factors_are_read_weight_by_weight_in_the_order_of_the_model(tmp_path: Path) -> None:
    shapes: Shapes = {"c.weight": (4, 4), "a.weight": (4, 4), "b.weight": (4, 4)}
    first = write(tmp_path / "1.safetensors", pair("a", (4, 4)) | pair("c", (4, 4)))
    second = write(tmp_path / "2.safetensors", pair("b", (4, 4)) | pair("c", (4, 4), 2))
    made, _ = plan_loras([(first, 1.0), (second, 0.5)], shapes, read_alphas)
    assert made.targets == ("c.weight", "a.weight", "b.weight")
    assert [(entry.name[0], entry.file.name[0]) for entry in made.entries[::2]] == [
        ("c", "1"), ("c", "2"), ("a", "1"), ("b", "2"),
    ]  # fmt: skip
    assert made.num_bytes == 2 * (4 * 4 * 2 * 3 + 4 * 2 * 2)


def test_one_file_twice_adds_up(tmp_path: Path, shapes: Shapes) -> None:
    index = write(tmp_path / "a.safetensors", pair(f"diffusion_model.{GATE}", (4, 64)))
    made, reports = plan_loras([(index, 0.5), (index, 0.25)], shapes, read_alphas)
    assert len(made.entries) == 2
    assert [report.strength for report in reports] == [0.5, 0.25]
    weight = torch.zeros(4, 64, dtype=F32)
    run(made, {f"{GATE}.weight": weight}).finish()
    down, up = (tensor.double() for tensor in pair_of(index))
    torch.testing.assert_close(weight.double(), 0.75 * (up @ down), rtol=1e-6, atol=1e-6)


def pair_of(index: Index) -> list[Tensor]:
    tensors = load_file(index.files[0])
    return [tensors[f"diffusion_model.{GATE}.{name}.weight"] for name in ("lora_A", "lora_B")]


def test_few_factors_are_held(tmp_path: Path, shapes: Shapes) -> None:
    linears = [name for name in shapes if name.endswith("to_q.weight")]
    tensors = {k: v for name in linears for k, v in pair(name.removesuffix(".weight"), shapes[name]).items()}
    made, _ = plan(tmp_path / "a.safetensors", tensors, shapes)
    merged: list[str] = []
    merger = LoraMerger(made, lambda target, factors: merged.append(target))
    for entry in made.entries:
        merger.take(entry, tensors[entry.name])
        assert len(merger._held) <= 1
    merger.finish()
    assert merged == linears


def test_several_sets_are_read_once_and_made_from_one_clean_weight(tmp_path: Path) -> None:
    """Oracle: each set's plan merged by itself."""
    shapes: Shapes = {f"{name}.weight": (4, 4) for name in "abc"}
    own = write(tmp_path / "own.safetensors", pair("a", (4, 4)) | pair("b", (4, 4)))
    distilled = write(tmp_path / "distilled.safetensors", pair("b", (4, 4)) | pair("c", (4, 4), 2))
    first, _ = plan_loras([(own, 0.5), (distilled, 0.0)], shapes, read_alphas)
    second, _ = plan_loras([(own, 0.5), (distilled, 1.0)], shapes, read_alphas)
    assert switched_targets([first, second]) == ("b.weight", "c.weight")
    assert switched_targets([first]) == switched_targets([second, second]) == ()
    whole = union([first, second])
    assert whole.targets == ("a.weight", "b.weight", "c.weight")
    assert len(whole.entries) == 8, "each factor once"
    assert union([first, second], ["c.weight"]).targets == ("c.weight",)
    clean = {name: torch.randn(4, 4).to(BF16) for name in shapes}
    sets = [{name: weight.clone() for name, weight in clean.items()} for _ in range(2)]

    def complete(target: str, factors: Mapping[TensorEntry, Tensor]) -> None:
        for plan, weights in zip((first, second), sets, strict=True):
            if target in plan.pairs:
                merge(weights[target], factors_of(plan.pairs[target], factors))

    merger = LoraMerger(whole, complete)
    for entry in random.Random(0).sample(whole.entries, 8):
        merger.take(entry, load_file(entry.file)[entry.name])
    merger.finish()
    for plan, weights in zip((first, second), sets, strict=True):
        alone = {name: weight.clone() for name, weight in clean.items()}
        run(plan, alone).finish()
        assert all(torch.equal(weights[name], alone[name]) for name in shapes)


@pytest.mark.parametrize(
    ("strengths", "shown"), [((0.0, 1.0), [0.5, 0.75]), ((0.25, 0.5), [0.5, 0.1875, 0.375]), ((0.0,), [0.5, 0.0])]
)
def test_sets_have_the_distilled_lora_at_their_own_strength(
    strengths: tuple[float, ...], shown: list[float], tmp_path: Path
) -> None:
    shapes: Shapes = {f"{name}.weight": (4, 4) for name in "ab"}
    paths = [tmp_path / f"{name}.safetensors" for name in ("run", "style", "distilled")]
    for path in paths:
        write(path, pair("a", (4, 4)))
    run, style, distilled = (Lora(path, strength) for path, strength in zip(paths, (0.5, 2.0, 0.75), strict=True))
    sets = LoraSets([run], distilled, strengths, shapes, read_alphas)

    def scales(plans: Sequence[LoraPlan]) -> list[list[float]]:
        return [[pair.scale for pair in plan.pairs["a.weight"]] for plan in plans]

    assert [report.strength for report in sets.reports] == shown
    assert scales(sets.base) == [[0.5, 0.75 * strength] if strength else [0.5] for strength in strengths]
    plans, reports = sets.plan([style])
    assert [report.strength for report in reports] == [2.0]
    assert scales(plans) == [[0.5, 2.0, 0.75 * strength] if strength else [0.5, 2.0] for strength in strengths]
    assert sets.plan([]) == (sets.base, [])


def test_a_report_accounts_for_every_key(tmp_path: Path, shapes: Shapes) -> None:
    gate = f"diffusion_model.{GATE}"
    whole = pair(gate, (4, 64)) | {f"{gate}.alpha": torch.tensor(8.0)}
    half = {
        "diffusion_model.proj_out.lora_A.weight": torch.ones(4, 64),
        "diffusion_model.proj_out.alpha": torch.ones(1),
    }
    alone = {"model.diffusion_model.audio_proj_out.alpha": torch.ones(1)}
    connectors = pair("text_embedding_projection.video_aggregate_embed", (8, 8)) | pair(
        "diffusion_model.audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q", (8, 8)
    )
    absent = pair("diffusion_model.transformer_blocks.7.attn1.to_q", (64, 64)) | pair("transformer.no\nsuch", (8, 8))
    strange = {"diffusion_model.proj_out.weight": torch.ones(2), "step": torch.ones(1)}
    tensors = whole | half | alone | connectors | absent | strange
    made, report = plan(tmp_path / "a.safetensors", tensors, shapes, 0.5)
    assert made.targets == (f"{GATE}.weight",)
    assert made.pairs[f"{GATE}.weight"][0].scale == 0.5 * 8 / 4
    assert report.file == tmp_path / "a.safetensors"
    assert report.applied == 1
    assert {reason.partition(",")[0]: set(names) for reason, names in report.skipped.items()} == {
        "for the connectors": {name.partition(".lora_")[0] for name in connectors},
        "not in this transformer": {name.partition(".lora_")[0] for name in absent},
    }
    assert set(report.unpaired) == set(half) | set(alone)
    assert set(report.unrecognised) == set(strange)
    line = report.describe()
    assert "\n" not in line
    for text in ("1 weights", "2 skipped, for the connectors", "2 skipped, not in", "3 unpaired", "2 not recognised"):
        assert text in line
    assert "'step'" in line


def test_strength_zero_reads_nothing_and_still_checks(tmp_path: Path, shapes: Shapes) -> None:
    stem = f"diffusion_model.{GATE}"
    made, report = plan(tmp_path / "a.safetensors", pair(stem, (4, 64)), shapes, 0.0)
    assert (made.entries, made.targets, made.num_bytes, report.applied) == ((), (), 0, 1)
    assert "strength 0 (changes nothing)" in report.describe()
    run(made, {}).finish()
    with pytest.raises(WeightsError, match="Use a LoRA of this model"):
        plan(tmp_path / "b.safetensors", pair(stem, (5, 64)), shapes, 0.0)


STEM = f"diffusion_model.{GATE}"
GOOD = {f"{STEM}.lora_A.weight": torch.zeros(4, 64), f"{STEM}.lora_B.weight": torch.zeros(4, 4)}
A, B = GOOD

REFUSED: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "in-features": ({A: torch.zeros(4, 63)}, WeightsError, r"\[4, 63\].*\[4, 4\].*shape \[4, 64\]"),
    "out-features": ({B: torch.zeros(5, 4)}, WeightsError, r"\[5, 4\]"),
    "ranks": ({B: torch.zeros(4, 3)}, WeightsError, r"\[4, 3\]"),
    "rank 0": ({A: torch.zeros(0, 64), B: torch.zeros(4, 0)}, WeightsError, r"\[0, 64\]"),
    "four axes": ({A: torch.zeros(4, 64, 1, 1)}, WeightsError, r"\[4, 64, 1, 1\]"),
    "no axis": ({A: torch.zeros(())}, WeightsError, r"with shape \[\]"),
    "swapped": ({A: torch.zeros(64, 4), B: torch.zeros(4, 4)}, WeightsError, r"\[64, 4\]"),
    "integers": ({A: torch.zeros(4, 64, dtype=torch.int8)}, WeightsError, "as I8"),
    "fp8": ({B: torch.zeros(4, 4).to(torch.float8_e4m3fn)}, UnsupportedError, "in fp8"),
    "fp8 alpha": ({f"{STEM}.alpha": torch.ones(()).to(torch.float8_e5m2)}, UnsupportedError, "in fp8"),
    "alpha of two": ({f"{STEM}.alpha": torch.ones(2)}, WeightsError, "one number"),
    "alpha of truth": ({f"{STEM}.alpha": torch.tensor(True)}, WeightsError, "one number"),
    "alpha NaN": ({f"{STEM}.alpha": torch.tensor(torch.nan)}, WeightsError, "nan / 4"),
    "alpha infinite": ({f"{STEM}.alpha": torch.tensor(-torch.inf)}, WeightsError, "-inf / 4"),
    "two spellings": ({f"{STEM}.lora_down.weight": torch.zeros(4, 64)}, WeightsError, "say the same"),
    "two prefixes": ({f"model.{A}": torch.zeros(4, 64)}, WeightsError, "say the same"),
    "diffusers too": ({A.replace("diffusion_model", "transformer"): torch.zeros(4, 64)}, WeightsError, "say the same"),
    "two alphas": ({f"{GATE}.alpha": torch.ones(1), f"{STEM}.alpha": torch.ones(1)}, WeightsError, "say the same"),
    "dora": ({f"{STEM}.dora_scale": torch.zeros(4, 1)}, UnsupportedError, "dora_scale"),
    "dora of peft": ({f"{STEM}.lora_magnitude_vector": torch.zeros(4)}, UnsupportedError, "lora_magnitude_vector"),
    "mid": ({f"{STEM}.lora_mid.weight": torch.zeros(4, 4)}, UnsupportedError, "lora_mid"),
    "hada": ({f"{STEM}.hada_w1_a": torch.zeros(4, 4)}, UnsupportedError, "hada_w1_a"),
    "loha": ({f"{STEM}.loha_w1_a": torch.zeros(4, 4)}, UnsupportedError, "loha_w1_a"),
    "lokr": ({f"{STEM}.lokr_w1": torch.zeros(4, 4)}, UnsupportedError, "lokr_w1"),
    "bias": ({f"{STEM}.lora_B.bias": torch.zeros(4)}, UnsupportedError, "lora_B.bias"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(
    change: dict[str, Tensor], error: type[Exception], message: str, tmp_path: Path, shapes: Shapes
) -> None:
    plan(tmp_path / "good.safetensors", GOOD, shapes)
    with pytest.raises(error, match=message) as caught:
        plan(tmp_path / "bad.safetensors", GOOD | change, shapes)
    assert str(tmp_path / "bad.safetensors") in str(caught.value)
    assert "to_gate_logits" in str(caught.value)


def test_a_vector_is_no_target(tmp_path: Path, shapes: Shapes) -> None:
    with pytest.raises(WeightsError, match=r"has shape \[64\]"):
        plan(tmp_path / "a.safetensors", pair("transformer_blocks.0.attn1.q_norm", (64, 64)), shapes)


NOTHING = [
    pair("diffusion_model.connectors.a", (4, 4)),
    pair("lora_unet_transformer_blocks_0_attn1_to_q", (64, 64)),
    {A: torch.zeros(4, 64)},
    {f"{GATE}.weight": torch.zeros(4, 64)},
    {},
]


@pytest.mark.parametrize("tensors", NOTHING)
@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_a_file_that_changes_nothing_is_refused(
    tensors: dict[str, Tensor], strength: float, tmp_path: Path, shapes: Shapes
) -> None:
    with pytest.raises(WeightsError, match="at least one pair") as caught:
        plan(tmp_path / "a.safetensors", tensors, shapes, strength)
    assert str(tmp_path / "a.safetensors") in str(caught.value)


def test_scalars_are_read_once_for_all_files_or_not_at_all(tmp_path: Path, shapes: Shapes) -> None:
    calls = []

    def count(entries: Sequence[TensorEntry]) -> Mapping[TensorEntry, float]:
        calls.append(len(entries))
        return read_alphas(entries)

    with_alpha = [
        (write(tmp_path / f"{i}.safetensors", GOOD | {f"{STEM}.alpha": torch.tensor(2.0)}), 1.0) for i in range(2)
    ]
    plan_loras(with_alpha, shapes, count)
    assert calls == [2]
    plan_loras([(write(tmp_path / "2.safetensors", GOOD), 1.0)], shapes, count)
    assert calls == [2]


METADATA = [
    ({"transformer.r": 4, "transformer.lora_alpha": 2}, 0.5),
    ({"lora_alpha": 8.0, "alpha_pattern": {}, "use_dora": False}, 2.0),
    ({"connectors.lora_alpha": 8}, 1.0),
    ({"lora_alpha": None}, 1.0),
]


@pytest.mark.parametrize(("config", "scale"), METADATA)
def test_the_alpha_in_diffusers_metadata(config: Any, scale: float, tmp_path: Path, shapes: Shapes) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    index = write(tmp_path / "a.safetensors", GOOD, metadata)
    made, _ = plan_loras([(index, 1.0)], shapes, read_alphas)
    assert made.pairs[f"{GATE}.weight"][0].scale == scale
    own = write(tmp_path / "b.safetensors", GOOD | {f"{STEM}.alpha": torch.tensor(12.0)}, metadata)
    assert plan_loras([(own, 1.0)], shapes, read_alphas)[0].pairs[f"{GATE}.weight"][0].scale == 3.0


BAD_METADATA = [
    ('{"lora_alpha": "8"}', WeightsError, "must be a number"),
    ('{"lora_alpha": true}', WeightsError, "must be a number"),
    ('{"lora_alpha": NaN}', WeightsError, "must be a number"),
    ('{"lora_alpha": 1' + "0" * 400 + "}", WeightsError, "must be a number"),
    ("[]", WeightsError, "must be an object"),
    ('{"transformer.use_rslora": true}', UnsupportedError, "use_rslora"),
    ('{"transformer.use_dora": true}', UnsupportedError, "use_dora"),
    ('{"transformer.alpha_pattern": {"to_q": 3}}', UnsupportedError, "alpha_pattern"),
]


@pytest.mark.parametrize(("text", "error", "message"), BAD_METADATA)
def test_metadata_that_cannot_be_followed(
    text: str, error: type[Exception], message: str, tmp_path: Path, shapes: Shapes
) -> None:
    index = write(tmp_path / "a.safetensors", GOOD, {"lora_adapter_metadata": text})
    with pytest.raises(error, match=message) as caught:
        plan_loras([(index, 1.0)], shapes, read_alphas)
    assert str(tmp_path / "a.safetensors") in str(caught.value)


def test_what_the_merger_was_not_given(tmp_path: Path, shapes: Shapes) -> None:
    made, _ = plan(tmp_path / "a.safetensors", GOOD, shapes)
    merged: list[str] = []
    merger = LoraMerger(made, lambda target, factors: merged.append(target))
    down, up = made.entries
    merger.take(up, GOOD[B])
    with pytest.raises(RuntimeError, match="never came"):
        merger.finish()
    with pytest.raises(RuntimeError, match="not awaited"):
        merger.take(up, GOOD[B])
    with pytest.raises(RuntimeError, match="not awaited"):
        merger.take(TensorEntry("x", tmp_path, "F32", (), 0, 4), torch.zeros(()))
    assert merged == []
    merger.take(down, GOOD[A])
    assert merged == [f"{GATE}.weight"]
    merger.finish()
    with pytest.raises(RuntimeError, match="not awaited"):
        merger.take(down, GOOD[A])


def test_hostile_names_stay_on_one_line(tmp_path: Path, shapes: Shapes) -> None:
    strange = {"\x1b[31m\n" + "x" * 5000: torch.zeros(1)}
    _, report = plan(tmp_path / "a.safetensors", GOOD | strange, shapes)
    assert isinstance(report, LoraReport)
    line = report.describe()
    assert line.isprintable()
    assert len(line) < 600
