"""S6 to S9* of a list of parameters in one launch; sftorch/kernels/arithmetic.h in Triton's language.

A program takes BLOCK elements of one tensor. Elements go through the operations of the single-tensor path in
their order and with IEEE roundings; with enable_fp_fusion=False results are equal bit for bit. All that is
inside a function with @triton.jit is not Python: Triton reads the source. Launched by call.py.

Run in Triton's interpreter and compiled for sm_90 (3.2, 3.7, 3.9), never yet on a GPU. Triton 3.2 takes
denormals for 0 in divisions and roots; the later ones do not.
"""

import triton
import triton.language as tl

# A row of the table: programs of the tensors before, elements, whether all addresses are multiples of 16
# bytes, and addresses, those that are not used being 0.
COLUMNS = ("first", "size", "aligned", "y", "rest", "z", "v", "m", "x", "g")
FIRST, SIZE, ALIGNED, Y, REST, Z, V, M, X, G = map(tl.constexpr, range(10))
WIDTH = tl.constexpr(len(COLUMNS))
QUIET_NAN = tl.constexpr(0x7FC00000)


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
    HALVES: tl.constexpr,  # whether y is bfloat16, its rest int16
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
            row, at, None, sign, lr_t, wd_y, wd_z, k1, k2, share2, eps, share1, per2, per1,
            HAS_V, HAS_M, SCALED, AT_Z, TO_X, HALVES, NARROW_G, True,
        )  # fmt: skip
    else:
        _move(
            row, at, at < size, sign, lr_t, wd_y, wd_z, k1, k2, share2, eps, share1, per2, per1,
            HAS_V, HAS_M, SCALED, AT_Z, TO_X, HALVES, NARROW_G, False,
        )  # fmt: skip


@triton.jit
def _move(
    row, at, mask, sign, lr_t, wd_y, wd_z, k1, k2, share2, eps, share1, per2, per1,
    HAS_V: tl.constexpr, HAS_M: tl.constexpr, SCALED: tl.constexpr, AT_Z: tl.constexpr,
    TO_X: tl.constexpr, HALVES: tl.constexpr, NARROW_G: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # All loads come first: the compiler may move none of them ahead of a store.
    of_z = _entries(row, Z, at, tl.float32, WIDE)
    z = tl.load(of_z, mask)
    if HALVES:
        of_y = _entries(row, Y, at, tl.int16, WIDE)
        of_rest = _entries(row, REST, at, tl.int16, WIDE)
        y = _join(tl.load(of_y, mask), tl.load(of_rest, mask))
    else:
        of_y = _entries(row, Y, at, tl.float32, WIDE)
        y = tl.load(of_y, mask)
    if HAS_V:
        of_v = _entries(row, V, at, tl.float32, WIDE)
        v = tl.load(of_v, mask)
    if HAS_M:
        of_m = _entries(row, M, at, tl.float32, WIDE)
        m = tl.load(of_m, mask)
    if TO_X:
        x = tl.load(_entries(row, X, at, tl.float32, WIDE), mask)
    if NARROW_G:
        g = _widened(tl.load(_entries(row, G, at, tl.int16, WIDE), mask))
    else:
        g = tl.load(_entries(row, G, at, tl.float32, WIDE), mask)
    g = sign * g
    direction = g
    if HAS_M:
        m = (m - m * share1) + g * share1
        tl.store(of_m, m, mask)
        direction = m * per1
    if HAS_V:
        v = (v - v * share2) + g * g * share2
        tl.store(of_v, v, mask)
        if SCALED:
            direction = tl.div_rn(direction, tl.sqrt_rn(v * per2) + eps)
    direction += wd_y * y
    if AT_Z:
        direction += wd_z * z
    delta = -lr_t * direction  # S6
    after = z + delta  # S7
    tl.store(of_z, after, mask)
    if TO_X:
        y = x + k1 * (after - x)  # S8
    else:
        y = y + (k1 * (z - y) + k2 * delta)  # S9*
    if HALVES:
        bits = tl.where(y != y, QUIET_NAN, y.to(tl.int32, bitcast=True))
        tl.store(of_y, ((bits + 0x8000) >> 16).to(tl.int16), mask)
        tl.store(of_rest, bits.to(tl.int16), mask)  # which keeps the lower bits
    else:
        tl.store(of_y, y, mask)


@triton.jit
def _entries(row, COLUMN: tl.constexpr, at, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Returns pointers to elements of a tensor whose address is in the row."""
    address = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if WIDE:
        address = tl.multiple_of(address, 16)
    return address + at


@triton.jit
def _widened(upper):
    """Returns bfloat16 numbers, given as int16, in float32."""
    return (upper.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _join(upper, rest):
    """Returns float32 numbers of two halves as `forms.join` does."""
    whole = ((upper.to(tl.int32) << 16) + rest.to(tl.int32)).to(tl.float32, bitcast=True)
    return tl.where(whole != whole, _widened(upper), whole)
