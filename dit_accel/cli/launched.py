"""A command that `torchrun` or `accelerate launch` started several times: the processes share the sequence of one picture or clip."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from dit_accel.errors import ArgumentError


def processes() -> int:
    """How many a launcher started; 1 without one. Raises ArgumentError where the environment says no number."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or int(count) < 1:
        raise ArgumentError(f"the environment variable WORLD_SIZE must be the number of processes that were started, not {count!r}")
    return int(count)


def spread(pipe: Any) -> bool:
    """Have the processes share the sequences of a pipeline's transformers, if there are several; whether this one writes and speaks.

    Raises ValueError, before anything is changed, where a transformer can't be shared by so many.
    """
    count = processes()
    if count == 1:
        return True
    from diffusers import ContextParallelConfig

    from dit_accel.finetune.processes import processes as joined
    from dit_accel.patch.anatomy import find_transformers

    models = find_transformers(pipe)
    state = joined(next(models[0].parameters()).device)
    # parts of unequal length, where diffusers knows them
    anything = {"ulysses_anything": True} if hasattr(ContextParallelConfig, "ulysses_anything") else {}
    with _counted_devices():
        for model in models:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count, **anything))
    return bool(state.is_main_process)


@contextlib.contextmanager
def _counted_devices() -> Iterator[None]:
    """diffusers divides by the number of accelerators, of which a machine without a GPU has none."""
    import torch

    count = torch.accelerator.device_count
    if count():
        yield
        return
    torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count
