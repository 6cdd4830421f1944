"""The print of a tensor's bits."""

import pytest
import torch

from sftorch.state import prints

CHUNK = prints._CHUNK


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int64, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)])
def test_equal_bits_give_equal_prints_in_every_dtype_and_shape(dtype, shape):
    torch.manual_seed(0)
    value = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
    assert prints.take([value]) == prints.take([value.clone()])


def test_strides_do_not_count_and_places_do():
    value = torch.arange(12.0).view(3, 4)
    transposed = value.t()
    assert prints.take([transposed]) == prints.take([transposed.contiguous()])
    assert prints.take([transposed.contiguous().view(3, 4)]) != prints.take([value])


@pytest.mark.parametrize("place", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 4])
def test_every_single_flipped_bit_changes_it(place):
    value = torch.zeros(2 * CHUNK + 5)
    found = prints.take([value])
    for bit in range(32):
        changed = value.clone()
        changed.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert prints.take([changed]) != found, bit


def test_equal_elements_that_change_places_change_it_across_chunks():
    value = torch.zeros(3 * CHUNK)
    value[5] = 1.0
    found = {prints.take([torch.roll(value, shift)])[0] for shift in (0, 1, CHUNK, 2 * CHUNK)}
    assert len(found) == 4


def test_small_differences_between_many_tensors_collide_nowhere():
    torch.manual_seed(0)
    base = torch.randn(50)
    values = [base + 1e-6 * torch.randn(50) for _ in range(2000)]
    assert len(set(prints.take(values))) == 2000


def test_it_is_what_it_was_when_state_dicts_were_saved():
    # State dicts on users' disks hold these numbers, so they never change.
    found = prints.take([torch.tensor([1.0, 2.0]), torch.arange(3.0).bfloat16()])
    assert found == [5020675476033634304, -1578545499574283392]
