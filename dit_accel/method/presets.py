"""The methods by name: `Fovea`, `CLEAR`, `SLA` and `GNA` fill an `AttentionSpec`'s slots."""

import math
from typing import Literal

from dit_accel.errors import ArgumentError
from dit_accel.kernels.reference import FEATURE_MAPS
from dit_accel.method.checks import axes, is_int, is_real, plain, require
from dit_accel.method.parts import (
    Box,
    DepthwiseConv,
    Disc,
    DiscBlocks,
    Downsampled,
    ErrorProduct,
    FirstFrames,
    Linear,
    Mass,
    Order,
    Pattern,
    Pooled,
    Raster,
    Residual,
    Tiles,
    TopK,
    Window,
)
from dit_accel.method.spec import AttentionSpec


def _frames(count: int) -> tuple[Pattern, ...]:
    count = plain(count)
    require(is_int(count) and count >= 0, "first_frames must be a number of frames >= 0", count)
    return (FirstFrames(count),) if count else ()


def _tiles(tile: tuple[int, ...]) -> tuple[Order, tuple[int, int]]:
    sides = plain(tile)
    legal = isinstance(sides, tuple | list) and len(sides) in (2, 3) and all(is_int(side) and side >= 1 for side in sides)
    require(legal, "tile must be (height, width) or (frames, height, width) in tokens, ints >= 1", tile)
    count = math.prod(sides)
    legal = 16 <= count <= 128 and count & (count - 1) == 0
    require(legal, "tile must have a power of two from 16 to 128 tokens", tile, f"it has {count}; (8, 8) has 64, for example")
    order = Tiles(sides)
    return order, (math.prod(order.sides),) * 2


def Fovea(  # noqa: N802
    density: float | None = None, *, radius: float | None = None, blocks: int | None = None, tile: tuple[int, ...] = (8, 8),
    first_frames: int = 0, order: int = 0, parts: int | None = None, conv: int | None = None,
) -> AttentionSpec:  # fmt: skip
    """Training-free: exact attention to the blocks that matter, one pooled key for each other block, one softmax over both.

    Args:
        density: the share of tiles that each query tile keeps, those that would leave the largest error (`ErrorProduct`); 0.05 unless
            density, radius or blocks is given.
        radius: in tokens; keeps every tile that a disc of this radius touches (a ball in a video), without any selection.
        blocks: in the place of a share so many tiles, at every size.
        tile: (height, width) or (frames, height, width) in tokens, a power of two from 16 to 128 of them in all.
        first_frames: so many frames of a video are always kept.
        order: 1 lets the value of what is not kept change with the query, to first order, with four pooled keys for each tile and, far
            from a query, for each group of tiles (`Pooled(opened=8)`).
        parts: in their place so many pooled keys for each tile by itself, 1, 2 or 4; to order 0 it is 1.
        conv: adds a learned convolution of V over so many rows and columns of tokens (`DepthwiseConv`), an odd number, and over 3 frames
            where the tile has frames; it is nothing until it is distilled.

    Raises ValueError for values out of these ranges, and where two of density, radius and blocks are given. Ancestors, relatives, and
    Fovea with tiles kept by the product of means: docs/methods.md.
    """
    given = [f"{name}={value!r}" for name, value in (("density", density), ("radius", radius), ("blocks", blocks)) if value is not None]
    if len(given) > 1:
        raise ArgumentError(f"Fovea takes one of density, radius and blocks, not {' and '.join(given)}: leave all but one of them out")
    rest = Pooled(parts=4, order=order, opened=8) if order and parts is None else Pooled(parts=1 if parts is None else parts, order=order)
    if blocks is None:
        chosen = TopK(0.05 if density is None else density, score=ErrorProduct())
    else:
        require(is_int(blocks) and blocks >= 1, "blocks must be a number of tiles >= 1", blocks)
        chosen = TopK(0.0, score=ErrorProduct(), blocks=blocks)
    kept: Pattern = DiscBlocks(radius) if radius is not None else chosen
    conv = plain(conv)
    require(conv is None or (is_int(conv) and conv >= 3 and conv % 2 == 1), "conv must be None or an odd number of tokens >= 3", conv)
    order_of, block = _tiles(tile)
    extras = () if conv is None else (DepthwiseConv(conv, frames=3 if len(tile) == 3 else 1),)
    return AttentionSpec((kept, *_frames(first_frames)), rest, Mass(), order_of, block, extras)


