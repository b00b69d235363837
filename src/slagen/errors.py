"""What can go wrong, in words the user can act on, and the exit code it ends with."""


class SlagenError(Exception):
    """A failure with a message that says what was given, what works and what to type.

    Args:
        lines: of the message, one as a rule; a line feed inside one, as of a path that has it, is escaped.
    """

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.message = "\n".join(text.replace("\n", "\\n") for text in lines)

    def __str__(self) -> str:
        return self.message


class UsageError(SlagenError):
    """A setting that cannot work, alone or with the others."""

    exit_code = 2


class EnvironmentProblem(SlagenError):
    """This machine lacks a device, a package or a driver, or does not reach the hub."""

    exit_code = 4


class KernelProblem(EnvironmentProblem, RuntimeError):
    """The Triton kernels do not run on a device: attention/ raises it, a RuntimeError as PyTorch would raise it."""


class WeightsError(SlagenError):
    """Weights, data sets or videos that are broken, or do not fit the model or the settings."""

    exit_code = 5


class GateError(SlagenError):
    """The work was done, and shows what should not be: a replay that differs, a kernel over a card's limit."""

    exit_code = 6


STAGE = "while "  # a note of an error that begins so says at what the run was
NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc", "bad allocation")


def no_memory(error: BaseException) -> bool:
    """Whether an error says that the host's memory ran out; PyTorch, NumPy, C++ and the system say it in many ways."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


LESS = {"finetune": "--micro-batch 1, data of fewer frames, ", "convert": "", "merge": "", "info": "", "doctor": ""}


def of_memory(error: BaseException, command: str = "generate") -> str:
    """What to say of it, and what of this command takes less."""
    notes = getattr(error, "__notes__", [])
    stage = next((f" {note}" for note in notes if note.startswith(STAGE)), "")
    less = LESS.get(command, "a smaller --size, fewer --num-frames, ")
    return f"the memory ran out{stage}. Try {less}{'or ' if less else ''}to close other programs."
