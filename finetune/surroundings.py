"""The state of the process and of the model that a training restores, however it ends."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import PartialState


@contextlib.contextmanager
def processes_kept() -> Iterator[None]:
    """Restore what accelerate has recorded of this process and its device after a `with` block.

    Except where there is a process group: torch has one for each process, and the programs of a launch go on sharing it.
    """
    noted = PartialState._shared_state
    before = dict(noted)
    try:
        yield
    finally:
        if not torch.distributed.is_initialized():
            noted.clear()
            noted.update(before)


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """The state of all random numbers (Python's, NumPy's, torch's), the number of threads and accelerate's notes are the same again after
    a `with` block. Within it gradients are taken, even where the caller has switched them off."""
    python, arrays, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with processes_kept(), torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def model_kept(transformer: Any) -> Iterator[None]:
    """Each module's mode, each parameter's gradient and whether it requires one, and gradient checkpointing are the same again after a
    `with` block. Parameters that came meanwhile require none, and modules have the mode that the model has."""
    modes = {module: module.training for module in transformer.modules()}
    gradients = {parameter: (parameter.requires_grad, parameter.grad) for parameter in transformer.parameters()}
    checkpointing = transformer.is_gradient_checkpointing
    try:
        yield
    finally:
        for module in transformer.modules():
            module.training = modes.get(module, modes[transformer])
        for parameter in transformer.parameters():
            required, gradient = gradients.get(parameter, (False, None))
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)  # a method's own are float32 from now on
            parameter.requires_grad_(required)
        if not checkpointing:
            transformer.disable_gradient_checkpointing()
