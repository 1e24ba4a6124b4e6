"""What several test files share: a dense oracle of every method, written from the formulas alone, and the way to compare with it.

The oracle makes N × N masks, works in raster order, knows tiles only as a number per token, and calls neither the plan nor a kernel.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_device import eager as eagerly
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.method import (
    AttentionSpec,
    Box,
    Disc,
    DiscBlocks,
    Downsampled,
    ErrorProduct,
    FirstFrames,
    Linear,
    Mass,
    Order,
    Pooled,
    Tiles,
    TopK,
    TopP,
    Window,
)
from dit_accel.method.parameters import AttentionParameters
from dit_accel.operator.layout import TokenLayout

Grid = tuple[int, int, int]
Grids = tuple[Grid, ...]


@dataclass(frozen=True)
class Shape:
    """The sizes of one attention call."""

    batch: int
    heads: int
    head_dim: int
    grid: Grid
    text: int = 0
    text_first: bool = True
    references: tuple[Grid, ...] = ()

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.text, self.text_first, references=self.references)

    def inputs(self, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> list[Tensor]:
        """Query, key and value, the same ones at each call; logits spread enough for the softmax to choose."""
        seed = torch.Generator().manual_seed(self.head_dim + self.text)
        size = (self.batch, self.heads, self.layout.tokens, self.head_dim)
        return [(s * torch.randn(size, generator=seed)).to(dtype).requires_grad_(grad) for s in (2.0, 1.0, 1.0)]

    def text_bias(self, *, masked: bool = False) -> Tensor:
        """`[B, text]`: every third entry -inf, of each sample another third, the others about 1 in size; where `masked`, all -inf."""
        bias = torch.randn(self.batch, self.text, generator=torch.Generator().manual_seed(9))
        gone = (torch.arange(self.text) + torch.arange(self.batch)[:, None]) % 3 == 0
        return bias.masked_fill(gone | masked, -torch.inf)


def random_parameters(spec: AttentionSpec, shape: Shape, dtype: torch.dtype = torch.float32) -> AttentionParameters:
    """The spec's parameters away from their start values."""
    params = spec.make_parameters(heads=shape.heads, head_dim=shape.head_dim).to(dtype)
    seed = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in params.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=seed).to(dtype))
    return params


def gradients(function: Callable[..., tuple[Tensor, Tensor]], spec: AttentionSpec, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """By name, of a loss in which both the output and the lse take part."""
    qkv = [x.to(dtype).requires_grad_() for x in shape.inputs()]
    params = random_parameters(spec, shape).to(dtype)
    seed = torch.Generator().manual_seed(5)
    sum((x * torch.randn(x.shape, generator=seed).to(x.dtype)).sum() for x in function(qkv, params)).backward()  # type: ignore[union-attr]
    learned = {"query": qkv[0], "key": qkv[1], "value": qkv[2], **dict(params.named_parameters())}
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in learned.items()}


# Choosing cases


def spread(keep: int, *axes: Mapping[str, Any]) -> list[Any]:
    """One of `keep` cases of a full grid, as pytest's parameters: those whose numbers along all axes add up to a multiple of it.

    Every combination of all axes but one is among them where that one has `keep` values or more: any pair of values meets, and of more
    than three axes any three.
    """
    numbered = [list(enumerate(axis.items())) for axis in axes]
    chosen = [case for case in itertools.product(*numbered) if sum(number for number, _ in case) % keep == 0]
    return [pytest.param(*(value for _, (_, value) in case), id="-".join(name for _, (name, _) in case)) for case in chosen]


# Comparing


