"""The built-in video model's forward for training: over tokens, in one dtype, nothing that waits for the device.

The stock forward under autocast goes back to float32 at every norm and modulation, which takes two to three times the memory traffic, and
copies positions from the CPU at every step. Here those are made once per grid and the text's masks once per caption; sums inside kernels
are float32. The parameters are the modules' own, and the tests hold outputs and gradients to the stock pipeline's.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from dit_accel.pipelines.builtin_video.studio import Studio
from dit_accel.pipelines.builtin_video.transformer import WAVES, over, places

Grid = tuple[int, int, int]  # frames, rows and columns of tokens


def to_tokens(latents: Tensor) -> Tensor:
    """Latents `[B, C, T, 2h, 2w]` as tokens `[B, T·h·w, 4C]`, in the order of the output projection."""
    patches = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # [B, C, T, h, 2, w, 2]
    return patches.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


class TokenModel:
    """A pipeline's text encoder and transformer over tokens, in `dtype`: float32, or bfloat16 as under autocast."""

    def __init__(self, pipe: WanPipeline, studio: Studio, dtype: torch.dtype) -> None:
        self.transformer, self.encoder, self.device, self.dtype = pipe.transformer, pipe.text_encoder, studio.device, dtype
        self.tables: dict[Grid, tuple[Tensor, Tensor]] = {}
        tokens = pipe.tokenizer(studio.captions, padding="longest", return_tensors="pt")
        self.ids, self.valid = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        # of all captions: made within the text encoder, a mask waits for the device
        embeds = torch.zeros(*self.ids.shape, self.encoder.config.d_model)
        masks = create_bidirectional_mask(self.encoder.encoder.config, inputs_embeds=embeds, attention_mask=tokens.attention_mask)
        self.masks = masks.to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """For what is too small to be worth more."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()

    def embed(self, numbers: Tensor, length: int) -> Tensor:
        """Text `[B, length, C]` of captions by their numbers, zero after their ends, as WanPipeline makes it; float32, with gradient.

        `length` is not less than the longest caption's."""
        with self.autocast():
            out = self.encoder(self.ids[numbers], self.masks[numbers]).last_hidden_state.float()
        return F.pad(out * self.valid[numbers][..., None], (0, 0, 0, length - out.shape[1]))

    def clean(self, tokens: Tensor, sigma: Tensor, text: Tensor, grid: Grid) -> Tensor:
        """The clean tokens `[B, N, 4C]` that are predicted of noisy ones at noise levels `sigma` [B]; float32."""
        model, kind = self.transformer, self.dtype
        turn, features = self._table(grid)
        embedding = model.patch_embedding
        weight = embedding.weight.permute(0, 2, 3, 4, 1).flatten(1)
        x = F.linear(tokens.to(kind), weight.to(kind), embedding.bias.to(kind)) + F.linear(features, embedding.place.weight).to(kind)
        with self.autocast():
            time, steps, text, _ = model.condition_embedder(sigma * 1000, text)
        steps, text = steps.unflatten(1, (6, -1)).float(), text.to(kind)
        for block in model.blocks:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (block.scale_shift_table + steps).to(kind).chunk(6, 1)
            y = _modulated(x, block.norm1, shift, scale)
            x = torch.addcmul(x, self._attend(block.attn1, y, y, turn), gate)
            norm = block.norm2
            x = x + self._attend(block.attn2, F.layer_norm(x, x.shape[-1:], norm.weight.to(kind), norm.bias.to(kind), norm.eps), text, None)
            y = self._linear(block.ffn.net[0].proj, _modulated(x, block.norm3, shift_mlp, scale_mlp))
            x = torch.addcmul(x, self._linear(block.ffn.net[2], F.gelu(y, approximate="tanh")), gate_mlp)
        shift, scale = (model.scale_shift_table + time.float().unsqueeze(1)).to(kind).chunk(2, 1)
        return self._linear(model.proj_out, _modulated(x, model.norm_out, shift, scale)).float()

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight.to(self.dtype), layer.bias.to(self.dtype))

    def _attend(self, layer: Any, x: Tensor, context: Tensor, turn: Tensor | None) -> Tensor:
        """Attention of `[B, N, C]` over a context, with rotated queries and keys where there are rotations."""
        queries, keys = (
            F.rms_norm(self._linear(projection, y), (projection.out_features,), norm.weight.to(self.dtype), norm.eps)
            for projection, y, norm in ((layer.to_q, x, layer.norm_q), (layer.to_k, context, layer.norm_k))
        )
        q, k, v = (y.unflatten(2, (layer.heads, -1)) for y in (queries, keys, self._linear(layer.to_v, context)))
        if turn is not None:
            q, k = (self._turned(y, turn) for y in (q, k))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self._linear(layer.to_out[0], out.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor, turn: Tensor) -> Tensor:
        """`[B, N, H, D]` with its pairs of channels multiplied by rotations."""
        pairs = torch.view_as_complex(x.float().unflatten(3, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(3).to(self.dtype)

    def _table(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Rotations `[1, N, 1, D/2]`, complex64, and features of places `[N, F]` of a grid, made once."""
        if grid not in self.tables:
            frames, rows, columns = grid
            cos, sin = self.transformer.rope(torch.empty(1, 1, frames, 2 * rows, 2 * columns))
            waves = 2 * math.pi / torch.tensor(WAVES, dtype=torch.float64)
            angles = [torch.outer(axis, waves) for axis in places(grid)]
            features = over(grid, [torch.cat([x.sin(), x.cos()], 1) for x in angles]).flatten(0, 2).float()
            turn = torch.complex(cos[..., 0::2].contiguous(), sin[..., 0::2].contiguous())
            self.tables[grid] = turn.to(self.device), features.to(self.device)
        return self.tables[grid]


def _modulated(x: Tensor, norm: Any, shift: Tensor, scale: Tensor) -> Tensor:
    """A norm without weights, times 1 + scale, plus shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=norm.eps), 1 + scale)
