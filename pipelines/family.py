"""The declaration of a family of transformers: the few facts that the patch requires, once for its diffusers classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Grid = tuple[int, int, int]
Grids = tuple[Grid, ...]
Arguments = Mapping[str, Any]  # a forward's arguments by name


def heads_by_inner_dim(module: Any) -> tuple[int, int]:
    """(heads, channels per head) of an attention module with `heads` and `inner_dim`, the width of all its queries."""
    return module.heads, module.inner_dim // module.heads


@dataclass(frozen=True)
class Family:
    """Diffusers transformer classes (and their subclasses) that are patched alike.

    "The image" below is what the model draws, a picture or a video; "text" is every other token of the sequence: text, registers, padding.

    Args:
        name: what the family is called in messages.
        classes: names of the classes.
        modules: regular expression that the full names of the image's self-attention modules match.
        grid: from a forward's arguments and the transformer: the grid (T, H, W) in tokens of each image in the sequence, the one that
            is drawn first, or the reason, as text, that there is none.
        projections: names, within these modules, of the linear projections that a LoRA or full training changes; without any, a family
            trains the method's own parameters alone.
        heads: from one of these modules: number of query heads and channels per head.
        image_only: regular expression of those modules whose sequence is the drawn image alone, without text.
        doubled: whether some modules have the image's tokens twice in their sequence, and no text.
        text_first: whether text precedes the image's tokens.
        text: from a forward's arguments: number of text tokens; without it, every token of a call that is not the image's counts as
            text.
        history: from a forward's arguments and the transformer: number of tokens before the image's although text follows it, as
            earlier frames; like text, they attend to every token and every token attends to them.
        keys_only: whether the text, or the history where there is one, has keys and values but no queries.
        sharded: how the class's context parallelism splits it: text and image each by itself, as "streams", or as one "sequence";
            without it, an accelerated model can't be shared by several processes.
        latents: the forward's argument that the scheduler changes.
        timestep: the argument with the timestep, which falls from step to step unless `timestep_rises`.
        timestep_rises: whether that timestep rises from step to step.
        prompt_first: where guidance makes a batch of two, whether the pipelines place the sample with the prompt before the other one.
        ids: the forward's arguments on the device from which the grid is read: the same tensors are read once, in a compiled graph with
            no other arguments than the latents and words.
        mask: what self-attention passes as a mask where text is padded: over "keys" `[B, N]` or `[B, 1, 1, N]`; over "pairs" `[B, 1, N,
            N]`, of which any image token's row is the mask over keys; "ones", made by the transformer itself, which hides nothing. A call
            with another mask, or with any where this is None, runs its original attention.
        patch: side of a token in latents where the pipeline, not the transformer, packs them; else the configuration's patch_size.
        longest_side: from the transformer: the longest side in tokens for which it has positions; without it, there is no limit.
        rotary: the transformer's attribute with the rotary embedding whose `theta`, the base, is read at every forward.
        rotary_factor: factor of that base above the trained size, unless a user asks for another.
    """

    name: str
    classes: tuple[str, ...]
    modules: str
    grid: Callable[[Arguments, Any], Grids | str]
    projections: tuple[str, ...] = ()
    heads: Callable[[Any], tuple[int, int]] = heads_by_inner_dim
    image_only: str | None = None
    doubled: bool = False
    text_first: bool = True
    text: Callable[[Arguments], int] | None = None
    history: Callable[[Arguments, Any], int] | None = None
    keys_only: bool = False
    sharded: Literal["streams", "sequence"] | None = None
    latents: str = "hidden_states"
    timestep: str = "timestep"
    timestep_rises: bool = False
    prompt_first: bool = False
    ids: tuple[str, ...] = ()
    mask: Literal["keys", "pairs", "ones"] | None = None
    patch: int | None = None
    longest_side: Callable[[Any], int | None] | None = None
    rotary: str | None = None
    rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("classes", "ids", "projections"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                raise ValueError(f"{name} of family {self.name!r} must be a tuple of names, not {value!r}")

    def lengths(self, arguments: Arguments, transformer: Any) -> tuple[int | None, int]:
        """The number of text tokens, None where the call's length gives it, and of tokens before the image although text follows it."""
        text = self.text(arguments) if self.text else None
        return text, self.history(arguments, transformer) if self.history else 0
