"""One thread: the tensors are tiny, and threads that wait for each other cost four times the time."""

import torch

torch.set_num_threads(1)
