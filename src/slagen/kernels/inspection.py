"""What every kernel costs on every GPU architecture, found by compiling it: no GPU is needed.

Each kernel is compiled for a target with the tiles that the table chooses there. Registers, spills and warnings are
what ptxas says as Triton runs it; instructions are counted in what nvdisasm shows of the cubin. Run it in a process
without TRITON_INTERPRET: the interpreter compiles nothing.
"""

import contextlib
import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slagen.kernels import backward, block_means, forward, low_bit, rotary, selection, states
from slagen.kernels.costs import KernelCost
from slagen.kernels.launches import Launch
from slagen.kernels.occupancy import MULTIPROCESSORS, programs_per_sm
from slagen.kernels.primitives import COLUMNS_AT_ONCE
from slagen.kernels.resources import Tiles, choose, entries
from slagen.kernels.sass import Code, disassemble

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
class Job:
    """One kernel to be compiled: for which target, and with which tiles."""

    name: str
    target: int
    head_dim: int
    dtype: str
    tile: Tiles | None
    warps: int
    stages: int
    source: ASTSource

    @property
    def fingerprint(self) -> str:
        """Triton's own hash of the source, with the functions it calls, types and constants; and target and options."""
        text = f"{self.name} {self.source.hash()} sm_{self.target} {self.warps} {self.stages}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Compiled:
    """One kernel as Triton compiled it, and what ptxas said of it."""

    job: Job
    shared_bytes: int
    ptx: str
    cubin: bytes
    said: str


def kernel_costs(
    targets: tuple[int, ...] = tuple(MULTIPROCESSORS), known: Iterable[KernelCost] = ()
) -> list[KernelCost]:
    """Compile every kernel for every target, in bf16, for heads of 128 and on some targets of 64 too.

    Blocks of 64, both domains of the linear branch; "attend-128" has query blocks of 128, as the public weights run;
    "attend-inference" is that of a call without gradients, on sm_90, for its estimate.

    Args:
        known: of an earlier run under the same Triton: these are not compiled again.
    Returns: the cost of each kernel on each target.
    Raises: RuntimeError under TRITON_INTERPRET, or when ptxas or nvdisasm say nothing that can be read.
    """
    found = {cost.fingerprint: cost for cost in known}
    rows: list[KernelCost] = []
    for target in targets:
        jobs = [
            job_of(name, target, head_dim)
            for head_dim in (64, 128)
            if head_dim == 128 or target in TARGETS_OF_64
            for name, variant in VARIANTS.items()
            if (head_dim == 128 or variant.heads) and target in (variant.targets or tuple(MULTIPROCESSORS))
        ]
        found |= _costs([job for job in jobs if job.fingerprint not in found], target)
        rows += [found[job.fingerprint] for job in jobs]
    return rows


def _costs(jobs: list[Job], target: int) -> dict[str, KernelCost]:
    """What each kernel costs, by fingerprint; all of them are disassembled at once."""
    compiled = [_compile(job) for job in jobs]
    codes = disassemble([one.cubin for one in compiled], target) if compiled else []
    return {one.job.fingerprint: _cost(one, code) for one, code in zip(compiled, codes, strict=True)}


