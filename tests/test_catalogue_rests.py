"""Rests and merges of the literature, each with its formula written densely in float64, token by token: nothing here calls another part."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Shape, block_of, coordinates, image_of, kept_pairs, membership, random_parameters
from torch import Tensor

from dit_accel import AttentionSpec, attention
from dit_accel.kernels.reference import Partial
from dit_accel.method import Decayed, DiscBlocks, Landmarks, Linear, Mass, Norm, Raster, Rest, Routed, Tiles, Token, TopK
from dit_accel.method.parameters import AttentionParameters
from dit_accel.method.parts import tokens
from dit_accel.operator import lowering
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call, visited_blocks

SHAPES = {
    "text-first": Shape(1, 2, 16, (1, 11, 14), 5),
    "video-text-last": Shape(2, 1, 8, (3, 5, 9), 4, False),
    "references": Shape(1, 2, 16, (1, 9, 6), 3, False, ((1, 7, 5),)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
TILES = Tiles((4, 4))
ORDERS = {"tiles": (TILES, (16, 16)), "raster": (Raster(), (16, 32))}
every_order = pytest.mark.parametrize(("order", "block"), ORDERS.values(), ids=ORDERS)
EVEN = Shape(1, 2, 8, (1, 16, 12))
MAPS = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": torch.relu}


def with_rest(rest: Rest, merge: Any = None, keep: Any = None, order: Any = TILES, block: tuple[int, int] = (16, 16)) -> AttentionSpec:
    return AttentionSpec((keep or TopK(0.3),), rest, merge or Mass(), order, block)


class Scene:
    """One call in float64: its image's tokens `[B, H, N, D]` in raster order, the pairs kept, the exact part over these and the text."""

    def __init__(
        self, spec: AttentionSpec, shape: Shape, qkv: list[Tensor] | None = None, params: AttentionParameters | None = None
    ) -> None:
        self.spec, self.shape = spec, shape
        self.qkv = shape.inputs(torch.float64) if qkv is None else qkv
        self.params = random_parameters(spec, shape, torch.float64) if params is None else params
        self.learned = {name: value.detach() for name, value in self.params.named_parameters()}
        layout = shape.layout
        self.q, self.k, self.v = (x[:, :, layout.image_slice] for x in self.qkv)
        self.scale = shape.head_dim**-0.5
        self.kept = kept_pairs(self.q, self.k, spec, layout.grids, v=self.v)
        self.q_number, self.k_number = (block_of(layout.grids, spec.order, b) for b in spec.block)
        logits = torch.cat(
            [
                self.scale * self.q @ self.qkv[1][:, :, layout.text_slice].mT,
                (self.scale * self.q @ self.k.mT).masked_fill(~self.kept, -torch.inf),
            ],
            -1,
        )
        values = torch.cat([self.qkv[2][:, :, layout.text_slice], self.v], 2)
        self.exact, self.lse = logits.softmax(-1) @ values, logits.logsumexp(-1)

    def head(self, name: str) -> Tensor:
        """A learned tensor `[H, ...]`."""
        return self.learned[name]

    def found(self) -> Tensor:
        """The image's rows of the operator."""
        out = attention(*self.qkv, self.spec, self.shape.layout, params=self.params, backend="reference")
        return out[:, :, self.shape.layout.image_slice]

    def rest(self) -> Partial:
        """What the spec's rest says, `[B, H, N, D]` and `[B, H, N]`."""
        assert self.spec.rest is not None
        plan = make_plan(self.spec, self.shape.layout, torch.device("cpu"))
        call = image_call(*self.qkv, self.shape.layout, plan, self.learned, self.scale)
        out, mass = self.spec.rest(dataclasses.replace(call, visited=visited_blocks(call, self.spec, plan)))
        return out.unflatten(0, self.q.shape[:2]), mass.unflatten(0, self.q.shape[:2])

    def merged(self, value: Tensor, mass: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """The exact part and a rest by their softmax masses."""
        share = (self.lse - mass - offset).sigmoid()[..., None]
        return share * self.exact + (1 - share) * value

    def by_weights(self, weights: Tensor) -> Partial:
        """The mean of v by weights `[B, H, N, N]` of the pairs not kept, and the log of their sum; nothing where it isn't positive."""
        weights = weights.masked_fill(self.kept, 0)
        total = weights.sum(-1)
        some = total > 0
        value = (weights @ self.v / total.masked_fill(~some, 1)[..., None]).masked_fill(~some[..., None], 0)
        return value, total.masked_fill(~some, 1).log().masked_fill(~some, -torch.inf)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def constant_on_blocks(scene: Scene) -> list[Tensor]:
    """The scene's inputs, without text, with each query and each key the first of its block."""
    first = torch.stack([(scene.k_number == n).nonzero()[0, 0] for n in scene.k_number])
    q, k, v = scene.qkv
    return [q[:, :, first], k[:, :, first], v]


# Decayed


def distances(scene: Scene) -> Tensor:
    """`[N, N]` between the blocks of tokens: centres, each axis in units of the key blocks' mean length along it."""
    p = coordinates(scene.shape.layout.grids).double()
    centres = [(m.T @ p / m.sum(0)[:, None])[number] for number in (scene.q_number, scene.k_number) for m in [membership(number)]]
    lengths = [[p[scene.k_number == n].amax(0) - p[scene.k_number == n].amin(0) + 1] for n in range(int(scene.k_number.max()) + 1)]
    sides = torch.stack([length for (length,) in lengths]).mean(0)
    return ((centres[0][:, None] - centres[1]) / sides).abs().sum(-1)


@every_order
@every_shape
def test_decayed_is_linear_attention_weighted_by_distance(shape: Shape, order: Any, block: tuple[int, int]) -> None:
    scene = Scene(with_rest(Decayed("elu", "alibi"), order=order, block=block), shape)
    fade = torch.exp(-scene.head("decay.slope").clamp_min(0)[:, None, None] * distances(scene))
    value, mass = scene.by_weights(MAPS["elu"](scene.q) @ MAPS["elu"](scene.k).mT * fade)
    close(scene.found(), scene.merged(value, mass, scene.head("offset")[:, None]), 1e-6)  # places are in float32


def test_decayed_starts_as_linear_attention_or_at_the_published_slopes() -> None:
    shape = SHAPES["references"]
    plain, decayed = (
        Scene(with_rest(rest), shape, params=with_rest(rest).make_parameters(heads=2, head_dim=16)) for rest in (Linear(), Decayed())
    )
    for found, expected in zip(decayed.rest(), plain.rest(), strict=True):
        close(found, expected)
    slopes = Decayed(slopes="alibi").parameters(8, 16)["decay.slope"]
    assert slopes.tolist() == [2.0**-n for n in range(1, 9)]


def test_even_tiles_are_as_far_apart_as_their_steps() -> None:
    shape = dataclasses.replace(EVEN, heads=1)
    spec = with_rest(Decayed("relu"), keep=DiscBlocks(1))
    scene = Scene(spec, shape, params=spec.make_parameters(heads=1, head_dim=8))
    scene.learned["decay.slope"] = torch.tensor([math.log(2)])
    row, column = (x // 4 for x in coordinates(((1, 16, 12),))[:, 1:].unbind(-1))
    steps = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    value, mass = scene.by_weights(torch.relu(scene.q) @ torch.relu(scene.k).mT / 2.0**steps)
    for found, expected in zip(scene.rest(), (value, mass), strict=True):
        close(found, expected, 1e-6)


def test_decay_along_one_axis_is_the_recurrence() -> None:
    """KV_t = λ KV_{t-1} + h_t over blocks in a row, read by the last one, which all others come before."""
    shape, decay = Shape(1, 1, 8, (1, 1, 96)), 0.7
    spec = with_rest(Decayed("elu"), keep=DiscBlocks(1), order=Tiles((1, 16)))
    scene = Scene(spec, shape, params=spec.make_parameters(heads=1, head_dim=8))
    scene.learned["decay.slope"] = torch.tensor([-math.log(decay)], dtype=torch.float64)
    phi = MAPS["elu"](scene.k[0, 0])
    state, norm = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for block in range(5):
        own = slice(16 * block, 16 * block + 16)
        state, norm = decay * state + phi[own].T @ scene.v[0, 0, own], decay * norm + phi[own].sum(0)
    reader = MAPS["elu"](scene.q[0, 0, 80:])
    found, mass = scene.rest()
    close(found[0, 0, 80:], (reader @ state) / (reader @ norm)[:, None], 1e-6)
    close(mass[0, 0, 80:], (decay * reader @ norm).log(), 1e-6)


# Landmarks


def landmark_weights(scene: Scene, ridge: float, group: Tensor) -> Tensor:
    """κ(q', L) (κ(L, L) + r I)⁻¹ κ(L, k') exp(‖k'‖²/2 + ‖q'‖²/2), `group` `[N]` the landmark that each key is averaged into."""
    q, k = (scene.scale**0.5 * x for x in (scene.q, scene.k))
    m = membership(group)
    marks = m.T @ k / m.sum(0)[:, None]
    kernel = lambda a, b: torch.exp(-((a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)) / 2)  # noqa: E731
    middle = torch.linalg.inv(kernel(marks, marks) + ridge * torch.eye(m.shape[1], dtype=torch.float64))
    outer = torch.exp((q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]) / 2)
    return kernel(q, marks) @ middle @ kernel(marks, k) * outer


@every_order
@every_shape
def test_landmarks_are_the_kernel_through_means_of_blocks(shape: Shape, order: Any, block: tuple[int, int]) -> None:
    scene = Scene(with_rest(Landmarks(0.05), order=order, block=block), shape)
    value, mass = scene.by_weights(landmark_weights(scene, 0.05, scene.k_number))
    assert mass.isfinite().double().mean() > 0.5
    close(scene.found(), scene.merged(value, mass, scene.head("offset")[:, None]), 1e-8)


def test_landmarks_of_all_keys_are_the_exact_softmax() -> None:
    """Keys that are alike in each block are their own landmarks."""
    spec = with_rest(Landmarks(1e-8), Mass(offset=False))
    scene = Scene(spec, EVEN)
    qkv = constant_on_blocks(scene)
    qkv[0] = scene.q
    close(Scene(spec, EVEN, qkv).found(), F.scaled_dot_product_attention(*qkv), 1e-6)


def test_many_blocks_share_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four key blocks that follow each other in one image have one, above so many."""
    monkeypatch.setattr(tokens, "LANDMARKS", 3)
    shape = Shape(1, 1, 8, (1, 9, 6), references=((1, 7, 6),))  # 6 blocks and 4
    scene = Scene(with_rest(Landmarks(0.1), keep=DiscBlocks(1)), shape)
    in_image = torch.where(image_of(shape.layout.grids) == 0, scene.k_number, scene.k_number - 6)
    group = in_image // 4 + 2 * image_of(shape.layout.grids)
    assert group.unique().tolist() == [0, 1, 2]
    value, mass = scene.by_weights(landmark_weights(scene, 0.1, group))
    close(scene.found(), scene.merged(value, mass, scene.head("offset")[:, None]), 1e-8)


# Token


@every_order
@every_shape
def test_the_token_of_energy_is_one_mean_for_all_queries(shape: Shape, order: Any, block: tuple[int, int]) -> None:
    scene = Scene(with_rest(Token(), order=order, block=block), shape)
    length = scene.q.norm(dim=-1, keepdim=True)
    mean = (length * scene.q).sum(2) / length.sum(2)
    weights = torch.relu((scene.k @ mean[..., None])[..., 0])
    value, _ = scene.by_weights(weights[:, :, None].expand_as(scene.kept))
    close(scene.found(), scene.merged(value, (~scene.kept).double().sum(-1).log(), scene.head("offset")[:, None]))


def test_the_order_of_the_queries_changes_nothing_of_the_energy() -> None:
    spec = with_rest(Token(), keep=DiscBlocks(1))
    scene = Scene(spec, EVEN)
    q, k, v = scene.qkv
    other = Scene(spec, EVEN, [q.flip(2), k, v])
    close(other.rest()[0], scene.rest()[0])
    assert (scene.rest()[0][:, :, 0] - scene.rest()[0][:, :, -1]).abs().max() > 1e-3  # what is kept differs


def estimated_logits(scene: Scene) -> Tensor:
    """s·q̄_I·k̄_J + log n_J + min(σ²/2, 4) `[B, H, Tq, Tk]`, σ² = s² Σ_d E_I[q_d²] Var_J(k_d)."""
    m, n = membership(scene.q_number), membership(scene.k_number)
    q_mean, q_square = (m.T @ x / m.sum(0)[:, None] for x in (scene.q, scene.q.square()))
    k_mean, k_square = (n.T @ x / n.sum(0)[:, None] for x in (scene.k, scene.k.square()))
    spread = scene.scale**2 * q_square @ (k_square - k_mean.square()).mT
    return scene.scale * q_mean @ k_mean.mT + n.sum(0).log() + (spread / 2).clamp(max=4)


@every_order
@every_shape
def test_the_estimated_token_is_the_column_means_of_the_estimated_map(shape: Shape, order: Any, block: tuple[int, int]) -> None:
    scene = Scene(with_rest(Token("estimated"), Mass("query"), order=order, block=block), shape)
    logits, n = estimated_logits(scene), membership(scene.k_number).sum(0)
    column = logits.softmax(-1)[:, :, scene.q_number].mean(2) / n  # of each token of the block
    value, _ = scene.by_weights(column[:, :, None, scene.k_number].expand_as(scene.kept))
    gone = scene.kept.double() @ membership(scene.k_number) > 0
    mass = logits[:, :, scene.q_number].masked_fill(gone, -torch.inf).logsumexp(-1)
    offset = scene.head("offset")[:, None] + (scene.q * scene.head("offset_query")[:, None]).sum(-1)
    close(scene.found(), scene.merged(value, mass, offset))


def test_the_estimated_mass_of_blocks_of_like_tokens_is_the_true_one() -> None:
    spec = with_rest(Token("estimated"), keep=DiscBlocks(1))
    scene = Scene(spec, EVEN, constant_on_blocks(Scene(spec, EVEN)))
    close(scene.rest()[1], (scene.scale * scene.q @ scene.k.mT).masked_fill(scene.kept, -torch.inf).logsumexp(-1))


# Routed


@every_shape
def test_routed_weighs_pairs_that_share_a_state(shape: Shape) -> None:
    scene = Scene(with_rest(Routed(3, "elu")), shape)
    (of_q, q_state), (of_k, k_state) = ((x @ scene.head("routes").mT).softmax(-1).max(-1) for x in (scene.q, scene.k))
    assert len(q_state.unique()) == len(k_state.unique()) == 3
    same = q_state[..., :, None] == k_state[..., None, :]
    factor = 1 + same * of_q[..., :, None] * of_k[..., None, :]
    value, mass = scene.by_weights(MAPS["elu"](scene.q) @ MAPS["elu"](scene.k).mT * factor / (1 + 1 / 9))
    close(scene.found(), scene.merged(value, mass, scene.head("offset")[:, None]))


def test_routed_starts_as_linear_attention() -> None:
    shape = SHAPES["text-first"]
    plain, routed = (
        Scene(with_rest(rest), shape, params=with_rest(rest).make_parameters(heads=2, head_dim=16)) for rest in (Linear(), Routed())
    )
    for found, expected in zip(routed.rest(), plain.rest(), strict=True):
        close(found, expected)


# Merges


@every_shape
@pytest.mark.parametrize("kind", ["rms", "simple", "l2"])
def test_a_norm_takes_the_place_of_the_mass(kind: Any, shape: Shape) -> None:
    """Of the numerator, whose RMS has the added 1e-6 in units of the mass."""
    scene = Scene(with_rest(Linear("elu"), Norm(kind)), shape)
    weights = (MAPS["elu"](scene.q) @ MAPS["elu"](scene.k).mT).masked_fill(scene.kept, 0)
    num, mass = weights @ scene.v, weights.sum(-1, keepdim=True)
    added = 1e-6 * mass.square()
    normed = num / (num.square().sum(-1, keepdim=True) + num.shape[-1] * added).sqrt()
    if kind != "l2":
        normed = normed * num.shape[-1] ** 0.5
    assert scene.head("norm.gain").shape == (shape.heads, 1 if kind == "simple" else shape.head_dim)
    close(scene.found(), scene.exact + scene.head("norm.gain")[:, None] * normed)


def test_a_norm_is_blind_to_the_size_of_the_rest_and_starts_at_nothing() -> None:
    shape = SHAPES["text-first"]
    spec = with_rest(Linear("elu"), Norm())
    call = image_call(
        *shape.inputs(torch.float64),
        shape.layout,
        make_plan(spec, shape.layout, torch.device("cpu")),
        {"norm.gain": torch.ones(2, 16)},
        0.25,
    )
    exact, rest = ((torch.randn(2, 154, 16, dtype=torch.float64), torch.randn(2, 154, dtype=torch.float64)) for _ in range(2))
    found, lse = Norm()(exact, rest, call)
    assert Norm()(exact, (rest[0], rest[1] + 1e4), call)[0].equal(found)  # exp(1e4) is no number of any dtype
    assert lse.equal(exact[1])
    start = Scene(spec, shape, params=spec.make_parameters(heads=2, head_dim=16))
    close(start.found(), start.exact)


def test_the_offset_by_the_query() -> None:
    shape = SHAPES["text-first"]
    scene = Scene(with_rest(Linear("relu"), Mass("query")), shape)
    value, mass = scene.by_weights(torch.relu(scene.q) @ torch.relu(scene.k).mT)
    offset = scene.head("offset")[:, None] + (scene.q * scene.head("offset_query")[:, None]).sum(-1)
    close(scene.found(), scene.merged(value, mass, offset))
    start, plain = (
        Scene(spec, shape, params=spec.make_parameters(heads=2, head_dim=16)) for spec in (scene.spec, with_rest(Linear("relu")))
    )
    assert start.found().equal(plain.found())


def test_offsets_are_loaded_and_lowered_as_before() -> None:
    for offset in (True, False):
        data = json.loads(json.dumps(with_rest(Linear(), Mass(offset)).to_dict()))
        assert data["merge"] == {"type": "Mass", "offset": offset}
        assert AttentionSpec.from_dict(data).merge == Mass(offset)
        assert lowering.fuses(AttentionSpec.from_dict(data))
    query = with_rest(Linear(), Mass("query"))
    assert AttentionSpec.from_dict(json.loads(json.dumps(query.to_dict()))) == query
    assert lowering.in_torch(query) == [Linear(), Mass("query")]
    assert not lowering.has_states(query)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mass("key"), "offset must be True, False or 'query'"),
        (lambda: Mass(1), "offset must be True, False or 'query'"),
        (lambda: Norm("layer"), "kind must be 'rms', 'simple' or 'l2'"),
        (lambda: Token("mean"), "kind must be 'energy' or 'estimated'"),
        (lambda: Landmarks(0), "ridge must be a number >= 1e-8"),
        (lambda: Decayed("gelu"), "feature_map must be one of"),
        (lambda: Decayed(slopes="one"), "slopes must be 'zero' or 'alibi'"),
        (lambda: Routed(1), "states must be an int from 2 to 64"),
    ],
)
def test_other_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
