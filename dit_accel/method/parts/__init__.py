"""The parts of methods, a file for each slot: importing this package registers them."""

from dit_accel.method.parts.base import (
    Blockwise,
    Merge,
    Order,
    Part,
    Pattern,
    Rest,
    Score,
    Selection,
    Static,
    Tokenwise,
    part_types,
)
from dit_accel.method.parts.call import Boxes, Call, Cost, Grid, Ground, Sizes
from dit_accel.method.parts.far import Downsampled, Pooled
from dit_accel.method.parts.linear import Linear
from dit_accel.method.parts.merges import Mass, Residual
from dit_accel.method.parts.offsets import PowerTiles, Stripes
from dit_accel.method.parts.orders import Raster, Tiles
from dit_accel.method.parts.patterns import Box, Disc, DiscBlocks, FirstFrames, Intervals, Window
from dit_accel.method.parts.scores import ErrorProduct, MeanProduct
from dit_accel.method.parts.selections import TopK, TopP

__all__ = [
    "Blockwise",
    "Box",
    "Boxes",
    "Call",
    "Cost",
    "Disc",
    "DiscBlocks",
    "Downsampled",
    "ErrorProduct",
    "FirstFrames",
    "Grid",
    "Ground",
    "Intervals",
    "Linear",
    "Mass",
    "MeanProduct",
    "Merge",
    "Order",
    "Part",
    "Pattern",
    "Pooled",
    "PowerTiles",
    "Raster",
    "Residual",
    "Rest",
    "Score",
    "Selection",
    "Sizes",
    "Static",
    "Stripes",
    "Tiles",
    "Tokenwise",
    "TopK",
    "TopP",
    "Window",
    "part_types",
]
