#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: bench/gpu.sh ring
# Each part takes under nine minutes and leaves JSON in bench/results/ (or $OUT), named by GPU.
# PYTHON: an interpreter that has torch for CUDA (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
LIMIT=${LIMIT:-530} # seconds that a part may take
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: torch finds no CUDA device; this is for a machine that has one" >&2
    exit 2
fi
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))')
mkdir -p "$OUT"

within() { timeout --signal=INT --kill-after=20 "$LIMIT" "$@"; }

ring() { # compute alone of 8 ranks in turn; then real processes: NCCL where each has a GPU, CUDA IPC where they share one
    local count shape=(--device cuda --dtype bfloat16 --heads 40 8 --dim 128)
    count=$("$PYTHON" -c 'import torch; print(max(2, torch.cuda.device_count()))')
    within "$PYTHON" -m bench ring --emulate 8 --tokens 131072 "${shape[@]}" --json "$OUT/ring-emulated-$GPU.json"
    within "$PYTHON" -m bench ring --processes "$count" --tokens 65536 "${shape[@]}" --json "$OUT/ring-$GPU.json"
}

run() {
    echo "== $1 on $GPU"
    local start=$SECONDS
    case $1 in
    ring) "$1" ;;
    *)
        echo "bench/gpu.sh: unknown part $1; expected ring" >&2
        exit 2
        ;;
    esac
    echo "== $1: $((SECONDS - start)) s"
}
for part in "${@:-ring}"; do
    for one in $part; do run "$one"; done
done
