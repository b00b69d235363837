"""The output folder of a training: its lock, its files, and which of them may be deleted or overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from slagen.errors import SlagenError, UsageError
from slagen.formats.model_files import SLA_FILE
from slagen.generation.embeddings import files_in
from slagen.io.files import delete, sweep
from slagen.io.locks import locked_folder
from slagen.io.text import counted
from slagen.training.checkpoints import FOLDER, KEPT, checkpoints
from slagen.training.log import CLIPS, LOG
from slagen.training.page import PAGE

RESULT, TENSORBOARD = "result.json", "tensorboard"
TRANSFORMER_FILE = "transformer.safetensors"
MARK = ".slagen-finetune"  # marks a folder as written by slagen finetune


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Lock the output folder. Raises SlagenError where another run has it, or it is not writable."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except Timeout as error:
            raise SlagenError(
                f"another slagen run is writing to {folder}. Wait for it, or give another --output."
            ) from error
        except OSError as error:
            why = error.strerror or error
            raise SlagenError(f"{folder} is not writable ({why}). Give another --output.") from error
        yield


def sweep_folder(folder: Path) -> None:
    """Delete the temporary files of killed runs; the caller holds the folder, so no other run is alive in it."""
    for place in (folder, folder / FOLDER, folder / CLIPS):
        sweep(place)
    for left in (folder / FOLDER).glob("step-*.part"):  # as earlier versions named them
        delete(left)


def clear_folder(folder: Path) -> None:
    """Delete the files of an earlier run, and nothing else."""
    paths = [*checkpoints(folder), folder / TENSORBOARD]
    if (folder / "transformer" / MARK).is_file():
        paths.append(folder / "transformer")
    for path in [*paths, *(folder / name for name in (RESULT, PAGE, SLA_FILE, TRANSFORMER_FILE))]:
        delete(path)
    clear_log(folder)


def clear_log(folder: Path) -> None:
    """Delete the log and the side-by-side videos that it lists."""
    clips = [*(folder / CLIPS).glob("step-*.mp4"), *(folder / CLIPS).glob("dense-*.mp4")]
    for path in [*clips, folder / LOG]:
        delete(path)


def check_foreign(folder: Path) -> None:
    """Raise UsageError where the result would overwrite a file that slagen finetune did not write."""
    base = folder / "transformer"
    ours = any((folder / name).is_file() for name in (MARK, RESULT)) or checkpoints(folder)
    found = [] if ours else [folder / name for name in (SLA_FILE, TRANSFORMER_FILE)]
    for path in [*found, *([] if (base / MARK).is_file() else [base])]:
        if path.exists():
            raise UsageError(f"{path} exists and was not written by slagen finetune. Give another --output.")


def check_disk_space(folder: Path, checkpoint_bytes: int, restart: bool) -> None:
    """Raise SlagenError where the disk has no space for the checkpoints and one more, which is being written.

    Args:
        checkpoint_bytes: size of each. restart: existing ones will be deleted.
    """
    there = checkpoints(folder)
    free, more = shutil.disk_usage(folder).free, KEPT + 1 - len(there)
    if restart:
        free, more = free + sum(f.stat().st_size for path in there for f in files_in(path)), KEPT + 1
    if free < more * checkpoint_bytes:
        raise SlagenError(
            f"{folder} has {free / 2**30:.2g} GiB free, but needs space for {counted(more, 'checkpoint')} of "
            f"{checkpoint_bytes / 2**30:.2g} GiB each. Free some space, or give another --output."
        )