def assert_close_as_eager(got: Tensor, exact: Tensor, eager: Tensor, name: str = "output") -> None:
    """The error of `got` is at most twice that of `eager`, which is the same formula run naively in low precision, plus one rounding.

    Errors are root mean squares against `exact` (float64); a maximum over few numbers would be luck.
    """
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert exact.dtype == torch.float64
    assert got.isfinite().all(), f"{name} is not finite"
    error, allowed, size = (x.square().mean().sqrt().item() for x in (got.double() - exact, eager.double() - exact, exact))
    budget = 2 * allowed + torch.finfo(got.dtype).eps / 2 * size
    assert error <= budget, f"{name}: error {error:.3e} exceeds {budget:.3e}; eager makes {allowed:.3e}, size {size:.3e}"


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All elements in one row."""
    return torch.cat([x.flatten() for x in tensors.values()])


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


# The oracle: which pairs are kept


def coordinates(grids: Grids) -> Tensor:
    """(t, y, x) `[N, 3]` of the image tokens in raster order, image after image."""
    return torch.cat([torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 3) for grid in grids])


def image_of(grids: Grids) -> Tensor:
    """The number `[N]` of the image that each token is in."""
    return torch.cat([torch.full((math.prod(grid),), number) for number, grid in enumerate(grids)])


def block_of(grids: Grids, order: Order, block: int) -> Tensor:
    """The number `[N]` of the block that holds each raster token; no block holds tokens of two images.

    Raster: runs of `block`. Tiles: an axis of L tokens is cut into P = ceil(L / side) parts, part p from ⌊L·p/P⌋ on.
    """
    numbers, before = [], 0
    for grid in grids:
        number = torch.zeros(math.prod(grid), dtype=torch.long)
        if not isinstance(order, Tiles):
            number = torch.arange(math.prod(grid)) // block
        else:
            for position, length, side in zip(coordinates((grid,)).unbind(-1), grid, order.sides, strict=True):
                parts = math.ceil(length / side)
                number = number * parts + ((position + 1) * parts - 1) // length
        numbers.append(number + before)
        before += int(number.max()) + 1
    return torch.cat(numbers)


def membership(number: Tensor) -> Tensor:
    """`[N, T]`, 1 where the token is in the block."""
    return F.one_hot(number).double()


def disc_pairs(grids: Grids, radius: float) -> Tensor:
    """`[N, N]`: squared distance < radius², strict; further images lie over the first."""
    p = coordinates(grids).double()
    return (p[:, None] - p).square().sum(-1) < radius**2


def box_pairs(grids: Grids, radii: tuple[int, int, int]) -> Tensor:
    """`[N, N]`: |distance| < radius along every axis."""
    p = coordinates(grids)
    return ((p[:, None] - p).abs() < torch.tensor(radii)).all(-1)


def window_keys(i: int, length: int, size: int, stride: int, dilation: int) -> list[int]:
    """The keys that query i of an axis sees (clear.md 5.1): a group is the tokens of one residue, a window never leaves it."""
    group = list(range(i % dilation, length, dilation))
    k = min(size, len(group))
    left, right = k // 2, k // 2 + k % 2 - 1
    leader = min(group.index(i) // stride * stride + stride // 2, len(group) - 1)
    centre = max(left, min(leader, len(group) - 1 - right))
    return group[centre - left : centre + right + 1]


def window_pairs(grids: Grids, window: Window) -> Tensor:
    """`[N, N]`: the AND over the axes; the window is that of the query's own image, and what lies under it in the others is seen too."""
    p, kept = coordinates(grids), torch.tensor(True)
    for axis, longest in enumerate(int(n) for n in p.amax(0) + 1):
        size, stride, dilation = (window.per_axis(name)[axis] for name in ("size", "stride", "dilation"))
        seen = torch.zeros(len(grids), longest, longest, dtype=torch.bool)
        for number, grid in enumerate(grids):
            for i in range(grid[axis]):
                seen[number, i, window_keys(i, grid[axis], size, stride, dilation)] = True
        kept = kept & seen[image_of(grids)[:, None], p[:, None, axis], p[None, :, axis]]
    return kept


