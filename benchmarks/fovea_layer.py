"""One captured layer, cut into tiles, and what a form of Fovea makes of a tile of queries. The program is `fovea_forms.py`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.method import AttentionSpec, DiscBlocks, Mass, Pooled, Tiles
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout

TINY = 1e-20
SUB = 16  # queries of a sub-tile


@dataclasses.dataclass(frozen=True)
class Form:
    """One form. `score`: which blocks are kept (`SCORES`). `parts`: content parts of a tile. `variance`: of a pooled logit, by query, by
    head or by tile, or none. `weights` of the first order: None (zeroth order), "pooled", "tile", "sub", "query". `damp`: name in `DAMPS`.
    `spread`: σ² from the mean query, or from the tile's mean of q². `own`: the own tile is kept. `delta`: the tile's mean query is exact;
    `mass`: its mass too. `limit`: the first-order term is bounded by the deviation of values.
    `split`: how parts are made. `joint`: one covariance a tile, the mean of its parts'.
    `gain`: of the first order in each query, see `Tile.gain`."""

    score: str = "product"
    parts: int = 1
    variance: str = "query"
    weights: str | None = None
    damp: str = "one"
    spread: str = "second"
    own: bool = False
    delta: bool = False
    mass: bool = False
    limit: bool = False
    split: str = "runs"
    joint: bool = False
    gain: str = "rest"

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return ",".join(f"{name}={value}" for name, value in shown.items()) or "today"


DAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "half": lambda x: 1 / (1 + x / 2),
    "one": lambda x: 1 / (1 + x),
    "two": lambda x: 1 / (1 + 2 * x),
    "flat": lambda x: (1 + x * x).rsqrt(),
    "flat3": lambda x: (1 + x**3) ** (-1 / 3),
    "flat4": lambda x: (1 + x**4) ** -0.25,
    "clip": lambda x: 1 / x.clamp_min(1),
    "flat/2": lambda x: (1 + x * x / 4).rsqrt(),
    "flat/3": lambda x: (1 + x * x / 9).rsqrt(),
    "flat/4": lambda x: (1 + x * x / 16).rsqrt(),
    "flat*2": lambda x: (1 + 4 * x * x).rsqrt(),
    "steep": lambda x: 1 / (1 + x**1.5),
    "square": lambda x: 1 / (1 + x * x),
    "root": lambda x: (1 + x).rsqrt(),
    "exp": lambda x: -torch.expm1(-x) / x.clamp_min(1e-6),
}


class Layer:
    """One captured layer `[H, N, D]`, cut into tiles, and what forms need to know of its key blocks."""

    def __init__(self, item: tuple[Any, ...], tile: tuple[int, ...], stress: float) -> None:
        _, grid, text, first, scale, q, k, v = item
        self.layout = TokenLayout(tuple(grid), text, first)
        self.tile, spec = tile, AttentionSpec((DiscBlocks(1),), Pooled(), Mass(), Tiles(tile), (Tiles(tile).block,) * 2)
        self.plan = make_plan(spec, self.layout, torch.device("cpu"))
        self.s = stress * (scale or q.shape[-1] ** -0.5)
        self.kt, self.vt = (x[:, self.layout.text_slice] for x in (k, v))
        self.q, self.k, self.v = (x[:, self.layout.image_slice] for x in (q, k, v))
        self.blocks = self.plan.k_blocks
        self.n = self.blocks.count.float()
        self.valid = self.blocks.valid[..., None].float()
        self.qg, self.kg, self.vg = (self.gathered(x) for x in (self.q, self.k, self.v))
        self.q_mean = self.qg.sum(2) / self.n[:, None]
        self.q_second = self.qg.square().sum(2) / self.n[:, None]
        self.heads, self.tiles, self.width, self.d = self.qg.shape
        self.made: dict[tuple[int, str], Pools] = {}

    def gathered(self, x: Tensor) -> Tensor:
        return self.blocks.gather(x) * self.valid

    def own(self) -> Tensor:
        return torch.eye(self.tiles, dtype=torch.bool)

    def labels(self, parts: int, split: str) -> Tensor:
        """The part `[H, T, w]` of each of a tile's tokens, by its content."""
        label = torch.zeros(self.heads, self.tiles, self.width, dtype=torch.long)
        if parts == 1:
            return label
        if split == "runs":
            z = self.principal(self.valid.expand(self.heads, -1, -1, -1), split).masked_fill(~self.blocks.valid, torch.inf)
            rank = z.argsort(-1).argsort(-1)
            return (rank * parts // self.blocks.count[:, None]).clamp(max=parts - 1)
        level = 1
        while level < parts:
            for part in range(level):
                mine = (label == part)[..., None] * self.valid
                z = self.principal(mine, split)
                label = torch.where(mine[..., 0].bool(), label + level * (z > 0), label)
            level *= 2
        if split.endswith("lloyd"):
            label = self.lloyd(label, parts)
        return label

    def principal(self, mine: Tensor, split: str) -> Tensor:
        """`[H, T, w]`: keys less their mean over the tokens `mine` `[H, T, w, 1]`, along the direction that spreads logits most, or, for
        `cross`, values by logits."""
        n = mine.sum(2, keepdim=True).clamp_min(1)
        kc, vc = ((x - (x * mine).sum(2, keepdim=True) / n) * mine for x in (self.kg, self.vg))
        metric = self.q.mT @ self.q / self.q.shape[1]
        cov = vc.mT @ kc if split.startswith("cross") else kc
        u = torch.ones(self.heads, self.tiles, self.d)
        for _ in range(4):
            u = (cov.mT @ (cov @ u[..., None]))[..., 0] @ metric
            u = u / u.norm(dim=-1, keepdim=True).clamp_min(TINY)
        return (kc @ u[..., None])[..., 0]

    def lloyd(self, label: Tensor, parts: int) -> Tensor:
        """Three steps of k-means of keys in the queries' metric and of values, each by its spread."""
        x = torch.cat(
            [self.s * self.kg @ self.root[:, None], self.vg / self.pools(1).v_var.mean(1).clamp_min(TINY).sqrt()[:, None, None, None]], -1
        )
        for _ in range(3):
            member = F.one_hot(label, parts).float() * self.valid
            means = member.mT @ x / member.sum(2)[..., None].clamp_min(1)
            label = torch.cdist(x, means).argmin(-1)
        return label

    def pools(self, parts: int, split: str = "runs") -> "Pools":
        if (parts, split) not in self.made:
            self.made[parts, split] = Pools(self, self.labels(parts, split), parts)
        return self.made[parts, split]

    def score(self, name: str) -> Tensor:
        """`[H, Tq, Tk]` of a score's name, `product` or `NAME/PARTS`."""
        if name == "product":
            return self.s * self.q_mean @ self.pools(1).k_mean.mT * (self.n / self.width).sqrt()
        kind, _, parts = name.partition("/")
        pools = self.pools(int(parts or 1))
        spread = pools.sigma2
        mass = self.s * self.q_mean @ pools.k_mean.mT + pools.n.log() + (spread / 2).clamp(max=2)
        plain = self.s * self.q_mean @ pools.k_mean.mT + pools.n.log()

        def tail(x: Tensor, power: float) -> Tensor:
            return (power * (x + 1e-6).log() + 0.5 * (pools.v_var + 1e-6).log())[:, None]

        found = {
            "mass": lambda: mass,
            "plain_H": lambda: plain + pools.cov.flatten(2).norm(dim=-1).add(TINY).log()[:, None],
            "mass_H": lambda: mass + pools.cov.flatten(2).norm(dim=-1).add(TINY).log()[:, None],
            "mass_HM": lambda: mass + (pools.cov @ self.root[:, None]).flatten(2).norm(dim=-1).add(TINY).log()[:, None],
            "error": lambda: mass + 0.75 * (spread + 1e-6).log() + 0.5 * (pools.v_var + 1e-6).log()[:, None],
            "error1": lambda: mass + 0.5 * (spread + 1e-6).log() + 0.5 * (pools.v_var + 1e-6).log()[:, None],
            "error2": lambda: mass + (spread + 1e-6).log() + 0.5 * (pools.v_var + 1e-6).log()[:, None],
            "bias_error2": lambda: plain + (pools.head / 2).clamp(max=2)[:, None] + tail(pools.head, 1.0),
            "bias_error1": lambda: plain + (pools.head / 2).clamp(max=2)[:, None] + tail(pools.head, 0.5),
            "bias_free2": lambda: plain + tail(pools.head, 1.0),
            "bias_mass_H": lambda: plain + ((pools.head / 2).clamp(max=2) + pools.cov.flatten(2).norm(dim=-1).add(TINY).log())[:, None],
            "plain_error": lambda: plain + 0.75 * (spread + 1e-6).log() + 0.5 * (pools.v_var + 1e-6).log()[:, None],
        }[kind]()
        return found if parts in ("", "1") else (2 * found.unflatten(-1, (self.tiles, -1))).logsumexp(-1) / 2

    @functools.cached_property
    def root(self) -> Tensor:
        """The square root of the second moment of queries, by head."""
        values, vectors = torch.linalg.eigh(self.q.mT @ self.q / self.q.shape[1])
        return vectors * values.clamp_min(0).sqrt()[:, None]

    def keep(self, rule: str, score: str, own: bool) -> Tensor:
        """`[H, Tq, Tk]`; `rule`: a density or `rRADIUS`."""
        if rule.startswith("r"):
            spec = AttentionSpec((DiscBlocks(float(rule[1:])),), Pooled(), Mass(), Tiles(self.tile), (Tiles(self.tile).block,) * 2)
            kept = make_plan(spec, self.layout, torch.device("cpu")).static.kept(self.tiles)  # type: ignore[union-attr]
            return kept.expand(self.heads, -1, -1)
        values = self.score(score)
        if own:
            values = values.masked_fill(self.own(), torch.inf)
        count = max(1, int(float(rule) * self.tiles + 1e-9))
        return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, values.topk(count, -1).indices, True)


