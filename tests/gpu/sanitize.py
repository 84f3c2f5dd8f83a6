"""Ops (all, or those named) once over their samples, forward and backward, for compute-sanitizer: bench/gpu.sh sanitize."""

import sys

import torch

from longvita_kernels import backends, testing
from longvita_kernels.spec import all_specs

for backend in ("triton", "cuda"):
    if backend not in backends.available():
        print(backend, "is not there:", backends._missing(backend))
        continue
    with backends.use(backend):
        for name in sys.argv[1:] or all_specs():
            spec, done = all_specs()[name], 0
            if backend == "cuda" and name not in backends.CUDA_OPS:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for sample in spec.samples(dtype, "cuda", 0):
                    _, cuda_cannot = backends._unsupported(name, sample.args, sample.kwargs)
                    if backend == "triton" or cuda_cannot() is None:
                        testing.run(spec.op, spec, sample)
                        torch.cuda.synchronize()
                        done += 1
            print(name, backend, f"{done} samples done", flush=True)