def top_pairs(
    q: Tensor, k: Tensor, v: Tensor | None, top: TopK, q_number: Tensor, k_number: Tensor, block: int, scale: float
) -> Tensor:  # fmt: skip
    """`[B, H, N, N]`: the n = max(1, ⌊density · T⌋ + blocks) key blocks with the largest product of block means, or error."""
    q_in, k_in = membership(q_number), membership(k_number)
    q_mean, k_mean = (m.T @ x.double() / m.sum(0)[:, None] for m, x in ((q_in, q), (k_in, k)))
    score = q_mean @ k_mean.mT
    if isinstance(top.score, ErrorProduct):
        assert v is not None
        n = k_in.sum(0)
        k_var, v_var = (k_in.T @ (x.double() - k_in @ (k_in.T @ x.double() / n[:, None])).square() / n[:, None] for x in (k, v))
        spread = scale**2 * (q.double().square().mean(-2, keepdim=True) @ k_var.mT)
        value = v_var.sum(-1)[..., None, :]
        score = scale * score + n.log() + (spread / 2).clamp(max=top.score.cap) + spread.log() + value.log() / 2
    if top.correct_short:
        score = score * (k_in.sum(0) / block).sqrt()
    n = min(k_in.shape[1], max(1, math.floor(top.density * k_in.shape[1] + 1e-9) + top.blocks))
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(n, -1).indices, True)
    return chosen[..., q_number, :][..., k_number]


def mass_pairs(q: Tensor, k: Tensor, top: TopP, q_number: Tensor, k_number: Tensor, scale: float) -> Tensor:
    """`[B, H, N, N]`: key blocks, best first, until softmax(scale · q̄·k̄ + log n) over blocks of n tokens reaches the mass."""
    q_in, k_in = membership(q_number), membership(k_number)
    q_mean, k_mean = (m.T @ x.double() / m.sum(0)[:, None] for m, x in ((q_in, q), (k_in, k)))
    share = (scale * q_mean @ k_mean.mT + k_in.sum(0).log()).softmax(-1)
    most = max(1, math.floor(top.at_most * k_in.shape[1] + 1e-9))
    better = share[..., None, :] > share[..., :, None]  # blocks before each other one
    chosen = ((better * share[..., None, :]).sum(-1) < top.mass) & (better.sum(-1) < most)
    return chosen[..., q_number, :][..., k_number]