class Pools:
    """Moments of a layer's pooled keys: `[H, P, ...]` with P = tiles · parts."""

    def __init__(self, layer: Layer, label: Tensor, parts: int) -> None:
        self.parts = parts
        member = (F.one_hot(label, parts).float() * layer.valid).mT[..., None]  # [H, T, parts, w, 1]
        self.n = member.sum((3, 4)).flatten(1)[:, None]  # [H, 1, P]
        number = self.n.mT.clamp_min(1)  # [H, P, 1]
        k, v = ((x[:, :, None] * member).flatten(1, 2) for x in (layer.kg, layer.vg))
        member = member.flatten(1, 2)
        self.k_mean, self.v_mean = (x.sum(2) / number for x in (k, v))
        kc, vc = (k - self.k_mean[:, :, None]) * member, (v - self.v_mean[:, :, None]) * member
        self.k_var = kc.square().sum(2) / number
        self.v_var = vc.square().sum((2, 3)) / number[..., 0]
        self.cov = vc.mT @ kc / number[..., None]  # [H, P, D of v, D of k]
        s2 = layer.s**2
        self.sigma2 = s2 * layer.q_second @ self.k_var.mT  # [H, Tq, P]
        self.sigma2_mean = s2 * layer.q_mean.square() @ self.k_var.mT
        self.head = s2 * (layer.q.square().mean(1)[:, None] * self.k_var).sum(-1)  # [H, P]

    def unkept(self, kept: Tensor) -> Tensor:
        return ~kept.repeat_interleave(self.parts, -1)


