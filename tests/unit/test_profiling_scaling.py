"""A prediction of scaling is the arithmetic that it says it is; a calibration measures what it says and reads back.

Oracle: arithmetic by hand, and ``ltx_sp.stage`` for operations and bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_sp.cost import DEFAULT_MACHINE, Machine, Prediction, machine_of, read_machine
from ltx_sp.errors import RequestError
from ltx_sp.model.attention import SdpaBackend
from ltx_sp.parallel.mesh import Mesh, calibration_path, device_name
from ltx_sp.plan import make_plan
from ltx_sp.request import Settings
from ltx_sp.runtime import _machine
from profiling import calibrate, scaling
from profiling.calibrate import Calibration, Link, fit_link, read_calibration
from profiling.scaling import Row, Wires, step_seconds, table
from tests.support.ranks import run_ranks

TOY = Calibration("Toy 9000", "bfloat16", "2.11.0", 5e14, {1000: 2e14, 20_000: 4e14}, 3e12, 1 << 37, 3e-6, 1, {})
LINK, SLOW = Link(1e-5, 3e11), Link(3e-5, 3e10)
CLIP = ["--height", "768", "--width", "1280", "--num-frames", "121"]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    TOY.write(tmp_path / "toy.json")
    return tmp_path / "toy.json"


def test_a_calibration_reads_back(tmp_path: Path) -> None:
    whole = dataclasses.replace(TOY, num_ranks=8, links={"all_to_all": LINK, "all_gather": SLOW})
    whole.write(tmp_path / "new" / "file.json")
    assert read_calibration(tmp_path / "new" / "file.json") == whole
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.json"]


def test_the_plan_reads_of_a_calibration_what_it_decides_by(tmp_path: Path) -> None:
    dataclasses.replace(TOY, links={"all_to_all": LINK, "all_gather": SLOW}).write(tmp_path / "file.json")
    assert TOY.machine(LINK) == Machine(5e14, 3e11, 1e-5, 3e12, 1 << 37)
    otherwise = dataclasses.replace(DEFAULT_MACHINE, memory_bytes=1 << 37)
    assert read_machine(tmp_path / "file.json", otherwise) == TOY.machine(LINK)


@pytest.mark.parametrize(
    "change",
    [{"product_flops": 0}, {"product_flops": float("nan")}, {"attention_flops": {}}, {"attention_flops": {"a": 1}},
     {"links": {"all_to_all": {"latency": 1e-5}}}, {"links": []}, {"launch_seconds": None}, {"num_ranks": "many"},
     {"read_bytes_per_second": 0}, {"read_bytes_per_second": None}, {"memory_bytes": -1}],
)  # fmt: skip
def test_what_is_no_calibration_ends_in_a_sentence(change: dict[str, Any], toy: Path) -> None:
    toy.write_text(json.dumps(json.loads(toy.read_text()) | change))
    with pytest.raises(RequestError, match="is no calibration"):
        read_calibration(toy)


@pytest.mark.parametrize("content", ["", "[]", "{}", "3"])
def test_a_file_of_something_else(content: str, toy: Path) -> None:
    toy.write_text(content)
    with pytest.raises(RequestError, match="Measure anew"):
        read_calibration(toy)


def test_a_calibration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Measure first"):
        read_calibration(tmp_path / "none.json")


def test_a_kept_calibration_counts_and_a_broken_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device, settings = torch.device("cpu"), Settings(Path("model.safetensors"))
    monkeypatch.setenv("LTX_SP_CACHE", str(tmp_path))
    assert _machine(settings, device) == machine_of("cpu")
    kept = calibration_path(device_name(device))
    TOY.write(kept)
    assert _machine(settings, device).flops == TOY.product_flops
    dataclasses.replace(TOY, product_flops=1e12).write(tmp_path / "other.json")
    asked = dataclasses.replace(settings, calibration=tmp_path / "other.json")
    assert _machine(asked, device).flops == 1e12
    kept.write_text("{}")
    assert _machine(settings, device) == machine_of("cpu")
    assert "Measure it again. Layouts go by the data sheet." in caplog.text


def test_without_a_home_or_a_way_in_there_is_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user without an entry and without HOME, and for a folder of somebody else's."""

    def fail(*_: object, **__: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("LTX_SP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(os, "stat", closed)
    assert _machine(Settings(Path("model.safetensors")), torch.device("cpu")) == machine_of("cpu")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LTX_SP_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/calibration-nvidia-h200-sxm.json"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/ltx_sp/calibration-nvidia-h200-sxm.json"),
        ({}, f"{Path.home()}/.cache/ltx_sp/calibration-nvidia-h200-sxm.json"),
    ],
)
def test_where_a_calibration_is_kept(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LTX_SP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(calibration_path("NVIDIA H200 (SXM)")) == expected


@pytest.mark.parametrize(("length", "rate"), [(1000, 2e14), (20_000, 4e14), (10_500, 3e14), (1, 2e14), (99_999, 4e14)])
def test_attention_between_the_lengths_that_were_measured(length: int, rate: float) -> None:
    assert TOY.attention_rate(length) == pytest.approx(rate)


def test_a_link_fits_both_ends() -> None:
    link = fit_link({1000: 2e-5, 10_000: 3e-5, 1_001_000: 2e-5 + 1e-3})
    assert link.bytes_per_second == pytest.approx(1e9)
    assert link.latency == pytest.approx(2e-5 - 1e-6)


def test_a_link_in_noise_is_still_one() -> None:
    """The larger exchange measured faster."""
    link = fit_link({1000: 2e-5, 2000: 1e-5})
    assert link.latency > 0
    assert link.bytes_per_second > 0


def _links(rank: int, num_ranks: int) -> dict[str, Link]:
    mesh = Mesh.of_group(None, torch.device("cpu"))
    return calibrate.measure_links(mesh.world, (1 << 10, 1 << 18), mesh.device, rounds=2)


def test_links_are_measured_between_ranks() -> None:
    for links in run_ranks(_links, 2):
        assert set(links) == {"all_to_all", "all_gather"}
        assert all(link.latency > 0 and link.bytes_per_second > 0 for link in links.values())


def test_one_rank_is_calibrated_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(calibrate, "_CPU_PRODUCTS", ((32, 32, 32),))
    monkeypatch.setattr(calibrate, "_CPU_LENGTHS", (16, 32))
    monkeypatch.setattr(calibrate, "_CPU_READ_BYTES", 1 << 20)
    path = tmp_path / "here.json"
    assert calibrate.main(["--device", "cpu", "--rounds", "1", "--output", str(path)]) == 0
    found = read_calibration(path)
    assert (found.num_ranks, found.links, found.dtype) == (1, {}, "float32")
    assert set(found.attention_flops) == {16, 32}
    assert found.read_bytes_per_second > 0
    assert found.memory_bytes == 0, "passes share no working memory on a CPU"


def test_products_count_two_operations_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "seconds_of", lambda call, device, rounds: 1e-3)
    device = torch.device("cpu")
    assert calibrate.measure_products([(2, 3, 5)], torch.float32, device, rounds=1) == pytest.approx(60e3)
    rates = calibrate.measure_attention(SdpaBackend(), [4], 2, torch.float32, device, rounds=1)
    assert rates == {4: pytest.approx(4 * 2 * 4 * 4 * 128 * 1e3)}


