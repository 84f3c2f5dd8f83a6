"""Every op once over its samples, forward and backward, for compute-sanitizer: bench/gpu.sh sanitize."""

import torch

from longvita_kernels import backends, testing
from longvita_kernels.spec import all_specs

with backends.use("triton"):
    for spec in all_specs().values():
        for dtype in (torch.float32, torch.bfloat16):
            for sample in spec.samples(dtype, "cuda", 0):
                testing.run(spec.op, spec, sample)
                torch.cuda.synchronize()
        print(spec.name, "done")
