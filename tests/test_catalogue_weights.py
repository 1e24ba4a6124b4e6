"""Weights of keys in linear attention, its readouts, and attention transfer: equal to dense oracles in float64 of the papers' formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill_fixtures import learn, prompt_pipe, same, state
from helpers import random_parameters
from test_catalogue_maps import SHAPES, every_shape, exact_and_left, found, hedgehog, joined, spec_of
from test_distill_stages import STAGE, teacher_calls
from torch import Tensor

import dit_accel
from dit_accel import AttentionSpec, attention
from dit_accel.finetune import distill as distillation
from dit_accel.finetune.data.collect import Samples
from dit_accel.method import Centred, Floored, Hedgehog, KVGate, Linear, Mass, Part, RankAugmented, Raster, Residual, TopK
from dit_accel.patch.state import operators_of

SHAPE = SHAPES["11x14-text-5"]
STARTS: dict[str, Part] = {part.__class__.__name__: part for part in (RankAugmented(), KVGate(), Centred(), Floored())}


def elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def linear(part: Part) -> Linear:
    return Linear("elu", **{"weights" if isinstance(part, RankAugmented | KVGate) else "readout": part})  # type: ignore[arg-type]


@pytest.mark.parametrize("part", STARTS.values(), ids=STARTS)
def test_at_the_start_nothing_changes(part: Part) -> None:
    for scope in ("complement", "all"):
        rest = linear(part)
        changed = found(SHAPE, spec_of(Linear("elu", scope, weights=rest.weights, readout=rest.readout)))  # type: ignore[arg-type]
        torch.testing.assert_close(changed, found(SHAPE, spec_of(Linear("elu", scope))), rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]


# Weights of keys


@every_shape
def test_rank_augmented(shape: Any) -> None:
    spec = spec_of(Linear("elu", weights=RankAugmented()))
    params = random_parameters(spec, shape, torch.float64)
    temperature = params.rank_augmented.temperature  # type: ignore[union-attr]
    with torch.no_grad():
        temperature.fill_(1.0)  # type: ignore[operator]  the paper's
    out, lse, left, (q, k, v) = exact_and_left(shape, spec)
    mean = elu(q).mean(2, keepdim=True)
    alpha = k.shape[2] * (shape.head_dim**-0.5 * mean @ elu(k).mT).softmax(-1)
    assert alpha.mean(-1).allclose(torch.ones((), dtype=torch.float64))
    weight = elu(q) @ elu(k).mT * alpha * left
    torch.testing.assert_close(found(shape, spec, params), joined(out, lse, weight, v), rtol=1e-10, atol=1e-10)


@every_shape
def test_kv_gate(shape: Any) -> None:
    spec = spec_of(Linear("elu", weights=KVGate()))
    params = random_parameters(spec, shape, torch.float64)
    learned = dict(params.named_parameters())
    out, lse, left, (q, k, v) = exact_and_left(shape, spec)
    of_key, of_value = (torch.einsum("bhnd,hd->bhn", k, learned[f"kv_gate.{name}"]).exp() for name in ("key", "value"))
    weight = (elu(q) @ elu(k).mT) * left * of_key[:, :, None]
    mass = lse.exp()[..., None]
    expected = (mass * out + weight @ (v * of_value[..., None])) / (mass + weight.sum(-1, keepdim=True))
    torch.testing.assert_close(found(shape, spec, params), expected, rtol=1e-10, atol=1e-10)


# Readouts


def of_rest(shape: Any, readout: Centred | Floored) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a readout with random learned tensors makes of the rest: by a merge that adds it to the exact part; and what it is made of.

    That is: the weights of the pairs not kept, their number for each query `[B, H, N, 1]`, the values, and the learned tensors.
    """
    spec = spec_of(Linear("elu", readout=readout), merge=Residual())
    params = random_parameters(spec, shape, torch.float64)
    with torch.no_grad():
        params.proj.weight.copy_(torch.eye(shape.head_dim))  # type: ignore[union-attr, operator, arg-type]
        params.proj.bias.zero_()  # type: ignore[union-attr, operator]
    out, _, left, (q, k, v) = exact_and_left(shape, spec)
    return found(shape, spec, params) - out, (elu(q) @ elu(k).mT * left, left, v, dict(params.named_parameters()))  # type: ignore[return-value]


