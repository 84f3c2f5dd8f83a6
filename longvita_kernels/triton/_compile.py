"""What is to be compiled of a kernel module, as data: `compile_specs()` of each module yields these; `make cuda-check` compiles them.

Compiling needs no GPU: `spec.compile()` gives the compiled kernel with its PTX and cubin in `.asm`.
"""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

# Block sizes are looked up by architecture, so each spec is for one of these compute capabilities.
CAPABILITIES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True, kw_only=True)
class CompileSpec:
    """One kernel as one architecture would launch it.

    name        tells kernel, dtype and sizes; unique together with `capability`
    kernel      the function under @triton.jit
    signature   argument → "*bf16", "i32", "i64", "fp32", …; arguments that are not named are constexprs
    constexprs  argument → value
    matrix      whether its main loop multiplies bf16 or fp16 matrices (wgmma is then expected on sm_90)
    aligned     arguments divisible by 16, as torch's pointers and usual strides are: what allows wide loads
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    matrix: bool
    capability: int
    aligned: tuple[str, ...] = ()

    def compile(self):
        """The compiled kernel (`.asm["ptx"]`, `.asm["cubin"]`, `.metadata.shared`)."""
        names = self.kernel.arg_names
        signature = {name: "constexpr" if name in self.constexprs else self.signature[name] for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, signature, {(names.index(name),): value for name, value in self.constexprs.items()}, attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return compile_source(source, target=GPUTarget("cuda", self.capability, 32), options=options)


def spec(name, kernel, capability, types, constexprs, *, warps=4, stages=3, matrix=False, unaligned=()):
    """CompileSpec with the arguments written by type: {"*bf16": "x y", "i32": "rows"}. All are divisible by 16 but fp32, `unaligned` and
    tensor descriptors, which have no value."""
    signature = {argument: kind for kind, arguments in types.items() for argument in arguments.split()}
    plain = {argument for argument, kind in signature.items() if kind != "fp32" and not kind.startswith("tensordesc")}
    aligned = tuple(argument for argument in signature if argument in plain and argument not in unaligned)
    return CompileSpec(
        name=name, kernel=kernel, signature=signature, constexprs=constexprs, num_warps=warps, num_stages=stages, matrix=matrix,
        capability=capability, aligned=aligned,
    )  # fmt: skip
