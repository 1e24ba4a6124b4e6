"""What the processes of a run in bands compare with one process alone; `parallel_checks.run_all` runs these too once this is imported."""

import functools
from types import SimpleNamespace
from typing import Any

import diffusers as D
import pytest
import torch
import torch.distributed as dist
from conftest import relative_error
from parallel_checks import (
    PIPELINES,
    Answer,
    bytes_of,
    check,
    compared,
    flux,
    flux_call,
    in_bfloat16,
    ring,
    sampled,
    trained,
    wan,
    wan_call,
    with_padded_text,
)
from test_families import SPARSE, Tiny

import dit_accel
from dit_accel import CLEAR, GNA, Assignment, Fovea, Rule
from dit_accel.errors import DecodingError
from dit_accel.method import Disc, DiscBlocks, Linear, Mass, Residual, Tiles
from dit_accel.method.parts import Centred, FirstFrames, Hedgehog, KVGate
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.layout import TokenLayout
from dit_accel.parallel import traffic

banded = functools.partial(compared, spread=ring)
FOUR: dict[str, Any] = {"order": Tiles((4, 4)), "block": (16, 16)}
LINEAR = AttentionSpec((DiscBlocks(2),), Linear(), Mass(), **FOUR)


@check
def halo_flux_text_0(count: int) -> Answer:
    return banded(flux, [flux_call(10, 12, 0)], CLEAR(3.0, tile=(4, 4)), count)


@check
def halo_flux_text_77(count: int) -> Answer:
    """77 tokens of text and 11 × 9 of the image, which no number of processes divides; bands end within rows and within tiles."""
    return banded(flux, [flux_call(11, 9, 77)], CLEAR(2.5, tile=(4, 4)), count, anything=True)


@check
def halo_flux_pooled(count: int) -> Answer:
    """Fovea's blocks beyond the radius, of which those at a band's end are in two processes."""
    return banded(flux, [flux_call(11, 9, 13)], Fovea(radius=2, tile=(4, 4)), count, anything=True, first="accelerate")


@check
def halo_flux_text_512_two_sizes_lora(count: int) -> Answer:
    calls = [flux_call(6, 10, 512), flux_call(10, 14, 512, batch=2, seed=5)]
    return banded(flux, calls, Fovea(radius=3, tile=(4, 4)), count, first="accelerate", lora=True)


@check
def halo_flux_windows(count: int) -> Answer:
    calls = [flux_call(12, 10, 6)]
    return banded(flux, calls, GNA((5, 3), stride=(2, 1), dilation=(1, 2), tile=(4, 4)), count, anything=True, checkpointing=True)


@check
def halo_flux_of_many_specs(count: int) -> Answer:
    rules = (Rule(CLEAR(2.0, tile=(4, 4))), Rule(Fovea(radius=2, tile=(4, 4)), heads=(0, 1)), Rule(None, heads=(2,)))
    return banded(flux, [flux_call(6, 10, 12)], Assignment(rules), count)


@check
def halo_wan_clip(count: int) -> Answer:
    return banded(wan, [wan_call(4, 4, 6), wan_call(2, 6, 10, 7)], Fovea(radius=3, tile=(2, 4, 4)), count, first="accelerate")


@check
def halo_wan_ragged(count: int) -> Answer:
    """3 × 5 × 7 tokens, a box, and the first frame, which all processes read."""
    return banded(wan, [wan_call(3, 5, 7)], CLEAR((2, 2, 3), tile=(2, 4, 4), first_frames=1), count, anything=True, lora=True)


# Rests of what is far


@check
def halo_flux_linear_text_0(count: int) -> Answer:
    """The sums of all tokens that a process does not read; bands end within rows and within tiles."""
    return banded(flux, [flux_call(10, 12, 0)], LINEAR, count, first="accelerate")


@check
def halo_flux_linear_two_sizes_lora(count: int) -> Answer:
    spec = AttentionSpec((DiscBlocks(3),), Linear("relu"), Residual(), **FOUR)
    return banded(flux, [flux_call(6, 10, 512), flux_call(10, 14, 77, batch=2, seed=5)], spec, count, anything=True, lora=True)