@every_shape
@pytest.mark.parametrize("gain", ["learned", "inline", "mala"])
def test_centred(gain: Any, shape: Any) -> None:
    got, (weight, left, v, learned) = of_rest(shape, Centred(gain))
    n, scale = left.sum(-1, keepdim=True).double(), shape.head_dim**-0.5
    mean = left.double() @ v / n
    z = scale * weight.sum(-1, keepdim=True) / n
    if gain == "inline":
        expected = scale / n * (weight @ v) + (1 - z) * mean
    elif gain == "mala":
        expected = (1 + 1 / z) * scale / n * (weight @ v) - z * mean
    else:
        log_gain, slope = (learned[f"centred.{name}"][:, None, None] for name in ("log_gain", "slope"))  # type: ignore[call-overload]
        g = log_gain.exp() * (1 + slope * z / z.mean(2, keepdim=True))
        expected = mean + g * (weight @ v / weight.sum(-1, keepdim=True) - mean)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@every_shape
@pytest.mark.parametrize("floored", [False, True])
def test_floored(floored: bool, shape: Any) -> None:
    _, (weight, left, v, _) = of_rest(shape, Floored())
    total, n = (x.sum(-1, keepdim=True).double() for x in (weight, left))
    floor = (total / n).median().item() if floored else 0.0  # it holds for one query in two
    got, (*_, learned) = of_rest(shape, Floored(floor))
    least = floor * n
    expected = weight @ v / torch.maximum(total, least) * learned["floored.log_factor"].exp()[:, None, None]  # type: ignore[call-overload]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("make", "says"), [(lambda: Centred("g"), "gain must be"), (lambda: Floored(-1.0), "floor must be")])  # type: ignore[arg-type]
def test_refuses(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# LoLCATs


@every_shape
def test_lolcats_share_of_the_exact_part_is_the_offset(shape: Any) -> None:
    """(γ Σ e^S v + phi(q) Σ phi(k) v) / (γ Σ e^S + phi(q) Σ phi(k)) of arXiv 2410.10254, γ = sigmoid(f): the offset is -log γ."""
    spec = spec_of(Linear(Hedgehog()), merge=Mass())
    params = random_parameters(spec, shape, torch.float64)
    gamma = torch.linspace(-2.197, 1.0, shape.heads, dtype=torch.float64).sigmoid()
    with torch.no_grad():
        params.offset.copy_(-gamma.log())  # type: ignore[union-attr, operator, arg-type]
    learned = dict(params.named_parameters())
    out, lse, left, (q, k, v) = exact_and_left(shape, spec)
    weight = (hedgehog(q, "q", learned) @ hedgehog(k, "k", learned).mT) * left
    exact = gamma[:, None, None] * lse.exp()[..., None]
    expected = (exact * out + weight @ v) / (exact + weight.sum(-1, keepdim=True))
    torch.testing.assert_close(found(shape, spec, params), expected, rtol=1e-10, atol=1e-10)


def test_the_first_stage_is_lolcats_attention_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean squared error of all layers' outputs in one forward of the teacher, divided by the output's mean square, is what its feature
    maps and its share of the exact part learn from; nothing else of the model does (LoLCATs, arXiv 2410.10254)."""
    monkeypatch.setattr(distillation, "_train", lambda run, checkpoint, progress: 0)
    spec = AttentionSpec((TopK(0.25),), Linear(Hedgehog()), Mass(), Raster(), (16, 16))
    pipe, untrained = (dit_accel.accelerate(prompt_pipe(), spec) for _ in range(2))
    start = {name: state(operator.params) for name, operator in operators_of(untrained).items()}
    rows = learn(pipe, tmp_path, **STAGE).parameter_history
    calls = teacher_calls(untrained, Samples(tmp_path / "samples"))

    def losses(params_of: Any) -> list[Tensor]:
        """Of the recorded forwards, each the mean over its two layers."""
        found = []
        for name, qkv, layout, target in calls:
            error = attention(*qkv, spec, layout, params=operators_of(params_of)[name].params) - target
            found.append(error.square().mean() / target.square().mean())
        return [torch.stack(found[at : at + 2]).mean() for at in range(0, len(found), 2)]

    with torch.no_grad():
        before, after = losses(untrained), losses(pipe)
    assert min(abs(rows[0]["attention"] - float(loss)) for loss in before) < 1e-5
    assert all(now < was for now, was in zip(after, before, strict=True))
    for name, operator in operators_of(pipe).items():
        learned = state(operator.params)
        assert sorted(learned) == ["hedgehog.k", "hedgehog.q", "offset"]
        assert all(not torch.equal(learned[tensor], start[name][tensor]) for tensor in learned)
    dit_accel.restore(pipe)
    assert same(state(pipe.transformer), state(prompt_pipe().transformer))