def job_of(name: str, target: int, head_dim: int, dtype: str = "bf16", tile: Tiles | None = None) -> Job:
    """A kernel with the table's tiles for a target, or with others that are to be tried."""
    variant = VARIANTS[name]
    block_m = 128 if name.endswith("-128") else BLOCK
    chosen = tile
    if variant.row is not None and tile is None:
        limit = MULTIPROCESSORS[target].shared_limit
        fitting = entries(variant.row, head_dim * DTYPES[dtype], limit, target // 10 == 10)
        chosen = choose(fitting, block_m, BLOCK)
    constants = dict(
        variant.options,
        HEAD_DIM=head_dim,
        CHUNK=min(head_dim, COLUMNS_AT_ONCE),
        SHORT=False,
        BLOCK_M=BLOCK,
        BLOCK_N=BLOCK,
        BLOCK=BLOCK,
    )
    constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    warps, stages = variant.warps, variant.stages
    if chosen is not None:
        constants.update(TILE_M=chosen.m, TILE_N=chosen.n, TILE=chosen.n)
        warps, stages = chosen.warps, chosen.stages
    source = _source(variant.kernel, constants, {"*": dtype, **POINTERS, **variant.pointers})
    return Job(name, target, head_dim, dtype, chosen, warps, stages, source)


def _compile(job: Job) -> Compiled:
    """Raises RuntimeError under TRITON_INTERPRET."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so no kernel compiles. Unset it.")
    said = io.StringIO()  # Triton prints what ptxas says; from its cache it would come without
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        compiled = triton.compile(
            job.source,
            target=GPUTarget("cuda", job.target, 32),
            options={"num_warps": job.warps, "num_stages": job.stages},
        )
    return Compiled(job, compiled.metadata.shared, compiled.asm["ptx"], compiled.asm["cubin"], said.getvalue())


def _cost(compiled: Compiled, code: Code) -> KernelCost:
    """What ptxas said and what the code shows."""
    job, said = compiled.job, compiled.said
    tile = job.tile
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or spills is None:
        raise RuntimeError(f"the output of ptxas for sm_{job.target} cannot be parsed: {said.strip()[:400]}")
    copies = code.copies_in_flight() or 0
    if "cp.async.bulk" in compiled.ptx:
        copies = job.stages - 1
    config = {"tile_m": tile.m, "tile_n": tile.n} if tile else {}
    rounds = VARIANTS[job.name].rounds
    return KernelCost(
        kernel=job.name,
        target=f"sm_{job.target}",
        head_dim=job.head_dim,
        dtype=job.dtype,
        fingerprint=job.fingerprint,
        config=config | {"num_warps": job.warps, "num_stages": job.stages},
        shared_bytes=compiled.shared_bytes,
        shared_limit=MULTIPROCESSORS[job.target].shared_limit,
        registers=int(registers[1]),
        spill_bytes=int(spills[1]) + int(spills[2]),
        mma=next((found for found, pattern in TENSOR_CORES.items() if re.search(pattern, compiled.ptx)), None),
        uses_dot=tile is not None and job.dtype != "fp32" and min(tile.m, tile.n) >= 64,
        instructions=len(code.instructions),
        round_instructions=_round_instructions(compiled, code),
        row_instructions=None if rounds is None else code.most_instructions(rounds),
        copies_in_flight=copies,
        programs_per_sm=programs_per_sm(job.target, int(registers[1]), job.warps, compiled.shared_bytes),
        warnings=re.findall(r"\(C75\d\d\).*", said),
    )


def _round_instructions(compiled: Compiled, code: Code) -> int:
    """Of a warp in one round; where ptxas put several rounds into a turn of its loop, their mean.

    Their number is found from the tensor-core instructions of the same loop in the PTX, which has one round in a turn.
    """
    turn = code.round()
    if "tcgen05.mma" in compiled.ptx:  # PTX and code order their loops differently there; no unrolling was seen
        return len(turn)
    rounds = round(sum(i.tensor_core for i in turn) / max(1, _products(compiled.ptx)))
    return round(len(turn) / max(1, rounds))


def _products(ptx: str) -> int:
    """Tensor-core instructions of the first loop in a PTX text that has any."""
    product = re.compile("|".join(TENSOR_CORES.values()))
    begun: dict[str, int] = {}
    lines = ptx.splitlines()
    for number, line in enumerate(lines):
        if label := re.match(r"(\$L\w+):", line):
            begun[label[1]] = number
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        first = begun.get(branch[1], number) if branch else number
        if found := sum(product.search(inside) is not None for inside in lines[first:number]):
            return found
    return 0


SELECTED_COLUMNS = 512  # blocks of a row whose selection is counted: Wan 2.1 at 480p
# What is compiled where is chosen so that all of it takes two minutes on two cores.
TARGETS_OF_64 = (80, 90, 120)  # heads of 64 too: one target of each kind of tensor core and of shared memory


@dataclass(frozen=True)
class Variant:
    """One way to call a kernel.

    row: of the table of tiles; None where it has no tiles, or of one size.
    options: its constants, without tiles, blocks and head dimension.
    pointers: dtypes that differ from POINTERS.
    warps, stages: of a kernel without a row.
    rounds: of a selection, how often its loops go round for a row of SELECTED_COLUMNS: loops without loops inside,
        those around them, and so on.
    heads: False where the head dimension changes nothing.
    targets: where it is compiled; None is everywhere.
    """

    kernel: Any
    row: str | None
    options: dict[str, Any]
    pointers: dict[str, str] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    rounds: tuple[int, ...] | None = None
    heads: bool = True
    targets: tuple[int, ...] | None = None


_BOTH = {"SPARSE": True, "LINEAR": True, "BIAS": True, "FEATURE_MAP": "softmax"}
_ATTEND = {**_BOTH, "MARGINAL": False, "SAVE_LSE": True}
_POOLED = {"FEATURE_MAP": "softmax", "POOL": True}
_SUMS = {"state_ptr": "fp32"}
# One target of each kind of tensor core and of shared memory, for kernels that differ little from another's.
_SOME = (80, 90, 120)
_TABLES = {"cos_ptr": "fp32", "sin_ptr": "fp32", "q_mean_ptr": "fp32", "k_mean_ptr": "fp32"}

VARIANTS = {
    "attend": Variant(forward.attend_kernel, "attend", _ATTEND),
    "attend-inference": Variant(
        forward.attend_kernel, "attend", {**_ATTEND, "SAVE_LSE": False}, targets=(90,)
    ),
    "attend-marginal": Variant(forward.attend_kernel, "attend", {**_ATTEND, "MARGINAL": True}, targets=_SOME),
    "attend-128": Variant(forward.attend_kernel, "attend", _ATTEND),
    "block-means": Variant(
        block_means.block_means_kernel, None, {"TILE_M": BLOCK, "TILE_N": block_means.MEANS},
        {"weight_ptr": "fp32", "kept_ptr": "i8"}, targets=_SOME,
    ),
    "low-bit": Variant(
        low_bit.low_bit_kernel, None, {"TILE_M": BLOCK},
        {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "i8"),
         **dict.fromkeys(("o_ptr", "q_step_ptr", "k_step_ptr", "v_step_ptr"), "fp32")}, warps=8, targets=_SOME,
    ),
    "key-states": Variant(
        states.key_states_kernel, "states", {**_POOLED, "PROJECT": False}, _SUMS
    ),
    "key-states-marginal": Variant(
        states.key_states_kernel, "states", {**_POOLED, "PROJECT": True}, targets=_SOME
    ),
    "query-states": Variant(
        states.query_states_kernel, "states", {"FEATURE_MAP": "softmax", "MARGINAL": False}, _SUMS
    ),
    "dq": Variant(backward.dq_kernel, "dq", {**_BOTH, "MARGINAL": False}),
    "dq-marginal": Variant(backward.dq_kernel, "dq", {**_BOTH, "MARGINAL": True}, targets=_SOME),
    "dkv": Variant(backward.dkv_kernel, "dkv", {**_BOTH, "MARGINAL": False}),
    "pool": Variant(selection.pool_kernel, None, {}),
    "select": Variant(
        selection.select_kernel, None, {"CLASSES": False, "COLUMNS": SELECTED_COLUMNS}, warps=1, rounds=(1,),
        heads=False,
    ),
    "select-classes": Variant(
        selection.select_kernel, None, {"CLASSES": True, "COLUMNS": SELECTED_COLUMNS}, warps=1, rounds=(1,),
        heads=False, targets=_SOME,
    ),
    "combine": Variant(
        states.combine_kernel, None, {"ROWS": states.COMBINED, "COLUMNS": 32, "SAVE": False},
        {"state_ptr": "fp32", "weight_ptr": "fp32", "total_ptr": "fp32"}, heads=False, targets=_SOME,
    ),
    "mix": Variant(
        states.mix_kernel, None, {"ROWS": states.MIX_TILE[0], "BLOCKS": states.MIX_TILE[1], "NORMALISE": True},
        {"scale_ptr": "fp32", "total_ptr": "fp32"}, stages=3, heads=False, targets=_SOME,
    ),
    "norm-rotate": Variant(
        rotary.norm_rotate_kernel, None, {"MEANS": False, "ROWS": 1, "HEADS": 16}, _TABLES, heads=False
    ),
    "norm-rotate-means": Variant(
        rotary.norm_rotate_kernel, None, {"MEANS": True, "ROWS": 1, "HEADS": 16}, _TABLES, heads=False, targets=_SOME
    ),
    "column-lists": Variant(
        selection.column_lists_kernel, None, {"ROWS": selection.LIST_ROWS, "COLUMNS": selection.LIST_COLUMNS},
        heads=False, targets=_SOME,
    ),
}  # fmt: skip


def variant_of(launch: Launch) -> str | None:
    """The variant that a launch of Triton is; None for an operator of PyTorch, and for one that is not listed."""
    for name, variant in VARIANTS.items():
        if variant.kernel.fn.__name__ == launch.kernel and variant.options.items() <= launch.constants.items():
            return name
    return None


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
            if re.fullmatch(r"[a-z]+_[bhl]|num_columns", name):  # SELECTED_COLUMNS is divisible by 16 too
                aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, fixed, aligned)
