"""Methods as text: what each form means, and what is said of every wrong one."""

import re

import pytest

from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea
from dit_accel.cli import options
from dit_accel.method.text import METHODS, parse_method


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", None),
        ("fovea", Fovea()),
        ("Fovea", Fovea()),
        ("fovea:0.05", Fovea(0.05)),
        ("fovea:density=0.1", Fovea(0.1)),
        ("fovea:radius=8", Fovea(radius=8)),
        ("fovea:0.05,order=1", Fovea(0.05, order=1)),
        ("fovea:0.05,conv=5", Fovea(0.05, conv=5)),
        ("fovea:0.05,conv=3,tile=4x4x4", Fovea(0.05, conv=3, tile=(4, 4, 4))),
        ("fovea:radius=8,order=1,parts=4", Fovea(radius=8, order=1, parts=4)),
        ("fovea:blocks=3,parts=2", Fovea(blocks=3, parts=2)),
        ("clear:16", CLEAR(16)),
        ("clear:7.5", CLEAR(7.5)),
        ("clear:8,downsample=4", CLEAR(8, downsample=4)),
        ("clear: 8, downsample = 4", CLEAR(8, downsample=4)),
        ("clear:downsample=4,radius=8", CLEAR(8, downsample=4)),
        ("sla:0.1", SLA(0.1)),
        ("sla:0.1,scope=all,feature_map=elu", SLA(0.1, "elu", "all")),
        ("sla:0.1,scope=none,block=128x64", SLA(0.1, scope="none", block=(128, 64))),
        ("gna:80,stride=16", GNA(80, 16)),
        ("gna:9x9,dilation=2", GNA((9, 9), dilation=2)),
        ("gna:3x9x5,stride=1x3x2", GNA((3, 9, 5), (1, 3, 2))),
    ],
)
def test_method_text(text: str, spec: AttentionSpec | None) -> None:
    assert parse_method(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "method must be one of none, fovea, clear, sla, gna or a JSON file, not ''"),
        ("flash", "method must be one of none, fovea, clear, sla, gna or a JSON file, not 'flash'"),
        ("none:1", "none takes no arguments: write none, not 'none:1'"),
        ("clear", "clear requires its radius, as in clear:16, which 'clear' lacks"),
        ("clear:downsample=4", "clear requires its radius, as in clear:16, which 'clear:downsample=4' lacks"),
        ("sla:scope=all", "sla requires its topk, as in sla:0.1, which 'sla:scope=all' lacks"),
        ("clear:", "clear's radius must be a number, or integers joined by x (a box), not '' in 'clear:'"),
        ("clear:wide", "clear's radius must be a number, or integers joined by x (a box), not 'wide' in 'clear:wide'"),
        ("clear:8,downsample=2.5", "clear's downsample must be an integer, not '2.5' in 'clear:8,downsample=2.5'"),
        ("gna:9xx9", "gna's window must be an integer, or integers joined by x as in 9x9, not '9xx9' in 'gna:9xx9'"),
        ("sla:0.1,block=64", "sla's block must be two integers joined by x, as in 128x64, not '64' in 'sla:0.1,block=64'"),
        ("fovea:0.05,8", "fovea requires key=value after its first argument, not '8' in 'fovea:0.05,8'"),
        ("fovea:0.05,", "fovea requires key=value after its first argument, not '' in 'fovea:0.05,'"),
        ("fovea:size=3", "fovea takes density, radius, blocks, order, parts, conv, tile, first_frames, not 'size' in 'fovea:size=3'"),
        ("clear:8,radius=9", "clear takes each argument once, but radius is twice in 'clear:8,radius=9': remove one"),
        ("fovea:2", "density must be a share of key blocks in (0, 1], not 2 (in 'fovea:2')"),
        ("fovea:0.1,order=2", "order must be 0, the mean value, or 1, its slope in the query too, not 2 (in 'fovea:0.1,order=2')"),
        ("fovea:nan", "density must be a share of key blocks in (0, 1], not nan (in 'fovea:nan')"),
        (
            "fovea:0.1,radius=8",
            "Fovea takes one of density, radius and blocks, not density=0.1 and radius=8: leave all but one of them out "
            "(in 'fovea:0.1,radius=8')",
        ),
        ("fovea:0.1,conv=2", "conv must be None or an odd number of tokens >= 3, not 2 (in 'fovea:0.1,conv=2')"),
        (
            "fovea:tile=3x3",
            "tile must have a power of two from 16 to 128 tokens, not (3, 3): it has 9; (8, 8) has 64, for example (in 'fovea:tile=3x3')",
        ),
        (
            "clear:8,tile=8",
            "tile must be (height, width) or (frames, height, width) in tokens, ints >= 1, not 8 (in 'clear:8,tile=8')",
        ),
        ("gna:0", "window must be an int >= 1 or a tuple of one to three of them, not 0 (in 'gna:0')"),
        ("fovea:blocks=0", "blocks must be a number of tiles >= 1, not 0 (in 'fovea:blocks=0')"),
        ("sla:0.1,scope=some", "scope must be 'complement', 'all' or 'none', not 'some' (in 'sla:0.1,scope=some')"),
        ("gna:3,stride=9", "stride must be at most the window's size 3, not 9 (in 'gna:3,stride=9')"),
    ],
)
def test_method_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_method(text)


@pytest.mark.parametrize("example", [e for method in METHODS.values() for e in method.examples])
def test_examples_are_methods(example: str) -> None:
    assert isinstance(parse_method(example), AttentionSpec)
    assert example in options.METHOD_FORMS
