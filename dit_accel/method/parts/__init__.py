"""The parts of methods, a file for each slot: importing this package registers them."""

from dit_accel.method.parts.base import (
    Blockwise,
    Extra,
    Features,
    KeyWeight,
    Merge,
    Order,
    Part,
    Pattern,
    Readout,
    Rest,
    Score,
    Selection,
    Static,
    Tokenwise,
    part_types,
)
from dit_accel.method.parts.call import Boxes, Call, Cost, Grid, Ground, Sizes
from dit_accel.method.parts.convolve import Concentration, DepthwiseConv, DynamicConv, PreConv
from dit_accel.method.parts.far import Downsampled, Pooled
from dit_accel.method.parts.features import Hedgehog, NormPower, NormPreserving, Taylor, TokenSoftmax
from dit_accel.method.parts.gate import Gate
from dit_accel.method.parts.gates import OutputGate
from dit_accel.method.parts.linear import Linear
from dit_accel.method.parts.merges import Mass, Norm, Residual
from dit_accel.method.parts.offsets import PowerTiles, Stripes
from dit_accel.method.parts.orders import Raster, Tiles
from dit_accel.method.parts.patterns import Box, Disc, DiscBlocks, FirstFrames, Intervals, Window
from dit_accel.method.parts.scores import ErrorProduct, Estimated, MeanProduct, SelfSaliency
from dit_accel.method.parts.searches import Clusters, Pyramid
from dit_accel.method.parts.selections import Among, Columns, TopK, TopP
from dit_accel.method.parts.states import Decayed, DeltaScan, Ridge, Routed
from dit_accel.method.parts.tokens import Landmarks, Token
from dit_accel.method.parts.weights import Centred, Floored, KVGate, RankAugmented

__all__ = [
    "Among",
    "Blockwise",
    "Box",
    "Boxes",
    "Call",
    "Centred",
    "Clusters",
    "Columns",
    "Concentration",
    "Cost",
    "Decayed",
    "DeltaScan",
    "DepthwiseConv",
    "Disc",
    "DiscBlocks",
    "Downsampled",
    "DynamicConv",
    "ErrorProduct",
    "Estimated",
    "Extra",
    "Features",
    "FirstFrames",
    "Floored",
    "Gate",
    "Grid",
    "Ground",
    "Hedgehog",
    "Intervals",
    "KVGate",
    "KeyWeight",
    "Landmarks",
    "Linear",
    "Mass",
    "MeanProduct",
    "Merge",
    "Norm",
    "NormPower",
    "NormPreserving",
    "Order",
    "OutputGate",
    "Part",
    "Pattern",
    "Pooled",
    "PowerTiles",
    "PreConv",
    "Pyramid",
    "RankAugmented",
    "Raster",
    "Readout",
    "Residual",
    "Rest",
    "Ridge",
    "Routed",
    "Score",
    "Selection",
    "SelfSaliency",
    "Sizes",
    "Static",
    "Stripes",
    "Taylor",
    "Tiles",
    "Token",
    "TokenSoftmax",
    "Tokenwise",
    "TopK",
    "TopP",
    "Window",
    "part_types",
]
