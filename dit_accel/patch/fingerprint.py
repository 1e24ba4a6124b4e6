"""Whether a model has the weights that something was made with: an exact hash, and sampled numbers that survive another dtype.

The hash reads every byte, half a minute for a large model. It is remembered per module for as long as the weights are the same: their
tensors' version counters, which every change in place advances, and numbers sampled from each of them are compared before it is reused.
"""

import base64
import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from dit_accel.patch.weights import stored, teacher_hash, teacher_values

TENSORS = 1024  # sampled at most, evenly spread over their names
NUMBERS, FEWEST, MOST = 8192, 8, 256  # sampled in all; of each tensor at least and at most
QUANTISED = 0.3  # relative error over all quantised weights; 4 bits give up to 0.15, unrelated weights 1.4
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32, torch.float64)
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}

Fingerprint = dict[str, list[str]]  # parameter -> [its dtype, or "quantised"; float32 numbers in base64]
_hashes: "WeakKeyDictionary[nn.Module, tuple[str, str]]" = WeakKeyDictionary()


def known_hash(transformer: nn.Module) -> str:
    """`teacher_hash`, computed once for the same weights of a module in a process."""
    state = _state(transformer)
    known = _hashes.get(transformer)
    if known is None or known[0] != state:
        known = _hashes[transformer] = state, teacher_hash(transformer)
    return known[1]


def _state(transformer: nn.Module) -> str:
    """A digest that changes whenever the original weights do, and not with a LoRA on them."""
    digest = hashlib.sha256()
    for plain, read in sorted(teacher_values(transformer).items()):
        for part in stored(read()):
            version = None if part.is_inference() else part._version
            values = _sampled(plain, part, FEWEST)
            digest.update(f"{plain} {tuple(part.shape)} {part.dtype} {version}".encode())
            digest.update(b"" if values is None else values.tobytes())
    return digest.hexdigest()


def fingerprint(transformer: nn.Module) -> Fingerprint:
    """Numbers sampled from the original weights, at places that depend on names and sizes alone; without tensors that can't be read."""
    readers = sorted(teacher_values(transformer).items())
    chosen = readers[:: -(-len(readers) // TENSORS) or 1]
    count = max(FEWEST, min(MOST, NUMBERS // max(1, len(chosen))))
    found: Fingerprint = {}
    for name, read in chosen:
        tensor = read()
        values = _sampled(name, tensor, count)
        kind = _kind(tensor)
        if values is not None and kind is not None:
            found[name] = [kind, base64.b64encode(values.tobytes()).decode()]
    return found


def check(value: Any) -> None:
    """Raise ValueError unless it is a fingerprint as `fingerprint` makes it."""
    if not isinstance(value, dict):
        raise ValueError(f"a fingerprint must be an object with an entry for each parameter, not {type(value).__name__}")
    for name, entry in value.items():
        pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str) for x in entry)
        if not pair or entry[0] not in (*NAMES, "quantised"):
            raise ValueError(f"the fingerprint of {name} must be [dtype, numbers in base64], not {str(entry)[:80]!r}")
        try:
            data = base64.b64decode(entry[1], validate=True)
        except ValueError as error:
            raise ValueError(f"the numbers in the fingerprint of {name} are not base64: {error}") from error
        if not data or len(data) % 4:
            raise ValueError(f"the numbers in the fingerprint of {name} must be float32, four bytes each, not {len(data)} bytes")


def same_weights(transformer: nn.Module, recorded: Fingerprint, exact: str) -> bool:
    """Whether the original weights are those of a fingerprint and a hash, be it in another dtype or quantised.

    Numbers may differ by the rounding of both dtypes, quantised ones by `QUANTISED` in all; where all are equal to the bit and of the same
    dtypes, the hash decides. True where nothing can be compared.
    """
    now = teacher_values(transformer)
    equal, errors, sizes = True, 0.0, 0.0
    for name, (kind, text) in recorded.items():
        before = np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
        if name not in now:
            return False
        tensor = now[name]()
        own, values = _kind(tensor), _sampled(name, tensor, len(before))
        if own is None or values is None:  # packed as others do it, or not in memory
            equal = False
            continue
        after = values.astype(np.float64)
        equal = equal and own == kind and bool((before == after).all())
        if "quantised" in (own, kind):
            errors, sizes = errors + float(np.square(after - before).sum()), sizes + float(np.square(before).sum())
        elif not (np.abs(after - before) <= _rounding(before, kind) + _rounding(after, own)).all():
            return False
    if errors > QUANTISED**2 * sizes:
        return False
    return not equal or known_hash(transformer) == exact


def _rounding(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """How far each number may be from what it was before it was rounded: to its dtype, or to a narrower one that it went through."""
    tensor = torch.from_numpy(values)
    passed = [NAMES[kind], *(dtype for dtype in (torch.bfloat16, torch.float16) if bool((tensor.to(dtype).double() == tensor).all()))]
    return np.max([1.01 * torch.finfo(d).eps * (np.abs(values) / 2 + torch.finfo(d).smallest_normal) for d in passed], axis=0)


def _kind(tensor: Tensor) -> str | None:
    """The tensor's dtype by name, "quantised" for one that is made of others; None for integers, which say nothing by themselves."""
    if hasattr(tensor, "__tensor_flatten__"):
        return "quantised"
    name = str(tensor.dtype).removeprefix("torch.")
    return name if name in NAMES else None


def _sampled(name: str, tensor: Tensor, count: int) -> np.ndarray[Any, Any] | None:
    """`count` of the tensor's numbers as little-endian float32; None where there are none to be read."""
    if hasattr(tensor, "__tensor_flatten__"):
        try:
            tensor = tensor.dequantize()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return None
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    total = tensor.numel()
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % total
    places = (first + torch.arange(count) * (int(total * 0.6180339887) | 1)) % total
    values = tensor.detach().reshape(-1)[places.to(tensor.device)]
    return values.to(torch.float32).cpu().numpy().astype("<f4")
