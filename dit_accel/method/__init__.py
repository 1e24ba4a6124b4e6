"""What is computed: a method is a spec whose slots are filled; presets fill them for the published methods."""

from dit_accel.method.assignment import Assignment, Rule
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
    "Assignment",
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
    "Rule",
    "Tiles",
    "TopK",
    "Window",
]