def kept_pairs(
    q: Tensor, k: Tensor, spec: AttentionSpec, grids: Grids, scale: float | None = None, v: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`[B, H, N, N]`: the union of the patterns over image tokens `[B, H, N, D]`, decided in float64. `v`: for a score by the error."""
    size = q.shape[-1] ** -0.5 if scale is None else scale
    q_number, k_number = (block_of(grids, spec.order, b) for b in spec.block)
    kept = torch.zeros(*q.shape[:3], q.shape[2], dtype=torch.bool)
    for pattern in spec.keep:
        match pattern:
            case TopK():
                values = None if v is None else v.detach()
                kept = kept | top_pairs(q.detach(), k.detach(), values, pattern, q_number, k_number, spec.block[1], size)
            case TopP():
                kept = kept | mass_pairs(q.detach(), k.detach(), pattern, q_number, k_number, size)
            case Disc(radius):
                kept = kept | disc_pairs(grids, radius)
            case DiscBlocks(radius):
                touched = membership(q_number).T @ disc_pairs(grids, radius).double() @ membership(k_number) > 0
                kept = kept | touched[q_number][:, k_number]
            case Window():
                kept = kept | window_pairs(grids, pattern)
            case Box():
                kept = kept | box_pairs(grids, pattern.radii)
            case FirstFrames(count):
                touched = (coordinates(grids)[:, 0] < count).double() @ membership(k_number) > 0
                kept = kept | touched[k_number]
    return kept


# The oracle: the rest


def pooled_keys(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, rest: Pooled, number: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Logits `[B, H, N, T]` and values of the pooled keys: s·q·k̄ + log n + min(s²/2 · Σ q² Var(k), cap); -inf where kept."""
    m = membership(number)
    n, gone = m.sum(0).to(q.dtype), kept.double() @ m > 0
    m = m.to(q.dtype)
    k_mean, v_mean = (m.T @ x / n[:, None] for x in (k, v))
    logits = scale * q @ k_mean.mT
    if rest.log_count:
        logits = logits + n.log()
    if rest.variance:
        var = m.T @ (k - m @ k_mean).square() / n[:, None]
        logits = logits + (scale**2 / 2 * q.square() @ var.mT).clamp(max=rest.cap)
    return logits.masked_fill(gone, -torch.inf), v_mean


def downsampled(x: Tensor, grids: Grids, factor: int, weight: Tensor) -> Tensor:
    """`[B, H, M, D]`: the weighted sum of each factor × factor patch, times factor²/tokens where the border cuts it off."""
    t, y, x_ = coordinates(grids).unbind(-1)
    patch = torch.stack([image_of(grids), t, y // factor, x_ // factor])
    m = membership(patch.unique(dim=1, return_inverse=True)[1]).to(x.dtype)
    return (m * weight.to(x.dtype)[y % factor, x_ % factor][:, None] * factor**2 / m.sum(0)).T @ x


def linear_rest(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, rest: Linear) -> tuple[Tensor, Tensor]:
    """phi(q)·phi(k) as weights (sla.md 1.4), and the log of their sum: over the pairs not kept, or over all with SLA's 1e-5."""
    maps = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": torch.relu}
    weight = maps[rest.feature_map](q) @ maps[rest.feature_map](k).mT
    if rest.scope == "all":
        mass = weight.sum(-1) + 1e-5
        return weight @ v / mass[..., None], mass.log()
    weight = weight.masked_fill(kept, 0)
    empty = weight.sum(-1) == 0
    mass = weight.sum(-1).masked_fill(empty, 1)
    return weight @ v / mass[..., None], mass.log().masked_fill(empty, -torch.inf)


# The oracle


@eagerly()
def oracle(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: TokenLayout, params: AttentionParameters | None = None,
    *, scale: float | None = None, text_bias: Tensor | None = None, dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse of `[B, H, N, D]` in raster order, computed densely and naively in `dtype`; what is kept is decided in float64."""
    text = torch.arange(layout.text) + (0 if layout.text_first else layout.image)
    image = torch.arange(layout.image) + (layout.text if layout.text_first else 0)
    kept = kept_pairs(q[:, :, image], k[:, :, image], spec, layout.grids, scale, v[:, :, image])
    params = spec.make_parameters(heads=q.shape[1], head_dim=q.shape[3]) if params is None else params
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(dtype) for x in (q, k, v))
    qi, ki, vi = (x[:, :, image] for x in (q, k, v))
    logits = [scale * qi @ k[:, :, text].mT, (scale * qi @ ki.mT).masked_fill(~kept, -torch.inf)]
    values = [v[:, :, text], vi]
    bias = torch.zeros(q.shape[0], layout.tokens, dtype=dtype)  # of every key, by the text's place
    if text_bias is not None:
        bias[:, text] = text_bias.to(dtype)
    logits[0] = logits[0] + bias[:, None, None, text]

    learned = dict(params.named_parameters())
    offset = learned["offset"].to(dtype)[:, None, None] if "offset" in learned else 0.0
    if isinstance(spec.rest, Pooled):
        extra, value = pooled_keys(qi, ki, vi, kept, spec.rest, block_of(layout.grids, spec.order, spec.block[1]), scale)
        logits, values = [*logits, extra + offset], [*values, value]
    if isinstance(spec.rest, Downsampled):
        key, value = (downsampled(x, layout.grids, spec.rest.factor, learned["spatial_weight"]) for x in (ki, vi))
        logits, values = [*logits, scale * qi @ key.mT + offset], [*values, value]
    joint = torch.cat(logits, -1)
    out, lse = joint.softmax(-1) @ torch.cat(values, 2), joint.logsumexp(-1)
    if isinstance(spec.rest, Linear):
        value, mass = linear_rest(qi, ki, vi, kept, spec.rest)
        if isinstance(spec.merge, Mass):
            share = (lse[..., None] - mass[..., None] - offset).sigmoid()
            out, lse = share * out + (1 - share) * value, torch.logaddexp(lse, mass + (offset[..., 0] if "offset" in learned else 0))
        else:
            out = out + value @ learned["proj.weight"].to(dtype).T + learned["proj.bias"].to(dtype)

    dense = scale * q[:, :, text] @ k.mT + bias[:, None, None]
    back = torch.cat([text, image]).argsort()
    return torch.cat([dense.softmax(-1) @ v, out], 2)[:, :, back], torch.cat([dense.logsumexp(-1), lse], 2)[:, :, back]