def rest_logits(layer: Layer, pools: Pools, variance: str, queries: Tensor, tile: int) -> Tensor:
    """Logits `[H, w, P]` of queries of a tile over all pooled keys."""
    logits = layer.s * queries @ pools.k_mean.mT + pools.n.log()
    if variance == "query":
        return logits + (layer.s**2 / 2 * queries.square() @ pools.k_var.mT).clamp(max=2)
    if variance == "head":
        return logits + (pools.head / 2).clamp(max=2)[:, None]
    return logits + (pools.sigma2[:, tile] / 2).clamp(max=2)[:, None] if variance == "tile" else logits


class Tile:
    """One query tile: the exact numerator `[H, T, w, D]` and mass `[H, w, T]` of every key block, of its queries and of their mean."""

    def __init__(self, layer: Layer, number: int) -> None:
        self.layer, self.number = layer, number
        self.w = int(layer.n[number])
        queries = layer.qg[:, number, : self.w]
        rows = torch.cat([queries, layer.q_mean[:, number, None]], 1)
        self.queries, self.rows = queries, rows
        logits = (layer.s * rows @ layer.kg.flatten(1, 2).mT).unflatten(-1, (layer.tiles, layer.width))
        logits = logits.masked_fill(~layer.blocks.valid, -torch.inf)
        text = layer.s * rows @ layer.kt.mT
        self.top = torch.cat([logits.flatten(2).amax(-1, True), text], -1).amax(-1, True)
        weights = (logits - self.top[..., None]).exp()
        self.mass = weights.sum(-1)
        self.values = weights.transpose(1, 2) @ layer.vg
        over_text = (text - self.top).exp()
        self.text_mass, self.text_values = over_text.sum(-1), over_text @ layer.vt
        self.exact = (self.values.sum(1) + self.text_values)[:, : self.w] / (self.mass.sum(-1) + self.text_mass)[:, : self.w, None]
        self.cache: dict[Any, Tensor] = {}

    def pooled(self, parts: int, variance: str, split: str) -> Tensor:
        """exp of the logits of all pooled keys `[H, w + 1, P]`, in the units of `mass`."""
        key = (parts, variance, split)
        if key not in self.cache:
            logits = rest_logits(self.layer, self.layer.pools(parts, split), variance, self.rows, self.number)
            self.cache[key] = (logits - self.top).exp()
        return self.cache[key]

    def output(self, form: Form, kept: Tensor) -> Tensor:
        """`[H, w, D]` with the key blocks `kept` `[H, T]`."""
        layer, pools, w = self.layer, self.layer.pools(form.parts, form.split), self.w
        chosen = kept.float()
        num = torch.einsum("ht,htwd->hwd", chosen, self.values) + self.text_values
        mass = (self.mass @ chosen[..., None])[..., 0] + self.text_mass
        p = self.pooled(form.parts, form.variance, form.split) * pools.unkept(kept)[:, None]
        rest_mass, rest = p.sum(-1), p @ pools.v_mean
        shift = torch.zeros(layer.heads, w, layer.d)
        if form.weights:
            shift = self.first_order(form, pools, p, rest_mass, mass)
        if form.delta:
            open_ = (~kept).float()
            x_mass = (self.mass[:, -1] * open_).sum(-1)
            x = torch.einsum("ht,htd->hd", open_, self.values[:, :, -1]) / x_mass[:, None].clamp_min(TINY)
            shift = shift + (x - rest[:, -1] / rest_mass[:, -1, None].clamp_min(TINY))[:, None]
            if form.mass:
                factor = (x_mass / rest_mass[:, -1].clamp_min(TINY))[:, None, None]
                rest, rest_mass = rest * factor, rest_mass * factor[..., 0]
        total = (mass + rest_mass)[:, :w, None]
        gain = self.gain(form, pools, p, rest_mass) if form.weights and form.gain != "rest" else rest_mass[:, :w]
        return (num[:, :w] + rest[:, :w] + gain[..., None] * shift) / total

    def gain(self, form: Form, pools: Pools, p: Tensor, rest_mass: Tensor) -> Tensor:
        """`[H, w]`: by how much of a query's mass the state counts: `dot` and `slope`, as far as its weights agree with the state's
        (least squares over independent slopes, of equal norm or of their own); with `min`, never more than the mass of the rest."""
        w, groups = self.w, pools.parts if form.joint else 1
        own = (p[:, :w] * 1.0).unflatten(-1, (-1, groups)).sum(-1)
        if form.weights == "tile":
            state = (own / rest_mass[:, :w, None].clamp_min(TINY)).mean(1, keepdim=True)
        else:
            state = (p[:, -1:] / rest_mass[:, -1:, None].clamp_min(TINY)).unflatten(-1, (-1, groups)).sum(-1)
        if "slope" in form.gain:
            damped = pools.cov * DAMPS[form.damp](pools.head)[..., None, None]
            share = pools.n / self.layer.n.repeat_interleave(pools.parts) if form.joint else torch.ones_like(pools.n)
            norm = (damped * share.mT[..., None]).unflatten(1, (-1, groups)).sum(2).square().sum((-1, -2))[:, None]
        else:
            norm = torch.ones_like(state)
        found = (own * state * norm).sum(-1) / (state.square() * norm).sum(-1).clamp_min(TINY)
        return torch.minimum(found, rest_mass[:, :w]) if "min" in form.gain else found

    def first_order(self, form: Form, pools: Pools, p: Tensor, rest_mass: Tensor, mass: Tensor) -> Tensor:
        """s S_I q `[H, w, D]`, of q - q̄ where the mean query is exact already."""
        layer, w, i = self.layer, self.w, self.number
        sigma2 = {"second": pools.sigma2[:, i], "mean": pools.sigma2_mean[:, i], "head": pools.head}[form.spread]
        damp = DAMPS[form.damp](sigma2)[:, None]
        if form.weights == "pooled":
            weights = p[:, -1:] / rest_mass[:, -1:, None].clamp_min(TINY)
        else:
            true = p[:, :w] / (mass + rest_mass)[:, :w, None]
            size = {"tile": w, "sub": SUB, "query": 1}[form.weights]
            sums = torch.stack([part.sum(1) for part in true.split(size, 1)], 1)
            weights = sums / sums.sum(-1, keepdim=True).clamp_min(TINY)
            if form.weights == "query":
                damp = DAMPS[form.damp](layer.s**2 * self.queries.square() @ pools.k_var.mT)
        if form.joint:
            share = pools.n / layer.n.repeat_interleave(pools.parts)  # [H, 1, P]
            weights = weights.unflatten(-1, (-1, pools.parts)).sum(-1).repeat_interleave(pools.parts, -1) * share
        state = ((weights * damp) @ pools.cov.flatten(2)).unflatten(-1, (layer.d, layer.d))  # [H, subs, D, D]
        away = self.queries - layer.q_mean[:, i, None] if form.delta else self.queries
        number = torch.arange(w) // {"pooled": w, "tile": w, "sub": SUB, "query": 1}[form.weights]
        shift = layer.s * torch.cat([away[:, number == m] @ state[:, m].mT for m in range(state.shape[1])], 1)
        if form.limit:
            room = (weights @ pools.v_var[..., None])[:, number]
            shift = shift * (1 + shift.square().sum(-1, keepdim=True) / room.clamp_min(TINY)).rsqrt()
        return shift
