"""The two halves of a float32 number: every upper half, with every rest that lies at an edge."""

import pytest
import torch

from sftorch.state.forms import join, new_rest, rest_dtype, split
from sftorch.tests.plain import same_bits

EDGES = (-0x8000, -0x7FFF, -0x1234, -1, 0, 1, 0x1234, 0x7FFF)
BFLOAT16 = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FLOAT16 = BFLOAT16.view(torch.float16)


def some_float32():
    """Returns a million floats with random bits: every exponent, both signs, infinities, NaN, denormals."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("rest", EDGES)
def test_every_number_in_bfloat16_halves_comes_back(rest):
    lower = torch.full(BFLOAT16.shape, rest, dtype=torch.int16)
    y = join(BFLOAT16, lower)
    p, again = split(y, torch.bfloat16)
    exists = ~y.isnan() & (y.view(torch.int32) == (BFLOAT16.view(torch.int16).int() << 16) + rest)
    assert exists.sum() >= 65_020  # all but NaN, and zero and infinity with a rest that leads beyond them
    assert same_bits([p[exists], again[exists]], [BFLOAT16[exists], lower[exists]])
    assert same_bits([join(p, again)], [torch.where(y.isnan(), torch.nan, y)])


@pytest.mark.parametrize("rest", EDGES)
def test_a_rest_that_belongs_to_other_weights_moves_them_by_half_an_ulp_at_most(rest):
    p = BFLOAT16[BFLOAT16.isfinite()]
    y = join(p, torch.full(p.shape, rest, dtype=torch.int16))
    assert not y.isnan().any()
    moved = (y.double() - p.double()).abs()
    ulp = torch.maximum(p.double().abs() * 2.0**-7, torch.tensor(2.0**-133, dtype=torch.float64))
    assert (moved <= ulp / 2).all()
    assert (p.sign() * y.sign() >= 0).all()


def test_any_float32_survives_the_split_into_bfloat16():
    y = some_float32()
    p, rest = split(y, torch.bfloat16)
    assert p.dtype == torch.bfloat16
    assert rest.dtype == torch.int16
    numbers = ~y.isnan()
    assert same_bits([join(p, rest)[numbers]], [y[numbers]])
    assert (p.isnan() == y.isnan()).all()
    assert join(p, rest).isnan().equal(y.isnan())


def test_the_parameter_is_the_nearest_number():
    y = some_float32()
    y = y[y.abs() < 3e38]
    p, _ = split(y, torch.bfloat16)
    usual = y.to(torch.bfloat16)
    assert ((p.double() - y.double()).abs() == (usual.double() - y.double()).abs()).all()  # ties may differ


@pytest.mark.parametrize(
    ("value", "upper"),
    [
        (3.4028234663852886e38, float("inf")),  # the largest float32
        (-3.4028234663852886e38, float("-inf")),
        (float("inf"), float("inf")),
        (float("-inf"), float("-inf")),
        (0.0, 0.0),
        (-0.0, -0.0),
        (1e-45, 0.0),
        (-1e-45, -0.0),
    ],
)
def test_the_ends_of_the_range(value, upper):
    y = torch.tensor(value)
    p, rest = split(y, torch.bfloat16)
    assert same_bits([p], [torch.tensor(upper, dtype=torch.bfloat16)])
    assert same_bits([join(p, rest)], [y])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF, 0x7FC00000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_nan_stays_nan(bits, dtype):
    y = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert y.isnan()
    p, rest = split(y, dtype)
    assert p.isnan()
    assert join(p, rest).isnan()


def test_float16_with_its_difference_is_float32_within_its_range():
    y = some_float32()
    y = y[y.abs() < 65519]
    p, rest = split(y, torch.float16)
    assert (p == y.to(torch.float16)).all()
    assert join(p, rest).equal(y)


def test_float16_beyond_its_range_is_infinite_and_a_foreign_rest_is_ignored():
    p, rest = split(torch.tensor([1e5, -1e5]), torch.float16)
    assert p.tolist() == [float("inf"), float("-inf")]
    assert rest.tolist() == [0.0, 0.0]
    foreign = torch.full(FLOAT16.shape, 0.25)
    y = join(FLOAT16, foreign)
    assert y.to(torch.float16).nan_to_num(7.0).equal(FLOAT16.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_wider_dtypes_have_no_rest(dtype):
    p = torch.ones(2, dtype=dtype)
    assert rest_dtype(dtype) is None
    assert new_rest(p) is None
    assert join(p, None) is p
    assert split(p, dtype)[1] is None


def test_halves_keep_the_layout():
    y = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    y = y.to(memory_format=torch.channels_last)
    p, rest = split(y, torch.bfloat16)
    assert p.stride() == rest.stride() == join(p, rest).stride() == y.stride()
    assert new_rest(p).stride() == y.stride()
