"""How many programs of a kernel a multiprocessor of each card holds at a time.

Source: CUDA programming guide, technical specifications per compute capability.
"""

from dataclasses import dataclass

KIB = 1024
REGISTERS = 65536  # of a multiprocessor, 32 bits each
RESERVED = KIB  # shared memory that the system keeps of every program
PARTITIONS = 4  # of a multiprocessor: a warp's registers all lie in one


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one: bytes of shared memory in all and for a program, warps, programs."""

    shared_bytes: int
    shared_limit: int
    warps: int
    programs: int


# By compute capability.
MULTIPROCESSORS = {
    80: Multiprocessor(164 * KIB, 163 * KIB, 64, 32),
    86: Multiprocessor(100 * KIB, 99 * KIB, 48, 16),
    89: Multiprocessor(100 * KIB, 99 * KIB, 48, 24),
    90: Multiprocessor(228 * KIB, 227 * KIB, 64, 32),
    100: Multiprocessor(228 * KIB, 227 * KIB, 64, 32),
    120: Multiprocessor(100 * KIB, 99 * KIB, 48, 24),
}


def programs_per_sm(target: int, registers: int, warps: int, shared_bytes: int) -> int:
    """Programs at a time, by registers of a thread, warps of a program and shared memory that a program asks for."""
    limits = MULTIPROCESSORS[target]
    of_a_warp = -(-registers // 8) * 8 * 32  # handed out 256 at a time
    by_registers = REGISTERS // PARTITIONS // of_a_warp * PARTITIONS // warps
    by_shared = limits.shared_bytes // (shared_bytes + RESERVED)
    return min(limits.programs, limits.warps // warps, by_registers, by_shared)
