"""`slagen doctor --kernels`: compile every kernel for every GPU architecture, without one, and check its limits."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import torch

from slagen.attention import sparse_linear_attention
from slagen.attention.sla.config import SLAConfig
from slagen.errors import EnvironmentProblem, GateError, SlagenError
from slagen.io.records import read_record
from slagen.kernels.costs import Bounds, KernelCost, KernelCosts, OperatorCall

TARGETS = (80, 86, 89, 90, 100, 120)
# What the other processes run: costs on stdin and the targets as arguments, costs or the call on stdout, as JSON.
COMPILE = "from slagen.doctor import kernel_costs; kernel_costs.compile_for_targets()"
OPERATOR = "from slagen.doctor import kernel_costs; kernel_costs.count_launches()"
MOST_LAUNCHES = 8  # of a call without gradients, domain "all": at 4,096 tokens the host is the limit
WAN_480P = (1, 12, 32760, 128)  # B, H, L, D of Wan2.1-1.3B, 832x480, 81 frames


def kernel_costs(on_note: Callable[[str], None] = lambda text: None, known: Sequence[KernelCost] = ()) -> KernelCosts:
    """Compile every kernel for every card, each card in a process of its own where Triton's interpreter is off.

    Args:
        known: of an earlier run under the same Triton, which need not be compiled again; what is left is compiled in
            one process.
    Raises: EnvironmentProblem without Triton, SlagenError when a kernel does not compile.
    """
    if importlib.util.find_spec("triton") is None:
        raise EnvironmentProblem(
            "Triton is not installed, so no kernel can be compiled. Try pip install triton (Linux only)."
        )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    given = _written(known)

    def compile_for(targets: tuple[int, ...]) -> list[KernelCost]:
        names = ", ".join(f"sm_{target}" for target in targets)
        on_note(f"compiling the kernels for {names}")
        command = [sys.executable, "-c", COMPILE, *map(str, targets)]
        return _read(_said(command, environment, f"the kernels do not compile for {names}", given))

    groups = [TARGETS] if known else [(target,) for target in TARGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(compile_for, groups) for row in rows]
    operator = _said(
        [sys.executable, "-c", OPERATOR], {**environment, "TRITON_INTERPRET": "1"},
        "the kernel launches of an attention call cannot be counted", _written(rows),
    )  # fmt: skip
    return KernelCosts(version("triton"), read_record(OperatorCall, json.loads(operator)), rows)


def compile_for_targets() -> None:
    """Compile for the targets that are the arguments of this process; costs come and go as JSON."""
    from slagen.kernels import inspection

    print(_written(inspection.kernel_costs(tuple(map(int, sys.argv[1:])), _read(sys.stdin.read()))))


def count_launches() -> None:
    """The call of the operator, of the costs on stdin, as JSON."""
    print(json.dumps(operator_call(_read(sys.stdin.read())).to_dict()))


def _written(costs: Sequence[KernelCost]) -> str:
    return json.dumps([cost.to_dict() for cost in costs])


def _read(text: str) -> list[KernelCost]:
    return [read_record(KernelCost, row) for row in json.loads(text)]


def _said(command: list[str], environment: dict[str, str], failure: str, given: str) -> str:
    """What another process prints. Raises SlagenError with the last line of its errors."""
    result = subprocess.run(command, capture_output=True, text=True, env=environment, input=given)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise SlagenError(f"{failure}: {last}")
    return result.stdout


def operator_call(rows: list[KernelCost]) -> OperatorCall:
    """What one call of the operator launches, counted by making it, and how long that should take on one card.

    The call is that of Wan2.1-1.3B at 480p: bf16, sparsity 0.95, domain "all", inference. No kernel of Triton runs.

    Args:
        rows: of `kernel_costs`.
    """
    from slagen.kernels.inspection import variant_of
    from slagen.kernels.launches import launches
    from slagen.kernels.roofline import CARD, TARGET, Call, estimate

    batch, heads, length, head_dim = WAN_480P
    config = SLAConfig()
    # (B, L, H, D) memory, as Wan hands it over.
    q, k, v = (torch.empty(batch, length, heads, head_dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    weight, bias = torch.empty(head_dim, head_dim), torch.empty(head_dim)
    with torch.inference_mode():
        found = launches(lambda: sparse_linear_attention(q, k, v, config, weight, bias, backend="triton"))
    costs = {row.kernel: row for row in rows if row.target == TARGET and row.head_dim == head_dim}
    blocks = config.num_blocks(length)[1]
    call = Call(batch * heads, length, head_dim, blocks, config.num_critical(blocks), q.element_size())
    described = [(launch, costs.get(variant_of(launch) or "")) for launch in found]
    bounds = {kernel: _rounded(found) for kernel, found in estimate(call, described).items()}
    times = {kernel: found.estimate for kernel, found in bounds.items()}
    return OperatorCall(
        shape="x".join(map(str, WAN_480P)), dtype="bf16", sparsity=config.sparsity, linear_domain=config.linear_domain,
        card=CARD, measured=False, launches=len(found),
        estimate_ms={**times, "total": round(sum(times.values()), 4)}, bounds_ms=bounds,
    )  # fmt: skip


def _rounded(bounds: Bounds) -> Bounds:
    return Bounds(*(round(value, 4) for value in dataclasses.astuple(bounds)))


def check_kernels(costs: KernelCosts) -> None:
    """Raise GateError if a kernel breaks a limit of its card, or the operator launches too often."""
    broken = [row for row in costs.kernels if row.faults]
    if broken:
        row = broken[0]
        raise GateError(
            f"{len(broken)} of {len(costs.kernels)} kernels failed the checks. The first is {row.kernel} on "
            f"{row.target}, head dimension {row.head_dim}: {'; '.join(row.faults)}."
        )
    launches = costs.operator.launches
    if launches > MOST_LAUNCHES:
        raise GateError(f"an attention call launches {launches} kernels, but at most {MOST_LAUNCHES} are allowed.")
