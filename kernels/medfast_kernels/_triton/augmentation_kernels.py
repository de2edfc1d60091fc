"""Views of stored boxes: place (window, turn, resize), blur along one axis, finish (contrast, gamma, noise).

Of two kernels, the one that runs last before the contrast is told so (LAST): it applies gain and shift and leaves the
sum of its voxels. numbers (m, 6): blur, gain, shift, contrast, gamma, noise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import block_of
from .random_kernels import box_muller, in_order


@triton.jit
def clamp01(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def taps(i, size, extent):
    """The two voxels of the box that voxel i of the view lies between, and the share of the second."""
    at = tl.maximum((i.to(tl.float32) + 0.5) * (extent.to(tl.float32) / size) - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), extent - 1)
    return first, tl.minimum(first + 1, extent - 1), at - first.to(tl.float32)


@triton.jit
def mirror(i, extent, on):
    return tl.where(on, extent - 1 - i, i)


@triton.jit
def row(boxes, x0, x1, share, inside, low, scale, RESIZE: tl.constexpr):
    """Windowed values of the row at ``boxes``."""
    first = clamp01((tl.load(boxes + x0, mask=inside, other=0).to(tl.float32) - low) * scale)
    if RESIZE:
        second = clamp01((tl.load(boxes + x1, mask=inside, other=0).to(tl.float32) - low) * scale)
        first += (second - first) * share
    return first


@triton.jit
def emit(value, out, numbers, sums, sample, part, programs, count, LAST: tl.constexpr, BLOCK: tl.constexpr):
    index = part * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    if LAST:
        gain, shift = tl.load(numbers + sample * 6 + 1), tl.load(numbers + sample * 6 + 2)
        value = tl.where(inside, clamp01(value * gain + shift), 0.0)
        tl.store(sums + sample * programs + part, tl.sum(value, 0))
    tl.store(out + sample.to(tl.int64) * count + index, value, mask=inside)


@triton.jit
def place(
    boxes, extent, numbers, out, sums, stride0, stride1, stride2, stride3, depth, height, width, low, scale, programs,
    RESIZE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Voxels of the view from boxes (m, d, h, w) int16; extent (m, 4): voxels that count, and bits of the turn."""
    sample, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    count = depth * height * width
    index = part * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    z0, y0, x0 = index // (height * width), index // width % height, index % width
    extent += sample * 4
    turn = tl.load(extent + 3).to(tl.int32)
    nz, n1, n2 = tl.load(extent).to(tl.int32), tl.load(extent + 1).to(tl.int32), tl.load(extent + 2).to(tl.int32)
    swapped = (turn & 1) != 0
    ny, nx = tl.where(swapped, n2, n1), tl.where(swapped, n1, n2)
    step_y, step_x = tl.where(swapped, stride3, stride2), tl.where(swapped, stride2, stride3)
    z1, y1, x1 = z0, y0, x0
    part_z, part_y, part_x = 0.0, 0.0, 0.0
    if RESIZE:
        z0, z1, part_z = taps(z0, depth, nz)
        y0, y1, part_y = taps(y0, height, ny)
        x0, x1, part_x = taps(x0, width, nx)
    z0, z1 = mirror(z0, nz, (turn & 2) != 0) * stride1, mirror(z1, nz, (turn & 2) != 0) * stride1
    y0, y1 = mirror(y0, ny, (turn & 4) != 0) * step_y, mirror(y1, ny, (turn & 4) != 0) * step_y
    x0, x1 = mirror(x0, nx, (turn & 8) != 0) * step_x, mirror(x1, nx, (turn & 8) != 0) * step_x
    boxes += sample.to(tl.int64) * stride0
    value = row(boxes + z0 + y0, x0, x1, part_x, inside, low, scale, RESIZE)
    if RESIZE:
        value += (row(boxes + z0 + y1, x0, x1, part_x, inside, low, scale, RESIZE) - value) * part_y
        deep = row(boxes + z1 + y0, x0, x1, part_x, inside, low, scale, RESIZE)
        deep += (row(boxes + z1 + y1, x0, x1, part_x, inside, low, scale, RESIZE) - deep) * part_y
        value += (deep - value) * part_z
    emit(value, out, numbers, sums, sample, part, programs, count, LAST, BLOCK)


@triton.jit
def blur(x, out, numbers, sums, length, stride, count, programs, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """One axis of a Gaussian blur of x (m, count); a standard deviation of 0 copies."""
    sample, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    index = part * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    place = index // stride % length
    sigma = tl.load(numbers + sample * 6)
    radius = tl.ceil(3.0 * sigma).to(tl.int32)
    slope, period = 1.0 / tl.maximum(sigma, 1e-6), tl.maximum(2 * (length - 1), 1)
    x += sample.to(tl.int64) * count
    value, total = tl.zeros((BLOCK,), tl.float32), 0.0
    for k in range(0, 2 * radius + 1):
        offset = (k - radius).to(tl.float32) * slope
        weight = tl.exp(-0.5 * offset * offset)
        at = tl.abs(place + k - radius) % period
        at = tl.minimum(at, period - at)
        value += weight * tl.load(x + index + (at - place) * stride, mask=inside, other=0.0)
        total += weight
    emit(value / total, out, numbers, sums, sample, part, programs, count, LAST, BLOCK)


@triton.jit
def finish(out, means, numbers, counter, seed, count, programs, NOISE: tl.constexpr, BLOCK: tl.constexpr):
    """Contrast about the mean, gamma and noise of out (m, count), in place; BLOCK blocks of four numbers a program."""
    sample, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    index = part * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    inside = index < count
    numbers += sample * 6
    mean, contrast, gamma = tl.load(means + sample), tl.load(numbers + 3), tl.load(numbers + 4)
    out += sample.to(tl.int64) * count
    value = tl.load(out + index, mask=inside, other=0.0)
    value = clamp01((value - mean) * contrast + mean)
    power = tl.exp(gamma * tl.log(tl.maximum(value, 1e-37)))
    value = tl.where(gamma == 1.0, value, tl.where(value > 0.0, power, 0.0))
    if NOISE:
        w0, w1, w2, w3 = block_of(counter, seed, sample, part * BLOCK + tl.arange(0, BLOCK))
        n0, n1 = box_muller(w0, w1)
        n2, n3 = box_muller(w2, w3)
        value = clamp01(value + tl.load(numbers + 5) * in_order(n0, n1, n2, n3))
    tl.store(out + index, value, mask=inside)
