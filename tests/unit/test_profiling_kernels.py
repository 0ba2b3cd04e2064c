"""The table of kernels counts what ran, and a collective too many or too few is seen.

Oracles: a recorded trace whose collectives the plan of its run says, and counting by hand; traces made by hand, with
arithmetic by hand. No Nsight Systems was here: its SQLite export is made by hand too, with the tables and columns that
its documentation and others' exports show.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ltx_sp.arguments import parse
from ltx_sp.cost import DEFAULT_MACHINE, Machine, machine_of
from ltx_sp.errors import RequestError
from ltx_sp.plan import make_plan
from ltx_sp.spec import ModelSpec
from profiling.kernel_traces import CLASSES, PATTERNS, Activity, Track, classify, read_trace, union
from profiling.kernels import Steps, deviations, main, planned, stated, table
from profiling.models import full_size

ALL_GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<(unsigned long)4096>)"
SEND_RECV = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<(unsigned long)4096>)"
ATTENTION = "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<(int)128, (int)128>>(...)"
PRODUCT = "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT"
ADD = "void at::native::vectorized_elementwise_kernel<(int)4, at::native::CUDAFunctor_add<c10::BFloat16>>(int)"
COPY = "void at::native::elementwise_kernel<(int)128, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase &)>"


Kernel = tuple[str, int, int]  # name, begin, end


def block(start: int) -> list[Kernel]:
    """What a block does, as far as these tests look: 100 ns, of which 10 are idle; the gather overlaps a product."""
    return [
        (SEND_RECV, start, start + 10),
        (ATTENTION, start + 10, start + 30),
        (SEND_RECV, start + 35, start + 45),
        (ALL_GATHER, start + 45, start + 65),
        (PRODUCT, start + 50, start + 85),
        (ADD, start + 85, start + 95),
    ]


def write_nsys(path: Path, kernels: Sequence[Kernel], *, device: int = 0, process: int = 77) -> Path:
    """Write the tables of an export that matter here; call it again for a further process."""
    is_new = not path.exists()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        if is_new:
            database.executescript(
                """
                CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
                CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
                    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL,
                    greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
                    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER,
                    launchType INTEGER, cacheConfig INTEGER, registersPerThread INTEGER NOT NULL,
                    gridX INTEGER NOT NULL, gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL,
                    blockY INTEGER NOT NULL, blockZ INTEGER NOT NULL, staticSharedMemory INTEGER NOT NULL,
                    dynamicSharedMemory INTEGER NOT NULL, localMemoryPerThread INTEGER NOT NULL,
                    localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, sharedMemoryExecuted INTEGER,
                    graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER);
                CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (
                    start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL,
                    greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
                    bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, graphNodeId INTEGER);
                """
            )
        short = database.execute("SELECT count(*) FROM StringIds").fetchone()[0] + 1
        database.execute("INSERT INTO StringIds VALUES (?, 'elementwise_kernel')", (short,))
        for name, start, end in kernels:
            database.execute("INSERT INTO StringIds SELECT max(id) + 1, ? FROM StringIds", (name,))
            (number,) = database.execute("SELECT max(id) FROM StringIds").fetchone()
            columns = "start, end, deviceId, contextId, streamId, correlationId, globalPid, demangledName, shortName"
            rest = ["registersPerThread", *(f"{kind}{axis}" for kind in ("grid", "block") for axis in "XYZ")]
            rest += ["staticSharedMemory", "dynamicSharedMemory", "localMemoryPerThread", "localMemoryTotal", "gridId"]
            database.execute(
                f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL ({columns}, {', '.join(rest)}, graphNodeId) "
                f"VALUES (?, ?, ?, 1, 7, 0, ?, ?, ?{', 1' * len(rest)}, 5)",
                (start, end, device, 0x01000000000000 | process << 24, number, short),
            )
    return path


def write_torch(path: Path, events: Sequence[dict[str, Any]], rank: int = 0) -> Path:
    content = {"distributedInfo": {"rank": rank}, "traceEvents": [{"ph": "X", "pid": 0, "tid": 7} | e for e in events]}
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def event(category: str, name: str, start: float, length: float, **more: Any) -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": start, "dur": length, **more}


@pytest.fixture
def recorded(golden: Path) -> list[Path]:
    return [golden / "traces" / f"gloo-rank{rank}.json.gz" for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (ALL_GATHER, "all_gather"),
        (SEND_RECV, "all_to_all"),
        ("ncclKernel_AllGather_RING_LL_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)", "all_gather"),
        ("ncclSymkDevKernel_AllGather_STMC(ncclSymkDevWorkArgs4K)", "all_gather"),
        ("void c10d::symmetric_memory::multimem_all_gather_kernel<(int)16>(char*)", "all_gather"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_reduce"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_reduce"),
        ("ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "broadcast"),
        ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", "other_collective"),
        ("gloo:all_to_all", "all_to_all"),
        ("gloo:barrier", "other_collective"),
        (ATTENTION, "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        (
            "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
            "attention",
        ),
        ("triton_tem_fused_flex_attention_0", "attention"),
        (PRODUCT, "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_32x5_tn_align8>", "gemm"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize96x128x32", "gemm"),
        ("ampere_sgemm_128x64_tn", "gemm"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "gemm"),
        ("void cublasLt::splitKreduce_kernel<(int)32, (int)16>", "gemm"),
        ("triton_tem_fused_addmm_3", "gemm"),
        ("aten::addmm", "gemm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, true>", "normalisation"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1", "normalisation"),
        ("aten::linalg_vector_norm", "normalisation"),
        ("triton_poi_fused_addmm_mul_silu_view_1", "elementwise"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_2", "elementwise"),
        ("triton_per_fused_sum_4", "other"),
        (ADD, "elementwise"),
        ("void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<normal_>", "elementwise"),
        (COPY, "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<...>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("MEMSET", "copies"),
        ("void at::native::reduce_kernel<(int)512, (int)1, at::native::ReduceOp<float, func_wrapper_t>>", "other"),
        ("aten::view", "other"),
    ],
)
def test_names_as_they_occur(name: str, key: str) -> None:
    assert classify(name) == key


def test_every_pattern_is_of_a_class() -> None:
    assert {key for key, _ in PATTERNS} <= set(CLASSES)


@pytest.mark.parametrize(
    ("more", "counted"),
    [
        # One pass of 48 blocks.
        (["--sigmas", "distilled"], {"blocks": 48}),
        # The conditional and the unconditional one whole, the perturbed one from block 28 and there without
        # self-attention, the isolated one without video-to-audio; moments.
        (
            ["--max-batch-size", "1"],
            {"blocks": 48 + 48 + 20 + 48, "skipped_exchanges": 1, "skipped_gathers": 48, "step_gathers": 1},
        ),
        # Conditional and unconditional together; the perturbed one from block 28; the isolated one.
        (
            ["--max-batch-size", "2"],
            {"blocks": 48 + 20 + 48, "skipped_exchanges": 1, "skipped_gathers": 48, "step_gathers": 1},
        ),
        # From block 28 all three together, two of which have self-attention there.
        (["--max-batch-size", "3"], {"blocks": 48 + 48, "skipped_gathers": 48, "step_gathers": 1}),
    ],
)
def test_a_step_counted_by_hand_is_the_plans(more: list[str], counted: dict[str, int]) -> None:
    command = parse(["--prompt", "a fox", "--checkpoint-path", "none", "--parallel", "1x4", *more])
    (stage,) = make_plan(command.request, ModelSpec((2, 3), "published", full_size(), {}), command.settings, 4).stages
    cost, counts = stage.prediction, stated(ranks=4, **counted).counts()
    assert counts["all_to_all"] == cost.all_to_alls
    assert counts["all_gather"] == cost.all_gathers


def test_windows_counted_by_hand() -> None:
    assert sum(stated(48, steps=3).counts().values()) == 0
    assert stated(96, ranks=2, steps=3, step_gathers=2, stage_ends=1) == Steps(288, 576, 288 + 6 + 1)
    skipping = stated(96, ranks=2, steps=3, skipped_exchanges=2, skipped_gathers=48)
    assert skipping == Steps(288, 2 * 3 * 94, 3 * 48)


def test_passes_on_several_ranks_exchange_even_where_tokens_are_whole() -> None:
    assert stated(48, steps=3, step_gathers=1) == Steps(144, 0, 3)


CLIP = ["--prompt", "a fox", "--height", "64", "--width", "96", "--num-frames", "9"]
STG = ["--video-stg-blocks", "1", "--audio-stg-blocks", "1"]
CPU = machine_of("cpu")


def _arguments(demo: Path, *more: str) -> list[str]:
    return ["--checkpoint-path", str(demo / "ltx-2.3-demo.safetensors"), *CLIP, *more]


def _planned(demo: Path, num_ranks: int, *more: str, machine: Machine = CPU) -> tuple[list[Steps], int]:
    return planned(_arguments(demo, *STG, *more), num_ranks, machine)


def test_the_plan_of_a_run_says_what_its_window_holds(demo: Path) -> None:
    """The model has 2 blocks; the perturbed pass has block 1 alone and skips its self-attention, the isolated one both
    gathers."""
    (steps,), size = _planned(demo, 2, "--profile-steps", "3-4", "--parallel", "1x2")
    assert size == 2
    assert steps == Steps(blocks=2 * 7, all_to_alls=2 * 12, all_gathers=2 * (5 + 1))


def test_dealt_passes_differ_by_rank(demo: Path) -> None:
    """Conditional and perturbed; unconditional and isolated. Both gather the moments and each other's passes."""
    hands, size = _planned(demo, 4, "--parallel", "2x2", "--profile-steps=5-5")
    assert size == 2
    assert hands == [Steps(3, 4, 3 + 2), Steps(4, 8, 2 + 2)]
    assert _planned(demo, 2, "--parallel", "2x1", "--profile-steps=5-6")[0] == [
        Steps(6, 0, 2),
        Steps(8, 0, 2),
    ]


