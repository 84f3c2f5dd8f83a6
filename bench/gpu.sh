#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: bench/gpu.sh [part …]. Parts: build smoke test attention head decode projector ring sanitize, which is the
# default and its order, and model and compile, which the others cover. smoke tells in less than two minutes which kernels work.
#
# A part takes at most LIMIT seconds, all of them BUDGET. What fails or hangs does not stop the rest: tests run in several processes, which
# are replaced when they die, every op is measured by a process of its own, and JSON, named by GPU, is written to $OUT (default:
# bench/results) as results come. The last lines say what failed.
#
# PYTHON        an interpreter that has torch for CUDA and triton (default python3); other packages that are missing are asked of pip
# BACKENDS      what is measured: triton, cuda, torch (default: triton, and cuda where it was built, for the ops that it has)
# JOBS          processes that run tests (default: as many as there are cores, at most 12; each takes 1 to 20 GB of the GPU)
# PYTEST_ADDOPTS  for instance '-k "not cuda"', where smoke has shown kernels that hang: each costs a process two minutes
# BENCH_COMMIT  the commit, for a copy of the tree without its history
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
LIMIT=${LIMIT:-530} BUDGET=${BUDGET:-1000000}
CORES=$(nproc)
JOBS=${JOBS:-$((CORES < 12 ? CORES : 12))}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} # all processes are on this machine, which may have no other network
ORDER="build smoke test attention head decode projector ring sanitize"
FAILED=()

