# shellcheck shell=bash
# The environment of a torchrun job. Source it; a value that is already set stays.
#
#   RANKS  ranks on this host, a number; 8 where it is not set

# torchrun would set 1 and warn. Host work (tokenising, tiles on a CPU, encoding the clip) gains from more, and
# unlimited each rank would take every core.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    OMP_NUM_THREADS=$(($(nproc) / ${RANKS:-8}))
    export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
fi

# Lines appear when they are written: the last words of a rank that dies would otherwise be lost in its buffer.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# NCCL says why it failed, in one line, and which version it is; by default it says neither.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Checkpoints are local files. Without this the text encoder's library looks for newer ones, once per rank, and waits
# for a time-out on a host without a way out.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# Large buffers stay with the process instead of going back to the kernel, which would clear their pages anew at every
# use: on a CPU the text encoder slows down by as much beside whatever else allocates meanwhile, a LoRA's merging say.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
