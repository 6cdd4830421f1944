"""One thread: the tensors are tiny, and threads that wait for each other cost four times the time."""

import sys

import numpy as np
import pytest
import torch

from sftorch.kernels import call

torch.set_num_threads(1)
KERNEL = "sftorch.kernels.triton_step"


@pytest.fixture
def exact_root(monkeypatch):
    """torch's own root of a CPU tensor is MKL's, an ulp off in one number of five; this one is IEEE's."""

    def sqrt_(tensor):
        return tensor.copy_(torch.from_numpy(np.sqrt(tensor.numpy())))

    monkeypatch.setattr(torch.Tensor, "sqrt_", sqrt_)


@pytest.fixture(scope="module")
def interpreted():
    """Returns the module of the Triton kernels, in Triton's interpreter, for the CPU."""
    language = pytest.importorskip("triton.language")
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setenv("TRITON_INTERPRET", "1")
        # It became a kernel when Triton was imported, which may have been without that.
        patch.setattr(language, "max", InterpretedFunction(language.max.fn))
        sys.modules.pop(KERNEL, None)
        call.find_triton.cache_clear()
        yield call.find_triton()
    sys.modules.pop(KERNEL, None)
    call.find_triton.cache_clear()
