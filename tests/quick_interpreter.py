"""Triton's interpreter, which is Python throughout, in less than half its time and with the same results."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """What does not depend on a tensor's values is computed once, not at each operation, and what nobody reads is not computed at all."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:  # no test of this process has kernels to interpret
        return
    _replace_language_once(interpreter, patch)
    _ignore_overflow(interpreter, patch)
    _remember_types(interpreter, patch)
    _shorten(interpreter.TritonSemantic, patch)


def _replace_language_once(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """The interpreter puts its own functions in the place of `triton.language`'s at every call of a function from a kernel: once in a
    launch is enough."""
    replace, launch, language = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter.tl
    replaced: set[int] = set()
    named = _remembered(lambda names: {id(x) for x in names.values() if x is language or x is language.core}, id)  # by each module

    def replace_once(function: Any) -> Any:
        missing = named(function.__globals__) - replaced
        replaced.update(missing)
        return replace(function) if missing else None  # the launch itself, which takes what it replaced back, is the first to ask

    def launched(*args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        return launch(*args, **kwargs)

    def replace_one(package: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # without the question whether it is called from a kernel

        def called(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(package, name, called)

    patch.setattr(interpreter, "_patch_attr", replace_one)
    patch.setattr(interpreter, "_patch_lang", replace_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launched)


def _ignore_overflow(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Integers' sums, differences and products are made again in 64 bits, for an assertion that runs under Triton's debugging alone."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def _remember_types(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Of each type once: the type of a block, a tensor's shape, numpy's name of a type, what two types become together."""
    core = interpreter.tl.core
    constexpr, block_type, tensor = core.constexpr, core.block_type, core.tensor
    new_block, new_tensor, unwrap = block_type.__init__, tensor.__init__, core._unwrap_if_constexpr
    plain = {int, float, bool, str, type(None), core.dtype, core.pointer_type, block_type, tensor}
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}

    def unwrapped(x: Any) -> Any:
        return x if type(x) in plain else x.value if type(x) is constexpr else unwrap(x)

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (*(x.value if type(x) is constexpr else x for x in shape),)
        if (element_ty.name, sizes) not in blocks:
            new_block(self, element_ty, shape)
            same = next((block["shape"] for (_, other), block in blocks.items() if other == sizes), self.shape)
            blocks[element_ty.name, sizes] = {**self.__dict__, "shape": same}
        self.__dict__.update(blocks[element_ty.name, sizes])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = (*type.shape.values,) if type.is_block() else ()
        if sizes not in shapes:
            new_tensor(self, handle, type)
            shapes[sizes] = (self.shape, self.numel)
        self.shape, self.numel = shapes[sizes]

    patch.setattr(core, "_unwrap_if_constexpr", unwrapped)
    patch.setattr(block_type, "__init__", make_block)
    patch.setattr(block_type, "with_element_ty", _remembered(block_type.with_element_ty, lambda block, element: (block.name, element.name)))
    patch.setattr(tensor, "__init__", make_tensor)
    patch.setattr(interpreter, "_get_np_dtype", _remembered(interpreter._get_np_dtype, lambda dtype: dtype.name))


def _shorten(semantic: Any, patch: pytest.MonkeyPatch) -> None:
    """What is asked before each operation, where nothing is to be done."""
    cast, broadcast = semantic.cast, semantic.broadcast_impl_value

    def cast_others(self: Any, x: Any, dtype: Any, fp_downcast_rounding: Any = None) -> Any:
        return x if x.dtype is dtype else cast(self, x, dtype, fp_downcast_rounding)

    def broadcast_others(self: Any, x: Any, y: Any) -> Any:
        same = x.type.shape is y.type.shape if x.type.is_block() and y.type.is_block() else not x.type.is_block() and not y.type.is_block()
        return (x, y) if same else broadcast(self, x, y)

    patch.setattr(semantic, "cast", cast_others)
    patch.setattr(semantic, "broadcast_impl_value", broadcast_others)
    known = _remembered(semantic.computation_type_impl, lambda _, a, lone_a, b, lone_b, divides: (a.name, lone_a, b.name, lone_b, divides))
    patch.setattr(semantic, "computation_type_impl", known)


def _remembered(function: Callable[..., Any], key_of: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def asked(*args: Any) -> Any:
        key = key_of(*args)
        if key not in known:
            known[key] = function(*args)
        return known[key]

    return asked
