"""The arguments of the whole-layer operator, as every implementation takes them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

RESTS = ("none", "pooled", "linear")
FEATURES = ("softmax", "elu", "relu")


class Method(NamedTuple):
    """What an operator's list of integers means: places in RESTS and FEATURES, flags, and the widths of the blocks in tokens."""

    rest: int
    log_count: int
    variance: int
    feature_map: int
    linear_all: int
    residual: int
    q_width: int
    k_width: int


def dense(x: Tensor) -> Tensor:
    """The tensor with its channels contiguous, which is all that compiled kernels ask; itself where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Arguments(NamedTuple):
    """The arguments of `dit_accel::attention`, in its order and with its meaning, but for the implementation's name."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None
    offset: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lists: Tensor
    counts: Tensor
    full: Tensor
    q_starts: Tensor
    k_starts: Tensor
    coords: Tensor
    windows: Tensor | None
    places: Tensor | None
    text_bias: Tensor | None
    text: int
    text_first: bool
    reach: int
    method: Sequence[int]
    cap: float
    scale: float
