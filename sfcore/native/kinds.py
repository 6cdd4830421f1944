"""What the kernels can do, by number."""

from __future__ import annotations

from enum import IntEnum

MARKED = 512  # elements that have a mark, as in job.h


class Kind(IntEnum):
    """What a job does; the names and their order are those of job.h."""

    SGD = 0
    YOUNG = 1
    ADAMW = 2
    ADAMW_MOMENTUM = 3
    RECOVER = 4
    PUT_ASIDE = 5
    HOLDS = 6
    PUT_BACK = 7
    MEAN = 8
    FLOOR_SGD = 9
    FLOOR_ADAMW = 10
    FLOOR_MEAN = 11
