"""Every op once over its samples, forward and backward, for compute-sanitizer: bench/gpu.sh sanitize."""

import torch

from longvita_kernels import backends, testing
from longvita_kernels.spec import all_specs

for backend in ("triton", "cuda"):
    if backend not in backends.available():
        print(backend, "is not there:", backends._missing(backend))
        continue
    with backends.use(backend):
        for spec in all_specs().values():
            if backend == "cuda" and spec.name not in backends.CUDA_OPS:
                continue
            done = 0
            for dtype in (torch.float32, torch.bfloat16):
                for sample in spec.samples(dtype, "cuda", 0):
                    _, cuda_cannot = backends._unsupported(spec.name, sample.args, sample.kwargs)
                    if backend == "triton" or cuda_cannot() is None:
                        testing.run(spec.op, spec, sample)
                        torch.cuda.synchronize()
                        done += 1
            print(spec.name, backend, f"{done} samples done")
