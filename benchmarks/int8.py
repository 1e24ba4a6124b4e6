"""What 8-bit products of queries and keys would err: each method in PyTorch on captured attention inputs, against float64.

    python benchmarks/fovea_captures.py FOLDER image-1024
    python benchmarks/int8.py FOLDER/image-1024.pt OUT.json

The inputs are rounded to bfloat16 first, and the blocks are chosen from these, for every form. A form changes the products of queries with
kept keys and with text keys; the softmax's weights are rounded to bfloat16 before they are multiplied by the values, and so is the output.
"bfloat16" changes nothing else: it is what the kernels do today. Errors are of the image tokens' output, relative, over all layers' heads.
What OUT.json has already is not computed again.
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.files import write_json
from dit_accel.kernels import reference
from dit_accel.kernels.arguments import SAMPLE
from dit_accel.kernels.blocks import Blocks, pool_blocks
from dit_accel.method import AttentionSpec
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator import composition
from dit_accel.operator.attention import attention, start_values
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout

METHODS = {"Fovea 5 %": Fovea(0.05), "Fovea radius 8": Fovea(radius=8), "CLEAR radius 8": CLEAR(8), "SLA 5 %": SLA(0.05)}
METHOD = "the method, against dense attention"
PLAIN = ("bfloat16, the CPU's kernels", "bfloat16")
E4M3 = 448.0  # the largest number of float8_e4m3fn
TEXT = 64  # text keys that have a scale in common


@dataclasses.dataclass(frozen=True)
class Form:
    """Queries and keys in `kind`, with a scale for each `by` "block" or "token"; `mean`: what is subtracted from keys: nothing, a head's
    mean over all keys ("head"), or each block's own ("block"), whose products join the logits in 16 bits. `kernels`: as they do it
    (`reference.rounded_to_int8`)."""

    name: str
    kind: str = "int8"
    mean: str = "head"
    by: str = "block"
    kernels: bool = False


FORMS = [
    Form("int8, a scale per block, keys as they are", mean="none"),
    Form("int8, a scale per block, keys less their mean"),
    Form("int8, a scale per block, keys less their blocks' means", mean="block"),
    Form("int8, a scale per token, keys less their mean", by="token"),
    Form("int8, as the kernels do it", by="token", kernels=True),
    Form("fp8, a scale per block, keys as they are", "fp8", "none"),
    Form("fp8, a scale per block, keys less their mean", "fp8"),
    Form("fp8, a scale per token, keys less their mean", "fp8", by="token"),
]


def rounded(x: Tensor, amount: Tensor, kind: str) -> Tensor:
    """x in 8 bits, where `amount` is the largest that a scale has to hold."""
    if kind == "int8":
        scale = (amount / 127).clamp_min(1e-30)
        return (x / scale).round().clamp(-127, 127) * scale
    scale = (amount / E4M3).clamp_min(1e-30)
    return (x / scale).float().to(torch.float8_e4m3fn).double() * scale


def largest(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """The largest size of an entry in each token's group: `[BH, N, 1]` of x `[BH, N, D]`."""
    of_token = x.abs().amax(-1)
    of_group = of_token.new_zeros(len(x), count).index_reduce_(1, groups, of_token, "amax")
    return of_group[:, groups, None]


def groups_of(blocks: Blocks, tokens: int) -> Tensor:
    """The block of each token."""
    found = torch.empty(tokens, dtype=torch.long)
    for number, (index, count) in enumerate(zip(blocks.index.tolist(), blocks.count.tolist(), strict=True)):
        found[index[:count]] = number
    return found


@dataclasses.dataclass
class Case:
    """One layer's inputs `[1, H, N, D]`, float64 of bfloat16's values."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    scale: float

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text of `[H, N, D]`."""
        return x[0][:, self.layout.image_slice], x[0][:, self.layout.text_slice]


@contextlib.contextmanager
def weights_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, the softmax's weights are rounded before they are multiplied by the values; their sum is of the unrounded ones."""
    exact = reference.softmax_partial

    def partial(scores: Tensor, values: Tensor) -> reference.Partial:
        weights, mass, lse = reference._exponentials(scores)
        return (weights.to(dtype).to(values.dtype) @ values) / mass[..., None], lse

    reference.softmax_partial = partial
    try:
        yield
    finally:
        reference.softmax_partial = exact


def operator(case: Case, spec: AttentionSpec, plan: Plan, form: Form | None) -> Tensor:
    """The image tokens' output `[H, N, D]` in float64, the products exact where `form` is None."""
    params = start_values(spec, case.q.float())()
    call = composition.image_call(case.q, case.k, case.v, case.layout, plan, params, case.scale)
    call = dataclasses.replace(call, visited=composition.visited_blocks(call, spec, plan))
    q, (keys, text) = call.q, case.sides(case.k)
    values, text_values = case.sides(case.v)
    shift = torch.zeros(q.shape[:2], dtype=q.dtype)
    if form is not None:
        q, keys, text, shift = quantised(q, keys, text, plan, form, case.scale)
    channels = values.shape[-1]
    if q.shape[-1] > channels:  # as wide as the queries
        values, text_values = (torch.cat([x, torch.zeros_like(x)], -1) for x in (values, text_values))
    parts = [
        reference.block_sparse_attention(
            q, keys, values, call.visited, plan.q_blocks, plan.k_blocks, scale=case.scale, tables=plan.geometry.tables
        )
    ]
    if case.layout.text:
        parts.append(reference.dense_attention(q, text, text_values, scale=case.scale))
    out, lse = reference.merge_partials(parts)
    return composition._merged((out[..., :channels], lse + shift), spec, call, None)[0]