@check
def halo_flux_far_of_many_specs(count: int) -> Answer:
    """Linear attention over all keys in some heads, and patches in others, which bands cut."""
    every = AttentionSpec((Disc(2.0),), Linear("elu", "all"), Residual(), **FOUR)
    rules = (Rule(every), Rule(CLEAR(2.0, downsample=4, tile=(4, 4)), heads=(0, 1)))
    return banded(flux, [flux_call(11, 9, 13)], Assignment(rules), count, anything=True, checkpointing=True)


@check
def halo_wan_linear(count: int) -> Answer:
    """Features and weights that are learned, of 3 × 7 × 11 tokens, and the mean of the values; all processes read the first frame."""
    rest = Linear(Hedgehog(), weights=KVGate(), readout=Centred("mala"))
    spec = AttentionSpec((DiscBlocks(1.5), FirstFrames()), rest, Mass(), Tiles((2, 4, 4)), (32, 32))
    return banded(wan, [wan_call(3, 7, 11)], spec, count, anything=True)


@check
def halo_wan_downsample(count: int) -> Answer:
    return banded(wan, [wan_call(3, 5, 7), wan_call(2, 4, 6, 7)], CLEAR(2.0, downsample=2, tile=(2, 4, 4)), count, anything=True)


@check
def halo_chronoedit(count: int) -> Answer:
    return banded(lambda: wan(kind=D.ChronoEditTransformer3DModel), [wan_call(2, 4, 6)], CLEAR(2.0, tile=(4, 4)), count)


# Whole pipelines, with guidance


@check
def halo_pipelines(count: int) -> dict[str, Any]:
    drawn = functools.partial(sampled, count=count, spread=ring)
    found: dict[str, Any] = {name: drawn(lambda: Tiny(name)) for name in PIPELINES}  # noqa: B023
    found["padded text"] = drawn(with_padded_text)
    found["bfloat16"] = drawn(in_bfloat16)
    found["linear"] = drawn(lambda: Tiny("flux"), method=LINEAR)
    found["linear with padded text"] = drawn(with_padded_text, method=LINEAR)
    found["linear in bfloat16"] = drawn(in_bfloat16, method=LINEAR)
    return found


@check
def halo_original(count: int) -> dict[str, float]:
    """The original attention within `dense` over the keys of all processes, with diffusers' default backend."""
    tiny, expected = Tiny("flux"), Tiny("flux").run()
    dit_accel.accelerate(tiny.pipe, CLEAR(2.0, tile=(4, 4)), strict=True)
    ring(tiny.pipe.transformer, count, anything=True)
    sparse = relative_error(tiny.run(), expected)
    with dit_accel.dense(tiny.pipe):
        within = relative_error(tiny.run(), expected)
    padded, whole = with_padded_text(), with_padded_text().run()
    dit_accel.accelerate(padded.pipe, SPARSE["clear"])
    ring(padded.pipe.transformer, count, anything=True)
    with dit_accel.dense(padded.pipe):
        return {"sparse": sparse, "within": within, "masked": relative_error(padded.run(), whole)}


@check
def halo_bytes(count: int) -> dict[str, Any]:
    """What each process sends in one forward of FLUX's two layers, and what the formula says of float64."""
    found = {}
    methods = {"clear": CLEAR(3.0, tile=(4, 4)), "fovea": Fovea(radius=3, tile=(4, 4)), "window": GNA(5, tile=(4, 4))}
    methods |= {
        "linear": LINEAR,
        "features": AttentionSpec((DiscBlocks(2),), Linear(Hedgehog(), readout=Centred("inline")), Mass(), **FOUR),
    }
    methods["downsample"] = CLEAR(3.0, downsample=4, tile=(4, 4))
    for (name, spec), height in zip(methods.items(), (16, 16, 15, 16, 16, 15), strict=True):
        found[name] = {"measured": _sent(spec, count, height), "formula": [2 * x for x in _formula(spec, height, count)]}
    return found


