"""What the kernels cost on cards that are not here, how that is read out of their code, and what a call launches."""

import dataclasses
import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from slagen.attention import sparse_linear_attention  # noqa: E402
from slagen.attention.sla.config import SLAConfig  # noqa: E402
from slagen.doctor import kernel_costs  # noqa: E402
from slagen.errors import GateError  # noqa: E402
from slagen.io.records import read_record  # noqa: E402
from slagen.kernels import roofline, sass  # noqa: E402
from slagen.kernels.costs import KernelCost, KernelCosts  # noqa: E402
from slagen.kernels.launches import Launch, launches  # noqa: E402
from slagen.kernels.occupancy import programs_per_sm  # noqa: E402

# Renewed by: slagen doctor --kernels --json > tests/kernels/kernel_costs.json
BASELINE = Path(__file__).parent / "kernel_costs.json"


# Compiled in every run, for heads of 128: one for each kind of tensor core. The others are those of the baseline while
# their fingerprint is the same: source, tiles and Triton decide what is compiled, on every host.
ALWAYS = {("attend-inference", "sm_90"), ("dkv", "sm_80")}


def baseline() -> KernelCosts:
    return read_record(KernelCosts, json.loads(BASELINE.read_text()))


@pytest.fixture(scope="module")
def costs() -> KernelCosts:
    """Of every kernel whose source, tiles or Triton are not those of the baseline, and of a few more; `make soak`
    compiles all of them."""
    before = baseline()
    known = [row for row in before.kernels if (row.kernel, row.target) not in ALWAYS or row.head_dim != 128]
    if "SLAGEN_SOAK_KERNELS" in os.environ or before.triton != version("triton"):
        known = []
    return kernel_costs.kernel_costs(known=known)


@pytest.mark.slow
def test_costs_on_every_card(costs):
    """No spill, shared memory within the card's, tensor cores in use, no faults of another kind; few launches."""
    rows = costs.kernels
    assert {row.target for row in rows} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert {row.head_dim for row in rows} == {64, 128}
    kernel_costs.check_kernels(costs)
    assert all(row.registers > 0 and row.instructions > row.round_instructions for row in rows)
    assert all(row.round_instructions > 0 for row in rows if row.mma)


@pytest.mark.slow
def test_pace_on_hopper(costs):
    """At Wan's heads: 330 instructions a round of 64 rows, 3,500 for a row's selection among 512 blocks."""
    rows = {row.kernel: row for row in costs.kernels if (row.target, row.head_dim) == ("sm_90", 128)}
    assert rows["attend"].round_instructions <= 330
    assert rows["attend-inference"].round_instructions <= 330
    assert rows["select"].row_instructions <= 3500


@pytest.mark.slow
def test_costs_are_no_worse_than_the_baseline(costs):
    """Other machines compile the same code, so these numbers do not depend on the host."""
    before = baseline()
    if costs.triton != before.triton:
        pytest.skip(f"the baseline is of Triton {before.triton}, here is {costs.triton}")
    known = {(row.kernel, row.target, row.head_dim): row for row in before.kernels}
    assert {(row.kernel, row.target, row.head_dim) for row in costs.kernels} == set(known)
    worse = [text for row in costs.kernels for text in grown(row, known[row.kernel, row.target, row.head_dim])]
    assert worse == []
    assert costs.operator.launches <= before.operator.launches


def test_the_baseline_is_read_whole():
    """A record holds all that the file does, in its order."""
    assert json.dumps(baseline().to_dict()) == json.dumps(json.loads(BASELINE.read_text()))


def grown(row: KernelCost, before: KernelCost) -> list[str]:
    """What a kernel needs more of than it did: in words, for the failure's message."""
    name = f"{row.kernel}, {row.target}, D = {row.head_dim}"
    limits = {
        "shared_bytes": before.shared_bytes,
        "registers": before.registers + 8,
        "instructions": before.instructions * 1.05,
        "round_instructions": before.round_instructions * 1.03,
        "row_instructions": (before.row_instructions or 0) * 1.03,
    }
    now = vars(row)
    found = [f"{name}: {key} {now[key]}, not over {most:g}" for key, most in limits.items() if (now[key] or 0) > most]
    for key in ("copies_in_flight", "programs_per_sm"):
        if now[key] < vars(before)[key]:
            found.append(f"{name}: {key} {now[key]}, not under {vars(before)[key]}")
    return [*found, *(f"{name}: {text}" for text in row.faults if text not in before.faults)]


ATTEND = KernelCost(
    kernel="attend", target="sm_90", head_dim=128, dtype="bf16", fingerprint="",
    config={"tile_m": 64, "tile_n": 64}, shared_bytes=1000,
    shared_limit=2000, registers=250, spill_bytes=0, mma="wgmma", uses_dot=True, instructions=2000,
    round_instructions=300, row_instructions=None, copies_in_flight=1, programs_per_sm=2, warnings=[],
)  # fmt: skip


