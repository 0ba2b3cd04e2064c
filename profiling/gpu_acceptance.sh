#!/usr/bin/env bash
# Everything that one bare GPU can prove, in under nine minutes: the tests that need it, two ranks with real NCCL in a
# captured step, the step at the published size beside the GPU's own rates, residency, loading. A step that fails or
# runs out of its time does not stop the next. Writes DATE-gpu-acceptance-DEVICE.json and .md. Exit codes: 0,
# also where steps were skipped; 1 if any failed; 2 if there was nothing to run them with. No installation: it takes what
# the interpreter finds.
#
#   profiling/gpu_acceptance.sh
#   profiling/gpu_acceptance.sh --dry-run    print the steps, run nothing
#
# What found no time runs by itself, with all of it: STEPS="step" profiling/gpu_acceptance.sh
#
#   STEPS           names of some steps; all where it is not set
#   PYTHON          the interpreter; python3 where it is not set
#   OUT             the folder to write to; profiling/results where it is not set
#   RESIDENCY_SIZE  of profiling/residency.py; small where it is not set. 22b writes 44 GB and takes many minutes
#   TIME_LIMIT      seconds for all steps together; 525 where it is not set
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-$ROOT/profiling/results}"
TIME_LIMIT="${TIME_LIMIT:-525}"
STEPS="${STEPS:-}"
case "$*" in
"") dry_run= ;;
--dry-run) dry_run=yes ;;
*)
    echo "gpu_acceptance: there is nothing to give but --dry-run; the top of $0 says what the environment sets" >&2
    exit 2
    ;;
esac

cd "$ROOT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

imports() {
    local module
    for module in "$@"; do
        "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" || return
    done
}

# step NAME SECONDS "MODULES THAT IT NEEDS" COMMAND...
step() {
    local name="$1" limit="$2" needs="$3" log="$work/$1.log" began=$SECONDS status=PASS code=0 note=
    shift 3
    if [[ -n "$STEPS" && " $STEPS " != *" $name "* ]]; then
        return
    fi
    local left=$((TIME_LIMIT - SECONDS)) command="$*"
    command="${command//"$work"/DIR}" command="${command//"$PYTHON"/python}"
    if [[ -n "$dry_run" ]]; then
        echo "$name, at most $limit s${needs:+, needs $needs}: $command"
        return
    fi
    read -ra modules <<<"$needs"
    if ((left < 3)); then
        status=SKIPPED note="no time left"
        : >"$log"
    elif ! imports "${modules[@]}"; then
        status=SKIPPED note="needs $needs"
        : >"$log"
    else
        echo "gpu_acceptance: $name" >&2
        # An interrupt, not an end: pytest then says what has failed so far.
        timeout --signal=INT --kill-after=10 "$((limit < left ? limit : left))" "$@" >"$log" 2>&1 </dev/null || code=$?
        if ((code == 124 || code == 137)); then
            status=FAIL note="ran out of time"
        elif ((code != 0)) && grep -q '^Traceback' "$log"; then
            status=FAIL note="crashed, exit code $code"
        elif ((code != 0)); then
            status=FAIL note="exit code $code"
        elif [[ "$1 $2 $3" == *" -m pytest" ]] && ! grep -qE '^(=+ )?[0-9]+ passed' "$log"; then
            status=SKIPPED note="nothing ran"
        fi
    fi
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" "$note" "$command" >>"$work/steps.tsv"
    printf '%-10s %-8s %4s s  %s\n' "$name" "$status" "$((SECONDS - began))" "$note"
}

if [[ -z "$dry_run" ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_acceptance: $PYTHON has no PyTorch that sees a CUDA device. Name another: PYTHON=/path/to/python $0" >&2
    exit 2
fi
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --durations=10)
compiled=tests/gpu/test_graph_cuda.py::test_compiled_steps_replay_as_they_run
bench=235 # seconds of the step that takes what it is given
[[ "$STEPS" != step ]] || bench=$((TIME_LIMIT - 35))
# In the order in which they matter: the later ones have what time the earlier ones leave.
step nccl 120 "pytest einops" "${pytest[@]}" tests/gpu/test_graph_nccl.py
step tests 150 "pytest safetensors einops" \
    "${pytest[@]}" tests/gpu --ignore=tests/gpu/test_graph_nccl.py --deselect "$compiled"
step step $((bench + 35)) "einops" "$PYTHON" profiling/gpu_bench.py --time-limit "$bench" --json "$work/step.json"
step load 90 "safetensors" \
    "$PYTHON" profiling/load.py --device cuda --only device --ranks 1 --rounds 1 --size-gib 1 --forms shards
step rates 60 "einops" "$PYTHON" profiling/calibrate.py --device cuda --output "$work/calibration.json"
step compiled 150 "pytest einops" "${pytest[@]}" "$compiled"
step residency 60 "diffusers av transformers" \
    "$PYTHON" profiling/residency.py --device cuda --size "${RESIDENCY_SIZE:-small}" --rounds 1
[[ -z "$dry_run" ]] || exit 0
if [[ ! -e "$work/steps.tsv" ]]; then
    echo "gpu_acceptance: none of the steps is called $STEPS; --dry-run names them" >&2
    exit 2
fi
"$PYTHON" profiling/acceptance_report.py "$work" "$OUT" "$STEPS"
