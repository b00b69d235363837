"""What every kernel costs on every card, found out by compiling it: no GPU is needed.

Each kernel is compiled for a target with the tiles that the table chooses there, and Triton's own ptxas reads out
registers and spills from the PTX. Run it in a process without TRITON_INTERPRET: the interpreter compiles nothing.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slagen.kernels import backward, forward, selection, states
from slagen.kernels.primitives import COLUMNS_AT_ONCE
from slagen.kernels.resources import KIB, Tiles, choose, entries

# Compute capability -> bytes of shared memory that one program may use (CUDA programming guide, capabilities).
SHARED_LIMITS = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
TENSOR_CORES = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}
BLOCK = 64
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}

# Pointers that are not of the tensors' own dtype.
POINTERS = {
    "lse_ptr": "fp32", "delta_ptr": "fp32", "dlinear_ptr": "fp32", "z_ptr": "fp32", "dz_ptr": "fp32", "g_ptr": "fp32",
    "bias_ptr": "fp32", "mean_ptr": "fp32", "score_ptr": "fp32", "kv_ptr": "i32", "list_ptr": "i32",
    "offset_ptr": "i32", "class_ptr": "i8",
}  # fmt: skip
FLOATS = ("scale", "scale_log2", "eps")


@dataclass(frozen=True)
class KernelCost:
    """One kernel on one target. `uses_dot`: it multiplies half-precision tiles of 64 rows or more with tl.dot."""

    kernel: str
    target: str
    head_dim: int
    dtype: str
    config: dict[str, int]
    shared_bytes: int
    shared_limit: int
    registers: int
    spill_bytes: int
    mma: str | None
    uses_dot: bool

    @property
    def wgmma(self) -> bool:
        return self.mma == "wgmma"

    def faults(self) -> list[str]:
        """Which limits the kernel breaks on its target."""
        found = []
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} bytes of shared memory, the card has {self.shared_limit}")
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes spilled")
        if self.uses_dot and self.mma is None:
            found.append("no tensor-core instruction")
        if self.uses_dot and self.target == "sm_90" and not self.wgmma:
            found.append("no wgmma")
        if self.uses_dot and self.target == "sm_100" and self.mma != "tcgen05":
            found.append("no tcgen05")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "wgmma": self.wgmma}


def kernel_costs(targets: tuple[int, ...] = tuple(SHARED_LIMITS)) -> Iterator[KernelCost]:
    """Compile every kernel for every target, in bf16 for heads of 64 and 128; yields as they are done.

    Blocks of 64, both domains of the linear branch; "attend-128" has query blocks of 128, as the public weights run.

    Raises: RuntimeError under TRITON_INTERPRET, or when ptxas says nothing that can be read.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is on, so nothing compiles. Unset it.")
    for target in targets:
        for head_dim in (64, 128):
            for name in VARIANTS:
                yield kernel_cost(name, target, head_dim)


def kernel_cost(name: str, target: int, head_dim: int, dtype: str = "bf16", tile: Tiles | None = None) -> KernelCost:
    """Compile one kernel for one target, with the table's tiles or with others that are to be tried."""
    kernel, row, options, kinds = VARIANTS[name]
    block_m = 128 if name.endswith("-128") else BLOCK
    shared_limit = SHARED_LIMITS[target]
    chosen = tile
    if row is not None and tile is None:
        chosen = choose(entries(row, head_dim * DTYPES[dtype], shared_limit), block_m, BLOCK)
    constants = dict(
        options, HEAD_DIM=head_dim, CHUNK=min(head_dim, COLUMNS_AT_ONCE), BLOCK_M=BLOCK, BLOCK_N=BLOCK, BLOCK=BLOCK
    )
    constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    warps, stages = 4, 2
    if chosen is not None:
        constants.update(TILE_M=chosen.m, TILE_N=chosen.n, TILE=chosen.n)
        warps, stages = chosen.warps, chosen.stages
    if name == "select":
        warps = 1
    source = _source(kernel, constants, {"*": dtype, **POINTERS, **kinds})
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "num_stages": stages}
    )
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx, target)
    mma = next((found for found, pattern in TENSOR_CORES.items() if re.search(pattern, ptx)), None)
    dot = chosen is not None and dtype != "fp32" and min(chosen.m, chosen.n) >= 64
    config = {"tile_m": chosen.m, "tile_n": chosen.n} if chosen else {}
    config |= {"num_warps": warps, "num_stages": stages}
    return KernelCost(
        name,
        f"sm_{target}",
        head_dim,
        dtype,
        config,
        compiled.metadata.shared,
        shared_limit,
        registers,
        spills,
        mma,
        dot,
    )


