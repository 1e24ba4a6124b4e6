"""What kernels may round before they multiply it: switches of the process, as `torch.set_float32_matmul_precision` is."""

import contextlib
from collections.abc import Iterator

from dit_accel.errors import ArgumentError, BackendError
from dit_accel.kernels import dispatch

PRECISIONS = ("highest", "medium")
PRODUCTS = ("input", "int8")
_precision = "highest"
_products = "input"


def set_float32_attention_precision(precision: str) -> None:
    """What attention on float32 tensors may round on a CPU, for all threads, until it is set again.

    "highest", as at the start: nothing; products are of float32. "medium": query, key, value and the output's gradient to bfloat16, where
    the CPU multiplies that in a matrix unit (AMX) and that unit serves bfloat16 here. Sums, the softmax, results and gradients stay in
    float32, and so does the choice of blocks. The names mean what they mean for `torch.set_float32_matmul_precision`, for whose "high"
    (three products) there is no code. float16, which the CPU kernels compute in float32, follows; float32 on GPUs does not: there torch's
    own switch decides.
    A backward pass rounds as is set when it runs.
    Raises ArgumentError (a ValueError) at another name.
    """
    global _precision
    if precision not in PRECISIONS:
        raise ArgumentError(f"the precision of float32 attention must be one of {PRECISIONS}, not {precision!r}")
    _precision = precision


def get_float32_attention_precision() -> str:
    """What `set_float32_attention_precision` was given last, or "highest"."""
    return _precision


def set_query_key_products(kind: str) -> None:
    """In which type GPUs multiply queries by keys, for all threads, until it is set again.

    "input", as at the start: in that of the tensors. "int8": where tensors are bfloat16 or float16 and no gradient is required, the
    products of queries with the keys that a method keeps and with the text's are of both rounded to 8 bits, keys without their mean and
    with a scale for each token (as SageAttention, arXiv 2410.02367, rounds them), and channels balanced between queries and keys. The
    choice of blocks, the rest, the softmax and the values stay as they are. That errs about twice as much as bfloat16 does, more where
    keys of some channels are large (docs/gpu.md has a table).
    On CPU tensors, on float32, with gradients, on heads of 16 channels or fewer and on GPUs of other compute capabilities than 8, 9 and 12
    it changes nothing; `summary` says where products have 8 bits.
    Raises ArgumentError (a ValueError) at another name, and BackendError where this process has no GPU on which it could change anything.
    """
    global _products
    if kind not in PRODUCTS:
        raise ArgumentError(f"the products of queries and keys must be one of {PRODUCTS}, not {kind!r}")
    refusal = dispatch.int8_refusal_here() if kind == "int8" else None
    if refusal:
        raise BackendError(f"products in 8 bits are for NVIDIA GPUs, and {refusal}: leave them at 'input'")
    _products = kind


@contextlib.contextmanager
def int8_products() -> Iterator[None]:
    """Inside, products of queries and keys are in 8 bits whatever GPU there is: to compile them for others."""
    global _products
    before, _products = _products, "int8"
    try:
        yield
    finally:
        _products = before


def get_query_key_products() -> str:
    """What `set_query_key_products` was given last, or "input"."""
    return _products