def quantised(q: Tensor, keys: Tensor, text: Tensor, plan: Plan, form: Form, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and text keys of a form, and what joins the lse; a block's mean that joins the logits is in channels of its own."""
    if form.kernels:
        of_image = slice(0, keys.shape[1])
        narrow, every, mean = reference.rounded_to_int8(q, torch.cat([keys, text], 1), of_image, of_image, SAMPLE)
        return narrow, every[:, of_image], every[:, keys.shape[1] :], scale * (q @ mean.mT)[..., 0]
    mean = torch.cat([keys, text], 1).mean(1, keepdim=True) * (form.mean == "head")
    shift = scale * (q @ mean.mT)[..., 0]
    of_key, of_text = groups_of(plan.k_blocks, keys.shape[1]), torch.arange(text.shape[1]) // TEXT
    own: list[Tensor] = [mean.expand_as(keys), mean.expand_as(text)]
    if form.mean == "block":
        own[0] = pool_blocks(keys, plan.k_blocks)[0][:, of_key]
        own[1] = text.new_zeros(len(text), int(of_text.max()) + 1 if len(of_text) else 0, text.shape[2])
        own[1] = own[1].index_reduce_(1, of_text, text, "mean", include_self=False)[:, of_text]
    found = []
    for x, base, of in ((keys, own[0], of_key), (text, own[1], of_text)):
        gap = x - base
        amount = gap.abs().amax(-1, keepdim=True) if form.by == "token" else largest(gap, of, int(of.max()) + 1 if len(of) else 0)
        small = rounded(gap, amount, form.kind)
        found.append(small + base if form.mean == "block" else small)
    of_query = groups_of(plan.q_blocks, q.shape[1])
    amount = q.abs().amax(-1, keepdim=True) if form.by == "token" else largest(q, of_query, int(of_query.max()) + 1)
    narrow = rounded(q, amount, form.kind)
    if form.mean == "block":  # products of the means are of the queries themselves: [q8, q] with [gap8, mean]
        found = [torch.cat([x - base, base], -1) for x, base in zip(found, own, strict=True)]
        narrow = torch.cat([narrow, q], -1)
    return narrow, found[0], found[1], shift


def error(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Squared error and squared size."""
    return (found - exact).square().sum().item(), exact.square().sum().item()


def stressed(q: Tensor, k: Tensor, stress: str) -> tuple[Tensor, Tensor]:
    """Queries and keys `[H, N, D]` with four channels changed as the name says: "offset 30" adds so many deviations, "keys 10" multiplies,
    "keys 30, queries 1/30" leaves the products as they are."""
    q, k = q.clone(), k.clone()
    channels = torch.randperm(q.shape[-1], generator=torch.Generator().manual_seed(1))[:4]
    if stress.startswith("offset"):
        k[..., channels] += float(stress.split()[1]) * k.std()
    elif stress.startswith("keys"):
        factor = float(stress.split()[1].rstrip(","))
        k[..., channels] *= factor
        if "queries" in stress:
            q[..., channels] /= factor
    return q, k


STRESSES = ("as captured", "offset 30", "keys 10", "keys 30", "keys 30, queries 1/30")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("captures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=4, help="layers")
    parser.add_argument("--stress", action="append", choices=STRESSES)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    items = torch.load(args.captures)
    settings = {"captures": args.captures.stem, "layers": args.items}
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    table: dict[str, dict[str, dict[str, float]]] = known["errors"] if known.items() >= settings.items() else {}
    sums: dict[str, dict[str, dict[str, list[float]]]] = {}
    for item in items[:: len(items) // args.items + 1]:
        layer, grid, text, text_first, scale, q, k, v = item
        layout = TokenLayout(grid, text, text_first)
        for stress in args.stress or STRESSES:
            narrow = [x.to(torch.bfloat16)[None] for x in (*stressed(q, k, stress), v)]
            case = Case(*(x.double() for x in narrow), layout, q.shape[-1] ** -0.5 if scale is None else scale)
            dense, _ = reference.dense_attention(case.sides(case.q)[0], case.k[0], case.v[0], scale=case.scale)
            for name, spec in METHODS.items():
                done = table.get(stress, {}).get(name, {})
                errors_of(case, narrow, spec, dense, sums.setdefault(stress, {}).setdefault(name, {}), done)
            print(layer, stress, flush=True)
    for stress, methods in sums.items():
        for name, forms in methods.items():
            found = table.setdefault(stress, {}).get(name, {}) | {form: (e / n) ** 0.5 for form, (e, n) in forms.items()}
            table[stress][name] = {form: found[form] for form in (METHOD, *PLAIN, *(form.name for form in FORMS))}
    write_json(args.out, settings | {"errors": table})


def errors_of(
    case: Case, narrow: list[Tensor], spec: AttentionSpec, dense: Tensor, found: dict[str, list[float]], done: Collection[str]
) -> None:
    """Add one layer's squared errors and sizes of all that is not `done`."""
    plan = make_plan(spec, case.layout, case.q.device)
    exact = operator(case, spec, plan, None)

    def add(name: str, e: tuple[float, float]) -> None:
        old = found.setdefault(name, [0.0, 0.0])
        old[0] += e[0]
        old[1] += e[1]

    if METHOD not in done:
        add(METHOD, error(exact, dense))
    if PLAIN[0] not in done:
        kernels = attention(*narrow, spec, case.layout, scale=case.scale)[0][:, case.layout.image_slice]
        add(PLAIN[0], error(kernels.double(), exact))
    with weights_in(torch.bfloat16):
        for name, form in {PLAIN[1]: None, **{form.name: form for form in FORMS}}.items():
            if name not in done:
                add(name, error(operator(case, spec, plan, form).bfloat16().double(), exact))


if __name__ == "__main__":
    main()
