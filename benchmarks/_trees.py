"""The parameter trees that steps are timed on: shapes only."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def gpt(width: int = 512, layers: int = 12, vocabulary: int = 24_576, context: int = 1024) -> list[Shape]:
    """Returns the shapes of a GPT-2; the default has the 148 tensors of GPT-2 small and 50.9M parameters."""
    block: list[Shape] = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


TREES: dict[str, list[Shape]] = {
    "gpt": gpt(),
    "gpt2-small": gpt(width=768, vocabulary=50_257),
    "one": [(50_936_832,)],
    "tiny": [(256,)] * 2000,
    "small": [(16, 16)] * 10,
}
CPU_TREES = ("gpt", "one", "tiny", "small")
JAX_TREES = ("gpt", "small")


def count(shapes: list[Shape]) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(shape) for shape in shapes)
