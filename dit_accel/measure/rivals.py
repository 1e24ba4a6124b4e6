"""The libraries that `dit-accel bench kernels` compares with, next to PyTorch's: FlexAttention on the same blocks, NATTEN on windows.

Each rival computes what the method keeps exactly: an estimate of the rest has no counterpart there.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from dit_accel.errors import ArgumentError
from dit_accel.kernels.blocks import BlockMap
from dit_accel.method import AttentionSpec, Window
from dit_accel.operator.attention import start_values
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.composition import image_call, visited_blocks
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.lists import FARTHEST

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Pairs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key: whether the pair is kept


def flex_refusal(spec: AttentionSpec, layout: TokenLayout, device: torch.device) -> str | None:
    """Why FlexAttention can't be compared with a method, or None where it can."""
    if device.type != "cuda":
        return "FlexAttention is compiled on CUDA devices; elsewhere it computes all pairs of tokens"
    return _no_block_mask(spec, layout, make_plan(spec, layout, device))


def _no_block_mask(spec: AttentionSpec, layout: TokenLayout, plan: Plan) -> str | None:
    """Why a method can't be a BlockMask, which requires blocks of one size and a predicate of coordinates; None where it can."""
    if not (plan.q_blocks.even and plan.k_blocks.even):
        return f"FlexAttention requires blocks of one size, but {spec.order} cuts a grid {layout.grid} unevenly"
    if not all(pattern.intervals or pattern.reach >= 0 for pattern in spec.tokenwise):
        return f"FlexAttention is given discs, windows and boxes here, not {spec}"
    sizes = [blocks.index.shape[1] for blocks in (plan.q_blocks, plan.k_blocks)]
    if any(layout.text % size for size in sizes):
        return f"FlexAttention requires text of whole blocks of {sizes[0]} queries and {sizes[1]} keys, not {layout.text} tokens"
    return None


def block_mask(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: TokenLayout) -> BlockMask:
    """The pairs that a method computes exactly, as FlexAttention's blocks: the operator's own lists, and its text.

    q, k, v `[B, H, N, D]` in the method's order of tokens (`layout.order` = `spec.order`). Raises ValueError where blocks differ in size.
    """
    if layout.order != spec.order:
        raise ArgumentError(f"the tokens must be in the method's order {spec.order}, not {layout.order}")
    plan = make_plan(spec, layout, q.device)
    if refusal := _no_block_mask(spec, layout, plan):
        raise ArgumentError(refusal)
    blocks = visited_blocks(image_call(q, k, v, layout, plan, start_values(spec, q)(), q.shape[-1] ** -0.5), spec, plan)
    partial = torch.zeros_like(blocks.valid) if blocks.partial is None else blocks.valid & blocks.partial
    keys = len(plan.k_blocks.count)
    some = BlockMap(blocks.index, partial).kept(keys)
    whole = blocks.kept(keys) & ~some
    size = (plan.q_blocks.index.shape[1], plan.k_blocks.index.shape[1])
    lists = [
        _ordered(_with_text(mask, layout, size, seen).unflatten(0, q.shape[:2]) if mask.ndim == 3 else _with_text(mask, layout, size, seen))
        for mask, seen in ((some, False), (whole, True))
    ]
    return BlockMask.from_kv_blocks(
        *lists[0],
        *lists[1],
        BLOCK_SIZE=size,
        mask_mod=_kept_pairs(spec, plan, layout.image_slice.start),
        seq_lengths=(layout.tokens, layout.tokens),
    )


