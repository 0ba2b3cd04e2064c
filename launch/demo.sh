#!/usr/bin/env bash
# From nothing to a clip: sets up, writes a tiny checkpoint with random weights, and generates demo.mp4 in the current
# folder with two ranks, on two GPUs where there are two and on the CPU elsewhere.
#
#   LTX_SP_CACHE  where the checkpoint is kept; the user's cache folder where it is not set
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export RANKS=2
source "$ROOT/launch/env.sh"

CACHE="${LTX_SP_CACHE:-${XDG_CACHE_HOME:-${HOME:?demo: set HOME or LTX_SP_CACHE}/.cache}/ltx_sp}/demo"
stamp="$CACHE/.stamp" # says which version of the demo wrote the checkpoint, and that it finished
wanted="$(cat "$ROOT"/ltx_sp/demo*.py | sha256sum)"
if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
    echo "demo: writing a checkpoint with random weights to $CACHE"
    mkdir -p "${CACHE%/*}"
    rm -rf "$CACHE.part"
    "$VENV_PYTHON" -m ltx_sp.demo "$CACHE.part" >/dev/null
    printf '%s\n' "$wanted" >"$CACHE.part/.stamp"
    # What another version wrote, or did not finish, gives way to what is whole.
    rm -rf "$CACHE"
    mv "$CACHE.part" "$CACHE"
fi

device=cpu
if "$VENV_PYTHON" -c "import sys, torch; sys.exit(torch.cuda.device_count() < $RANKS)"; then
    device=cuda
fi

echo "demo: generating demo.mp4 with $RANKS ranks on $device"
start=$SECONDS
"$VENV_PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$RANKS" -m ltx_sp.generate \
    --checkpoint-path "$CACHE/ltx-2.3-demo.safetensors" \
    --gemma-root "$CACHE/gemma" \
    --prompt "a robot dancing" \
    --negative-prompt "blurry" \
    --height 128 --width 128 --num-frames 9 \
    --num-inference-steps 4 \
    --video-stg-blocks 1 --audio-stg-blocks 1 \
    --dtype float32 \
    --device "$device" \
    --output-path demo.mp4

if [[ ! -s demo.mp4 ]]; then
    echo "demo: the run ended well, yet $PWD/demo.mp4 is not there" >&2
    exit 1
fi

cat <<END

demo: wrote $PWD/demo.mp4 in $((SECONDS - start)) s.

It shows and sounds like noise, as it must: the weights are random. What it proves is that this machine runs the whole
flow on two ranks. With the weights of LTX-2, on all GPUs of this host:

    "$ROOT/launch/one_node.sh" \\
        --checkpoint-path ltx-2.3.safetensors --gemma-root gemma \\
        --prompt "a robot dancing" --output-path robot.mp4

docs/running.md says where the weights come from and what the other options do.
END
