"""What can go wrong, in words the user can act on, and the exit code it ends with.

Messages are written for the command line, `Try --num-frames 81`; a caller in Python reads `Try num_frames=81`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

FLAGS = {
    "overwrite", "allow-untrained", "ode", "report", "save-latents", "local-files-only", "from-dense", "restart",
    "retry-failed", "no-cache", "compile", "backward", "checkpointing", "tensorboard", "no-upscale", "smooth-keys",
    "curve", "no-metadata", "lora-merge", "cfg-parallel",
}  # fmt: skip
# Words behind an option that are not its value.
NO_VALUES = {
    "above", "adds", "and", "are", "begins", "both", "compares", "compiles", "computes", "corrects", "counts",
    "decides", "excludes", "for", "generates", "gives", "has", "holds", "in", "is", "leaves", "loads", "makes", "may",
    "measures", "names", "needs", "or", "out", "over", "runs", "saves", "say", "says", "select", "selects", "skips",
    "starts", "takes", "the", "those", "to", "too", "tries", "wants", "was", "where", "with", "would", "writes",
    "wrote",
}  # fmt: skip
_SPELLINGS = re.compile(
    r"(?P<kept>\b(?:pip install|torchrun|ray start|slagen [a-z]+)\b.*?(?=\.\s|$)|(?<!\w)(?:'[^']*'|\"[^\"]*\")(?!\w))"
    r"|(?P<before>\bwith )?(?<![\w-])--(?P<name>[a-z][a-z0-9-]*)"
    r"(?: (?P<value>'[^']*'|\"[^\"]*\"|[^\s,;()]+?(?=[.,;:)]*(?:\s|$))))?"
)


def in_python(text: str) -> str:
    """A message that names options, with the arguments of a call in their place; commands and quotes stay."""
    return re.sub(r"(=(?:'[^']*'|[\w.]+)) (?=[a-z_]+=)", r"\1, ", _SPELLINGS.sub(_as_argument, text))


def _as_argument(match: re.Match[str]) -> str:
    if match["kept"] is not None:
        return match["kept"]
    before, name, value = match["before"] or "", match["name"].replace("-", "_"), match["value"]
    behind = ""
    if value is not None and (value in NO_VALUES or value.startswith("--")):
        behind, value = f" {in_python(value)}", None
    if name == "size":
        width, _, height = (value or "").partition("x")
        return f"{before}{f'width={width}, height={height}' if height else 'width and height'}{behind}"
    if value is not None:
        plain = re.fullmatch(r"-?\d[\d.e+-]*|[A-Z_]+|'.*'|\".*\"", value, re.DOTALL) is not None
        return f"{before}{name}={value if plain else repr(value)}"
    if before:
        return f"{before}{name}={'True' if match['name'] in FLAGS else ''}{behind}"
    return f"{name}{behind}"


class _Reader:
    at_command_line = False


@contextmanager
def for_the_command_line() -> Iterator[None]:
    """In here errors name options; outside of it, where slagen is called from Python, arguments."""
    before, _Reader.at_command_line = _Reader.at_command_line, True
    try:
        yield
    finally:
        _Reader.at_command_line = before


def worded(text: str) -> str:
    """A message that names options as its reader types them."""
    return text if _Reader.at_command_line else in_python(text)


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
        return worded(self.message)


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


class MissingPath(UsageError, WeightsError):
    """A path was given that does not exist: wrong usage, whatever kind of file was wanted."""


class GateError(SlagenError):
    """The work was done, and shows what should not be: a replay that differs, a kernel over a card's limit."""

    exit_code = 6


class PeerFailed(SlagenError):
    """Another process of this run failed first, and says why."""

    def __init__(self) -> None:
        super().__init__("another process of this run failed. Its message says why.")


class Interrupted(SlagenError):
    """The user or the system ended the command; the message says what is kept and how to go on."""

    exit_code = 130


STAGE = "while "  # a note of an error that begins so says at what the run was
FAILED_IN = "in process "  # and one that begins so, in which of several processes it was
NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc", "bad allocation")


def no_memory(error: BaseException) -> bool:
    """Whether an error says that the host's memory ran out; PyTorch, NumPy, C++ and the system say it in many ways."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


LESS = {"finetune": "--micro-batch 1, clips of fewer frames, ",  # by command; of others a smaller video
        **dict.fromkeys(("convert", "merge", "info", "doctor", "decode", "replay"), "")}  # fmt: skip


def of_memory(error: BaseException, command: str = "generate") -> str:
    """What to say of it, and what of this command takes less."""
    notes = getattr(error, "__notes__", [])
    stage = next((f" {note}" for note in notes if note.startswith(STAGE)), "")
    less = LESS.get(command, "a smaller --size, a lower --num-frames, ")
    return f"out of memory{stage}. Try {less}{'or ' if less else ''}closing other programs."
