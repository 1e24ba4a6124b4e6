"""A plan in the form that compiled kernels read: int32 block lists, block starts, coordinates and window bounds."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap, TokenTables
from dit_accel.kernels.choosing import Chosen
from dit_accel.operator.bit_masks import BitMasks

PADDING = 16  # entries past the last token, because kernels load whole vectors
FARTHEST = 2**31 - 1


@dataclass(frozen=True)
class Lists:
    """Visited key blocks of each query block, `[..., Tq, n]` int32: of each list the first `counts` `[..., Tq]`, of these first the `full`.

    `mask_of` `[..., Tq, n]` int32: the number of each entry's bit mask, read from `full` to `counts`, or None. `bits`: as in `Chosen`, or
    None.
    """

    index: Tensor
    counts: Tensor
    full: Tensor
    mask_of: Tensor | None = None
    bits: Tensor | None = None

    @classmethod
    def from_map(cls, blocks: BlockMap) -> "Lists":
        """The same lists, whole blocks moved to the front."""
        whole = blocks.valid if blocks.partial is None else blocks.valid & ~blocks.partial
        order = (blocks.valid.int() + whole.int()).argsort(dim=-1, descending=True, stable=True)
        index = blocks.index.gather(-1, order).to(torch.int32).contiguous()
        mask_of = None if blocks.mask_of is None else blocks.mask_of.gather(-1, order).contiguous()
        return cls(index, blocks.valid.sum(-1, dtype=torch.int32), whole.sum(-1, dtype=torch.int32), mask_of)

    def with_bits(self, key_blocks: int) -> "Lists":
        """The same, and as bits, so that no call has to make them."""
        index, held = self.listed()
        words = torch.zeros(*index.shape[:-1], -(-key_blocks // 32), dtype=torch.int64, device=index.device)
        words.scatter_add_(-1, index // 32, held * (1 << index % 32))  # a block is on a list once: a sum of bits is their union
        return replace(self, bits=(words - (words >> 31 << 32)).to(torch.int32))

    def kept(self, key_blocks: int) -> Tensor:
        """The same as a mask `[..., Tq, Tk]`."""
        index, held = self.listed()
        seen = torch.zeros(*index.shape[:-1], key_blocks, dtype=torch.int32, device=index.device)
        return seen.scatter_add(-1, index, held.int()) > 0

    def listed(self) -> tuple[Tensor, Tensor]:
        """The key blocks `[..., Tq, n]`, and which of these entries count."""
        return self.index.long(), torch.arange(self.index.shape[-1], device=self.index.device) < self.counts[..., None]

    @classmethod
    def of_chosen(cls, chosen: Chosen) -> "Lists":
        """Lists all of whose entries are whole blocks."""
        return cls(chosen.lists, chosen.counts, chosen.counts, bits=chosen.bits if chosen.bits.numel() else None)


@dataclass(frozen=True)
class Geometry:
    """One grid for the kernels, or a part of it as queries and another as keys.

    `starts_q`, `starts_k` `[T + 1]`: first token of each block. `coords` `[3, Nk + PADDING]`: (t, y, x) of the keys, read with windows
    alone. `windows` `[W, 3 axes, 3, Nq + PADDING]`: first and last coordinate that a query sees, and the residue that its keys share, or
    None; `residues` `[W, 3 axes, Nk + PADDING]`: the keys' own, None where queries and keys are the same tokens. All in the order of the
    blocks; `places_q`, `places_k` `[N]`: where each token of that order is among the image's tokens, or None where they are in it. `masks`,
    `masks_t`: bit masks of partial blocks, None where windows say all. All int32 but the masks, which are int64.
    """

    starts_q: Tensor
    starts_k: Tensor
    lists: Lists | None
    coords: Tensor
    windows: Tensor | None
    places_q: Tensor | None
    places_k: Tensor | None
    masks: Tensor | None
    masks_t: Tensor | None
    residues: Tensor | None = None

    @property
    def tables(self) -> TokenTables:
        """What decides token by token."""
        return TokenTables(self.coords, self.windows, self.masks, self.residues)


def padded(rows: Tensor) -> Tensor:
    """`[..., N]` as int32 with PADDING zeros behind each row."""
    return torch.nn.functional.pad(rows.to(torch.int32), (0, PADDING)).contiguous()


def make_geometry(
    starts_q: Tensor, starts_k: Tensor, coords: Tensor, static: BlockMap | None, windows: list[Tensor],
    places: Tensor | None, masks: BitMasks | None, *, bits: bool = False,
) -> Geometry:  # fmt: skip
    """`coords` `[N, 3]`; `windows`: each as `[3 axes, 3, N]`; `places` `[N]`, see `Geometry`. `bits`: see `Lists`."""
    lists = Lists.from_map(static) if static else None
    places = None if places is None else places.to(torch.int32)
    return Geometry(
        starts_q=starts_q.to(torch.int32),
        starts_k=starts_k.to(torch.int32),
        lists=lists.with_bits(len(starts_k) - 1) if lists and bits else lists,
        coords=padded(coords.T),
        windows=padded(torch.stack(windows)) if windows else None,
        places_q=places,
        places_k=places,
        masks=None if masks is None else masks.masks,
        masks_t=None if masks is None else masks.masks_t,
    )
