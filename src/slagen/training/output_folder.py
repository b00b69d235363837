"""The output folder of a training: who holds it, what lies in it, and what may be deleted or overwritten."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from slagen.errors import SlagenError

RESULT, TENSORBOARD = "result.json", "tensorboard"
TRANSFORMER_FILE = "transformer.safetensors"
MARK = ".slagen-finetune"  # in a folder that a run here writes to


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold the output folder. Raises SlagenError where another run has it, or it takes no files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SlagenError(f"another slagen finetune is at work in {folder}. Give another --output.") from error
    except OSError as error:
        raise SlagenError(f"{folder} takes no files ({error.strerror or error}). Give another --output.") from error
    try:
        yield
    finally:
        lock.release()
