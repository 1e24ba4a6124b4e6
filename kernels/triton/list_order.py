"""Block lists in other orders, by torch's operators: nothing here waits for the device."""

import torch
from torch import Tensor

from dit_accel.kernels.triton.tuples import Transposed


def complement(lists: Tensor, counts: Tensor, key_blocks: int) -> Tensor:
    """Lists `[.., Tq, n]` continued by the key blocks that are not on them, ascending: int32 `[.., Tq, Tk]`."""
    place = torch.arange(lists.shape[-1], device=lists.device, dtype=torch.int32).expand(lists.shape)
    rank = torch.arange(key_blocks, 2 * key_blocks + 1, device=lists.device, dtype=torch.int32).repeat(*lists.shape[:-1], 1)
    listed = torch.where(place < counts[..., None], lists, key_blocks).long()  # what pads a list goes to a column of its own
    rank.scatter_(-1, listed, place)
    return rank[..., :key_blocks].argsort(-1).to(torch.int32)


def columns(lists: Tensor, counts: Tensor, full: Tensor, key_blocks: int, mask_of: Tensor | None = None) -> Transposed:
    """The lists transposed: for each key block the query blocks that visit it, those that visit it whole first.

    `entries` `[1 or BH, Tq · n]` int32 and `indptr` `[1 or BH, 2·Tk + 1]` int32. A stable sort: no atomics, no wait for the device.
    """
    lists, counts, full = (x if x.ndim == y else x[None] for x, y in ((lists, 3), (counts, 2), (full, 2)))
    place = torch.arange(lists.shape[-1], device=lists.device)
    key = lists * 2 + (place >= full[..., None])
    key = torch.where(place < counts[..., None], key, 2 * key_blocks).flatten(1)
    ordered, position = key.sort(dim=1, stable=True)
    bounds = torch.arange(2 * key_blocks + 1, device=lists.device, dtype=ordered.dtype).expand(len(lists), -1).contiguous()
    indptr = torch.searchsorted(ordered.contiguous(), bounds)
    if mask_of is not None:
        mask_of = mask_of.reshape(key.shape).gather(1, position)
    return Transposed((position // lists.shape[-1]).to(torch.int32), indptr.to(torch.int32), mask_of)


def spans_by_tile(lists: Tensor, counts: Tensor, units: int, tiles: int) -> Transposed:
    """Lists of units `[B, H, spans, n]`, the first `counts` of them, by tiles of `units` of them in a row: as `columns` has it, the spans
    that see some unit of a tile, each once."""
    place = torch.arange(lists.shape[-1], device=lists.device)
    tile = torch.where(place < counts[..., None], lists // units, tiles).flatten(0, 1).sort(-1).values
    again = torch.cat([torch.zeros_like(tile[..., :1], dtype=torch.bool), tile[..., 1:] == tile[..., :-1]], -1)
    tile = tile.masked_fill(again, tiles).sort(-1).values[..., :tiles]
    seen = (tile < tiles).sum(-1)
    return columns(tile, seen, seen, tiles)