def test_a_kernel_that_grew_is_named():
    """The baseline's comparison itself: each kind of growth is found, and what shrank is none."""
    row = dataclasses.replace(ATTEND, instructions=1000, registers=100, round_instructions=400, programs_per_sm=3)
    better = dataclasses.replace(row, registers=90, instructions=900, copies_in_flight=2, programs_per_sm=4)
    assert grown(row, row) == grown(better, row) == []
    worse = {"shared_bytes": 1001, "registers": 109, "instructions": 1051, "round_instructions": 413,
             "row_instructions": 1, "programs_per_sm": 2, "spill_bytes": 8,
             "warnings": ["(C7515) serialized"]}  # fmt: skip
    for key, value in worse.items():
        assert len(grown(dataclasses.replace(row, **{key: value}), row)) == 1, key
    assert len(grown(dataclasses.replace(row, copies_in_flight=0), row)) == 2  # fewer, and a fault


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"copies_in_flight": 0}, "no asynchronous copies"),
        ({"programs_per_sm": 1}, "one program"),
        ({"warnings": ["(C7515) serialized"]}, "C7515"),
        ({"spill_bytes": 8}, "8 bytes spilled"),
        ({"mma": "mma.sync"}, "no wgmma"),
        ({"shared_bytes": 3000}, "3000 bytes of shared memory"),
    ],
    ids=["copies", "programs", "warning", "spill", "wgmma", "shared"],
)
def test_faults(change, fault):
    assert ATTEND.faults == []
    assert len(dataclasses.replace(ATTEND, **change).faults) == 1
    assert fault in dataclasses.replace(ATTEND, **change).faults[0]


def test_one_program_of_128_rows_is_no_fault():
    assert dataclasses.replace(ATTEND, config={"tile_m": 128}, programs_per_sm=1).faults == []


def test_too_many_launches_are_a_gate():
    costs = dataclasses.replace(baseline(), kernels=[ATTEND])
    kernel_costs.check_kernels(dataclasses.replace(costs, operator=dataclasses.replace(costs.operator, launches=8)))
    with pytest.raises(GateError, match="launches 9 kernels, but at most 8"):
        kernel_costs.check_kernels(dataclasses.replace(costs, operator=dataclasses.replace(costs.operator, launches=9)))


def test_a_broken_limit_is_a_gate():
    costs = dataclasses.replace(baseline(), kernels=[ATTEND, dataclasses.replace(ATTEND, spill_bytes=8)])
    with pytest.raises(
        GateError, match="1 of 2 kernels failed the checks. The first is attend on sm_90.*8 bytes spilled"
    ):
        kernel_costs.check_kernels(costs)


# How the code is read


def code(text: str) -> sass.Code:
    """A kernel from lines "predicate opcode operands", 16 bytes each; branches name lines by number."""
    lines = []
    for number, line in enumerate(text.strip().splitlines()):
        words = line.split()
        predicate = words.pop(0) if words[0].startswith("@") else ""
        operands = " ".join(words[1:])
        if words[0].startswith(("BRA", "CALL")):
            operands = " ".join([*words[1:-1], hex(int(words[-1]) * 16)])
        lines.append((number * 16, predicate, words[0], operands))
    return sass.read(lines)


RESCALING = """
    S2R R0, SR_TID.X
    LDGDEPBAR
    DEPBAR.LE SB0, 0x2
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ
    @P0 BRA 7
    FMUL R1, R1, R2
    FMUL R3, R3, R2
    HGMMA.64x128x16.F32.BF16 R56, R88, gdesc[UR8], R56
    LDGSTS.E.BYPASS.128 [R49], desc[UR30][R24.64]
    LDGDEPBAR
    @P2 BRA 2
    DEPBAR.LE SB0, 0x0
    EXIT
    BRA 13
"""


def test_main_loop_without_the_rescale():
    """The shortest way with all products; waits outside the loop and what pads the end do not count."""
    found = code(RESCALING)
    assert len(found.instructions) == 13
    assert [i.opcode.split(".")[0] for i in found.round()] == [
        "DEPBAR", "HGMMA", "BRA", "HGMMA", "LDGSTS", "LDGDEPBAR", "BRA",
    ]  # fmt: skip
    assert found.copies_in_flight() == 2


def test_main_loop_whose_rescale_is_moved_away():
    """ptxas puts rare blocks behind the end; the way back from there is no loop of its own."""
    found = code("""
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ
        @P0 BRA 5
        FADD R1, R1, R2
        @P2 BRA 0
        EXIT
        FMUL R1, R1, R2
        BRA 2
    """)
    assert len(found.loops) == 1
    assert len(found.round()) == 4


