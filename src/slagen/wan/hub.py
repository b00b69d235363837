"""Download files from the Hugging Face hub, with their sizes checked first, or find them on this machine.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

from slagen.errors import EnvironmentProblem, UsageError, WeightsError
from slagen.formats.model_files import SLA_FILE
from slagen.io.text import counted, quote
from slagen.wan.folder import BUNDLED

PIPELINE_FILES = ["*.json", "*.safetensors", "tokenizer/*", "*.txt", "*.model"]
TRANSFORMER_WEIGHTS = ["transformer/*.safetensors", "transformer/*.index.json"]
OTHER_MODEL = f"give a folder with --model, or use the bundled model with --model {BUNDLED}"
# The hub's own errors are HTTPErrors too; a proxy or an address that no client takes are the last two.
FAILURES = (HTTPError, OSError, RuntimeError, ImportError, ValueError)

OnNote = Callable[[str], None]


@contextmanager
def closed_hub() -> Iterator[None]:
    """In here the hub is not asked for anything, as with HF_HUB_OFFLINE: for files that lie on this machine.

    A damaged file can make a library take some of its text for a hub id.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_cached(repo_id: str) -> bool:
    """Whether a pipeline of the hub was downloaded before."""
    try:
        return isinstance(try_to_load_from_cache(repo_id, "model_index.json"), str)
    except HFValidationError:
        return False


def fetch_pipeline(repo_id: str, *, transformer: bool, local_files_only: bool, on_note: OnNote) -> Path:
    """The folder of a diffusers pipeline; without its transformer's weights where others replace them."""
    ignored = [] if transformer else TRANSFORMER_WEIGHTS
    return _fetch(repo_id, PIPELINE_FILES, ignored, local_files_only, on_note)


def fetch_weights(repo_id: str, *, local_files_only: bool, on_note: OnNote) -> Path:
    """The one transformer file of a repository that is not quantised.

    Raises: EnvironmentProblem if there is not exactly one.
    """
    folder = _fetch(repo_id, ["*.pth", "*.safetensors"], ["*quant*"], local_files_only, on_note)
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in (".pth", ".safetensors")]
    files = [file for file in files if "quant" not in file.name]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise EnvironmentProblem(
            f"{repo_id} should contain one transformer file, but contains {found}. Download the right one and give "
            "it with --weights."
        )
    return files[0]


def fetch_sla(repo_id: str, *, local_files_only: bool = False, on_note: OnNote) -> Path:
    """The `sla.safetensors` of a repository. Raises WeightsError if it has none."""
    folder = _fetch(repo_id, [SLA_FILE], [], local_files_only, on_note, "or give a file or folder")
    if not (folder / SLA_FILE).is_file():
        raise WeightsError(
            f"{repo_id} does not contain {SLA_FILE}. Give a repository that contains it, a file or a folder."
        )
    return folder / SLA_FILE


def _fetch(
    repo_id: str, wanted: list[str], ignored: list[str], local_files_only: bool, on_note: OnNote,
    advice: str = OTHER_MODEL,
) -> Path:  # fmt: skip
    """A snapshot of some of a repository's files. Raises EnvironmentProblem, or UsageError for an impossible id.

    Args:
        advice: what else to do where it cannot be downloaded.
    """
    options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": ignored}
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if local_files_only or constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(repo_id, local_files_only=True, **options))
        info = HfApi().model_info(repo_id, files_metadata=True)
        _check_room(repo_id, info, wanted, ignored, on_note)
        return Path(snapshot_download(repo_id, **options))
    except HFValidationError as error:
        raise UsageError(
            f"{quote(repo_id)} is not a Hugging Face id. Give owner/name, a folder, or a preset with --model."
        ) from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise EnvironmentProblem(
            f"Hugging Face has no model {quote(repo_id)} that you can read. Check the name. A gated or private model "
            "also needs a valid token (hf auth login, or HF_TOKEN)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise EnvironmentProblem(_absent(repo_id, "downloads are switched off", advice)) from error
    except FAILURES as error:
        return _from_cache(repo_id, options, error, advice)


def _unreached(error: Exception) -> str:
    """Why the hub cannot be reached, and which setting of the environment to fix."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if "SOCKS" in str(error).upper():
        package = "pysocks" if "requests" in type(error).__module__ else "socksio"
        return f"the SOCKS proxy in ALL_PROXY, HTTPS_PROXY or HTTP_PROXY needs a package (pip install {package})"
    if isinstance(error, ImportError | ValueError):
        return f"Hugging Face cannot be reached (check ALL_PROXY, HTTPS_PROXY, HTTP_PROXY, HF_ENDPOINT): {first}"
    return f"Hugging Face cannot be reached: {first}"


def _from_cache(repo_id: str, options: dict[str, Any], error: Exception, advice: str) -> Path:
    """A complete earlier download, where the hub cannot be reached now."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403):
        raise EnvironmentProblem(f"Hugging Face denies access to {repo_id} ({first}). Check HF_TOKEN.") from error
    try:
        return Path(snapshot_download(repo_id, local_files_only=True, **options))
    except (LocalEntryNotFoundError, OSError) as missing:
        raise EnvironmentProblem(_absent(repo_id, _unreached(error), advice)) from missing


def _absent(repo_id: str, why: str, advice: str) -> str:
    return f"{repo_id} is not on this machine, and {why}. Try again online (finished files are kept), {advice}."


def _check_room(repo_id: str, info: Any, wanted: list[str], ignored: list[str], on_note: OnNote) -> None:
    """Note what will be downloaded. Raises EnvironmentProblem if the disk has too little room."""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = filter_repo_objects(sizes, allow_patterns=wanted, ignore_patterns=ignored)
    missing = [name for name in names if not isinstance(try_to_load_from_cache(repo_id, name, revision=info.sha), str)]
    needed = sum(sizes[name] for name in missing)
    if not missing:
        return
    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise EnvironmentProblem(
            f"{repo_id} needs {needed / 2**30:.2f} GiB, but {place} has {free / 2**30:.2f} GiB free. Free some space, "
            "or set HF_HOME to a folder on another disk."
        )
    on_note(f"downloading {counted(len(missing), 'file')} of {repo_id} ({needed / 2**30:.2f} GiB) to {cache}")
