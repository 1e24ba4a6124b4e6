"""The operator on a GPU at the sizes of FLUX.1 and Wan 2.1, next to PyTorch's attention and FlexAttention:

    python benchmarks/gpu.py --out benchmarks/gpu-h100.json
    python benchmarks/gpu.py --tiny                             (a look at the program, under TRITON_INTERPRET=1)

Every time is a median by the card's events, its second-level cache emptied before each run, on random bfloat16 inputs. Dense attention is
the fastest of what torch has (flash, cuDNN, its default). A method's time has all of it: choosing, rest, merge. `kernels` are its Triton
kernels one by one, `host` the processor's time per call, `graph` a call's time inside a CUDA graph. The kernels are compiled first, on all
processors.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.files import write_json
from dit_accel.kernels import dispatch
from dit_accel.kernels.triton import ahead, calls, launch, timing
from dit_accel.measure import rivals
from dit_accel.measure.timing import machine
from dit_accel.method import AttentionSpec
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator import composition
from dit_accel.operator.attention import attention, start_values
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.cost import computed_pairs
from dit_accel.operator.layout import TokenLayout

SPECS: dict[str, AttentionSpec] = {
    "Fovea 5 %": Fovea(0.05),
    "Fovea radius 8": Fovea(radius=8),
    "CLEAR radius 8": CLEAR(8),
    "SLA 5 %": SLA(0.05),
    "Fovea 5 %, order 1": Fovea(0.05, order=1),
}
DENSE = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The tokens and heads of one call."""

    name: str
    grid: tuple[int, int, int]
    text: int = 512
    heads: int = 24
    head_dim: int = 128
    detailed: bool = False  # also kernel by kernel
    backward: bool = False

    def layout(self, spec: AttentionSpec) -> TokenLayout:
        return TokenLayout(self.grid, self.text, order=spec.order)

    def inputs(self, device: torch.device, dtype: torch.dtype, *, grad: bool = False) -> list[Tensor]:
        """Query, key and value `[1, H, N, D]` as a processor hands them on, the heads next to the channels in memory."""
        seed = torch.Generator(device).manual_seed(0)
        tokens = self.grid[0] * self.grid[1] * self.grid[2] + self.text
        made = (s * torch.randn(1, tokens, self.heads, self.head_dim, generator=seed, device=device) for s in (2.0, 1.0, 1.0))
        return [x.to(dtype).transpose(1, 2).detach().requires_grad_(grad) for x in made]


SHAPES = (
    Shape("FLUX.1, 2048 x 2048", (1, 128, 128), detailed=True, backward=True),
    Shape("FLUX.1, 4096 x 4096", (1, 256, 256)),
    Shape("FLUX.1, 1024 x 1024", (1, 64, 64)),
    Shape("Wan 2.1 14B, 81 x 480 x 832", (21, 30, 52), 0, 40),
    Shape("Wan 2.1 14B, 81 x 720 x 1280", (21, 45, 80), 0, 40),
)
TINY = (Shape("tiny", (1, 10, 12), 5, 1, 16, detailed=True, backward=True),)


def compile_job(job: tuple[str, Shape, torch.dtype, Any, Any]) -> int:
    """Compile what a method launches at a shape, on any processor; how many kernels did not compile."""
    name, shape, dtype, device_machine, target = job
    torch.set_num_threads(1)
    few = dataclasses.replace(shape, grid=tuple(min(n, 64) for n in shape.grid), heads=2)  # the same kernels
    q, k, v = few.inputs(torch.device("cpu"), dtype, grad=True)
    spec = SPECS[name]
    layout, params = few.layout(spec), start_values(spec, q).requires_grad_(shape.backward)
    with torch.autograd.set_multithreading_enabled(False), calls.recorded(device_machine) as found:
        plan = make_plan(spec, layout, q.device)
        out, _ = composition.attend(q, k, v, spec, layout, plan, params(), shape.head_dim**-0.5, "triton")
        if shape.backward:
            out.sum().backward()
    return sum(ahead.compile_launch(one, target) is not None for one in found)