say() { "$PYTHON" -c "$1"; }
GPU=$(say 'import torch
if torch.cuda.is_available(): print(torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-"))')
if [[ -z $GPU ]]; then
    echo "bench/gpu.sh: torch finds no CUDA device; this is for a machine that has one (make cuda-check needs none)" >&2
    exit 2
fi
mkdir -p "$OUT"

within() { # a command, for what is left of the part's time, at most MOST seconds; remembers that it failed
    local left=$((END - SECONDS)) status=124
    ((left = left < ${MOST:-LIMIT} ? left : ${MOST:-LIMIT}))
    if ((left > 0)); then
        timeout --signal=INT --kill-after=15 "$left" "$@" && return
        status=$?
    fi
    FAILED+=("$PART: exit status $status$( ((status == 124)) && echo ', out of time'): $*")
    return "$status"
}
choose() { # BACKENDS, when everything is built
    BACKENDS=${BACKENDS:-triton $(say 'from longvita_kernels.cuda import native_cuda; print("cuda" if native_cuda.load() else "")')}
}
measure() { # an op, then options of python -m bench
    local backend
    choose
    for backend in $BACKENDS; do
        if [[ $backend != cuda || $1 == varlen_attention || $1 == masked_lm_head ]]; then
            MOST=180 within "$PYTHON" -m bench "$@" --device cuda --backend "$backend" --seconds 1.5 --json "$OUT/$1-$backend-$GPU.json"
        fi
    done
}
check() { # name of the result, then arguments of pytest
    local result=$1 parallel=()
    shift
    if say 'import xdist' 2>/dev/null; then parallel=(-n "$JOBS" --dist worksteal --max-worker-restart 1000); fi
    OMP_NUM_THREADS=1 within "$PYTHON" -m pytest -q --tb short -p no:cacheprovider --timeout "${HANG:-120}" --timeout-method thread \
        ${parallel[@]+"${parallel[@]}"} --gpu-result "$OUT/$result-$GPU.json" "$@"
}

part_build() { # what a fresh machine lacks: packages, and the native parts (for CUDA where nvcc is)
    local missing
    missing=$("$PYTHON" - <<'EOF'
import importlib.util, os, shutil, sys

path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
programs = [name for name in ("cmake", "ninja") if shutil.which(name, path=path) is None]
modules = {"pybind11": "pybind11", "pytest": "pytest", "pytest_timeout": "pytest-timeout", "xdist": "pytest-xdist"}
print(*programs, *(package for module, package in modules.items() if importlib.util.find_spec(module) is None))
EOF
    )
    # shellcheck disable=SC2086  # several words
    if [[ $missing ]]; then within "$PYTHON" -m pip install --quiet $missing; fi
    PATH="$PATH:/usr/local/cuda/bin"
    if command -v nvcc >/dev/null; then export LONGVITA_CUDA=1; fi
    within "$PYTHON" setup.py --quiet build_ext --inplace --parallel 2
    say 'from longvita_kernels import native; from longvita_kernels.cuda import native_cuda as c
print("CPU core:", native.why_missing() or "built", "\nCUDA C++:", c.why_missing() or "built")'
}
part_smoke() {
    ((END = END < SECONDS + 115 ? END : SECONDS + 115))
    HANG=40 check smoke tests/gpu/test_kernels.py tests/gpu/test_cuda_cpp.py -k "bfloat16 and (accurate or packed)"
}
part_test() { check tests tests/gpu; }
part_model() { check model tests/gpu/test_model.py; }
part_attention() { measure varlen_attention; }
part_decode() { measure decode_attention; }
part_head() {
    measure linear_cross_entropy --heavy
    measure masked_lm_head
}
part_projector() { measure pixel_shuffle_projection; }
part_ring() { # compute alone of 8 ranks in turn; then real processes: NCCL where each has a GPU, CUDA IPC where they share one
    local backend count MOST=120 shape=(--device cuda --dtype bfloat16 --heads 40 8 --dim 128)
    choose
    count=$(say 'import torch; print(max(2, torch.cuda.device_count()))')
    for backend in $BACKENDS; do
        export LONGVITA_BACKEND=$backend
        within "$PYTHON" -m bench ring "${shape[@]}" --emulate 8 --tokens 131072 --json "$OUT/ring-emulated-$backend-$GPU.json"
        within "$PYTHON" -m bench ring "${shape[@]}" --processes "$count" --tokens 65536 --json "$OUT/ring-$backend-$GPU.json"
        if [[ $backend == cuda ]]; then
            within "$PYTHON" -m bench ring "${shape[@]}" --processes "$count" --tokens 65536 --peer-copies \
                --json "$OUT/ring-peer-copies-$GPU.json"
        fi
    done
    unset LONGVITA_BACKEND
}
part_sanitize() { # out-of-bounds accesses and races on small shapes
    local tool op MOST=100 ops
    ops=$(say 'from longvita_kernels.spec import all_specs; print(*reversed(all_specs()))')
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        for op in $ops; do
            within compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tests/gpu/sanitize.py "$op"
        done
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}
part_compile() { # every kernel by this machine's compilers, for this GPU
    local cuda_cpp=--no-cuda-cpp capability
    if command -v nvcc /usr/local/cuda/bin/nvcc >/dev/null; then cuda_cpp=--cuda-cpp; fi
    capability=$(say 'import torch; from bench.cuda_check import SHARED_LIMIT
major, minor = torch.cuda.get_device_capability(); print(max(c for c in SHARED_LIMIT if c <= 10 * major + minor))')
    within "$PYTHON" -m bench.cuda_check "$cuda_cpp" --capability "$capability"
}

for PART in ${@:-$ORDER}; do
    if ! declare -F "part_$PART" >/dev/null; then
        echo "bench/gpu.sh: unknown part $PART; expected some of $ORDER model compile" >&2
        exit 2
    fi
done
for PART in ${@:-$ORDER}; do
    START=$SECONDS
    ((END = START + LIMIT < BUDGET ? START + LIMIT : BUDGET))
    echo "== $PART on $GPU"
    "part_$PART"
    echo "== $PART: $((SECONDS - START)) s"
done
if ((${#FAILED[@]})); then
    printf 'FAILED %s\n' "${FAILED[@]}"
    exit 1
fi
