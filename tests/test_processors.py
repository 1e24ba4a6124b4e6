"""Processors that users write: whatever Python allows in them either runs accelerated or is refused before anything is changed."""

import functools
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, relative_error, run, tiny_pipe
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as renamed

import dit_accel
from dit_accel import Fovea
from dit_accel.errors import UnsupportedModelError

WHOLE = Fovea(1.0)


def heads(attn: Any, image: Tensor, text: Tensor | None) -> list[Tensor]:
    """Query, key and value `[B, H, N, D]` of the joint sequence, without norm and rotary embedding."""
    x = image if text is None else torch.cat([text, image], 1)
    return [layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)]


def rows(attn: Any, x: Tensor, text: Tensor | None) -> Any:
    """What a processor of FLUX returns."""
    x = x.transpose(1, 2).flatten(2)
    return x if text is None else (attn.to_out[0](x[:, text.shape[1] :]), attn.to_add_out(x[:, : text.shape[1]]))


class Calls:
    """A decorator that counts."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, call: Any) -> Any:
        @functools.wraps(call)
        def wrapper(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.number += 1
            return call(this, *args, **kwargs)

        return wrapper


def decorated() -> type:
    class Decorated(FluxAttnProcessor):
        __call__ = Calls()(FluxAttnProcessor.__call__)

    return Decorated


def decorated_twice() -> type:
    class Decorated:
        _attention_backend = None
        _parallel_config = None

        @Calls()
        @torch.no_grad()
        def __call__(self, attn: Any, x: Tensor, text: Any = None, mask: Any = None, rope: Any = None) -> Any:
            q, k, v = heads(attn, x, text)
            return rows(attn, F.scaled_dot_product_attention(q, k, v), text)

    return Decorated


def closure() -> type:
    factor, calls = 1.5, 0

    class Closure:
        def __call__(self, attn: Any, x: Tensor, text: Any = None, mask: Any = None, rope: Any = None) -> Any:
            nonlocal calls
            calls += 1
            q, k, v = heads(attn, x, text)
            return rows(attn, F.scaled_dot_product_attention(q * factor, k, v), text)

    return Closure


def parent() -> type:
    class Parent:
        def scaled(self, q: Tensor) -> Tensor:
            return 0.5 * q

    class Child(Parent):
        def scaled(self, q: Tensor) -> Tensor:
            return q

        def __call__(self, attn: Any, x: Tensor, text: Any = None, mask: Any = None, rope: Any = None) -> Any:
            q, k, v = heads(attn, x, text)
            return rows(attn, F.scaled_dot_product_attention(super().scaled(q), k, v), text)

    return Child


def private() -> type:
    class _Private:
        FACTOR = 0.25

        def __init__(self) -> None:
            self.__factor = 2.0

        def __call__(this, attn: Any, x: Tensor, /, text: Any = None, mask: Any = None, rope: Any = None, by: float = FACTOR) -> Any:  # noqa: N805
            q, k, v = heads(attn, x, text)
            return rows(attn, F.scaled_dot_product_attention(q * this.__factor * by, k, v), text)

    return _Private


def under_another_name() -> type:
    def attend(self: Any, attn: Any, x: Tensor, text: Any = None, mask: Any = None, rope: Any = None, *, by: float = 3.0) -> Any:
        q, k, v = heads(attn, x, text)
        return rows(attn, renamed(by * q, k, v), text)

    return type("Assigned", (), {"__call__": attend})


ACCEPTED = [decorated, decorated_twice, closure, parent, private, under_another_name]


def pipe_with(kind: type) -> Any:
    pipe = tiny_pipe()
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        block.attn.processor = kind()
    return pipe


@pytest.mark.parametrize("make", ACCEPTED)
def test_a_processor_runs_accelerated(make: Callable[[], type], sparse_calls: list[Any]) -> None:
    expected = run(pipe_with(make()))
    pipe = dit_accel.accelerate(pipe_with(make()), WHOLE, strict=True)
    assert relative_error(run(pipe), expected) < 1e-5
    assert len(sparse_calls) == 2 * LAYERS
    assert torch.equal(run(dit_accel.restore(pipe)), expected)


def test_a_decorator_goes_on_working() -> None:
    calls = Calls()

    class Decorated(FluxAttnProcessor):
        __call__ = calls(FluxAttnProcessor.__call__)

    run(dit_accel.accelerate(pipe_with(Decorated), WHOLE, strict=True))
    assert calls.number == 2 * LAYERS


def test_a_closure_is_shared() -> None:
    kind = closure()
    counter = kind.__call__.__closure__[kind.__call__.__code__.co_freevars.index("calls")]  # type: ignore[attr-defined]
    run(dit_accel.accelerate(pipe_with(kind), WHOLE, strict=True))
    assert counter.cell_contents == 2 * LAYERS


def through_super() -> type:
    class Child(FluxAttnProcessor):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(attn, *args, **kwargs)

    return Child


def through_the_class() -> type:
    class Child:
        def __call__(self, attn: Any, x: Tensor, text: Any = None, mask: Any = None, rope: Any = None) -> Any:
            q, k, v = heads(attn, x, text)
            F.scaled_dot_product_attention(q, k, v)
            return FluxAttnProcessor.__call__(self, attn, x, text, mask, rope)  # type: ignore[arg-type]

    return Child


def decorated_from_afar() -> type:
    kept: dict[str, Any] = {}

    def remember(call: Any) -> Any:
        kept["call"] = call

        @functools.wraps(call)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return kept["call"](self, *args, **kwargs)

        return wrapper

    class Decorated:
        __call__ = remember(FluxAttnProcessor.__call__)

    return Decorated


def decorated_unseen() -> type:
    def unseen(call: Any) -> Any:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return call(self, *args, **kwargs)

        return wrapper

    class Decorated:
        __call__ = unseen(FluxAttnProcessor.__call__)

    return Decorated


def lambda_() -> type:
    class Lambda:
        __call__ = lambda self, attn, x, text=None, *_: rows(attn, F.scaled_dot_product_attention(*heads(attn, x, text)), text)  # noqa: E731

    return Lambda


def slots() -> type:
    class Slots:
        __slots__ = ("kept",)

        def __call__(self, attn: Any, x: Tensor, text: Any = None, mask: Any = None, rope: Any = None) -> Any:
            return rows(attn, F.scaled_dot_product_attention(*heads(attn, x, text)), text)

    return Slots


def without_source() -> type:
    namespace: dict[str, Any] = {}
    exec("def __call__(self, attn, x): return F.scaled_dot_product_attention(x, x, x)", namespace)
    return type("Unwritten", (), {"__call__": namespace["__call__"]})


REFUSED: dict[Callable[[], type], str] = {
    through_super: r"Child.__call__ calls another processor's, super\(\).__call__",
    through_the_class: r"Child.__call__ calls another processor's, FluxAttnProcessor.__call__",
    decorated_from_afar: "Decorated.__call__ is decorated, and its decorator does not keep",
    decorated_unseen: r"Decorated.__call__ does not begin with two named arguments, \(self, attn, ...\)",
    lambda_: "Lambda.__call__ is not a function written with def",
    slots: "Slots has __slots__",
    without_source: "the source of Unwritten.__call__ is not available",
}


@pytest.mark.parametrize("make", REFUSED)
def test_a_processor_that_cannot_be_rewritten_is_refused_before_anything_changes(make: Callable[[], type]) -> None:
    pipe = tiny_pipe()
    pipe.transformer.single_transformer_blocks[1].attn.processor = make()()
    before, names = dict(pipe.transformer.attn_processors), [name for name, _ in pipe.transformer.named_modules()]
    with pytest.raises(UnsupportedModelError, match=REFUSED[make]):
        dit_accel.accelerate(pipe, WHOLE)
    assert {name: id(p) for name, p in pipe.transformer.attn_processors.items()} == {name: id(p) for name, p in before.items()}
    assert [name for name, _ in pipe.transformer.named_modules()] == names


def test_a_processor_put_in_later_that_cannot_be_rewritten_is_left_alone() -> None:
    pipe = dit_accel.accelerate(tiny_pipe(), WHOLE)
    pipe.transformer.single_transformer_blocks[1].attn.processor = through_super()()
    with pytest.warns(UserWarning, match="original attention for calls with a processor that was set after"):
        got = run(pipe)
    assert relative_error(got, run(tiny_pipe())) < 1e-5


def test_a_traceback_shows_the_rewritten_source() -> None:
    class Failing:
        def __call__(self, attn: Any, x: Tensor, text: Any = None, mask: Any = None, rope: Any = None) -> Any:
            q, k, v = heads(attn, x, text)
            return F.scaled_dot_product_attention(q, k[:, :, :1, :1], v)

    pipe = dit_accel.accelerate(pipe_with(Failing), WHOLE)
    with pytest.raises(RuntimeError) as caught:
        run(pipe)
    assert "return self._dit_accel_sdpa(attn, q, k[:, :, :1, :1], v)" in "".join(traceback.format_exception(caught.value))
