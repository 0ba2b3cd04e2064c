"""Count the collectives of a forward, and set their bytes beside the formula.

    python profiling/comm.py --ranks 4

First measured on gloo ranks with a small model, then at the sizes of the 22B model through PyTorch's fake process
group, where one process takes the place of each rank in turn and shapes stand for tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx_sp.model.args import BlockSkips
from ltx_sp.model.attention import SdpaBackend
from ltx_sp.model.dit import Transformer
from ltx_sp.parallel.collectives import Exchange
from ltx_sp.parallel.mesh import Mesh
from ltx_sp.parallel.parallelize import parallelize
from ltx_sp.request import CHOICES
from ltx_sp.spec import LatentShape, TransformerSpec
from profiling.models import full_size, random_inputs, random_transformer, stream_inputs, transformer_spec
from tests.support.ranks import run_ranks

SMALL_SHAPE = LatentShape(frames=3, height=4, width=8, audio_frames=17)
FULL_SHAPE = LatentShape(frames=16, height=24, width=40, audio_frames=126)
"""768x1280, 121 frames at 24 per second: 15 360 video tokens."""


def small_spec(num_heads: int = 8) -> TransformerSpec:
    """A model small enough for many ranks on one machine."""
    return transformer_spec(num_heads=num_heads, head_dim=16, audio_head_dim=8, num_layers=3)


@dataclasses.dataclass(frozen=True)
class Count:
    """What one rank received in one forward, the exchanges of all blocks together."""

    rank: int
    num_layers: int
    exchanges: tuple[Exchange, ...]

    @property
    def per_block(self) -> float:
        return len(self.exchanges) / self.num_layers

    @property
    def bytes_per_block(self) -> float:
        return sum(exchange.num_bytes for exchange in self.exchanges) / self.num_layers


def bound(spec: TransformerSpec, shape: LatentShape, num_ranks: int, element_size: int) -> float:
    """Bytes per rank and block that the ``partial`` strategy may receive: the design's own formula."""
    n, s, a = num_ranks, shape.video_tokens, shape.audio_frames
    exchanged = 4 * (n - 1) / n * s * spec.video.width * element_size / n
    return exchanged + (n - 1) * a * (spec.cross_width * element_size + 4 * spec.audio.num_heads)


def count_forward(mesh: Mesh, model: Transformer, shape: LatentShape, *, strategy: str) -> Count:
    """Run one forward and return what this rank's ledger says. Collective."""
    spec, weight = model.spec, model.proj_out.weight
    inputs = random_inputs(spec, shape, num_text=8, dtype=weight.dtype, device=weight.device)
    attends = parallelize(
        SdpaBackend(),
        mesh.tokens,
        num_tokens=shape.video_tokens,
        num_heads=spec.video.num_heads,
        video_to_audio=strategy,
    )
    with torch.inference_mode():
        video, audio = stream_inputs(model, inputs, mesh.tokens)
        mesh.ledger.recording = True
        model(video, audio, attends, [BlockSkips()] * spec.num_layers)
        mesh.ledger.recording = False
    return Count(mesh.world.rank, spec.num_layers, tuple(mesh.ledger.exchanges))


def count_on_gloo(rank: int, num_ranks: int, strategy: str, dtype_name: str, num_heads: int) -> Count:
    """One rank of a measured forward."""
    mesh = Mesh.alone() if num_ranks == 1 else Mesh.of_group(None, torch.device("cpu"))
    dtype: torch.dtype = getattr(torch, dtype_name)
    model = random_transformer(small_spec(num_heads), dtype=dtype, device=torch.device("cpu"))
    return count_forward(mesh, model, SMALL_SHAPE, strategy=strategy)


def count_on_fake(rank: int, num_ranks: int, strategy: str, model: Transformer) -> Count:
    """One rank of a model on meta, without the other ranks: shapes and counts only."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        mesh = Mesh.of_group(None, torch.device("meta"))
        return count_forward(mesh, model, FULL_SHAPE, strategy=strategy)
    finally:
        dist.destroy_process_group()


def _print_table(counts: Sequence[Count], limit: float) -> None:
    count = counts[0]
    calls = Counter((exchange.label, exchange.operation) for exchange in count.exchanges)
    sizes: Counter[tuple[str, str]] = Counter()
    for exchange in count.exchanges:
        sizes[exchange.label, exchange.operation] += exchange.num_bytes
    for key, number in calls.items():
        label, operation = key
        print(
            f"    {label:40} {operation:12} {number / count.num_layers:4.0f} per block "
            f"{sizes[key] / count.num_layers:14,.0f} bytes (rank 0)"
        )
    received = [one.bytes_per_block for one in counts]
    mean = sum(received) / len(received)
    ratio = f"{mean / limit:.4f} of the formula's {limit:,.0f}" if limit else ""
    print(
        f"    {count.per_block:.0f} collectives per block, {len(count.exchanges)} per forward; received per rank and "
        f"block: mean {mean:,.0f}, most {max(received):,.0f} bytes; mean is {ratio}"
    )


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="ranks of both tables (default 4)")
    num_ranks = parser.parse_args().ranks
    spec = small_spec(max(8, num_ranks))
    if num_ranks < 2:
        parser.error("one rank has no collectives; give 2 or more")
    for strategy in CHOICES["video_to_audio"]:
        counts = run_ranks(count_on_gloo, num_ranks, strategy, "bfloat16", max(8, num_ranks), timeout=300)
        print(f"\nmeasured: {num_ranks} gloo ranks, {strategy}, bf16, {SMALL_SHAPE.video_tokens} video tokens")
        _print_table(counts, bound(spec, SMALL_SHAPE, num_ranks, 2))
    if num_ranks <= 32:
        model = random_transformer(full_size(), dtype=torch.bfloat16, device=torch.device("meta"))
        for strategy in CHOICES["video_to_audio"]:
            counts = [count_on_fake(rank, num_ranks, strategy, model) for rank in range(num_ranks)]
            print(
                f"\ncounted: 22B sizes, 48 blocks, {num_ranks} ranks of the fake group, {strategy}, bf16, "
                f"{FULL_SHAPE.video_tokens} video tokens"
            )
            _print_table(counts, bound(full_size(), FULL_SHAPE, num_ranks, 2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