def test_what_is_read_is_the_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []

    def seconds_of(call: Any, device: torch.device, rounds: int) -> float:
        sums.append(call().item())
        return 1e-3

    monkeypatch.setattr(calibrate, "seconds_of", seconds_of)
    assert calibrate.measure_read(1 << 12, torch.device("cpu"), rounds=1) == pytest.approx(4096e3)
    assert sums == [1024]


def test_exchanges_inside_a_host() -> None:
    wires = Wires(8, LINK, LINK, None)
    assert wires.seconds(LINK, 3e8, 2, size=8) == pytest.approx(2e-5 + 1e-3)
    assert wires.seconds(LINK, 3e8, 2, size=1) == 0


def test_exchanges_between_hosts_wait_for_the_slower_part() -> None:
    """Of 15 others 8 are on the other host, and only these bytes go between."""
    wires = Wires(8, LINK, LINK, SLOW)
    assert wires.seconds(LINK, 15e6, 1, size=16) == pytest.approx(3e-5 + 8e6 / 3e10)
    # Two guidance ranks, 8 ranks apart, are on two hosts; four of them, 4 apart, two by two.
    assert wires.seconds(LINK, 1e6, 1, size=2, stride=8) == pytest.approx(3e-5 + 1e6 / 3e10)
    assert wires.seconds(LINK, 3e6, 1, size=4, stride=4) == pytest.approx(3e-5 + 2e6 / 3e10)
    assert wires.seconds(LINK, 1e6, 1, size=2, stride=4) == pytest.approx(1e-5 + 1e6 / 3e11)


def test_hosts_of_unknown_connection_are_refused() -> None:
    with pytest.raises(RequestError, match="--network-gbps"):
        Wires(8, LINK, LINK, None).seconds(LINK, 1, 1, size=2, stride=8)


WIRES = Wires(8, LINK, Link(2e-5, 1e11), SLOW)


