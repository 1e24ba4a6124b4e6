"""Reading the outputs of a model's accelerated attention layers during one forward."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dit_accel.patch import patches_of


@contextlib.contextmanager
def capture(pipe_or_transformer: object) -> Iterator[dict[str, Tensor]]:
    """Collects, by layer name, what each accelerated attention module returns for the image (or joint) tokens; hooks end with the block."""
    outputs: dict[str, Tensor] = {}
    hooks = []

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for model, patch in patches_of(pipe_or_transformer):
        hooks += [model.get_submodule(name).register_forward_hook(keep(name)) for name in patch.originals]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
