"""Triton kernels for what lies between the matrix products; fused_elementwise.py launches them.

A kernel reads its inputs once, computes in float32 and writes once. Between two formulas it rounds to the dtype of its
input where PyTorch's operations would write their result, so that the numbers are theirs but for the order of sums, the
last bit of exponentials, and fused multiply-adds. Rows (tokens) are the first dimension of every grid, and their
offsets are 64-bit integers.

Triton decides when a kernel is defined whether it is compiled or interpreted, so tests load this file a second time
with TRITON_INTERPRET=1. The file can be imported only where Triton is installed.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return float32 x after rounding to `dtype`."""
    return x.to(dtype).to(tl.float32)


# ------------------------------------------------------------------ (1 + scale) * norm(x) + shift


@triton.jit
def normalized(x, mask, width, eps):
    """Return (x - mean) / sqrt(var + eps) of a row, zero outside the mask, and the factor 1 / sqrt(var + eps)."""
    centered = tl.where(mask, x - tl.sum(x) / width, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centered * centered) / width + eps)
    return centered * factor, factor


@triton.jit
def modulated_norm(
    x, shift, scale, out, tokens, x_batch, x_token, shift_batch, scale_batch, width, eps,
    ROUNDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the modulated norm of a row. ROUNDS: whether the norm is rounded to the dtype of x, as without autocast."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, WIDTH)
    mask = columns < width
    values = tl.load(x + batch * x_batch + token * x_token + columns, mask, 0.0).to(tl.float32)
    norm, _ = normalized(values, mask, width, eps)
    if ROUNDS:
        norm = rounded(norm, x.dtype.element_ty)
    add = tl.load(shift + batch * shift_batch + columns, mask, 0.0).to(tl.float32)
    factor = tl.load(scale + batch * scale_batch + columns, mask, 0.0).to(tl.float32)
    result = add + norm * rounded(1.0 + factor, scale.dtype.element_ty)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask)


