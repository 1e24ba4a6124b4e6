"""What stands for the drawings that the built-in models were trained on."""

import torch

from dit_accel.pipelines.builtin.drawings import CONCEPTS, Renderings


def discs() -> Renderings:
    """Discs of a colour each in place of drawings."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    inside = ((rows**2 + columns**2) < 0.9)[None]
    colours = torch.rand(len(CONCEPTS), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return Renderings({64: [torch.cat([c * inside, inside]).mul(255).byte() for c in colours]}, list(CONCEPTS.values()))