def test_instructions_of_nested_loops():
    """30 rounds of a loop around 4 rounds of one inside it, left by a call that does not come back."""
    found = code("""
        MOV R1, R2
        MOV R3, R4
        IADD3 R3, R3, 1
        @!P0 BRA 2
        IADD3 R1, R1, 1
        @P1 CALL.REL.NOINC 7
        BRA 1
        EXIT
    """)
    assert found.most_instructions((4, 30)) == 1 + 30 * (1 + 4 * 2 + 3) + 1
    assert found.most_instructions((1,)) == 1 + 6 + 1


def test_division_that_comes_back_is_no_branch():
    found = code("""
        @P1 CALL.REL.NOINC 3
        FADD R1, R1, R2
        EXIT
        MUFU.RCP R1, R1
        RET.REL.NODEC R2
    """)
    assert found.loops == []
    assert found.most_instructions((1,)) == 3


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "programs"),
    [
        pytest.param(90, 250, 4, 81920, 2, id="by-registers"),
        pytest.param(90, 32, 4, 81920, 2, id="by-shared"),
        pytest.param(90, 240, 8, 98304, 1, id="by-registers-of-eight-warps"),
        pytest.param(90, 32, 4, 0, 16, id="by-warps"),
        pytest.param(86, 32, 1, 0, 16, id="by-programs"),
        pytest.param(120, 128, 4, 101376, 1, id="by-shared-of-99-KiB"),
        pytest.param(80, 95, 1, 0, 20, id="by-registers-of-a-quarter"),
    ],
)
def test_programs_on_a_multiprocessor(target, registers, warps, shared, programs):
    assert programs_per_sm(target, registers, warps, shared) == programs


# What a call launches


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        pytest.param(lambda x: x.mT[0].unsqueeze(0).expand(3, -1, -1), [], id="views"),
        pytest.param(lambda x: torch.empty_like(x).new_empty(3), [], id="empty"),
        pytest.param(lambda x: x.to(torch.float32).contiguous(), [], id="nothing-to-do"),
        pytest.param(lambda x: x.to(torch.float64), ["aten._to_copy"], id="to"),
        pytest.param(lambda x: x.mT.reshape(-1), ["aten.clone"], id="reshape-that-copies"),
        pytest.param(lambda x: x @ x.mT, ["aten.bmm"], id="matmul"),
        pytest.param(lambda x: x.new_empty(3).fill_(1).zero_(), ["aten.fill_", "aten.zero_"], id="fill"),
        pytest.param(lambda x: torch.where(x > 0, x, 0.0), ["aten.gt", "aten.scalar_tensor", "aten.where"], id="where"),
    ],
)
def test_launches_of_operators(call, kernels, inference):
    with torch.inference_mode(inference):
        x = torch.ones(2, 3, 4).transpose(0, 1).contiguous()
        assert [launch.kernel for launch in launches(lambda: call(x))] == kernels


def test_launches_of_the_operator():
    """Through the registered operator, at a full length that the interpreter would take hours for."""
    q = torch.empty(1, 2, 4100, 64, dtype=torch.float16)
    weight, bias = torch.empty(64, 64), torch.empty(64)

    def call():
        return sparse_linear_attention(q, q, q, SLAConfig(), weight, bias, backend="triton")

    with torch.inference_mode():
        found = launches(call)
    attends = [launch for launch in found if launch.kernel == "attend_kernel"]
    assert len(attends) == 1
    assert attends[0].constants["HEAD_DIM"] == 64
    assert attends[0].programs * attends[0].constants["TILE_M"] >= 2 * 4100
    assert "aten.bmm" in [launch.kernel for launch in found]


def test_estimate_is_the_slowest_bound():
    """430 MB from memory take a tenth of a millisecond, and each launch its own time."""
    call = roofline.Call(heads=1, length=64, head_dim=128, blocks=1, topk=1, element_bytes=2)
    copy = Launch("aten.clone", read=[((215_000_000,), 1)], written=[((215_000_000,), 1)])
    found = roofline.estimate(call, [(copy, None), (copy, None)])["aten.clone"]
    assert found.launches == 2
    assert found.dram == pytest.approx(0.2)
    assert found.estimate == pytest.approx(0.2 + 2 * roofline.LAUNCH_MS)
    cost = dataclasses.replace(ATTEND, row_instructions=1000, config={"num_warps": 1})
    select = Launch("select_kernel", programs=roofline.MULTIPROCESSORS * roofline.SCHEDULERS * 1755)
    found = roofline.estimate(call, [(select, cost)])["select_kernel"]
    assert found.issue == pytest.approx(1.0)
    assert found.estimate == pytest.approx(1.0 + roofline.LAUNCH_MS)