_BOTH = {"SPARSE": True, "LINEAR": True, "BIAS": True, "FEATURE_MAP": "softmax"}

# name -> kernel, row of the table, constants, dtypes of its pointers
VARIANTS: dict[str, tuple[Any, str | None, dict[str, Any], dict[str, str]]] = {
    "attend": (forward.attend_kernel, "attend", {**_BOTH, "MARGINAL": False, "SAVE_LSE": True}, {}),
    "attend-marginal": (forward.attend_kernel, "attend", {**_BOTH, "MARGINAL": True, "SAVE_LSE": True}, {}),
    "attend-128": (forward.attend_kernel, "attend", {**_BOTH, "MARGINAL": False, "SAVE_LSE": True}, {}),
    "key-states": (
        states.key_states_kernel,
        "states",
        {"FEATURE_MAP": "softmax", "POOL": True, "PROJECT": False},
        {"state_ptr": "fp32"},
    ),
    "key-states-marginal": (
        states.key_states_kernel,
        "states",
        {"FEATURE_MAP": "softmax", "POOL": True, "PROJECT": True},
        {},
    ),
    "query-states": (
        states.query_states_kernel,
        "states",
        {"FEATURE_MAP": "softmax", "MARGINAL": False},
        {"state_ptr": "fp32"},
    ),
    "dq": (backward.dq_kernel, "dq", {**_BOTH, "MARGINAL": False}, {}),
    "dq-marginal": (backward.dq_kernel, "dq", {**_BOTH, "MARGINAL": True}, {}),
    "dkv": (backward.dkv_kernel, "dkv", {**_BOTH, "MARGINAL": False}, {}),
    "pool": (selection.pool_kernel, None, {}, {}),
    "select": (selection.select_kernel, None, {"CLASSES": True, "COLUMNS": selection.COLUMNS}, {}),
    "column-lists": (
        selection.column_lists_kernel,
        None,
        {"ROWS": selection.LIST_ROWS, "COLUMNS": selection.LIST_COLUMNS},
        {},
    ),
}


def _source(kernel: Any, constants: dict[str, Any], dtypes: dict[str, str]) -> ASTSource:
    """A kernel with the types its launcher gives it: contiguous rows, aligned pointers and strides."""
    signature, fixed, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name], fixed[name] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtypes.get(name, dtypes['*'])}"
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        elif re.fullmatch(r"[a-z]+_d", name):
            signature[name], fixed[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if re.fullmatch(r"[a-z]+_[bhl]", name):
                aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, aligned)


def _assemble(ptx: str, target: int) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled (stores and loads), as ptxas reports them."""
    tool = knobs.nvidia.ptxas_blackwell if target >= 100 else knobs.nvidia.ptxas
    suffix = "a" if target >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name=sm_{target}{suffix}", str(source), "-o", str(source.with_suffix(".o"))]
        result = subprocess.run(command, capture_output=True, text=True)
    said = result.stdout + result.stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if result.returncode or registers is None or spills is None:
        raise RuntimeError(f"ptxas for sm_{target} says nothing that can be read: {said.strip()[:400]}")
    return int(registers[1]), int(spills[1]) + int(spills[2])
