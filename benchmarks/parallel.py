"""Wall time of one picture in two processes of one thread each against one process of one thread, over gloo on a CPU.

    python benchmarks/parallel.py [--sides 128 256] [--rounds 3] [--out benchmarks/parallel.json]

A FLUX transformer of two layers, 4 heads of 64 channels, float32, side x side image tokens and 64 of text, random weights; its forward
alone, under a ulysses_degree and, for static patterns, under a ring_degree of 2, which take turns. Of each the medians in seconds: wall
time from barrier to barrier, and the processor time of the process that takes most, which is nearly the same where both cores are free and
says more where they are not; while one process runs alone, the other waits. Bytes are those that the first process sends in a forward.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from torch.multiprocessing.spawn import spawn

import dit_accel
from dit_accel.measure.timing import machine

METHODS = {"clear:8": dit_accel.CLEAR(8), "fovea:radius=8": dit_accel.Fovea(radius=8), "fovea:0.05": dit_accel.Fovea(0.05)}
TEXT = 64


def transformer() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip


def call(side: int) -> dict[str, Any]:
    seed = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": torch.randn(1, side * side, 16, generator=seed),
        "encoder_hidden_states": torch.randn(1, TEXT, 64, generator=seed),
        "pooled_projections": torch.randn(1, 64, generator=seed), "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros_like(y), y, x], -1).view(-1, 3).float(), "txt_ids": torch.zeros(TEXT, 3),
    }  # fmt: skip


def models(spec: Any, count: int) -> dict[str, Any]:
    """The ways of a method by name."""
    found = {}
    degrees: dict[str, dict[str, int]] = {"alone": {}, "ulysses": {"ulysses_degree": count}, "ring": {"ring_degree": count}}
    for name, degree in degrees.items():
        if name == "ring" and spec.selection is not None:
            continue
        model = dit_accel.accelerate(transformer(), spec, strict=True)
        if degree:
            model.enable_parallelism(config=ContextParallelConfig(**degree))
        found[name] = model
    return found


def timed(run: Callable[[], Any], rank: int, everyone: bool) -> tuple[float, float]:
    """Wall time, and the most processor time of any process."""
    dist.barrier()
    start, spent = time.perf_counter(), time.process_time()
    if everyone or rank == 0:
        run()
    most = torch.tensor(time.process_time() - spent)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return time.perf_counter() - start, float(most)


def work(rank: int, count: int, port: int, sides: list[int], rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a machine without a GPU has none
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo")
    sent = [0]
    original = dist.all_to_all_single

    def counting(received: Any, given: Any, incoming: Any, outgoing: Any, **settings: Any) -> Any:
        sent[0] += (given.numel() - outgoing[rank]) * given.element_size()
        return original(received, given, incoming, outgoing, **settings)

    dist.all_to_all_single = counting
    rows = []
    for (method, spec), side in itertools.product(METHODS.items(), sides):
        arguments, ways = call(side), models(spec, count)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        bytes_sent = dict.fromkeys(ways, 0)
        with torch.no_grad():
            for number in range(rounds + 1):  # the first makes the plans
                for name, model in ways.items():
                    sent[0] = 0
                    taken = timed(lambda: model(**arguments, return_dict=False), rank, name != "alone")  # noqa: B023
                    bytes_sent[name] = sent[0]
                    if number:
                        seconds[name].append(taken)
        row = {"method": method, "tokens": side * side} | {
            name: {
                "seconds": round(statistics.median(wall for wall, _ in values), 3),
                "processor": round(statistics.median(most for _, most in values), 3),
                "megabytes": round(bytes_sent[name] / 1e6, 2),
            }
            for name, values in seconds.items()
        }
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)
    if rank == 0 and out:
        Path(out).write_text(json.dumps({"machine": machine(), "processes": count, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    spawn(work, (2, number, given.sides, given.rounds, given.out), nprocs=2)
