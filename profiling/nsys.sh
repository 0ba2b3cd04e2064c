#!/usr/bin/env bash
# Records a window of denoising steps with Nsight Systems: one report per host, and its SQLite export for kernels.py.
# What follows -- goes to ltx_sp.generate; --profile-steps A-B is the window, in steps counted from 1 over all stages:
#
#   profiling/nsys.sh -- --profile-steps 3-4 --checkpoint-path ltx-2.3.safetensors --gemma-root gemma --prompt "..."
#   python profiling/kernels.py ltx_sp-$(hostname).sqlite
#
#   NSYS           the profiler; nsys where it is not set
#   NSYS_ARGS      more options for nsys profile, such as "--gpu-metrics-devices=all"
#   REPORT         the report's name; ltx_sp-%h where it is not set, in which nsys puts the host's name for %h
#   TORCHRUN_ARGS  how the ranks of several hosts meet; --standalone where it is not set. Start this on every host:
#                  TORCHRUN_ARGS="--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
#   RANKS, PYTHON  as for launch/one_node.sh
set -euo pipefail

nsys_fail() {
    printf 'nsys: %s\n' "$@" >&2
    exit 2
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
NSYS="${NSYS:-nsys}"
command -v "$NSYS" >/dev/null ||
    nsys_fail "there is no $NSYS here. Install Nsight Systems or name it (NSYS=/path/to/nsys); without it: profiling/trace.py"
[[ "${1:-}" != -- ]] || shift
[[ " $* " == *" --profile-steps"[=\ ]* ]] ||
    nsys_fail "the arguments need --profile-steps A-B: which steps to record, counted from 1"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$ROOT/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
if [[ -z "${RANKS:-}" ]]; then
    RANKS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
    ((RANKS > 0)) || nsys_fail "PyTorch sees no GPU here. On the CPU: profiling/trace.py"
fi
export RANKS
source "$ROOT/launch/env.sh"

read -ra more <<<"${NSYS_ARGS:-}"
read -ra torchrun <<<"${TORCHRUN_ARGS:---standalone}"

# A window, or loading would fill the report. It ends with the first rank that leaves it, and the run goes on. Graphs
# by node, or a captured step is one entry without kernels. No sampling of the host: it would take its time from the
# launches, and these are looked at.
exec "$NSYS" profile \
    --capture-range=cudaProfilerApi \
    --capture-range-end=stop \
    --cuda-graph-trace=node \
    --trace=cuda,nvtx \
    --sample=none \
    --cpuctxsw=none \
    --export=sqlite \
    --force-overwrite=true \
    --output="${REPORT:-ltx_sp-%h}" \
    "${more[@]}" \
    "$PYTHON" -m torch.distributed.run "${torchrun[@]}" --nproc_per_node="$RANKS" -m ltx_sp.generate "$@"
