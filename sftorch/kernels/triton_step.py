"""S6 to S9* of a list of parameters in one launch: arithmetic.h and eight.h of sfcore in Triton's language.

A program takes BLOCK elements of one tensor, in the 8-bit form a row. Elements go through the operations of
_run_single, _run_lean and _run_eight (sftorch/step/backends.py) in their order and with IEEE roundings; with
enable_fp_fusion=False results are equal bit for bit. All that is inside a function with @triton.jit is not
Python: Triton reads the source. Launched by call.py.

Run in Triton's interpreter (3.7, 3.9) and compiled for sm_90 (3.2 too), never yet on a GPU. Triton 3.2 takes
denormals for 0 in divisions and roots; the later ones do not.
"""

import triton
import triton.language as tl

# A row of the table: programs of the tensors before, elements, those of one of its rows, whether this and all
# addresses are multiples of 16; where a part lies in the whole, as `place_of` of drawn.py tells it; and
# addresses, those that are not used being 0.
COLUMNS = (
    "first", "size", "length", "aligned", "begin", "run", "next", "y", "rest", "z", "v", "m", "x", "g",
    "scale",
)  # fmt: skip
FIRST, SIZE, LENGTH, ALIGNED, BEGIN, RUN, NEXT, Y, REST, Z, V, M, X, G, SCALE = map(tl.constexpr, range(15))
WIDTH = tl.constexpr(len(COLUMNS))
QUIET_NAN = tl.constexpr(0x7FC00000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
# Of sfcore/codes.py.
BROKEN, LEAST, FIRST_CODE, SHIFT = map(tl.constexpr, (127, -120, 1776, 19))


@triton.jit
def step(
    table,  # (tensors, WIDTH) int64
    owners,  # (programs,) int32: each program's row
    # Python floats: they come as float32, and Triton never compiles for their values.
    sign, lr_t, wd_y, wd_z, k1, k2, share2, eps, share1, per2, per1,
    HAS_V: tl.constexpr, HAS_M: tl.constexpr,
    SCALED: tl.constexpr,  # whether the direction is divided by v's root
    AT_Z: tl.constexpr,  # whether wd_z is not 0
    TO_X: tl.constexpr,  # whether y is to end as x
    HALVES: tl.constexpr,  # whether y is bfloat16, with a rest
    NARROW_G: tl.constexpr,  # whether gradients are bfloat16
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps the elements of one program; the numbers are those of sftorch/kernels/call.py."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * WIDTH
    start = (program - tl.load(row + FIRST)) * BLOCK
    size = tl.load(row + SIZE)
    at = start + tl.arange(0, BLOCK)
    # Loads are 16 bytes wide only where the compiler knows of alignment and needs no mask.
    if (start + BLOCK <= size) & (tl.load(row + ALIGNED) != 0):
        _move(
            row, at, None, sign, lr_t, wd_y, wd_z, k1, k2, share2, eps, share1, per2, per1, HAS_V, HAS_M,
            SCALED, AT_Z, TO_X, HALVES, NARROW_G, True,
        )  # fmt: skip
    else:
        _move(
            row, at, at < size, sign, lr_t, wd_y, wd_z, k1, k2, share2, eps, share1, per2, per1, HAS_V, HAS_M,
            SCALED, AT_Z, TO_X, HALVES, NARROW_G, False,
        )  # fmt: skip


@triton.jit
def _move(
    row, at, mask, sign, lr_t, wd_y, wd_z, k1, k2, share2, eps, share1, per2, per1, HAS_V: tl.constexpr,
    HAS_M: tl.constexpr, SCALED: tl.constexpr, AT_Z: tl.constexpr, TO_X: tl.constexpr, HALVES: tl.constexpr,
    NARROW_G: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # All loads come first, those of addresses too: the compiler may move none of them ahead of a store.
    of_y, of_rest, of_z, of_v, of_m, of_g = _entries_of(
        row, at, tl.int16, tl.float32, tl.float32, tl.float32, HAS_V, HAS_M, HALVES, NARROW_G, WIDE
    )
    z, y = tl.load(of_z, mask), _joined(of_y, of_rest, mask, HALVES)
    v, m, x = z, z, z  # where there is none
    if HAS_V:
        v = tl.load(of_v, mask)
    if HAS_M:
        m = tl.load(of_m, mask)
    if TO_X:
        x = tl.load(_entries(row, X, tl.float32, WIDE) + at, mask)
    g = _gradient(of_g, mask, NARROW_G)
    delta, v, m = _delta(
        y, z, v, m, g, sign, lr_t, wd_y, wd_z, share2, eps, share1, per2, per1, HAS_V, HAS_M, SCALED, AT_Z
    )
    if HAS_V:
        tl.store(of_v, v, mask)
    if HAS_M:
        tl.store(of_m, m, mask)
    after = z + delta  # S7
    tl.store(of_z, after, mask)
    if TO_X:
        y = x + k1 * (after - x)  # S8
    else:
        y = y + (k1 * (z - y) + k2 * delta)  # S9*
    _put_y(of_y, of_rest, mask, y, HALVES)


@triton.jit
def step_lean(
    table, owners,
    keys,  # (tensors, HASHES, 2) int32: words of `keys` in sftorch/step/backends.py
    sign, lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps, share1, per2, per1,
    HAS_V: tl.constexpr, HAS_M: tl.constexpr, SCALED: tl.constexpr, AT_Z: tl.constexpr,
    HALVES: tl.constexpr, NARROW_G: tl.constexpr, HASHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same in the lean form: in the place of z there is the gap, which as v and m is bfloat16."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program).to(tl.int64)
    row, keys = table + tensor * WIDTH, keys + tensor * HASHES * 2
    start = (program - tl.load(row + FIRST)) * BLOCK
    size = tl.load(row + SIZE)
    at = start + tl.arange(0, BLOCK)
    begin, run = tl.load(row + BEGIN), tl.load(row + RUN)
    place = begin + at
    if run < size:  # a block of several columns of a DTensor, say; divisions of 64 bits are slow
        place = begin + at // run * tl.load(row + NEXT) + at % run
    if (start + BLOCK <= size) & (tl.load(row + ALIGNED) != 0):
        _move_lean(
            row, at, None, keys, place, sign, lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps, share1,
            per2, per1, HAS_V, HAS_M, SCALED, AT_Z, HALVES, NARROW_G, True,
        )  # fmt: skip
    else:
        _move_lean(
            row, at, at < size, keys, place, sign, lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps,
            share1, per2, per1, HAS_V, HAS_M, SCALED, AT_Z, HALVES, NARROW_G, False,
        )  # fmt: skip


@triton.jit
def _move_lean(
    row, at, mask, keys, place, sign, lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps, share1, per2, per1,
    HAS_V: tl.constexpr, HAS_M: tl.constexpr, SCALED: tl.constexpr, AT_Z: tl.constexpr, HALVES: tl.constexpr,
    NARROW_G: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    of_y, of_rest, of_gap, of_v, of_m, of_g = _entries_of(
        row, at, tl.int16, tl.int16, tl.int16, tl.int16, HAS_V, HAS_M, HALVES, NARROW_G, WIDE
    )
    gap, y = _widened(tl.load(of_gap, mask)), _joined(of_y, of_rest, mask, HALVES)
    v, m = gap, gap
    if HAS_V:
        v = _widened(tl.load(of_v, mask))
    if HAS_M:
        m = _widened(tl.load(of_m, mask))
    g = _gradient(of_g, mask, NARROW_G)
    for_gap, for_v, for_m = _draws(keys, place, HAS_M)
    y, gap, v, m = _moved(
        y, gap, v, m, g, sign, lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps, share1, per2, per1, HAS_V,
        HAS_M, SCALED, AT_Z,
    )  # fmt: skip
    _put_y(of_y, of_rest, mask, y, HALVES)
    tl.store(of_gap, _rounded(gap, for_gap), mask)
    if HAS_V:
        tl.store(of_v, _rounded(v, for_v), mask)
    if HAS_M:
        tl.store(of_m, _rounded(m, for_m), mask)


@triton.jit
def step_eight(
    table, owners, keys, sign, lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps, share1, per2, per1,
    HAS_V: tl.constexpr, HAS_M: tl.constexpr, SCALED: tl.constexpr, AT_Z: tl.constexpr, HALVES: tl.constexpr,
    NARROW_G: tl.constexpr, HASHES: tl.constexpr,
    WIDE: tl.constexpr,  # what the table has as `aligned`, for all
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The same in the 8-bit form: a program has one row of a tensor, of less than 2^31 elements."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program).to(tl.int64)
    row, keys = table + tensor * WIDTH, keys + tensor * HASHES * 2
    which, length = program - tl.load(row + FIRST), tl.load(row + LENGTH)
    if WIDE:
        length = tl.multiple_of(length, 16)  # so that a mask is the same for 16 elements
    begin = which * length
    length = length.to(tl.int32)  # numbers of 64 bits take twice the registers
    place = tl.load(row + BEGIN) + begin
    of_y, of_rest, of_gap, of_v, of_m, of_g = _entries_of(
        row, begin, tl.int8, tl.int8 if HALVES else tl.int16, tl.uint8, tl.int8, HAS_V, HAS_M, HALVES,
        NARROW_G, WIDE,
    )  # fmt: skip
    scale = tl.load(row + SCALE).to(tl.pointer_type(tl.int8)) + which * (1 + HAS_V + HAS_M)
    power_gap = _power(tl.load(scale).to(tl.int32), 1)
    power_v, power_m = power_gap, power_gap
    if HAS_V:
        power_v = _power(tl.load(scale + 1).to(tl.int32), 1)
    if HAS_M:
        power_m = _power(tl.load(scale + 2).to(tl.int32), 1)
    first = tl.arange(0, BLOCK)
    y, gap, v, m = _moved_codes(
        of_y, of_rest, of_gap, of_v, of_m, of_g, first, length, power_gap, power_v, power_m, sign, lr_t, wd_y,
        wd_z, k1, k2, left, direct, share2, eps, share1, per2, per1, HAS_V, HAS_M, SCALED, AT_Z, HALVES,
        NARROW_G,
    )  # fmt: skip
    most_gap, most_v, most_m = _magnitude(gap), _magnitude(v), _magnitude(m)
    # A longer row is computed twice: its exponents are known only when its last element has moved.
    for start in range(BLOCK, length, BLOCK):
        _, far_gap, far_v, far_m = _moved_codes(
            of_y, of_rest, of_gap, of_v, of_m, of_g, start + first, length, power_gap, power_v, power_m, sign,
            lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps, share1, per2, per1, HAS_V, HAS_M, SCALED,
            AT_Z, HALVES, NARROW_G,
        )  # fmt: skip
        most_gap = tl.maximum(most_gap, _magnitude(far_gap))
        most_v = tl.maximum(most_v, _magnitude(far_v))
        most_m = tl.maximum(most_m, _magnitude(far_m))
    new_gap = _exponent(most_gap)
    new_v, new_m = new_gap, new_gap
    if HAS_V:
        new_v = _exponent(most_v)
    if HAS_M:
        new_m = _exponent(most_m)
    _put_codes(
        of_y, of_rest, of_gap, of_v, of_m, first, length, keys, place, y, gap, v, m, new_gap, new_v, new_m,
        HAS_V, HAS_M, HALVES,
    )  # fmt: skip
    for start in range(BLOCK, length, BLOCK):
        y, gap, v, m = _moved_codes(
            of_y, of_rest, of_gap, of_v, of_m, of_g, start + first, length, power_gap, power_v, power_m, sign,
            lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps, share1, per2, per1, HAS_V, HAS_M, SCALED,
            AT_Z, HALVES, NARROW_G,
        )  # fmt: skip
        _put_codes(
            of_y, of_rest, of_gap, of_v, of_m, start + first, length, keys, place, y, gap, v, m, new_gap,
            new_v, new_m, HAS_V, HAS_M, HALVES,
        )  # fmt: skip
    tl.store(scale, new_gap.to(tl.int8))
    if HAS_V:
        tl.store(scale + 1, new_v.to(tl.int8))
    if HAS_M:
        tl.store(scale + 2, new_m.to(tl.int8))


@triton.jit
def _moved_codes(
    of_y, of_rest, of_gap, of_v, of_m, of_g, at, length, power_gap, power_v, power_m, sign, lr_t, wd_y, wd_z,
    k1, k2, left, direct, share2, eps, share1, per2, per1, HAS_V: tl.constexpr, HAS_M: tl.constexpr,
    SCALED: tl.constexpr, AT_Z: tl.constexpr, HALVES: tl.constexpr, NARROW_G: tl.constexpr,
):  # fmt: skip
    """Returns y, gap, v and m of a part of a row after the step, in float32; beyond its end they are 0."""
    mask = at < length
    if HALVES:
        rest = tl.load(of_rest + at, mask).to(tl.int32)
        code = tl.load(of_gap + at, mask).to(tl.int32) * 256 + (rest & 3) * 64
        y = _join(tl.load(of_y + at, mask), (rest >> 2) * 1024)
    else:
        code = tl.load(of_gap + at, mask).to(tl.int32)
        y = tl.load(of_y + at, mask)
    gap = code.to(tl.float32) * 2.0**-15 * power_gap
    v, m = gap, gap
    if HAS_V:
        of_octave = tl.load(of_v + at, mask).to(tl.int32)
        bits = tl.where(of_octave == 0, 0, (of_octave + FIRST_CODE) << SHIFT)
        v = bits.to(tl.float32, bitcast=True) * power_v
    if HAS_M:
        m = tl.load(of_m + at, mask).to(tl.float32) * 2.0**-7 * power_m
    y, gap, v, m = _moved(
        y, gap, v, m, _gradient(of_g + at, mask, NARROW_G), sign, lr_t, wd_y, wd_z, k1, k2, left, direct,
        share2, eps, share1, per2, per1, HAS_V, HAS_M, SCALED, AT_Z,
    )  # fmt: skip
    return y, tl.where(mask, gap, 0.0), tl.where(mask, v, 0.0), tl.where(mask, m, 0.0)


@triton.jit
def _put_codes(
    of_y, of_rest, of_gap, of_v, of_m, at, length, keys, place, y, gap, v, m, new_gap, new_v, new_m,
    HAS_V: tl.constexpr, HAS_M: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Writes what `_moved_codes` returned, in codes of new exponents; place is that of the row."""
    mask = at < length
    for_gap, for_v, for_m = _draws(keys, place + at, HAS_M)
    if HALVES:
        code = _linear(gap, new_gap, 10, for_gap)
        bits = (y.to(tl.int32, bitcast=True) + (for_v & 0x3FF)) & ~0x3FF  # which leaves inf as it is
        upper, lower = _split(tl.where(y != y, QUIET_NAN, bits))
        tl.store(of_y + at, upper, mask)
        tl.store(of_rest + at, ((lower.to(tl.int32) >> 10) * 4 | (code & 3)).to(tl.int8), mask)
        tl.store(of_gap + at, (code >> 2).to(tl.int8), mask)
    else:
        tl.store(of_y + at, y, mask)
        tl.store(of_gap + at, _linear(gap, new_gap, 16, for_gap).to(tl.int16), mask)
    if HAS_V:
        bits = (v * _power(new_v, -1)).to(tl.int32, bitcast=True)
        code = ((bits + for_v * 8) >> SHIFT) - FIRST_CODE
        code = tl.where(v > 0, tl.minimum(tl.maximum(code, 1), 255), 0)
        tl.store(of_v + at, code.to(tl.uint8), mask)
    if HAS_M:
        tl.store(of_m + at, _linear(m, new_m, 8, for_m).to(tl.int8), mask)


@triton.jit
def _delta(
    y, z, v, m, g, sign, lr_t, wd_y, wd_z, share2, eps, share1, per2, per1, HAS_V: tl.constexpr,
    HAS_M: tl.constexpr, SCALED: tl.constexpr, AT_Z: tl.constexpr,
):  # fmt: skip
    """Returns S6 and the new moments."""
    g = sign * g
    direction = g
    if HAS_M:
        m = (m - m * share1) + g * share1
        direction = m * per1
    if HAS_V:
        v = (v - v * share2) + g * g * share2
        if SCALED:
            direction = tl.div_rn(direction, tl.sqrt_rn(v * per2) + eps)
    direction += wd_y * y
    if AT_Z:
        direction += wd_z * z
    return -lr_t * direction, v, m


@triton.jit
def _moved(
    y, gap, v, m, g, sign, lr_t, wd_y, wd_z, k1, k2, left, direct, share2, eps, share1, per2, per1,
    HAS_V: tl.constexpr, HAS_M: tl.constexpr, SCALED: tl.constexpr, AT_Z: tl.constexpr,
):  # fmt: skip
    """Returns y, the gap and the moments after a step of the forms that are kept by the gap; k2 is beta."""
    z = y + gap
    delta, v, m = _delta(
        y, z, v, m, g, sign, lr_t, wd_y, wd_z, share2, eps, share1, per2, per1, HAS_V, HAS_M, SCALED, AT_Z
    )
    w = gap + k2 * delta
    return y + (k1 * w + direct * delta), left * w, v, m  # S9* S7


@triton.jit
def _draws(keys, place, HAS_M: tl.constexpr):
    """Returns what gap, v and m are rounded by, as `draws` in sftorch/step/backends.py."""
    bits = _hash(keys, 0, place)
    of_m = bits
    if HAS_M:
        of_m = _hash(keys, 1, place)
    return (bits >> 16).to(tl.int32), (bits & 0xFFFF).to(tl.int32), (of_m >> 16).to(tl.int32)


@triton.jit
def _hash(keys, WHICH: tl.constexpr, place):
    """Returns 32 random bits of elements, uint32, as `noise` in sftorch/step/backends.py."""
    one = tl.load(keys + 2 * WHICH).to(tl.uint32, bitcast=True)
    other = tl.load(keys + 2 * WHICH + 1).to(tl.uint32, bitcast=True)
    bits = place.to(tl.uint32) * 0x9E3779B9 + one
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) ^ other
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _rounded(value, draw):
    """Returns bfloat16 numbers, as int16, of float32 ones."""
    bits = tl.where(value != value, QUIET_NAN, value.to(tl.int32, bitcast=True))
    return ((bits + draw) >> 16).to(tl.int16)


@triton.jit
def _linear(value, exponent, BITS: tl.constexpr, draw):
    """Returns codes, int32; those of a broken row are 0."""
    parts = value * _power(exponent, -1) * 2.0 ** (BITS + 15)
    parts = tl.where(parts == parts, parts, 0.0)
    below = tl.floor(parts)
    over, whole = parts - below, below.to(tl.int32)
    whole += ((over > 0.5) | ((over == 0.5) & ((whole & 1) != 0))).to(tl.int32)  # the nearest, or even
    return (whole + draw) >> 16


@triton.jit
def _magnitude(value):
    """Returns bits that are larger for a larger magnitude; those of NaN are above all others."""
    return value.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def _exponent(magnitudes):
    """Returns the exponent of a row."""
    most = tl.max(magnitudes, axis=0).to(tl.float32, bitcast=True) * 1.0625
    exponent = (most.to(tl.int32, bitcast=True) >> 23) - 126
    return tl.where(exponent >= BROKEN, BROKEN, tl.maximum(exponent, LEAST))


@triton.jit
def _power(exponent, SIGN: tl.constexpr):
    """Returns 2 to the exponent of a row, or its inverse; NaN for a broken one."""
    bits = (exponent * SIGN + 127) << 23
    return tl.where(exponent == BROKEN, QUIET_NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def _entries(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Returns a pointer to a tensor whose address is in the row."""
    address = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if WIDE:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _entries_of(
    row, at, REST_TYPE: tl.constexpr, Z_TYPE: tl.constexpr, V_TYPE: tl.constexpr, M_TYPE: tl.constexpr,
    HAS_V: tl.constexpr, HAS_M: tl.constexpr, HALVES: tl.constexpr, NARROW_G: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Returns pointers to elements of y, rest, z or the gap, v, m and g; some other where there is none."""
    of_z = _entries(row, Z, Z_TYPE, WIDE) + at
    of_rest, of_v, of_m = of_z, of_z, of_z
    if HALVES:
        of_rest = _entries(row, REST, REST_TYPE, WIDE) + at
    of_y = _entries(row, Y, tl.int16 if HALVES else tl.float32, WIDE) + at
    if HAS_V:
        of_v = _entries(row, V, V_TYPE, WIDE) + at
    if HAS_M:
        of_m = _entries(row, M, M_TYPE, WIDE) + at
    of_g = _entries(row, G, tl.int16 if NARROW_G else tl.float32, WIDE) + at
    return of_y, of_rest, of_z, of_v, of_m, of_g


@triton.jit
def _gradient(of_g, mask, NARROW_G: tl.constexpr):
    """Returns gradients in float32."""
    g = tl.load(of_g, mask)
    return _widened(g) if NARROW_G else g


@triton.jit
def _joined(of_y, of_rest, mask, HALVES: tl.constexpr):
    """Returns y in float32, of a rest of 16 bits where there is one."""
    y = tl.load(of_y, mask)
    return _join(y, tl.load(of_rest, mask).to(tl.int32)) if HALVES else y


@triton.jit
def _put_y(of_y, of_rest, mask, y, HALVES: tl.constexpr):
    """Writes y, and its rest of 16 bits where there is one."""
    if HALVES:
        upper, lower = _split(tl.where(y != y, QUIET_NAN, y.to(tl.int32, bitcast=True)))
        tl.store(of_y, upper, mask)
        tl.store(of_rest, lower, mask)
    else:
        tl.store(of_y, y, mask)


@triton.jit
def _widened(upper):
    """Returns bfloat16 numbers, given as int16, in float32."""
    return (upper.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _join(upper, rest):
    """Returns float32 numbers of two halves as `forms.join` does."""
    whole = ((upper.to(tl.int32) << 16) + rest).to(tl.float32, bitcast=True)
    return tl.where(whole != whole, _widened(upper), whole)


@triton.jit
def _split(bits):
    """Returns the halves of float32 numbers, int16 both, as `forms.split` does."""
    return ((bits + 0x8000) >> 16).to(tl.int16), bits.to(tl.int16)  # which keeps the lower bits
