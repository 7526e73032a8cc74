"""Prints the PTX that Triton makes of a product for sm_90; argument 1 says whether B's rows run along N."""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, c, K, ACROSS: tl.constexpr):
    m, n, k = tl.arange(0, 64), tl.arange(0, 128), tl.arange(0, 64)
    acc = tl.zeros((64, 128), tl.float32)
    for i in range(0, K, 64):
        x = tl.load(a + m[:, None] * K + (k + i)[None, :])
        if ACROSS:
            y = tl.load(b + (k + i)[:, None] * 128 + n[None, :])
        else:
            y = tl.trans(tl.load(b + n[:, None] * K + (k + i)[None, :]))
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * 128 + n[None, :], acc)


if __name__ == "__main__":
    source = ASTSource(
        product,
        signature={"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32", "ACROSS": "constexpr"},
        constexprs={"ACROSS": bool(int(sys.argv[1]))},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2}
    )
    print(compiled.asm["ptx"])