def _with_text(mask: Tensor, layout: TokenLayout, size: tuple[int, int], seen: bool) -> Tensor:
    """A mask `[..., Tq, Tk]` of the image's blocks with the text's around it, all of them `seen` by all or not."""
    queries, keys = (layout.text // n for n in size)
    around = (keys, 0, queries, 0) if layout.text_first else (0, keys, 0, queries)
    return pad(mask, around, value=seen)


def _ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts `[B, H, Tq]` and indices `[B, H, Tq, Tk]` of a mask `[..., Tq, Tk]`, those that are set first."""
    mask = mask if mask.ndim == 4 else mask[None, None]
    return mask.sum(-1, dtype=torch.int32), mask.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def _kept_pairs(spec: AttentionSpec, plan: Plan, start: int) -> Pairs:
    """The token predicate of blocks that are kept in part; the image's tokens begin at `start`.

    It closes over tensors alone, so that one compilation serves every grid, radius and window: numbers would be constants of the graph.
    """
    g = plan.geometry
    coords, windows = g.coords, () if g.windows is None else tuple(g.windows)
    widest = min(max((pattern.reach for pattern in spec.tokenwise), default=-1), FARTHEST)
    first, last, reach = torch.tensor([start, len(plan.coords) - 1, widest], device=coords.device, dtype=torch.int32).unbind()

    def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # the text is outside of it: its blocks are whole, but eager FlexAttention asks for them too
        q, k = (torch.minimum((x - first).clamp_min(0), last) for x in (query, key))
        inside = functools.reduce(torch.add, [(coords[axis, q] - coords[axis, k]) ** 2 for axis in range(3)]) <= reach
        for bounds in windows:
            axes = [
                (coords[axis, k] >= bounds[axis, 0, q])
                & (coords[axis, k] <= bounds[axis, 1, q])
                & (bounds[axis, 2, k] == bounds[axis, 2, q])
                for axis in range(3)
            ]
            inside = inside | functools.reduce(torch.logical_and, axes)
        return inside

    return kept


@functools.cache
def compiled(backend: str = "inductor") -> Callable[..., Tensor]:
    """FlexAttention compiled for any number of tokens and of listed blocks: anew for another head size, dtype, block size, for gradients
    and for windows, not for every case, which takes half a minute each and past eight is refused by torch."""
    return torch.compile(flex_attention, fullgraph=True, dynamic=True, backend=backend)


def flex(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: TokenLayout) -> Attention:
    """Compiled FlexAttention over the blocks that q, k and v `[B, H, N, D]` choose. Raises ValueError as `block_mask` does."""
    mask = block_mask(q, k, v, spec, layout)
    rows, columns = mask.BLOCK_SIZE
    tiles: dict[str, Any] = {"fwd_BLOCK_M": min(rows, 128), "fwd_BLOCK_N": min(columns, 64)}  # its own may not divide the blocks
    return functools.partial(compiled(), block_mask=mask, kernel_options=tiles)


def natten_refusal(spec: AttentionSpec, layout: TokenLayout, device: torch.device) -> str | None:
    """Why NATTEN can't be compared with a method, or None where it can."""
    window = spec.find(Window)
    if window is None or len(spec.keep) != 1 or spec.rest is not None or spec.extras:
        return "NATTEN computes windows (GNA) alone"
    if layout.text or layout.references:
        return "NATTEN requires one grid without text"
    if any(n * d > side for n, d, side in zip(window.per_axis("size"), window.per_axis("dilation"), layout.grid, strict=True) if side > 1):
        return f"NATTEN requires windows within the grid {layout.grid}, not {window}"
    if device.type != "cuda":
        return "NATTEN's kernels require a CUDA device"
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed"
    return None


def natten(window: Window, layout: TokenLayout) -> Attention:
    """NATTEN's attention on `[B, H, N, D]` with the tokens in raster order."""
    from natten.functional import na2d, na3d

    skipped = 0 if layout.grid[0] > 1 else 1
    function, grid = (na2d if skipped else na3d), layout.grid[skipped:]
    names = {"kernel_size": "size", "stride": "stride", "dilation": "dilation"}
    given = {theirs: window.per_axis(ours)[skipped:] for theirs, ours in names.items()}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_last = (x.transpose(1, 2).unflatten(1, grid) for x in (q, k, v))
        out: Tensor = function(*heads_last, **given)
        return out.flatten(1, len(grid)).transpose(1, 2)

    return run
