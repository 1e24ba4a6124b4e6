"""Memory that several pieces of a call share, and memory of a card that several streams read.

PyTorch gives freed memory to whatever asks next on the stream that it was allocated on, and does not know what other streams have yet to
read there. Who frees a model waits for its work; plans, records of calls and start values are freed by us when newer ones take their place.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

CUT = 128  # bytes: pieces of one allocation begin at multiples, as those of their own do


class Readers:
    """The streams that read some tensors. Once these are freed, their memory is given to nobody before all of the streams have done what
    they had to do then."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [x for x in tensors if x.device.type == "cuda" and type(x) is Tensor]  # fake ones have no memory
        self._streams: set[tuple[torch.device, int]] = set()

    def join(self) -> None:
        """The current streams of their devices read them from now on. To ask again costs little."""
        if not self._tensors or torch.compiler.is_compiling():  # what is compiled holds its constants itself
            return
        for device in {x.device for x in self._tensors}:
            stream = torch.cuda.current_stream(device)
            if (device, stream.cuda_stream) not in self._streams:
                for x in self._tensors:
                    if x.device == device:
                        x.record_stream(stream)
                self._streams.add((device, stream.cuda_stream))


def placed(memory: Tensor, begin: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a piece of an allocation of bytes."""
    typed = memory[begin : begin + (len(memory) - begin) // dtype.itemsize * dtype.itemsize].view(dtype)
    return typed.as_strided(size, stride, typed.storage_offset())


def arranged(spaces: Sequence[tuple[int, int, int]]) -> tuple[int, list[int]]:
    """Bytes of an allocation for pieces that are each used from a first to a last step, of so many bytes, and where each begins: the
    largest first, each at the lowest place that is free then."""
    offsets = [0] * len(spaces)
    done: list[tuple[int, int]] = []  # where it begins, which
    for number in sorted(range(len(spaces)), key=lambda n: -spaces[n][2]):
        first, last, size = spaces[number]
        begin = 0
        for other, which in sorted(done):
            if spaces[which][0] > last or spaces[which][1] < first:
                continue
            if begin + size <= other:
                break
            begin = max(begin, -(-(other + spaces[which][2]) // CUT) * CUT)
        offsets[number] = begin
        done.append((begin, number))
    return max((begin + space[2] for begin, space in zip(offsets, spaces, strict=True)), default=0), offsets
