"""What is computed: a method is a spec whose slots are filled; presets fill them for the published methods."""

from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.method.spec import (
    AttentionSpec,
    Box,
    Disc,
    DiscBlocks,
    Downsampled,
    FirstFrames,
    Linear,
    Mass,
    Pooled,
    Raster,
    Residual,
    Tiles,
    TopK,
    Window,
)

__all__ = [
    "CLEAR",
    "GNA",
    "SLA",
    "AttentionSpec",
    "Box",
    "Disc",
    "DiscBlocks",
    "Downsampled",
    "FirstFrames",
    "Fovea",
    "Linear",
    "Mass",
    "Pooled",
    "Raster",
    "Residual",
    "Tiles",
    "TopK",
    "Window",
]