def _rows(gpus: list[int], *more: str) -> list[Row]:
    command, model = scaling._request([*CLIP, *more])
    return scaling.predict_rows(command, model, gpus, TOY, WIRES)


def _predictions(parallel: str, num_gpus: int, *more: str) -> tuple[Prediction, ...]:
    command, model = scaling._request([*CLIP, "--parallel", parallel, *more])
    return make_plan(command.request, model, command.settings, num_gpus, TOY.machine(LINK)).stages[0].predictions


def _computing(cost: Prediction) -> float:
    """Attention at its rate, the audio stream at that of products or of reading its weights, the rest at the former."""
    rest = cost.flops - cost.attention_flops - cost.audio_flops
    audio = max(cost.audio_flops / 5e14, cost.audio_bytes / 3e12)
    return rest / 5e14 + cost.attention_flops / TOY.attention_rate(15_360) + audio


def test_one_gpu_by_hand() -> None:
    """Self-attention at its own rate, the rest at that of products; 30 steps.

    Of 48 blocks conditional, unconditional and isolated pass run all, the perturbed one 20; one of them without
    self-attention, which it does not skip where it shares them.
    """
    tokens, width = 15_360, 4096
    for size, num_attentions in ((1, 48 + 48 + 19 + 48), (3, 48 + 48 + 20 + 48)):
        together = ["--max-batch-size", str(size)]
        (row,), (cost,) = _rows([1], *together), _predictions("1x1", 1, *together)
        assert cost.attention_flops == num_attentions * 4 * tokens**2 * width
        assert row.layout == (1, 1)
        assert row.steps[0] == pytest.approx(_computing(cost))
        assert row.seconds == pytest.approx(30 * row.steps[0])


