"""A processor's `__call__` with its calls to the attention primitive rebound: the function's own source, compiled anew.

The new function has the old one's globals, defaults and closure, with the cell that `super()` reads, and is placed in a class of the
same name, so that private names keep their meaning. A decorator that keeps what it wraps in its closure, as functools.wraps is used, is
copied around it. Anything else is refused with the reason.
"""

import ast
import functools
import inspect
import linecache
import textwrap
from types import CellType, CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

from dit_accel.errors import UnsupportedModelError

FACTORY = "_dit_accel_closure"


def rewritten(base: type) -> FunctionType:
    """The `__call__` of a processor class that asks `self._dit_accel_dispatch` and `self._dit_accel_sdpa` in place of the primitives.

    Raises UnsupportedModelError where that can't be done.
    """
    layers = [base.__call__]
    while hasattr(layers[-1], "__wrapped__"):
        layers.append(layers[-1].__wrapped__)
    *wrappers, inner = layers
    new = _rebound(base, inner)
    for wrapper, wrapped in reversed(list(zip(wrappers, layers[1:], strict=True))):
        new = _wrapped_again(base, wrapper, wrapped, new)
    return new


def _wrapped_again(base: type, wrapper: Any, wrapped: Any, new: FunctionType) -> FunctionType:
    """A copy of a decorator's function around `new` in place of `wrapped`."""
    cells = (getattr(wrapper, "__closure__", None) or ()) if isinstance(wrapper, FunctionType) else ()
    holds = [_content(cell) is wrapped for cell in cells]
    if not any(holds):
        raise UnsupportedModelError(
            f"{base.__name__}.__call__ is decorated, and its decorator does not keep the decorated function in a closure, so that it can't "
            "be put around an accelerated one: take the decorator off, or set a processor without it"
        )
    closure = tuple(CellType(new) if held else cell for cell, held in zip(cells, holds, strict=True))
    copy = _like(wrapper, wrapper.__code__, closure)
    copy.__wrapped__ = new  # type: ignore[attr-defined]  # its signature is what diffusers chooses arguments by
    return copy


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _like(old: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    """A function of other code with all else of the old one."""
    new = FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
    functools.update_wrapper(new, old)
    del new.__wrapped__  # type: ignore[attr-defined]
    new.__kwdefaults__ = old.__kwdefaults__
    return new


def _rebound(base: type, call: Any) -> FunctionType:
    definition = _definition(base, call)
    cells = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True))
    known = call.__globals__ | {name: _content(cell) for name, cell in cells.items()}
    names = [x.arg for x in (*definition.args.posonlyargs, *definition.args.args)]
    rebind = _Rebind(base, names[0], names[1], known)
    definition = rebind.visit(definition)
    if rebind.count == 0:
        raise UnsupportedModelError(f"{base.__name__} calls no attention primitive that dit_accel knows")
    code = _compiled(base, call, definition, [name for name in cells if name != "__class__"])
    return _like(call, code, tuple(cells[name] for name in code.co_freevars))


def _definition(base: type, call: Any) -> ast.FunctionDef:
    """The source of a `__call__`, without the decorators."""
    try:
        source = textwrap.dedent(inspect.getsource(call))
        found = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise UnsupportedModelError(f"the source of {base.__name__}.__call__ is not available: {error}") from error
    if not (isinstance(call, FunctionType) and isinstance(found, ast.FunctionDef) and found.name == call.__code__.co_name):
        raise UnsupportedModelError(f"{base.__name__}.__call__ is not a function written with def: {source.splitlines()[0]!r}")
    if len(found.args.posonlyargs) + len(found.args.args) < 2:
        raise UnsupportedModelError(
            f"{base.__name__}.__call__ does not begin with two named arguments, (self, attn, ...): {source.splitlines()[0]!r}"
        )
    found.decorator_list = []
    return found


def _compiled(base: type, call: FunctionType, definition: ast.FunctionDef, free: list[str]) -> CodeType:
    """The code of a definition inside of its class, with these names free."""
    owner = call.__qualname__.rpartition(".")[0].rpartition(".")[2]
    outer: Any = ast.parse(f"def {FACTORY}({', '.join(free)}): pass")
    inner = outer.body[0]
    if owner.isidentifier():  # not "<locals>"
        inner.body = ast.parse(f"class {owner}: pass").body
        inner = inner.body[0]
    inner.body = [definition]
    text = ast.unparse(ast.fix_missing_locations(outer))
    filename = f"<dit_accel {base.__module__}.{base.__qualname__}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    code = compile(text, filename, "exec", dont_inherit=True)
    for name in (FACTORY, *([owner] if owner.isidentifier() else []), definition.name):
        code = next(x for x in code.co_consts if isinstance(x, CodeType) and x.co_name == name)
    return code


class _Rebind(ast.NodeTransformer):
    """Rebinds the calls to the attention primitive in a processor's `__call__(this, attn, ...)`; `known`: its globals and closure."""

    def __init__(self, base: type, this: str, attn: str, known: dict[str, Any]) -> None:
        self.base, self.this, self.attn, self.known, self.count = base, this, attn, known, 0

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        function = node.func
        value = self._value(function)
        if isinstance(function, ast.Attribute) and function.attr == "__call__" and self._is_class(function.value):
            raise UnsupportedModelError(
                f"{self.base.__name__}.__call__ calls another processor's, {ast.unparse(function)}(...), whose attention can't be replaced "
                "from there: write that attention out in its place"
            )
        if value is dispatch_attention_fn or (isinstance(function, ast.Name) and function.id == "dispatch_attention_fn"):
            method = "_dit_accel_dispatch"
        elif value is F.scaled_dot_product_attention or (
            isinstance(function, ast.Attribute) and function.attr == "scaled_dot_product_attention"
        ):
            method = "_dit_accel_sdpa"
        else:
            return node
        self.count += 1
        node.func = ast.Attribute(ast.Name(self.this, ast.Load()), method, ast.Load())
        node.args.insert(0, ast.Name(self.attn, ast.Load()))
        return node

    def _value(self, node: ast.expr) -> Any:
        """The value of a global or free name."""
        return self.known.get(node.id) if isinstance(node, ast.Name) else None

    def _is_class(self, node: ast.expr) -> bool:
        """Whether an expression is `super()` or names a class."""
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
        return called or isinstance(self._value(node), type)
