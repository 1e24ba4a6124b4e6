"""What the patch must know of a family of transformers: a few facts, declared once for its diffusers classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Grid = tuple[int, int, int]
Grids = tuple[Grid, ...]
Arguments = Mapping[str, Any]  # a forward's arguments by name


@dataclass(frozen=True)
class Family:
    """Diffusers transformer classes (and their subclasses) that are patched alike.

    `classes`: their names. `modules`: regular expression of the full names of their image or video self-attention modules. `grid`: from
    the forward's arguments and the transformer, the grid (T, H, W) in tokens of each image in the sequence, the one that is drawn
    first, or a sentence that says why there is none. `text_first`: what is not image (text, registers, padding) stands before the
    image's tokens. `text`: how many such tokens there are, where the arguments tell; without it, whatever a call has beside the image.
    `history`: how many tokens stand before the image's although the text stands behind them, as earlier frames do; like text, they
    attend to all and are attended by all. `keys_only`: the text, or the history where there is one, has keys and values but no queries,
    so that calls have fewer queries than keys. `twice`: some modules have the image's tokens twice over and no text. `alone`: regular
    expression of those modules whose sequence is the drawn image's alone. `timestep`: the argument that falls from step to step, or
    rises with `rising`. `ids`: arguments on the device from which the grid is read; the same tensors are read once, in a compiled
    graph with no other arguments than the latents and words. `latents`: the
    argument that the scheduler changes. `mask`: what its self-attention passes as a mask where text is padded: over "keys" `[B, N]` or
    `[B, 1, 1, N]`, or over "pairs" `[B, 1, N, N]`, of which any image token's row is the mask over keys; or "ones", a mask that the
    transformer itself makes and that hides nothing. With any other mask, or without this, a call runs its original attention.
    """

    name: str
    classes: tuple[str, ...]
    modules: str
    grid: Callable[[Arguments, Any], Grids | str]
    text_first: bool = True
    text: Callable[[Arguments], int] | None = None
    history: Callable[[Arguments, Any], int] | None = None
    keys_only: bool = False
    twice: bool = False
    alone: str | None = None
    timestep: str = "timestep"
    rising: bool = False
    ids: tuple[str, ...] = ()
    latents: str = "hidden_states"
    mask: Literal["keys", "pairs", "ones"] | None = None

    def __post_init__(self) -> None:
        for name in ("classes", "ids"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} is a tuple of names, got {getattr(self, name)!r}")
