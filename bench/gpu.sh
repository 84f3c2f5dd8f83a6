#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: bench/gpu.sh build|test|sanitize|attention|decode|head|projector|model|ring
# Each part takes under nine minutes and leaves JSON in bench/results/ (or $OUT), named by GPU; `bench/gpu.sh` alone runs them all in turn.
# PYTHON: an interpreter that has torch for CUDA and triton (default: python3). BACKEND: what runs the ops (default: triton; cuda
# for the ops that CUDA C++ has).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
BACKEND=${BACKEND:-triton}
OUT=${OUT:-bench/results}
LIMIT=${LIMIT:-530} # seconds that a part may take
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: torch finds no CUDA device; this is for a machine that has one (make cuda-check needs none)" >&2
    exit 2
fi
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))')
mkdir -p "$OUT"

within() { timeout --signal=INT --kill-after=20 "$LIMIT" "$@"; }
measure() { # name of the part, then arguments of python -m bench
    local name=$1
    shift
    within "$PYTHON" -m bench "$@" --device cuda --backend "$BACKEND" --json "$OUT/$name-$BACKEND-$GPU.json"
}

build() { # what a fresh machine lacks: the native parts (for CUDA where nvcc is), pytest; and every kernel compiled for this GPU
    "$PYTHON" -m pip install --quiet "cmake>=3.18" ninja "pybind11>=2.13" pytest pytest-timeout hypothesis expecttest
    local cuda_cpp=--no-cuda-cpp
    if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then cuda_cpp=--cuda-cpp; else echo "no nvcc: csrc/cuda is left out" >&2; fi
    within "$PYTHON" setup.py --quiet build_ext --inplace
    within "$PYTHON" -m bench.cuda_check "$cuda_cpp" --capability "$("$PYTHON" -c 'import torch; print(min(100, torch.cuda.get_device_capability()[0] * 10))')"
}
tests() { within "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider --gpu-result "$OUT/tests-$GPU.json"; }
sanitize() { # out-of-bounds accesses and races on small shapes
    local tool
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 within compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tests/gpu/sanitize.py
    done
}
attention() { measure attention varlen_attention --seconds 3; }
decode() { measure decode decode_attention --seconds 3; }
head() { measure head linear_cross_entropy masked_lm_head --heavy --seconds 3; }
projector() { measure projector pixel_shuffle_projection --seconds 3; }
model() { within "$PYTHON" -m pytest tests/gpu/test_model.py -q -p no:cacheprovider --gpu-result "$OUT/model-$GPU.json"; }

ring() { # compute alone of 8 ranks in turn; then real processes: NCCL where each has a GPU, CUDA IPC where they share one
    local count shape=(--device cuda --dtype bfloat16 --heads 40 8 --dim 128)
    count=$("$PYTHON" -c 'import torch; print(max(2, torch.cuda.device_count()))')
    within "$PYTHON" -m bench ring --emulate 8 --tokens 131072 "${shape[@]}" --json "$OUT/ring-emulated-$GPU.json"
    within "$PYTHON" -m bench ring --processes "$count" --tokens 65536 "${shape[@]}" --json "$OUT/ring-$GPU.json"
    if "$PYTHON" -c 'from longvita_kernels.cuda import native_cuda; import sys; sys.exit(native_cuda.load() is None)'; then
        within "$PYTHON" -m bench ring --peer-copies --processes "$count" --tokens 65536 "${shape[@]}" --json "$OUT/ring-peer-copies-$GPU.json"
    fi
}

run() {
    echo "== $1 on $GPU"
    local start=$SECONDS
    case $1 in
    test) tests ;;
    build | sanitize | attention | decode | head | projector | model | ring) "$1" ;;
    *)
        echo "bench/gpu.sh: unknown part $1; expected build, test, sanitize, attention, decode, head, projector, model or ring" >&2
        exit 2
        ;;
    esac
    echo "== $1: $((SECONDS - start)) s"
}
for part in "${@:-build test sanitize attention decode head projector model ring}"; do
    for one in $part; do run "$one"; done
done
