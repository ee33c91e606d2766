"""Kernels with a fault each that the net of `sm90.problems` must catch, and one without."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, c, n, k, stride_bn, stride_bk, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (BM, n) int32 = a (BM, k) int8 times b int8, which lies as its strides say; one program for each BN columns."""
    rm, rn, rk = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_ptr = a + rm[:, None] * k + rk[None, :]
    b_ptr = b + rk[:, None] * stride_bk + rn[None, :] * stride_bn
    acc = tl.zeros((BM, BN), tl.int32)
    for _ in tl.range(0, k, BK):
        acc = tl.dot(tl.load(a_ptr), tl.load(b_ptr), acc, out_dtype=tl.int32)
        a_ptr += BK
        b_ptr += BK * stride_bk
    tl.store(c + rm[:, None] * n + rn[None, :], acc)