def _sent(spec: AttentionSpec, count: int, height: int) -> int:
    model = dit_accel.accelerate(flux(), spec, strict=True)
    ring(model, count, anything=True)
    return sum(bytes_of(lambda: model(**flux_call(height, 10, 13), return_dict=False)))


def _formula(spec: AttentionSpec, height: int, count: int) -> list[int]:
    found = traffic.halo(spec, TokenLayout((1, height, 10), 13), 4, 16, count, width=8, wide=8)
    return [] if found is None else found


@check
def halo_training(count: int) -> list[dict[str, Any]]:
    return trained(count, ring, "banded")


def _tiled_pipeline(count: int, **settings: Any) -> Any:
    """A transformer that is spread over processes, and an autoencoder in tiles."""
    torch.manual_seed(0)
    vae = D.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, sample_size=16, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, **settings,
    ).eval()  # fmt: skip
    vae.enable_tiling()
    transformer = dit_accel.accelerate(flux(), CLEAR(2.0, tile=(4, 4)))
    ring(transformer, count)
    return SimpleNamespace(vae=vae, transformer=transformer)


@check
def tiles_decoded(count: int) -> dict[str, Any]:
    """Whether the pixels are those of one process, in how many tiles, and of how many this process ran the decoder."""
    pipe, z = _tiled_pipeline(count), torch.randn(2, 4, 20, 13, generator=torch.Generator().manual_seed(1))
    vae, ran = pipe.vae, []  # type: tuple[Any, list[int]]
    with torch.no_grad():
        vae.decoder.mid_block.register_forward_hook(lambda *_: ran.append(1))
        expected, tiles = vae.decode(z).sample, len(ran)
        with dit_accel.shared_decoding(pipe):
            same = torch.equal(vae.decode(z).sample, expected)
        own = len(ran) - tiles
        same = same and torch.equal(vae.decode(z).sample, expected)
    return {"same": same, "tiles": tiles, "own": own, "left": [name for name in ("tiled_decode",) if name in vars(vae)]}


@check
def tiles_decoded_under_autocast(count: int) -> bool:
    """Of float32 latents, FLUX's autoencoder has no convolution before its decoder, whose pixels are of autocast's type."""
    pipe = _tiled_pipeline(count, use_quant_conv=False, use_post_quant_conv=False)
    z = torch.randn(1, 4, 13, 13, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = pipe.vae.decode(z).sample
        with dit_accel.shared_decoding(pipe):
            found = pipe.vae.decode(z).sample
    return expected.dtype == torch.bfloat16 and torch.equal(found, expected)


@check
def tiles_that_fail(count: int) -> dict[str, Any]:
    """What each process raises where the last one can't decode its second tile, and whether the next picture is decoded as ever."""
    pipe, z = _tiled_pipeline(count), torch.randn(1, 4, 20, 13, generator=torch.Generator().manual_seed(1))
    ran: list[int] = []

    def fails(*_: Any) -> None:
        ran.append(1)
        if len(ran) == 2 and dist.get_rank() == count - 1:
            raise MemoryError("no room for a tile")

    with torch.no_grad():
        expected = pipe.vae.decode(z).sample
        hook = pipe.vae.decoder.mid_block.register_forward_hook(fails)
        with pytest.raises((MemoryError, DecodingError)) as raised, dit_accel.shared_decoding(pipe):
            pipe.vae.decode(z)
        hook.remove()
        with dit_accel.shared_decoding(pipe):
            same = torch.equal(pipe.vae.decode(z).sample, expected)
    return {"raised": type(raised.value).__name__, "message": str(raised.value), "same": same}


@check
def halo_far_is_not_read(count: int) -> bool:
    """Whether the first layer of this process is finite although the last row of the image, a tile's, is not."""
    model = dit_accel.accelerate(flux(), CLEAR(2.0, tile=(4, 4)), strict=True)
    ring(model, count)
    seen: list[bool] = []
    layer = model.transformer_blocks[0].attn
    layer.register_forward_hook(lambda module, args, out: seen.append(bool(out[0].isfinite().all())))
    call = flux_call(16, 8, 0)
    call["hidden_states"][:, -8:] = torch.nan
    with torch.no_grad():
        model(**call, return_dict=False)
    return seen[0]