def compile_all(shapes: tuple[Shape, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Fill Triton's cache, several kernels at once."""
    start = time.perf_counter()
    jobs = [(name, shape, dtype, calls.machine_of(device), ahead.current_target()) for shape in shapes for name in SPECS]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        failed = sum(pool.map(compile_job, jobs))
    print(f"compiled in {time.perf_counter() - start:.0f} s" + (f"; {failed} kernels did not compile" if failed else ""), flush=True)


def milliseconds(function: Callable[[], Any]) -> float:
    """The median; of a single run where nothing is a GPU."""
    if dispatch.INTERPRETED:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    return timing.median_seconds(function) * 1e3


def dense_times(qkv: list[Tensor], device: torch.device) -> dict[str, float | str]:
    """Milliseconds of torch's attention by its implementations; why one does not run."""
    found: dict[str, float | str] = {}
    for name, backend in DENSE.items():
        if device.type != "cuda" and backend is not None:
            continue
        try:
            with sdpa_kernel(backend) if backend is not None else torch.no_grad():
                found[name] = milliseconds(functools.partial(F.scaled_dot_product_attention, *qkv))
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found


def fastest(times: dict[str, float | str]) -> float:
    return min(x for x in times.values() if isinstance(x, float))


def by_kernel(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of each Triton kernel that a call launches."""
    found: dict[str, float] = {}

    def run(one: launch.Launch) -> None:
        launch.execute(one)
        name = one.kernel.__name__
        found[name] = found.get(name, 0.0) + milliseconds(functools.partial(launch.execute, one))

    with torch.autograd.set_multithreading_enabled(False), calls.redirected(calls.machine_of(device), run):
        call()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def step_of(function: Callable[..., Tensor], qkv: list[Tensor]) -> Callable[[], Any]:
    """A forward and backward."""
    pull = torch.ones_like(function(*qkv))
    return lambda: torch.autograd.grad(function(*qkv), qkv, pull)


def host_and_graph(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Microseconds of the processor per call, and milliseconds of a call inside a CUDA graph."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 30
    for _ in range(count):
        call()
    taken = (time.perf_counter() - start) / count * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return {"host_us": taken, "graph_ms": milliseconds(graph.replay)}


def flex_rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """FlexAttention over the blocks that methods visit, which is without their rest. Its compiler takes half a minute."""
    qkv = shape.inputs(device, dtype)
    for name in ("Fovea 5 %", "CLEAR radius 8"):
        layout = shape.layout(SPECS[name])
        row = {"shape": shape.name, "tokens": layout.tokens, "heads": shape.heads, "method": f"FlexAttention, blocks of {name}"}
        if reason := rivals.flex_refusal(SPECS[name], layout, device):
            yield row | {"missing": reason}
            continue
        with torch.no_grad():
            call = functools.partial(rivals.flex(*qkv, SPECS[name], layout), *qkv)
            call()
            yield row | {"ms": milliseconds(call)}


def measure(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for dense attention, one for each method, and those of forward and backward."""
    qkv = shape.inputs(device, dtype)
    own = {"shape": shape.name, "tokens": qkv[0].shape[2], "heads": shape.heads}
    with torch.no_grad():
        times = dense_times(qkv, device)
        yield own | {"method": "dense", "ms": fastest(times), "by_backend": times}
        for name, spec in SPECS.items():
            layout, params = shape.layout(spec), start_values(spec, qkv[0])
            call = functools.partial(attention, *qkv, spec, layout, params=params, backend="triton")
            call()
            ms = milliseconds(call)
            row = own | {"method": name, "ms": ms, "ratio": fastest(times) / ms}
            row["ideal"] = layout.tokens**2 / computed_pairs(spec, layout, shape.head_dim)
            yield row | host_and_graph(call, device) | ({"kernels": by_kernel(call, device)} if shape.detailed else {})
    if shape.backward:
        qkv = shape.inputs(device, dtype, grad=True)
        dense = milliseconds(step_of(F.scaled_dot_product_attention, qkv))
        yield own | {"method": "dense, forward + backward", "ms": dense}
        for name, spec in SPECS.items():
            layout, params = shape.layout(spec), start_values(spec, qkv[0])
            call = step_of(lambda q, k, v, s=spec, y=layout, p=params: attention(q, k, v, s, y, params=p, backend="triton"), qkv)
            ms = milliseconds(call)
            yield own | {"method": f"{name}, forward + backward", "ms": ms, "ratio": dense / ms, "kernels": by_kernel(call, device)}


def line(row: dict[str, Any]) -> str:
    shown = f"{row['shape']:28} {row['method']:38} " + (f"{row['ms']:9.3f} ms" if "ms" in row else row["missing"])
    if "ratio" in row:
        shown += f" {row['ratio']:6.2f}x" + (f" of {row['ideal']:5.1f}x" if "ideal" in row else " " * 10)
    if "host_us" in row:
        shown += f"; host {row['host_us']:.0f} us, graph {row['graph_ms']:.3f} ms"
    return shown + "".join(f", {name} {ms:.3f}" for name, ms in list(row.get("kernels", {}).items())[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape, interpreted")
    args = parser.parse_args()
    device, dtype = (torch.device("cpu"), torch.float16) if args.tiny else (torch.device("cuda"), torch.bfloat16)
    shapes = TINY if args.tiny else SHAPES
    if not args.tiny:
        compile_all(shapes, dtype, device)
    rows: list[dict[str, Any]] = []
    found = [measure(shape, dtype, device) for shape in shapes] + [flex_rows(shapes[0], dtype, device)]
    for row in itertools.chain.from_iterable(found):
        rows.append(row)
        print(line(row), flush=True)
        if args.out is not None:  # after each row: an interruption loses no more than one
            write_json(args.out, {"machine": machine(), "dtype": str(dtype).removeprefix("torch."), "rows": rows})


if __name__ == "__main__":
    main()
