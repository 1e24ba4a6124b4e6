"""How the CPU kernels multiply what is float32: a switch of the process, as `torch.set_float32_matmul_precision` is."""

from dit_accel.errors import ArgumentError

PRECISIONS = ("highest", "medium")
_precision = "highest"


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