def CLEAR(  # noqa: N802
    radius: float | tuple[int, ...], *, downsample: int | None = None, tile: tuple[int, ...] = (8, 8), first_frames: int = 0
) -> AttentionSpec:
    """CLEAR (arXiv 2412.16112): each image query sees a disc around itself and the text; needs distillation.

    Args:
        radius: in tokens; in a video of a ball over frames, rows and columns. A tuple, (height, width) or (frames, height, width), is
            a box.
        downsample: adds learned pooled keys, one for each square of so many rows and columns of tokens.
        tile: as in `Fovea`: what kernels compute together, which changes the time and not the result.
        first_frames: so many frames of a video are always kept.

    Raises ValueError for values that can't be used.
    """
    kept: Pattern = Box(radius) if isinstance(radius, tuple | list) else Disc(radius)
    rest, merge = (None, None) if downsample is None else (Downsampled(downsample), Mass(offset=False))
    return AttentionSpec((kept, *_frames(first_frames)), rest, merge, *_tiles(tile))


def SLA(  # noqa: N802
    topk: float,
    feature_map: Literal["softmax", "elu", "relu"] = "softmax",
    scope: Literal["complement", "all", "none"] = "complement",
    *,
    block: tuple[int, int] = (64, 64),
    tile: tuple[int, ...] | None = None,
    first_frames: int = 0,
) -> AttentionSpec:
    """Sparse-linear attention (SLA, arXiv 2509.24006): the best key blocks exactly, linear attention of the rest; needs distillation.

    The linear attention is added through a projection that starts at zero.

    Args:
        topk: the share of key blocks that each query block keeps, in (0, 1], those with the largest product of means.
        feature_map: of the linear attention.
        scope: what it covers: "complement", the blocks not kept (the paper); "all" blocks (the released weights); "none": no linear
            attention.
        block: (query, key) tokens of a block in raster order.
        tile: puts the blocks in tile order instead, as boxes of (height, width) or (frames, height, width) tokens.
        first_frames: so many frames of a video are always kept.

    Raises ValueError for values that can't be used.
    """
    require(scope in ("complement", "all", "none"), "scope must be 'complement', 'all' or 'none'", scope)
    topk = plain(topk)
    require(is_real(topk) and 0 < topk <= 1, "topk must be a share of key blocks in (0, 1]", topk)
    require(feature_map in tuple(FEATURE_MAPS), f"feature_map must be one of {tuple(FEATURE_MAPS)}", feature_map)
    order: Order = Raster()
    if tile is not None:
        require(block == (64, 64), "block must keep its default (64, 64) where tile is given", block, "leave it out, a tile is the block")
        order, block = _tiles(tile)
    keep = (TopK(topk), *_frames(first_frames))
    if scope == "none":
        return AttentionSpec(keep, order=order, block=block)
    return AttentionSpec(keep, Linear(feature_map, scope), Residual(), order, block)


def GNA(  # noqa: N802
    window: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    *,
    tile: tuple[int, ...] = (8, 8),
    first_frames: int = 0,
) -> AttentionSpec:
    """Generalized neighborhood attention (NATTEN, arXiv 2504.16922): each image query sees a window around itself and the text.

    Args:
        window: its full width in tokens, of all axes, or (height, width) or (frames, height, width).
        stride: above 1, so many neighbours share one window. A stride of the tile's size is sliding tile attention (arXiv 2502.04507).
        dilation: the step between a window's keys.
        tile: as in `Fovea`: what kernels compute together, which changes the time and not the result.
        first_frames: so many frames of a video are always kept.

    Raises ValueError for values that can't be used.
    """
    window = axes("window", plain(window))  # which the pattern calls its size
    return AttentionSpec((Window(window, stride, dilation), *_frames(first_frames)), None, None, *_tiles(tile))