def test_every_layout_is_there_and_none_that_leaves_ranks_idle() -> None:
    assert [row.layout for row in _rows([1, 2, 4, 8])] == [
        (1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (4, 2)
    ]  # fmt: skip


def test_passes_on_ranks_of_their_own_cost_one_exchange() -> None:
    """The ranks with the unconditional and the isolated pass take longest: the others share blocks."""
    _, _, apart = _rows([1, 2])
    hands = _predictions("2x1", 2)
    sent = 2 * 128 * 2 * (15_360 + 126)  # two passes, all channels, bf16, both streams
    assert [hand.x0_bytes for hand in hands] == [sent, sent]
    assert _computing(hands[1]) > 1.2 * _computing(hands[0])
    assert apart.steps[0] == pytest.approx(_computing(hands[1]) + 2e-5 + sent / 1e11)


def test_the_slowest_ranks_count_wherever_they_are() -> None:
    command, model = scaling._request([*CLIP, "--parallel", "2x1"])
    stage = make_plan(command.request, model, command.settings, 2).stages[0]
    turned = dataclasses.replace(stage, predictions=stage.predictions[::-1])
    assert step_seconds(turned, TOY, WIRES) == step_seconds(stage, TOY, WIRES)


@pytest.mark.parametrize(
    ("size", "exchanges", "gathers"),
    [
        # The perturbed pass from block 28, which it exchanges nothing for; the isolated one gathers nothing.
        ("1", 48 + 48 + 19 + 48, 48 + 48 + 20),
        # Conditional and unconditional pass share all blocks, then the perturbed one its own too.
        ("2", 48 + 19 + 48, 48 + 20),
        ("3", 48 + 48, 48),
    ],
)
def test_tokens_on_ranks_of_their_own_cost_the_counted_bytes(size: str, exchanges: int, gathers: int) -> None:
    sharded, _ = _rows([2], "--max-batch-size", size)
    (cost,) = _predictions("1x2", 2, "--max-batch-size", size)
    num_calls = 2 * exchanges + gathers + 1  # moments
    exchanging = num_calls * LINK.latency + cost.received_bytes / LINK.bytes_per_second
    assert sharded.steps[0] == pytest.approx(_computing(cost) + exchanging)


def test_the_calibrated_machine_decides_which_passes_share_a_batch() -> None:
    slow = dataclasses.replace(TOY, read_bytes_per_second=1e11)
    small = dataclasses.replace(slow, memory_bytes=0)

    def seconds(machine: Calibration, *more: str) -> float:
        command, model = scaling._request([*CLIP, *more])
        return scaling.predict_rows(command, model, [2], machine, WIRES)[0].seconds

    assert seconds(small) == seconds(slow, "--max-batch-size", "1")
    assert seconds(slow) < seconds(small)


def test_a_second_stage_folds_all_ranks_into_tokens() -> None:
    rows = _rows([4], "--pipeline", "two-stages", "--spatial-upsampler-path", "x", "--distilled-lora", "y")
    assert [row.layout for row in rows] == [(1, 4), (2, 2), (4, 1)]
    assert len({row.steps[1] for row in rows}) == 1
    assert all(row.seconds == pytest.approx(30 * row.steps[0] + 3 * row.steps[1]) for row in rows)


def test_the_table_by_hand() -> None:
    text = table([Row((1, 1), (0.2,), 6.0), Row((1, 2), (0.125,), 3.75), Row((2, 1), (0.1,), 3.0)])
    assert text.splitlines() == [
        "| GPUs | guidance x tokens | step of stage 1, ms | denoising, s | speed-up | efficiency |",
        "|--:|--:|--:|--:|--:|--:|",
        "| **1** | **1 x 1** | **200.0** | **6.000** | **1.00** | **100 %** |",
        "| 2 | 1 x 2 | 125.0 | 3.750 | 1.60 | 80 % |",
        "| **2** | **2 x 1** | **100.0** | **3.000** | **2.00** | **100 %** |",
    ]


def test_the_first_line_says_that_it_is_a_prediction(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = ["--link-gbps", "300", "--latency-us", "10"]
    assert scaling.main(["--calibration", str(toy), *stated, "--", *CLIP]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("A prediction, not a measurement, for Toy 9000: ")
    assert "300 GB/s and 10 us per exchange, none of it hidden" in out[0]
    assert [line.split("|")[1].strip(" *") for line in out[4:]] == [*"122444888"]  # one host


def test_a_network_brings_sixteen_gpus(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = ["--link-gbps", "300", "--network-gbps", "30"]
    assert scaling.main(["--calibration", str(toy), *stated, "--", *CLIP]) == 0
    out = capsys.readouterr().out
    assert "between hosts 30 GB/s" in out
    assert "| 16 | 1 x 16 |" in out


@pytest.mark.parametrize(
    ("own", "more", "message", "code"),
    [
        ([], [], "Give --link-gbps", 2),
        (["--gpus", "16", "--link-gbps", "300"], [], "--network-gbps", 2),
        (["--gpus", "1"], ["--height", "100"], "does not fit", 3),
        (["--gpus", "1"], ["--hight", "100"], "Did you mean --height", 2),
        (["--gpus", "67", "--link-gbps", "300", "--gpus-per-host", "99"], [], "has no layout on 67 GPUs", 3),
        (["--gpus", "1"], ["--checkpoint-path", "none.safetensors"], "none.safetensors", 4),
    ],
)
def test_what_cannot_be_predicted(
    own: list[str], more: list[str], message: str, code: int, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scaling.main(["--calibration", str(toy), *own, "--", *more]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--link-gbps", "0"], ["--gpus", "0"], ["--gpus-per-host", "-1"]])
def test_speeds_that_are_none(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scaling.main(words)


class Torchrun:
    """Stands for ``subprocess.run``: writes the report of a run in which each rank of tokens is worth 2 s."""

    def __init__(self, returncode: int = 0):
        self.commands: list[list[str]] = []
        self._returncode = returncode

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        guidance, tokens = map(int, command[command.index("--parallel") + 1].split("x"))
        phases = [
            {"phase": "encode prompts", "seconds": 9.0, "device_seconds": None},
            {"phase": "denoise", "seconds": 12.0 - 2 * tokens - guidance, "device_seconds": None},
        ]
        earlier = {"phases": [{"phase": "denoise", "seconds": 100.0, "device_seconds": None}]}
        report = Path(command[command.index("--report") + 1])
        report.write_text(json.dumps({"requests": [earlier, {"phases": phases}]}))
        return subprocess.CompletedProcess(command, self._returncode)


def test_every_layout_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torchrun = Torchrun()
    monkeypatch.setattr(subprocess, "run", torchrun)
    assert scaling.main(["--measure", "--gpus", "1", "2", "--", *CLIP]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Measured on ")
    assert out[-2:] == [
        "| **2** | **1 x 2** | **7.000** | **1.29** | **64 %** |",
        "| 2 | 2 x 1 | 8.000 | 1.12 | 56 % |",
    ]
    for command, ranks in zip(torchrun.commands, (1, 2, 2), strict=True):
        assert f"--nproc_per_node={ranks}" in command
        assert command[command.index("ltx_sp.generate") + 1 :][: len(CLIP)] == CLIP


def test_a_run_that_fails_gives_no_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subprocess, "run", Torchrun(returncode=8))
    assert scaling.main(["--measure", "--gpus", "1", "--", *CLIP]) == 2
    assert "ended with 8" in capsys.readouterr().err
