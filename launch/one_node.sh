#!/usr/bin/env bash
# Runs ltx_sp.generate on all GPUs of this host; every argument goes through.
#
#   launch/one_node.sh --checkpoint-path ltx-2.3.safetensors --gemma-root gemma --prompt "..." --output-path out.mp4
#
#   RANKS   how many ranks; as many as there are GPUs where it is not set
#   PYTHON  the interpreter that has ltx_sp; the repository's .venv where it is not set, else python3
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$ROOT/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
if [[ -z "${RANKS:-}" ]]; then
    RANKS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
    if ((RANKS == 0)); then
        echo "one_node: PyTorch sees no GPU here. On the CPU: RANKS=2 $0 --device cpu ..." >&2
        exit 1
    fi
fi
export RANKS
source "$ROOT/launch/env.sh"

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$RANKS" -m ltx_sp.generate "$@"
