"""Machine code (SASS) of compiled kernels, as nvdisasm prints it: its main loop, and what a warp runs of it.

Instructions form basic blocks, blocks form natural loops. The main loop is the first innermost one that holds
tensor-core instructions; a kernel without any has its largest loop there.
"""

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from triton import knobs

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
TENSOR_CORE = re.compile(r"(H|HG|Q|QG|I|IG|O|D)MMA\b|UTC\w*MMA")
COPY = re.compile(r"LDGSTS|UBLKCP|UTMALDG")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def tensor_core(self) -> bool:
        return TENSOR_CORE.match(self.opcode) is not None

    @property
    def target(self) -> int | None:
        """Where a branch goes. One that only warps with diverged threads take (BRA.DIV) counts as none."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        if self.kind not in ("BRA", "CALL") or ".DIV" in self.opcode or found is None:
            return None
        return int(found[1], 16)

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def always(self) -> bool:
        """No predicate decides about it: neither before the opcode nor, as in BRA.U, among the operands."""
        return not self.predicate and re.match(r"!?U?P\d", self.operands) is None


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block, the blocks that go back to it, and all of its blocks."""

    header: int
    latches: frozenset[int]
    body: frozenset[int]


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, addresses from 0 on, without what pads its end."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def blocks(self) -> dict[int, list[Instruction]]:
        """Basic blocks by the address that they begin at."""
        starts = {0} | {i.target for i in self.instructions if i.target is not None}
        blocks: dict[int, list[Instruction]] = {}
        ended = True
        for instruction in self.instructions:
            if ended or instruction.address in starts:
                blocks[instruction.address] = current = []
            current.append(instruction)
            ended = instruction.target is not None or instruction.kind in ("EXIT", "RET")
        return blocks

    @cached_property
    def edges(self) -> dict[int, set[int]]:
        """Which blocks may follow a block."""
        order = list(self.blocks)
        found: dict[int, set[int]] = {}
        for block, following in zip(order, [*order[1:], None], strict=True):
            last = self.blocks[block][-1]
            found[block] = {last.target} & set(order) if last.target is not None else set()
            stops = last.always and (last.target is not None or last.kind in ("EXIT", "RET"))
            if following is not None and not stops:
                found[block].add(following)
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, by the address of their first block."""
        above = self._dominators()
        into: dict[int, set[int]] = {block: set() for block in above}
        for block in above:
            for following in self.edges[block]:
                into[following].add(block)
        latches: dict[int, set[int]] = {}
        for block in above:
            for header in self.edges[block] & above[block]:
                latches.setdefault(header, set()).add(block)
        loops = []
        for header, ends in sorted(latches.items()):
            body, open_ends = {header}, list(ends)
            while open_ends:
                block = open_ends.pop()
                if block not in body:
                    body.add(block)
                    open_ends += into[block]
            loops.append(Loop(header, frozenset(ends), frozenset(body)))
        return loops

    def _dominators(self) -> dict[int, set[int]]:
        """For every block that is reached, the blocks that every way to it passes, itself included."""
        order = _order(0, self.edges)
        above = {block: set(order) for block in order}
        above[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                before = [above[other] for other in order if block in self.edges[other]]
                now = set.intersection(*before) | {block}
                changed |= now != above[block]
                above[block] = now
        return above

    @cached_property
    def main_loop(self) -> Loop | None:
        """The first innermost loop with tensor-core instructions, or else the largest loop."""
        holding = [loop for loop in self.loops if any(i.tensor_core for i in self.inside(loop))]
        inner = [loop for loop in holding if not any(other.body < loop.body for other in holding)]
        return inner[0] if inner else max(self.loops, key=lambda loop: len(self.inside(loop)), default=None)

    def inside(self, loop: Loop) -> list[Instruction]:
        return [i for block in sorted(loop.body) for i in self.blocks[block]]

    def round(self) -> list[Instruction]:
        """The shortest way once through the main loop that does all of its products and copies; empty without a loop.

        What the loop may leave out, such as a rescale that is skipped where no maximum moved, is not on it.
        """
        loop = self.main_loop
        if loop is None:
            return []
        merit = {
            block: (
                sum(i.tensor_core for i in self.blocks[block]),
                sum(COPY.match(i.opcode) is not None for i in self.blocks[block]),
                -len(self.blocks[block]),
            )
            for block in loop.body
        }
        within = {block: self.edges[block] & loop.body - {loop.header} for block in loop.body}
        order = _order(loop.header, within)
        place = {block: i for i, block in enumerate(order)}
        best = {loop.header: (merit[loop.header], [loop.header])}
        for block in order:
            for following in within[block]:
                if place[following] > place[block]:
                    score = tuple(a + b for a, b in zip(best[block][0], merit[following], strict=True))
                    if following not in best or score > best[following][0]:
                        best[following] = (score, [*best[block][1], following])  # type: ignore[assignment]
        way = max(best[latch] for latch in loop.latches)[1]
        return [i for block in way for i in self.blocks[block]]

    def copies_in_flight(self) -> int | None:
        """The fewest groups of copies that a wait of the main loop leaves in flight; None where it waits for none."""
        if self.main_loop is None:
            return None
        inside = self.inside(self.main_loop)
        waits = [re.match(r"SB0, 0x([0-9a-f]+)", i.operands) for i in inside if i.opcode == "DEPBAR.LE"]
        left = [int(wait[1], 16) for wait in waits if wait is not None]
        return min(left) if left and any(i.opcode == "LDGDEPBAR" for i in inside) else None

    def most_instructions(self, rounds: tuple[int, ...]) -> int:
        """How many instructions a warp runs at most, from the first to the last.

        Args:
            rounds: how often loops go round: those without loops inside, those around them, and so on; the last number
                is for all others.
        """
        weight = {block: len(instructions) for block, instructions in self.blocks.items()}
        edges = {block: set(following) for block, following in self.edges.items()}
        height: dict[int, int] = {}
        for loop in sorted(self.loops, key=lambda loop: len(loop.body)):
            inner = [height[other.header] for other in self.loops if other.body < loop.body]
            height[loop.header] = 1 + max(inner, default=-1)
            left = loop.body & set(edges)  # inner loops are one block by now
            reached = _longest(loop.header, {b: edges[b] & left - {loop.header} for b in left}, weight)
            one_round = max(length for block, length in reached.items() if loop.header in edges[block])
            weight[loop.header] = one_round * rounds[min(height[loop.header], len(rounds) - 1)]
            edges[loop.header] = set().union(*(edges[b] for b in left)) - loop.body
            for block in left - {loop.header}:
                del edges[block]
        return max(_longest(0, edges, weight).values())


def disassemble(cubins: list[bytes], target: int) -> list[Code]:
    """The code of kernels that were compiled for one target, one kernel a cubin. nvdisasm starts once for all.

    Raises: RuntimeError when nvdisasm can not read them.
    """
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.bin"
        file.write_bytes(b"".join(texts))
        suffix = "a" if target >= 90 else ""
        command = [knobs.nvidia.nvdisasm.path, "--binary", f"SM{target}{suffix}", "--no-dataflow", str(file)]
        result = subprocess.run(command, capture_output=True, text=True)
    found = [(int(m[1], 16), (m[2] or "").strip(), m[3], m[4].strip()) for m in LINE.finditer(result.stdout)]
    if result.returncode or not found:
        raise RuntimeError(f"the output of nvdisasm for sm_{target} cannot be parsed: {result.stderr.strip()[:400]}")
    codes, first = [], 0
    for text in texts:
        lines = [line for line in found if first <= line[0] < first + len(text)]
        codes.append(read(lines, first))
        first += len(text)
    return codes


def read(lines: list[tuple[int, str, str, str]], first: int = 0) -> Code:
    """A kernel from its lines (address, predicate, opcode, operands), with addresses that count from `first`."""
    instructions = []
    for address, predicate, opcode, operands in lines:
        if opcode.startswith(("BRA", "CALL")):
            operands = re.sub(r"0x([0-9a-f]+)\s*$", lambda m: hex(int(m[1], 16) - first), operands)
        instruction = Instruction(address - first, predicate, opcode, operands)
        if opcode != "NOP" and instruction.target != instruction.address:
            instructions.append(instruction)
    return Code(tuple(_without_calls(instructions)))


def _without_calls(instructions: list[Instruction]) -> list[Instruction]:
    """The same, with calls that come back, such as a division's rare cases, no longer branches.

    A call whose target does not return is a jump: ptxas leaves loops that way.
    """
    ends = [i for i in instructions if i.always and i.kind in ("BRA", "EXIT", "RET")]
    found = []
    for instruction in instructions:
        if instruction.kind == "CALL" and instruction.target is not None:
            end = next((i for i in ends if i.address >= instruction.target), None)
            if end is not None and end.kind == "RET":
                instruction = replace(instruction, operands="")
        found.append(instruction)
    return found


def _order(start: int, edges: dict[int, set[int]]) -> list[int]:
    """The blocks that are reached, each before those that follow it, loops aside."""
    done: list[int] = []
    seen, stack = {start}, [(start, iter(sorted(edges[start])))]
    while stack:
        block, following = stack[-1]
        step = next((other for other in following if other not in seen), None)
        if step is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(sorted(edges[step]))))
    return done[::-1]


def _longest(start: int, edges: dict[int, set[int]], weight: dict[int, int]) -> dict[int, int]:
    """The longest way from `start` to the end of every block that is reached. There are no loops."""
    length = {start: weight[start]}
    for block in _order(start, edges):
        for following in edges[block]:
            length[following] = max(length.get(following, 0), length[block] + weight[following])
    return length


def _text(cubin: bytes) -> bytes:
    """The one section of a cubin (ELF, 64 bits, little-endian) that holds code."""
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    strings = sections[names][4]
    for name, _, _, _, start, length in sections:
        if cubin.startswith(b".text.", strings + name):
            return cubin[start : start + length]
    raise RuntimeError("the compiled kernel (cubin) contains no code")
