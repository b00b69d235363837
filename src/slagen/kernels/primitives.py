"""Tile loads, feature maps and the online-softmax update: what the kernels of both directions share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(2.0**-126)  # float32's least normal number
COLUMNS_AT_ONCE = 32  # of a (D, D) state that a kernel multiplies with at a time


@triton.jit
def load_rows(ptr, stride_l, stride_d, start, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Load the (ROWS, HEAD_DIM) tile from row `start` (int64) on; rows from `length` on are 0 where MASKED."""
    offs_l = tl.arange(0, ROWS)
    offs_d = tl.arange(0, HEAD_DIM)
    ptrs = ptr + start * stride_l + offs_l[:, None] * stride_l + offs_d[None, :] * stride_d
    if MASKED:
        return tl.load(ptrs, mask=(offs_l < length - start)[:, None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(ptr, stride_l, stride_d, start, length, tile, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store a (ROWS, HEAD_DIM) tile from row `start` (int64) on, up to row `length`, in the pointer's dtype."""
    offs_l = tl.arange(0, ROWS)
    offs_d = tl.arange(0, HEAD_DIM)
    ptrs = ptr + start * stride_l + offs_l[:, None] * stride_l + offs_d[None, :] * stride_d
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(offs_l < length - start)[:, None])


@triton.jit
def load_square(ptr, HEAD_DIM: tl.constexpr):
    """Load a contiguous (HEAD_DIM, HEAD_DIM) matrix."""
    offs_d = tl.arange(0, HEAD_DIM)
    return tl.load(ptr + offs_d[:, None] * HEAD_DIM + offs_d[None, :])


@triton.jit
def store_square(ptr, matrix, HEAD_DIM: tl.constexpr):
    """Store a contiguous (HEAD_DIM, HEAD_DIM) matrix in the pointer's dtype."""
    offs_d = tl.arange(0, HEAD_DIM)
    tl.store(ptr + offs_d[:, None] * HEAD_DIM + offs_d[None, :], matrix.to(ptr.dtype.element_ty))


@triton.jit
def wide(x):
    """x in a dtype of float32's range: bfloat16 stays, float16 becomes float32."""
    if x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def feature_shift(x, FEATURE_MAP: tl.constexpr):
    """What is taken from every row of x (ROWS, HEAD_DIM) before `feature_values`, so that no softmax overflows."""
    if FEATURE_MAP == "softmax":
        return tl.max(x, 1).to(tl.float32) * LOG2_E
    else:
        return tl.zeros((x.shape[0],), dtype=tl.float32)


@triton.jit
def feature_values(x, shift, FEATURE_MAP: tl.constexpr):
    """phi of some columns of rows, in float32; for softmax not yet divided by the sum over the row."""
    x = x.to(tl.float32)
    if FEATURE_MAP == "softmax":
        return tl.math.exp2(x * LOG2_E - shift[:, None])  # one fused multiply-add; the shift's rounding cancels
    elif FEATURE_MAP == "elu":
        return tl.where(x > 0, x + 1, tl.math.exp2(tl.minimum(x, 0.0) * LOG2_E))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def softmax_factor(values, FEATURE_MAP: tl.constexpr):
    """What makes phi of `feature_values` of whole rows: 1 / their sum for softmax, 1 otherwise."""
    if FEATURE_MAP == "softmax":
        return 1.0 / tl.sum(values, 1)
    else:
        return tl.full((values.shape[0],), 1.0, dtype=tl.float32)


@triton.jit
def weight_inverse(
    x_ptr, stride_l, stride_d, start, length, shift, z_ptr, eps,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """1 / (values . z + eps s) of rows, s the softmax's sum: values z times this are weights in [0, 1].

    The softmax's own division cancels. CHUNK columns at a time, so that little is on chip at once.
    """
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in tl.static_range(0, HEAD_DIM, CHUNK):
        x = load_columns(x_ptr, stride_l, stride_d, start, first, length, ROWS, CHUNK)
        z = tl.load(z_ptr + first + tl.arange(0, CHUNK))
        if FEATURE_MAP == "softmax":
            z += eps
        total += tl.sum(feature_values(x, shift, FEATURE_MAP) * z[None, :], 1)
    if FEATURE_MAP != "softmax":
        total += eps
    return reciprocal(total)


@triton.jit
def feature_gradient(x, scale, phi, FEATURE_MAP: tl.constexpr):
    """Gradient of a row, given phi of it and the gradient of phi as x times `scale`.

    `scale` may be as large as 1 / phi, so it meets phi before it meets x: that product is a weight and stays in range.
    """
    if FEATURE_MAP == "softmax":
        weighted = phi * scale * x
        return weighted - phi * tl.sum(weighted, 1)[:, None]
    elif FEATURE_MAP == "elu":
        return tl.minimum(phi, 1.0) * scale * x
    else:
        return tl.where(phi > 0, scale * x, 0.0)


@triton.jit
def reciprocal(x):
    """1 / x, and 0 where x is 0 or so small that 1 / x would be infinite; x is not negative."""
    return tl.where(x >= SMALLEST, 1.0 / x, 0.0)


@triton.jit
def load_columns(ptr, stride_l, stride_d, start, column, length, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Load columns `column` to `column + CHUNK` of rows from `start` (int64) on; past the end the last row again."""
    offs_l = tl.minimum(tl.arange(0, ROWS), (length - 1 - start).to(tl.int32))
    offs_c = column + tl.arange(0, CHUNK)
    return tl.load(ptr + start * stride_l + offs_l[:, None] * stride_l + offs_c[None, :] * stride_d)


@triton.jit
def times_transposed(
    x_ptr, stride_l, stride_d, start, length, square_ptr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x S^T, for rows of x from `start` on and a contiguous (HEAD_DIM, HEAD_DIM) S, CHUNK columns of both at a time."""
    acc = tl.zeros((ROWS, HEAD_DIM), dtype=tl.float32)
    offs_d = tl.arange(0, HEAD_DIM)
    for first in tl.static_range(0, HEAD_DIM, CHUNK):
        x = load_columns(x_ptr, stride_l, stride_d, start, first, length, ROWS, CHUNK)
        square = tl.load(square_ptr + offs_d[:, None] * HEAD_DIM + (first + tl.arange(0, CHUNK))[None, :])
        acc = tl.dot(x.to(square.dtype), tl.trans(square), acc, input_precision=PRECISION)
    return acc
