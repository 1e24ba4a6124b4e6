"""What a spec costs on a layout: pairs of tokens, multiply-adds, tensors read. The only place where they are counted.

The exact part is counted from the plan's block lists; what choosing and the rest add, each part says itself (`Part.cost`).
"""

import functools
from typing import NamedTuple

import torch

from dit_accel.kernels.blocks import BlockMap, unpacked
from dit_accel.method.parts import Grid, Sizes
from dit_accel.method.parts.call import Cost, total
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout

COUNTED_PAIRS = 1 << 22  # pairs of tokens that are counted together
TENSORS = 4  # q, k, v and out


def kept_density(spec: AttentionSpec, layout: TokenLayout) -> float:
    """The share of image token pairs that the spec attends to exactly on this grid, counted block list by block list."""
    return _shares(spec, layout.grids).kept


def visited_density(spec: AttentionSpec, layout: TokenLayout) -> float:
    """The share of image token pairs in the blocks that are visited: `kept_density` and what partial blocks compute in vain."""
    return _shares(spec, layout.grids).visited


def kept_pairs(spec: AttentionSpec | None, layout: TokenLayout) -> float:
    """Pairs of image tokens that are attended to exactly; `spec` None: the original attention.

    By arithmetic where one pattern can tell, with blocks of the mean size where they are chosen, else counted.
    """
    if spec is None:
        return layout.image**2
    if len(spec.keep) == 1 and not layout.references:
        if spec.selection is not None:
            shares = _shares(spec, layout.grids)
            return layout.image**2 * spec.selection.count(shares.k_blocks) / shares.k_blocks
        if (pairs := spec.static[0].pairs(layout.grid)) is not None:
            return pairs
    return kept_density(spec, layout) * layout.image**2


def multiply_adds(spec: AttentionSpec, layout: TokenLayout, head_dim: int) -> float:
    """Multiply-adds of image queries over image keys as a share of dense attention's 2·N²·D: visited pairs, and what the parts add."""
    shares = _shares(spec, layout.grids)
    sizes = Sizes(layout.image, shares.q_blocks, shares.k_blocks, head_dim)
    return shares.visited + _added(spec, sizes).multiply_adds / (2 * layout.image**2 * head_dim)


def image_pairs(spec: AttentionSpec | None, layout: TokenLayout, head_dim: int) -> float:
    """The arithmetic on image tokens as pairs of tokens, each 2·D multiply-adds of a head; `spec` None: the original attention."""
    return layout.image**2 * (1.0 if spec is None else multiply_adds(spec, layout, head_dim))


def computed_pairs(spec: AttentionSpec | None, layout: TokenLayout, head_dim: int) -> float:
    """The same of a whole layer, pairs with text in full."""
    return with_text(image_pairs(spec, layout, head_dim), layout)


def with_text(image_pairs: float, layout: TokenLayout) -> float:
    """Pairs of image tokens, and all those in which text takes part."""
    return image_pairs + layout.tokens**2 - layout.image**2


def passes(spec: AttentionSpec | None) -> int:
    """Tensors of N × D that a forward reads or writes: q, k, v, out, and what choosing blocks and the rest read once more."""
    return TENSORS + (0 if spec is None else _added(spec, Sizes(1, 1, 1, 1)).passes)


def _added(spec: AttentionSpec, sizes: Sizes) -> Cost:
    """Of the parts; a part that is a field of another is counted there."""
    return total([part.cost(sizes) for part in (*spec.keep, spec.rest, spec.merge, *spec.extras) if part is not None])


class _Shares(NamedTuple):
    """Shares of image token pairs, and the numbers of blocks."""

    kept: float
    visited: float
    q_blocks: int
    k_blocks: int


@functools.lru_cache(maxsize=256)
def _shares(spec: AttentionSpec, grids: tuple[Grid, ...]) -> _Shares:
    plan = make_plan(spec, TokenLayout(grids[0], order=spec.order, references=grids[1:]), torch.device("cpu"))
    tokens, blocks = len(plan.coords), len(plan.k_blocks.count)
    # a chosen block's size depends on the content: its mean is taken where blocks differ
    visited = spared = 0
    if plan.static:
        keys = plan.k_blocks.count[plan.static.index] * plan.static.valid
        visited = int((keys.sum(-1) * plan.q_blocks.count).sum())
        spared = visited - _static_pairs(plan, plan.static)
    chosen = plan.top * tokens * tokens / blocks
    kept, computed = (min(1.0, (pairs + chosen) / tokens**2) for pairs in (visited - spared, visited))
    return _Shares(kept, computed, len(plan.q_blocks.count), blocks)


def _static_pairs(plan: Plan, static: BlockMap) -> int:
    """Pairs of tokens in the static lists that are kept: all of a whole block, of a partial one those that the tables say."""
    partial = torch.zeros_like(static.valid) if static.partial is None else static.partial & static.valid
    whole = plan.k_blocks.count[static.index] * (static.valid & ~partial)
    pairs = int((whole.sum(-1) * plan.q_blocks.count).sum())
    row, place = partial.nonzero(as_tuple=True)
    if not len(row):
        return pairs
    together, tables = max(1, COUNTED_PAIRS // (plan.q_blocks.index.shape[1] * plan.k_blocks.index.shape[1])), plan.geometry.tables
    if tables.masks is not None and static.mask_of is not None:
        bits = [unpacked(part, plan.k_blocks.index.shape[1]).sum((-1, -2)) for part in tables.masks.split(together)]
        return pairs + int(torch.cat(bits)[static.mask_of[row, place]].sum())
    column = static.index[row, place]
    for rows, columns in zip(row.split(together), column.split(together), strict=True):
        allowed = tables.kept(rows, columns[:, None], None, plan.q_blocks, plan.k_blocks)
        tokens = plan.q_blocks.valid[rows][..., :, None] & plan.k_blocks.valid[columns][..., None, :]
        pairs += int((allowed & tokens).sum())
    return pairs
