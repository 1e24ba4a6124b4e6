"""Teach `accelerate` a transformer class of one's own: a declaration, and nothing copied.

    python samples/new_family.py

What is needed: an attention module with a `processor` whose `__call__(attn, ...)` calls `dispatch_attention_fn` or
`F.scaled_dot_product_attention`, as all of diffusers' have, and a `Family` that says which modules are image self-attention, where the
grid of tokens comes from and where the text is placed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel import CLEAR, accelerate, restore, summary
from dit_accel.pipelines import Family, register


class ToyProcessor:
    def __call__(self, attn: "ToyAttention", x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ToyAttention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.inner_dim, self.processor = heads, width, ToyProcessor()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.processor(self, x)
        return out


class ToyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToyAttention() for _ in range(2))
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    def forward(self, hidden_states: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        x = torch.cat([text, hidden_states.flatten(2).mT], dim=1)  # [B, text + H·W, C]
        for block in self.blocks:
            x = x + block(x)
        return x[:, text.shape[1] :].mT.unflatten(2, hidden_states.shape[2:])


# The declaration. Nothing else is needed for another transformer.
register(
    Family(
        name="toy",
        classes=("ToyTransformer",),
        modules=r"blocks\.\d+",
        grid=lambda arguments, transformer: ((1, *arguments["hidden_states"].shape[2:]),),  # one image: (frames, height, width)
        text_first=True,
        text=lambda arguments: arguments["text"].shape[1],
        projections=("to_q", "to_k", "to_v"),  # what a LoRA would change
    )
)

torch.manual_seed(0)
transformer = ToyTransformer().eval()
latents, text, timestep = torch.randn(1, 64, 33, 47), torch.randn(1, 9, 64), torch.tensor([0.7])
with torch.no_grad():
    original = transformer(latents, text, timestep)
    accelerate(transformer, CLEAR(radius=1000), strict=True)
    whole = transformer(latents, text, timestep)
    print(f"all keys kept: relative difference {(whole - original).norm() / original.norm():.1e}")
    restore(transformer)
    accelerate(transformer, CLEAR(radius=8), strict=True)
    transformer(latents, text, timestep)
    summary(transformer)
