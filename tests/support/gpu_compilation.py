"""Compiles the GPU kernel's steps for GPUs that need not be there, as a program: formats, types of
tokens, capabilities and numbers of tokens as its arguments, with commas between. Says what it
compiled, a line each. TRITON_INTERPRET must be 0."""

import itertools
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_infinity.kernels.gpu.layout import UP, Matrix, lay_out_matrix
from moe_infinity.kernels.gpu.steps import inner_step, product_step
from moe_infinity.kernels.gpu.tuning import Way, load
from support.gpu import DTYPES, OF_256, random, stored

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def compile_step(step: Any, constants: dict[str, Any], x: str, capability: int, way: Way) -> Any:
    types = {"table": "*i64", "x": f"*{x}", "inner": f"*{x}", "out": f"*{x}"}
    types |= {"out_stride": "i32", "out_first": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*i32") for name in step.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(step.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(step, signature, constants, aligned)
    options = {"num_warps": way.num_warps, "num_stages": way.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def of_format(number_format: str) -> list[Matrix]:
    """Of several steps to the right, of one, and where there can be such, of an odd shape."""
    if number_format == "transposed":
        blocks = [random(*shape).bfloat16().T for shape in ((512, 64), (40, 33))]
    else:
        shapes = [(64, 512), (64, 256 if number_format in OF_256 else 64)]
        shapes += [(33, 139)] if number_format in (*DTYPES, "EXACT12") else []
        blocks = [stored(number_format, *shape) for shape in shapes]
    found = [lay_out_matrix(block) for block in blocks]
    return [each[0] for each in found if each is not None]


def both_steps(matrix: Matrix, x: str, capability: int, tokens: int) -> list[int]:
    """Bytes of shared memory of both, compiled with all that there is to compile."""
    way = load("default").way(tokens, matrix.is_tall)
    type_of_dot = TYPES["fp32" if x == "bf16" and capability < 80 else x]
    cut = {"T": way.tokens, "R": way.rows, "W": way.columns}
    cut["DOT"] = type_of_dot if way.is_many else None  # type: ignore[assignment]
    biased = Matrix(**{**matrix.__dict__, "bias_format": "BF16", "bias_stride": 1})
    inner = {"GATE": biased, "UP": biased, "ACTIVATION": 4, **cut}
    product = {"MATRIX": biased, "FIELD": UP, "EVERY": 2, "IS_PLACED": True, **cut}
    return [
        compile_step(step, constants, x, capability, way).metadata.shared
        for step, constants in ((inner_step, inner), (product_step, product))
    ]


def main(formats: str, types: str, capabilities: str, tokens: str) -> None:
    lists = (each.split(",") for each in (formats, types, capabilities, tokens))
    for number_format, x, capability, count in itertools.product(*lists):
        for matrix in of_format(number_format):
            shared = both_steps(matrix, x, int(capability), int(count))
            print(number_format, x, capability, count, *shared, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