def test_alone_a_rank_exchanges_nothing(demo: Path) -> None:
    assert _planned(demo, 1, "--profile-steps", "1-1") == ([Steps(7, 0, 0)], 1)


def test_passes_that_share_blocks_skip_no_exchange(demo: Path) -> None:
    run = ["--parallel", "1x2", "--profile-steps", "1-1"]
    together = Steps(4, 8, 2 + 1)  # of the isolated pass neither gather
    assert _planned(demo, 2, *run, "--max-batch-size", "4")[0] == [together]
    # A GPU with room for it does that of itself.
    assert _planned(demo, 2, *run, machine=DEFAULT_MACHINE)[0] == [together]


def test_a_calibration_decides_the_layout_as_it_did_in_the_run(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    link = {"latency": 1e-12, "bytes_per_second": 1e18}
    rates = {"product_flops": 1e9, "read_bytes_per_second": 1e18, "memory_bytes": 0}
    file.write_text(json.dumps(rates | {"links": {"all_to_all": link}}))
    run = ["--profile-steps", "1-1", "--height", "512", "--width", "512"]
    assert _planned(demo, 2, *run)[1] == 1
    assert _planned(demo, 2, *run, "--calibration", str(file))[1] == 2


@pytest.mark.parametrize("steps", ["", "3", "0-1", "4-3", "30-31", "a-b"])
def test_windows_that_are_none(steps: str, demo: Path) -> None:
    with pytest.raises(RequestError, match=r"--profile-steps|do not lie in one stage of the run, which has 30"):
        _planned(demo, 2, *(["--profile-steps", steps] if steps else []))


def test_a_rank_is_held_against_its_own_passes(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks 0 and 1 run two passes, ranks 2 and 3 the isolated one; a report of Nsight Systems fits if any of them
    fits. On a GPU the two passes share their blocks."""
    off = ["--video-stg-guidance-scale", "0", "--audio-stg-guidance-scale", "0"]
    run = _arguments(demo, *off, "--parallel", "2x2", "--profile-steps", "1-1")
    hands, gpu_hands = (planned(run, 4, machine)[0] for machine in (CPU, DEFAULT_MACHINE))
    assert [hand.blocks for hand in hands] == [4, 2]
    assert [hand.blocks for hand in gpu_hands] == [2, 2]
    for rank in range(4):
        names = _collectives(hands[rank // 2], "gloo:{}")
        events = [event("user_annotation", name, 10 * place, 5) for place, name in enumerate(names)]
        write_torch(tmp_path / f"rank{rank}.json.gz", events, rank=rank)
        names = _collectives(gpu_hands[rank // 2], "nccl_{}")
        kernels = [(name, 10 * place, 10 * place + 5) for place, name in enumerate(names)]
        write_nsys(tmp_path / "node.sqlite", kernels, device=rank, process=rank)
    expect = ["--expect", "--world", "4", "--", *run]
    files = [str(tmp_path / f"rank{rank}.json.gz") for rank in range(4)]
    assert main([*files, *expect]) == 0
    assert main([str(tmp_path / "node.sqlite"), *expect]) == 0
    content = json.loads(gzip.decompress((tmp_path / "rank3.json.gz").read_bytes()))
    content["distributedInfo"]["rank"] = 1
    (tmp_path / "other.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    capsys.readouterr()
    assert main([str(tmp_path / "other.json.gz"), *expect]) == 1
    assert "rank 1, host: all_to_all = 4, expected 8: 4 too few, 1 per block." in capsys.readouterr().out


def _collectives(steps: Steps, name: str) -> list[str]:
    return [name.format("all_to_all")] * steps.all_to_alls + [name.format("all_gather")] * steps.all_gathers


PREDICTED = ["--blocks", "7", "--ranks", "2", "--steps", "1", "--step-gathers", "1", "--skipped-exchanges", "1"]
PREDICTED += ["--skipped-gathers", "2"]


def test_a_recorded_step_has_the_predicted_collectives(
    recorded: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, recorded), "--expect", "collectives=18", *PREDICTED]) == 0
    out = capsys.readouterr().out
    for rank in (0, 1):
        assert f"### gloo-rank{rank}.json.gz: rank {rank}, host" in out
    assert out.count("| all-to-all, send/recv | 12 |") == 2
    assert out.count("| all-gather | 6 |") == 2
    assert out.count("| GEMM | 228 |") == 2
    assert out.endswith("\nAs expected.\n")


def test_a_recorded_step_is_what_the_plan_of_its_run_says(
    demo: Path, recorded: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = _arguments(demo, *STG, "--num-inference-steps", "3", "--parallel", "1x2", "--profile-steps", "2-2")
    assert main([*map(str, recorded), "--expect", "--world", "2", "--", *run]) == 0
    run[run.index("--video-stg-blocks") + 1] = "0"  # the perturbed pass would run from there
    capsys.readouterr()
    assert main([*map(str, recorded), "--expect", "--world", "2", "--", *run]) == 1
    assert "all_to_all = 12, expected 14: 2 too few." in capsys.readouterr().out


def test_own_times_of_the_recorded_step_add_up(recorded: list[Path]) -> None:
    """On one thread operations never run side by side, so their own times are what the thread was busy."""
    (track,) = read_trace(recorded[0])
    host = [activity for activity in track.activities if not activity.name.startswith("gloo:")]
    assert len(host) > 9000
    busy, _ = union(host)
    assert sum(activity.own for activity in host) == pytest.approx(busy, rel=1e-3)


def _replant(path: Path, folder: Path, *, twice: str = "", once_less: str = "") -> Path:
    """A copy of a trace with every event of one name doubled, or one of another left out."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    kept: list[dict[str, Any]] = []
    for one in content["traceEvents"]:
        if one["name"] == once_less:
            once_less = ""
            continue
        kept.append(one)
        if one["name"] == twice:
            kept.append(one | {"ts": one["ts"] + one["dur"] + 0.001, "dur": 0.001})
    content["traceEvents"] = kept
    copy = folder / path.name
    copy.write_bytes(gzip.compress(json.dumps(content).encode()))
    return copy


def test_a_missing_all_to_all_is_seen(recorded: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = _replant(recorded[1], tmp_path, once_less="gloo:all_to_all")
    assert main([str(recorded[0]), str(planted), "--expect", *PREDICTED]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "gloo-rank1.json.gz: rank 1, host: all_to_all = 11, expected 12: 1 too few."


def test_gathers_too_many_are_seen(recorded: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = _replant(recorded[0], tmp_path, twice="gloo:all_gather")
    assert main([str(planted), "--expect", *PREDICTED]) == 1
    assert "all_gather = 12, expected 6: 6 too many." in capsys.readouterr().out


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report with the four blocks of two processes on two GPUs."""
    kernels = [kernel for number in range(4) for kernel in block(1000 + 100 * number)]
    path = write_nsys(tmp_path / "node.sqlite", kernels)
    return write_nsys(path, kernels, device=1, process=78)


FOUR_BLOCKS = ["--blocks", "4", "--ranks", "2", "--steps", "1"]


def test_an_nsys_report_has_a_table_per_process(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(report), "--expect", "collectives=12", *FOUR_BLOCKS]) == 0
    out = capsys.readouterr().out
    assert "### node.sqlite: GPU 0, process 77" in out
    assert "### node.sqlite: GPU 1, process 78" in out
    assert out.count("| all-gather | 4 | 0.000 | 19.0 % |") == 2


def test_gaps_and_overlap_by_hand(report: Path) -> None:
    """Four blocks of 90 busy ns between 395; of the collectives 10 + 10 + 5 per block alone."""
    track, _ = read_trace(report)
    assert union(track.activities) == (360, 8)
    assert {key: own for key, (_, own) in track.sums().items()} == {
        "all_gather": 80,
        "all_to_all": 80,
        "attention": 80,
        "gemm": 140,
        "elementwise": 40,
    }
    lines = table(track).splitlines()
    assert "0.000 ms (8.9 %) of it nothing ran, in 7 gaps." in lines[-2]  # 35 of 395
    assert lines[-1] == "Collectives ran 0.000 ms with nothing beside them."
    slow = Track("slow", tuple(_slower(track)), is_device=True)
    assert "Collectives ran 100.000 ms with nothing beside them." in table(slow)


def _slower(track: Track) -> Iterator[Activity]:
    for one in track.activities:
        yield dataclasses.replace(one, start=1e6 * one.start, end=1e6 * one.end, own=1e6 * one.own)


def test_a_positional_gather_is_named(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it was before the tables were made whole on every rank: one gather more per block."""
    write_nsys(report, [(ALL_GATHER, 1090 + 100 * number, 1091 + 100 * number) for number in range(4)])
    assert main([str(report), "--expect", *FOUR_BLOCKS]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "node.sqlite: GPU 0, process 77: all_gather = 8, expected 4: 4 too many, 1 per block "
        "(as if cos and sin were gathered)."
    )


def test_counts_that_are_given_come_before_those_predicted(report: Path) -> None:
    assert main([str(report), "--expect", "all_gather=5", *FOUR_BLOCKS]) == 1
    assert main([str(report), "--expect", "all_to_all=8", "gemm=4"]) == 0
    assert main([str(report), "--expect", "all_reduce=1"]) == 1


def test_any_collective_that_is_not_the_designs_is_seen(report: Path) -> None:
    write_nsys(report, [("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", 5000, 5001)])
    track, _ = read_trace(report)
    steps = stated(4, ranks=2)
    (line,) = deviations(track, steps.counts(), steps.blocks)
    assert "other_collective = 1, expected 0: 1 too many" in line


def test_copies_are_no_gaps(report: Path) -> None:
    with contextlib.closing(sqlite3.connect(report)) as database, database:
        database.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY (start, end, deviceId, contextId, streamId, globalPid, bytes, "
            "copyKind) VALUES (1030, 1035, 0, 1, 7, ?, 64, 8)",
            (0x01000000000000 | 77 << 24,),
        )
    track, _ = read_trace(report)
    assert union(track.activities) == (365, 7)
    assert track.counts()["copies"] == 1


def test_a_graph_traced_as_a_whole_is_refused(report: Path) -> None:
    with contextlib.closing(sqlite3.connect(report)) as database, database:
        database.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER, end INTEGER, graphId INTEGER)")
    with pytest.raises(RequestError, match="--cuda-graph-trace=node"):
        read_trace(report)


def test_an_nsys_report_without_kernels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
    with pytest.raises(RequestError, match="window was never opened"):
        read_trace(path)


def test_a_torch_trace_of_a_gpu(tmp_path: Path) -> None:
    """NCCL's ranges on the device, and the host's operations, are not kernels."""
    path = write_torch(
        tmp_path / "rank1.json.gz",
        [
            event("kernel", ALL_GATHER, 10, 5),
            event("gpu_user_annotation", "nccl:_all_gather_base", 10, 5),
            event("cpu_op", "c10d::_allgather_base_", 1, 2),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 20, 5),
        ],
        rank=1,
    )
    (track,) = read_trace(path)
    assert track.name == "rank1.json.gz: rank 1, GPU 0"
    assert track.counts() == {"all_gather": 1, "copies": 1, "collectives": 1}
    assert union(track.activities) == (10_000, 2)


def test_operations_inside_others_count_once(tmp_path: Path) -> None:
    """A product of 10 us inside a call of 16 leaves 6; a collective's own copies are a part of it."""
    path = write_torch(
        tmp_path / "rank0.json",
        [
            event("cpu_op", "aten::linear", 0, 16),
            event("cpu_op", "aten::addmm", 2, 10),
            event("cpu_op", "aten::copy_", 3, 4),
            event("cpu_op", "aten::mul", 16, 3),
            event("cpu_op", "c10d::alltoall_base_", 20, 10),
            event("user_annotation", "gloo:all_to_all", 21, 8, tid=8),
            event("cpu_op", "aten::copy_", 22, 2, tid=8),
            event("user_annotation", "step", 0, 30),
        ],
    )
    path.write_bytes(gzip.decompress(path.read_bytes()))  # a trace that is not compressed
    (track,) = read_trace(path)
    assert track.sums() == {
        "all_to_all": (1, 8000),
        "gemm": (1, 6000),
        "elementwise": (1, 3000),
        "copies": (1, 4000),
        "other": (1, 6000),
    }


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[1]", b'{"traceEvents": [1]}', b'{"traceEvents": []}', b"\x1f\x8b",
     b"\x1f\x8b\x08\0junkjunkjunk", b"SQLite format 3\0junk", b"\xff\xfe\0",
     b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k"}]}'],
)  # fmt: skip
def test_what_is_no_trace_ends_in_a_sentence(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert main([str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"kernels: {path} ")
    assert err.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--expect"], "nothing to check"),
        (["--expect", "all_gathers=3"], "must be one of"),
        (["--expect", "all_gather"], "must be one of"),
        (["--expect", "all_gather=-1"], "must be one of"),
        (["--blocks", "3"], "Give --expect too"),
        (["--expect", "--", "--prompt", "x"], "Give --world"),
        (["--expect", "--blocks", "3", "--world", "2"], "Give one of them"),
        (["--expect", "--world", "2", "--", "--profile-steps", "1-1"], "required: --checkpoint-path"),
    ],
)
def test_expectations_that_mean_nothing(
    words: list[str], message: str, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(report), *words]) == 2
    assert message in capsys.readouterr().err