@triton.jit
def modulated_norm_gradient(
    x, scale, dy, dx, tokens, x_batch, x_token, scale_batch, width, eps,
    ROUNDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write dx = (g - mean(g) - n * mean(g * n)) / sqrt(var + eps) of a row, n = norm(x) and g = dy * (1 + scale)."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, WIDTH)
    mask = columns < width
    values = tl.load(x + batch * x_batch + token * x_token + columns, mask, 0.0).to(tl.float32)
    norm, inverse = normalized(values, mask, width, eps)
    factor = tl.load(scale + batch * scale_batch + columns, mask, 0.0).to(tl.float32)
    gradient = tl.load(dy + row * width + columns, mask, 0.0).to(tl.float32)
    gradient = gradient * rounded(1.0 + factor, scale.dtype.element_ty)
    if ROUNDS:
        gradient = rounded(gradient, x.dtype.element_ty)
    mean, along = tl.sum(gradient) / width, tl.sum(gradient * norm) / width
    result = inverse * (gradient - mean - norm * along)
    tl.store(dx + row * width + columns, result.to(dx.dtype.element_ty), mask)


# ------------------------------------------------------------------ SwiGLU


@triton.jit
def swiglu(x, out, x_row, width, BLOCK: tl.constexpr):
    """Write silu(gate) * value, where a row of x is [gate, value], each `width` wide."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x + row * x_row + columns, mask, 0.0).to(tl.float32)
    value = tl.load(x + row * x_row + width + columns, mask, 0.0).to(tl.float32)
    silu = rounded(gate / (1.0 + tl.exp(-gate)), x.dtype.element_ty)
    tl.store(out + row * width + columns, (silu * value).to(out.dtype.element_ty), mask)


@triton.jit
def swiglu_gradient(x, dy, dx, x_row, dy_row, dx_row, width, BLOCK: tl.constexpr):
    """Write the gradients of gate and value into a row of dx."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x + row * x_row + columns, mask, 0.0).to(tl.float32)
    value = tl.load(x + row * x_row + width + columns, mask, 0.0).to(tl.float32)
    gradient = tl.load(dy + row * dy_row + columns, mask, 0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = rounded(gate * sigmoid, x.dtype.element_ty)
    of_silu = rounded(gradient * value, x.dtype.element_ty)
    of_gate = of_silu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx + row * dx_row + columns, of_gate.to(dx.dtype.element_ty), mask)
    tl.store(dx + row * dx_row + width + columns, (gradient * silu).to(dx.dtype.element_ty), mask)


# ------------------------------------------------------------------ heads: norm and rotation of q and k, copy of v


@triton.jit
def turned(x, cos, sin, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Rotate adjacent pairs of the columns of x (HEADS, 2 * PAIRS) by angles whose cos and sin are (1, PAIRS)."""
    even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    return tl.reshape(tl.join(cos * even - sin * odd, sin * even + cos * odd), (HEADS, 2 * PAIRS))


@triton.jit
def heads(
    x, q, k, v, q_weight, k_weight, cos, sin, tokens, start, count, x_batch, x_token, out_batch, head_dim, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write `HEADS` heads of a token of q, k or v, which are third dimension of the grid, from x = [q, k, v, ...].

    q, k and v are (B, L, count, head_dim), contiguous in each image; these tokens begin at `start` of its L. q and k
    are divided by their root mean square over head_dim, multiplied by a weight, and rotated; v is copied.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token, part = row // tokens, row % tokens, tl.program_id(2)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    columns, pairs = tl.arange(0, 2 * PAIRS)[None, :], tl.arange(0, PAIRS)[None, :]
    mask, offsets = (head < count) & (columns < head_dim), head * head_dim + columns
    values = tl.load(x + batch * x_batch + token * x_token + part * count * head_dim + offsets, mask, 0.0)
    offsets = batch * out_batch + (start + token) * count * head_dim + offsets
    if part == 2:
        tl.store(v + offsets, values, mask)
    else:
        weight = tl.load((q_weight if part == 0 else k_weight) + columns, columns < head_dim, 0.0).to(tl.float32)
        numbers = values.to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 1) / head_dim + eps)
        normed = rounded(numbers * inverse[:, None] * weight, x.dtype.element_ty)
        angles = (start + token) * (head_dim // 2) + pairs
        c, s = tl.load(cos + angles, pairs < head_dim // 2, 0.0), tl.load(sin + angles, pairs < head_dim // 2, 0.0)
        tl.store((q if part == 0 else k) + offsets, turned(normed, c, s, HEADS, PAIRS).to(q.dtype.element_ty), mask)


@triton.jit
def heads_gradient(
    x, q_weight, k_weight, cos, sin, dq, dk, dv, dx, tokens, start, count, x_batch, x_token, dx_batch, dx_token,
    dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token, head_dim, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of `HEADS` heads of a token of q, k or v into dx = [dq, dk, dv, ...]; see `heads`."""
    row = tl.program_id(0).to(tl.int64)
    batch, token, part = row // tokens, row % tokens, tl.program_id(2)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    columns, pairs = tl.arange(0, 2 * PAIRS)[None, :], tl.arange(0, PAIRS)[None, :]
    mask, at = (head < count) & (columns < head_dim), start + token
    offsets = part * count * head_dim + head * head_dim + columns
    target = dx + batch * dx_batch + token * dx_token + offsets
    if part == 2:
        tl.store(target, tl.load(dv + batch * dv_batch + head * dv_head + at * dv_token + columns, mask, 0.0), mask)
    else:
        if part == 0:
            source = dq + batch * dq_batch + head * dq_head + at * dq_token + columns
        else:
            source = dk + batch * dk_batch + head * dk_head + at * dk_token + columns
        weight = tl.load((q_weight if part == 0 else k_weight) + columns, columns < head_dim, 0.0).to(tl.float32)
        values = tl.load(x + batch * x_batch + token * x_token + offsets, mask, 0.0).to(tl.float32)
        inverse = (1.0 / tl.sqrt(tl.sum(values * values, 1) / head_dim + eps))[:, None]
        angles = at * (head_dim // 2) + pairs
        c, s = tl.load(cos + angles, pairs < head_dim // 2, 0.0), tl.load(sin + angles, pairs < head_dim // 2, 0.0)
        gradient = turned(tl.load(source, mask, 0.0).to(tl.float32), c, -s, HEADS, PAIRS)
        gradient = rounded(gradient, x.dtype.element_ty) * weight
        normed = values * inverse
        along = (tl.sum(gradient * normed, 1) / head_dim)[:, None]
        tl.store(target, (inverse * (gradient - normed * along)).to(dx.dtype.element_ty), mask)


# ------------------------------------------------------------------ rows in 8 bits


@triton.jit
def scaled(x, before, columns, mask, HAS_BEFORE: tl.constexpr, ROUNDS: tl.constexpr):
    """Return these columns of a row in float32, times `before`; ROUNDS: rounded to the dtype of x after that."""
    values = tl.load(x + columns, mask, 0.0).to(tl.float32)
    if HAS_BEFORE:
        values *= tl.load(before + columns, mask, 0.0)
        if ROUNDS:
            values = rounded(values, x.dtype.element_ty)
    return values


@triton.jit
def quantized_rows(
    x, before, values, scales, x_row, width, inverse_of_largest, smallest,
    INTEGERS: tl.constexpr, HAS_BEFORE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write a row in int8 or e4m3, and its scale; a row is read twice, the second time from the cache.

    The rounding is that of flux2/quantization/int8.py and float8.py: float16 at 1536 has steps of one, and 448 is the
    largest e4m3. PyTorch divides by a number on a GPU by multiplying with its inverse, and so does this.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    largest = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        part = scaled(x, before, columns, columns < width, HAS_BEFORE, INTEGERS)
        largest = tl.maximum(largest, tl.abs(part), propagate_nan=tl.PropagateNan.ALL)
    has_nan = tl.max((largest != largest).to(tl.int32))  # which a maximum over threads would drop
    scale = tl.maximum(tl.max(largest) * inverse_of_largest, smallest)
    scale = tl.where(has_nan > 0, float("nan"), scale)
    tl.store(scales + row, scale)
    for block in range(BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        part = scaled(x, before, columns, columns < width, HAS_BEFORE, INTEGERS)
        if INTEGERS:
            sums = (1536.0 + part * tl.div_rn(1.0, scale)).to(tl.float16)
            result = sums.to(tl.int16, bitcast=True).to(tl.int8)
        else:
            part = tl.clamp(tl.div_rn(part, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
            result = part.to(values.dtype.element_ty)
        tl.store(values + row * width + columns, result, columns < width)
