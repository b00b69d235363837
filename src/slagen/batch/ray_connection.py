"""Connect to Ray, or start it here so that no other user can reach it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slagen.errors import EnvironmentProblem, UsageError
from slagen.io.text import quote

OBJECT_STORE_BYTES = 100 * 2**20  # nothing but settings and progress travels
LOCAL = "local"


@contextmanager
def connected_to_ray(address: str) -> Iterator[Any]:
    """Import Ray and connect, or start it here, without dashboard, usage report or log lines, for the block.

    Anyone who can connect to an open Ray can run code in it. One that is started here is private to this process: it
    listens on the loopback interface, its sockets and logs are in a folder closed to other users, and every call needs
    a random token that only its own processes know.
    """
    match = re.fullmatch(r"(?:ray://)?(\[[^\]\s]+\]|[^\s:/]+):(\d{1,5})", address)
    if match is None and address not in (LOCAL, "auto"):
        raise UsageError(
            f"the Ray address is {quote(address)}, but must be HOST:PORT. Leave the address out to use this machine."
        )
    folder = _private_folder() if address == LOCAL else None
    try:
        _set_environment(local=folder is not None)
        ray = _connect(address, match, folder)
        try:
            yield ray
        finally:
            ray.shutdown()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _private_folder() -> Path:
    """A folder closed to other users, for Ray's own, which is open to all. A socket's path has at most 107 bytes."""
    parent = os.environ.get("RAY_TMPDIR") or ("/tmp" if os.name == "posix" else None)
    return Path(tempfile.mkdtemp(prefix="slagen-ray-", dir=parent))


def _set_environment(*, local: bool) -> None:
    """Environment variables that Ray reads when imported and its processes inherit."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if local:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system: all of Ray binds to loopback
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # failures are reported below
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # whoever gives a token means it


def _connect(address: str, match: re.Match[str] | None, folder: Path | None) -> Any:
    try:
        import ray
    except ImportError as error:
        raise EnvironmentProblem("--ray needs Ray. Install it: pip install 'slagen[ray]'") from error
    if match is not None:  # Ray itself would try for minutes
        try:
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise _unreached(address, error) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if folder is not None:
        options |= {
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(folder / "ray"),
        }
    try:
        ray.init(address, **options)
    except ray.exceptions.AuthenticationError as error:
        raise _refused(address) from error
    except (ConnectionError, RuntimeError, ValueError, ImportError, OSError, TimeoutError) as error:
        if match is not None and isinstance(error, ConnectionError):  # something listens there, as was seen above
            raise _refused(address) from error
        raise _unreached(address, error) from error
    return ray


def _refused(address: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"Ray at {quote(address)} refuses the connection: the token is missing or wrong, or the versions of Ray "
        "differ. Set RAY_AUTH_TOKEN to the cluster's token (or RAY_AUTH_TOKEN_PATH to a file that holds it), and "
        "install the cluster's version of Ray."
    )


def _unreached(address: str, error: Exception) -> EnvironmentProblem:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return EnvironmentProblem(
        f"Ray at {quote(address)} cannot be reached ({reason}). Start it with ray start --head, or leave the "
        "address out to use this machine."
    )
