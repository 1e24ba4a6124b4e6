"""What the patch must know of a family of transformers: four facts, declared once per diffusers class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """One diffusers transformer class (and its subclasses).

    `model_class`: its name. `modules`: regular expression of the names of its image self-attention modules. `text_first`: text tokens
    stand before the image's in the joint sequence. `per_token`: forward arguments with one row per image token in their last dimension
    but one (tensors, or lists of them). `grid`: (T, H, W) from the forward arguments, or a sentence that says why there is none.
    `text`: number of text tokens in the sequence. `timestep`: the argument that falls from step to step.
    """

    name: str
    model_class: str
    modules: str
    text_first: bool
    per_token: tuple[str, ...]
    grid: Callable[[Mapping[str, Any]], Grid | str]
    text: Callable[[Mapping[str, Any]], int]
    timestep: str = "timestep"
