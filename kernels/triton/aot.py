"""Compiling the kernels for GPUs that are not here: what a call would launch, for each architecture, and what the compiler made of it."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import triton
from dit_accel.kernels.triton.launch import Launch
from dit_accel.kernels.triton.tables import SHARED_LIMIT
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import constexpr

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
    torch.int8: "*i8",
}  # fmt: skip
TILES_OF = {"sm_89": "sm_120"}  # whose tiles an architecture without its own has, as `calls.machine_of` gives them
TENSOR_CORES = {
    "sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": "mma.sync", "gfx942": "v_mfma",
}  # fmt: skip
# kernels whose loops are matrix products
MATRIX_KERNELS = {
    "attend_rows", "dense_rows", "gradient_rows", "gradient_dense_rows", "gradient_columns", "gradient_shared_keys", "gradient_pooled",
    "linear_gradient", "linear_columns", "outer_sums",
}  # fmt: skip
INSTRUCTIONS = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)")
LABEL = re.compile(r"^(\$L__\w+|\.LBB\w+):")
BRANCH = re.compile(r"\b(?:bra(?:\.uni)?|s_cbranch_\w+|s_branch)\s+(\$L__\w+|\.LBB\w+)")


class Limits(NamedTuple):
    """One multiprocessor (compute unit): its threads, registers, bytes of shared memory, bytes each program loses, threads of a warp."""

    threads: int
    registers: int
    shared_of_all: int
    reserved: int
    warp: int


# CUDA C++ programming guide, table of technical specifications per compute capability; CDNA 3 instruction set guide (512 registers of 64
# lanes for each of 4 units)
LIMITS = {
    "sm_80": Limits(2048, 65536, 167936, 1024, 32),
    "sm_89": Limits(1536, 65536, 102400, 1024, 32),
    "sm_90": Limits(2048, 65536, 233472, 1024, 32),
    "sm_100": Limits(2048, 65536, 233472, 1024, 32),
    "sm_120": Limits(1536, 65536, 102400, 1024, 32),
    "gfx942": Limits(2048, 131072, 65536, 0, 64),
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports of one kernel: bytes, registers per thread, tensor-core instructions of one round of its loops."""

    kernel: str
    arch: str
    warps: int
    stages: int
    registers: int
    spilled: int  # bytes of stack or spill per thread
    shared: int
    loops: int
    looped: dict[str, int]  # tensor-core instructions by kind, inside loops
    code: int

    def faults(self, spilled: int | None = 0) -> list[str]:
        """What must not be: more than `spilled` bytes a thread spilled (None: any may be), too much shared memory, loads that nothing
        overlaps, loops without tensor cores."""
        found = []
        if spilled is not None and self.spilled > spilled:
            found.append(f"{self.spilled} bytes of stack or spilled registers")
        if self.shared > SHARED_LIMIT[TILES_OF.get(self.arch, self.arch)]:
            found.append(f"{self.shared} bytes of shared memory, more than {SHARED_LIMIT[TILES_OF.get(self.arch, self.arch)]}")
        if self.kernel in MATRIX_KERNELS:
            if self.stages < 2:
                found.append(f"{self.stages} pipeline stage")
            if self.loops and not self.looped:  # the linear rest over all keys needs no loop
                found.append("no tensor-core instruction in a loop")
        return found

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's threads that can be resident at once, by threads, registers and shared memory."""
        limit = LIMITS[self.arch]
        threads = self.warps * limit.warp
        by_registers = limit.registers // (max(1, -(-self.registers // 8) * 8) * threads)
        by_shared = limit.shared_of_all // max(1, self.shared + limit.reserved)
        return min(limit.threads // threads, by_registers, by_shared) * threads / limit.threads


def target(arch: str) -> GPUTarget:
    """Triton's name for an architecture."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def source(launch: Launch) -> ASTSource:
    """The specialisation that running the launch would compile: constants, types, and what is divisible by 16."""
    kernel, signature = launch.kernel, {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        else:
            signature[parameter.name] = _described(value, (place,), constants, attributes, special=not parameter.do_not_specialize)
    return ASTSource(kernel, signature, constants, attributes)


def _described(
    value: Any, place: tuple[int, ...], constants: dict[tuple[int, ...], Any], attributes: dict[tuple[int, ...], Any], *, special: bool
) -> Any:
    """An argument's type as a signature has it, in the form of its tuple; what is constant or divisible by 16 is noted."""
    if isinstance(value, tuple):  # of whose members Triton knows what it can (see `tuples`)
        return type(value)(*(_described(x, (*place, i), constants, attributes, special=True) for i, x in enumerate(value)))
    if value is None or isinstance(value, constexpr) or (type(value) is int and value == 1 and special):
        constants[place] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and special):
        attributes[place] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile one launch for one architecture and read the result."""
    compiled = triton.compile(source(launch), target=target(arch), options={"num_warps": launch.warps})
    read = _read_nvidia if arch.startswith("sm_") else _read_amd
    return Compiled(
        launch.kernel.__name__, arch, launch.warps, launch.constants.get("STAGES", 1), shared=compiled.metadata.shared, **read(compiled.asm)
    )


def looped(text: str) -> tuple[int, dict[str, int]]:
    """The loops of PTX or AMD assembly (from a label to a branch back to it), and the tensor-core instructions inside them by kind."""
    lines = text.splitlines()
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        if found := LABEL.match(line):
            labels[found[1]] = number
        elif (found := BRANCH.search(line)) and found[1] in labels:
            loops.append((labels[found[1]], number))
    inside = {number for first, last in loops for number in range(first, last)}
    return len(loops), dict(Counter(kind for number in inside for kind in INSTRUCTIONS.findall(lines[number])))


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in usage.splitlines() if "REG:" in line]
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    loops, kinds = looped(asm["ptx"])
    return {
        "registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "loops": loops, "looped": kinds, "code": len(asm["cubin"]),
    }  # fmt: skip


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]
    found = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    loops, kinds = looped(text)
    return {
        "registers": found["vgpr_count"], "spilled": found["private_segment_fixed_size"], "loops": loops, "looped": kinds,
        "code": len(asm["hsaco"]),
    }  # fmt: skip
