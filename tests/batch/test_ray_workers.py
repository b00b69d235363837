"""Batches on Ray: real actors on this machine's CPU, killed and left alone."""

import contextlib
import dataclasses
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from processes import start
from test_batch import check_consistent, command, made, settings
from wan_models import save_pipeline

from slagen.batch import ray_connection, ray_workers
from slagen.batch.config import BatchConfig
from slagen.batch.manifest import Manifest, Wanted
from slagen.cli.main import run
from slagen.errors import EnvironmentProblem, SlagenError, UsageError
from slagen.generation import prompts
from slagen.generation.config import GenerateConfig


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    pytest.importorskip("ray", reason="needs ray: pip install 'slagen[ray]'")
    return save_pipeline(tmp_path_factory.mktemp("model") / "toy")


def begin(toy, tmp_path):
    """The command in a process of its own; what it says goes into the files `told` and `told.err`."""
    arguments = ["batch", str(tmp_path / "prompts.txt"), *command(toy, tmp_path / "out"), "--ray", "--ray-workers", "2"]
    return start(run, [arguments], tmp_path / "told")


def workers_at_work(folder):
    """Processes that make a video just now, as the manifest tells."""
    jobs = Manifest(folder).read().values() if folder.is_dir() else []
    return {int(str(job.result.get("worker")).split(":")[-1]) for job in jobs if job.state == "running"}


def kill_worker(folder, process, timeout=1800):
    """SIGKILL one that is at work; False if the driver ends before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.is_alive():
        for pid in workers_at_work(folder):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
        time.sleep(0.02)
    return False


def until(said, timeout=1800):
    end = time.monotonic() + timeout
    while not said() and time.monotonic() < end:
        time.sleep(0.05)


def has_workers(process):
    """Whether Ray is up and has started processes for actors, which then take seconds to import torch."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("ray::" in "".join(p.cmdline()) for p in psutil.Process(process.pid).children(recursive=True))
    return False


def of_the_living(ask: Callable[[], Any]) -> Any:
    """What a process answers; nothing where it has ended meanwhile, as Ray's helpers do."""
    try:
        return ask()
    except psutil.NoSuchProcess:
        return []


def check_that_nobody_else_gets_in(process):
    """Every socket of Ray is on the loopback interface or in a folder of our own, and a call needs the token.

    Ray listened on all interfaces, and a second process ran a function in it. Returns the folder.
    """
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    sockets = [c for p in processes for c in of_the_living(lambda p=p: p.net_connections("inet"))]
    listening = [c.laddr for c in sockets if c.status == psutil.CONN_LISTEN]
    assert listening and {address.ip.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}
    server = next(p for p in processes if "gcs_server" in of_the_living(p.name))
    token = server.environ()["RAY_AUTH_TOKEN"]
    assert len(token) == 64 and not any(token in part for p in processes for part in of_the_living(p.cmdline))
    port = next(c.laddr.port for c in server.net_connections("inet") if c.status == psutil.CONN_LISTEN)
    grpc = pytest.importorskip("grpc", reason="needs grpcio, which comes with slagen[tensorboard]")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        for given in (None, "f" * 64):
            metadata = given and [("authorization", f"Bearer {given}")]
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                ask(b"", metadata=metadata, timeout=60)
        assert ask(b"", metadata=[("authorization", f"Bearer {token}")], timeout=60)
    session = next(part.partition("=")[2] for part in server.cmdline() if part.startswith("--session-dir="))
    folder = Path(session).parents[1]
    assert folder.name.startswith("slagen-ray-") and folder.stat().st_mode & 0o777 == 0o700
    return folder


@pytest.mark.slow
def test_killed_workers_and_drivers_leave_whole_work(toy, tmp_path):
    """A killed worker is replaced, and every video is made once. `make soak` also kills the driver or a worker 25 times
    with 40 prompts: a killed driver leaves what is made, and the next run makes the rest."""
    count, kills = int(os.environ.get("SLAGEN_SOAK_PROMPTS", 6)), int(os.environ.get("SLAGEN_SOAK_KILLS", 0))
    lines = [f"a circle --seed {seed}" for seed in range(count + 6)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines[:count]))
    rng = random.Random(count)
    for number in range(kills):
        process = begin(toy, tmp_path)
        if number % 2 and kill_worker(tmp_path / "out", process):
            time.sleep(rng.uniform(0.0, 3.0))
        else:
            time.sleep(rng.uniform(6.0, 14.0))
        process.kill()
        process.join()
    if kills:
        (tmp_path / "prompts.txt").write_text("\n".join(lines))  # so that something is left to make
    process = begin(toy, tmp_path)
    until(lambda: not process.is_alive() or has_workers(process))
    folder = check_that_nobody_else_gets_in(process)
    assert kill_worker(tmp_path / "out", process)
    process.join(1800)
    out, errors = ((tmp_path / name).read_text() for name in ("told", "told.err"))
    assert process.exitcode == 0, errors
    assert not folder.exists()
    said = set(map(os.path.basename, out.split()))
    assert said and said <= set(made(tmp_path / "out")) and "Ray" in errors
    assert "died; starting another" in errors
    check_consistent(tmp_path / "out", len(lines) if kills else count)


def test_a_job_that_costs_three_workers_fails(toy, tmp_path, monkeypatch):
    """As one does that the machine's memory does not hold; the rest goes on."""
    config = settings(toy, tmp_path, ["a circle --seed 1"])
    manifest = Manifest(Path(config.generate.output))
    (job,) = manifest.queue([Wanted({"prompt": "a circle"}, 1, "a-circle")])
    said = []
    driver = ray_workers.Driver(None, config, [], SimpleNamespace(is_set=lambda: False), said.append)
    monkeypatch.setattr(driver, "_spawn", lambda number: ray_workers.WorkerHandle(number, None, None, None, "next"))
    for number in range(ray_workers.MAX_LOSSES):
        manifest.append({"event": "running", "key": job.key, "attempt": str(number), "worker": f"w{number}"})
        driver._replace(ray_workers.WorkerHandle(1, None, None, None, f"w{number}"), RuntimeError("killed"))
    state = manifest.read()[job.key]
    assert state.state == "failed" and "died 3 times" in state.result["reason"] and len(said) == 3
    with pytest.raises(SlagenError, match="before they generated a video: out of disk"):
        for _ in range(ray_workers.MAX_LOSSES):
            driver._replace(ray_workers.WorkerHandle(1, None, None, None, ""), RuntimeError("x\nout of disk"))


@pytest.mark.slow
def test_what_cannot_start(toy, tmp_path, monkeypatch, capsys):
    config = settings(toy, tmp_path, ["a circle"])
    with pytest.raises(UsageError, match="ray_workers is 2, but Ray is not used. Add --ray"):
        dataclasses.replace(config, ray_workers=2)
    with pytest.raises(UsageError, match="ray_workers is 0, but must be from 1 to 10000"):
        dataclasses.replace(config, ray_workers=0, ray_address="auto")
    (tmp_path / "prompts.txt").write_text("a circle --sneed 3")
    assert run(["batch", str(tmp_path / "prompts.txt"), *command(toy, tmp_path / "out"), "--ray"]) == 2
    assert "--sneed is unknown" in capsys.readouterr().err
    assert run(["batch", str(tmp_path / "prompts.txt"), "--ray-address", "127.0.0.1:1"]) == 2  # the file comes first
    (tmp_path / "prompts.txt").write_text("a circle")
    for address, code in (("127.0.0.1:1", 4), ("nonsense", 2)):
        options = [*command(toy, tmp_path / "out"), "--ray-address", address]
        assert run(["batch", str(tmp_path / "prompts.txt"), *options]) == code
        assert address in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentProblem, match=r"slagen\[ray\]"), ray_connection.connected_to_ray("local"):
        pass


@pytest.mark.parametrize("error", ["AuthenticationError", "ConnectionError"])
def test_a_token_that_is_missing_or_wrong(monkeypatch, error):
    """Ray's own words for it are many lines, and for a wrong one they are others than of tokens."""
    lacking = type("AuthenticationError", (Exception,), {})
    kinds = {"AuthenticationError": lacking, "ConnectionError": ConnectionError}

    def refuse(address, **options):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        raise kinds[error]("Failed to connect to Ray cluster\nmore")

    ray = SimpleNamespace(init=refuse, exceptions=SimpleNamespace(AuthenticationError=lacking))
    monkeypatch.setitem(sys.modules, "ray", ray)
    for name in ("RAY_AUTH_MODE", "RAY_BACKEND_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(EnvironmentProblem, match="the token is missing or wrong") as told,
            ray_connection.connected_to_ray(address),
        ):
            pass
    assert address in str(told.value) and "RAY_AUTH_TOKEN_PATH" in str(told.value)


def test_workers_fit_the_machines(toy):
    """One a GPU, else one a machine; never more than there are videos, nor than Ray has room for."""

    def resources(have, workers=None, device="auto", count=100):
        config = BatchConfig("p", GenerateConfig("-", device=device), ray_address="local", ray_workers=workers)
        ray = SimpleNamespace(cluster_resources=lambda: have)
        requests = [prompts.Request("a", {"num_videos": count}, "", "")]
        return ray_workers.Driver(ray, config, requests, None, print)._resources()

    two = {"CPU": 16.0, "GPU": 8.0, "node:10.0.0.1": 1.0, "node:10.0.0.2": 1.0, "node:__internal_head__": 1.0}
    assert resources(two) == ({"num_gpus": 1}, 8)
    assert resources(two, workers=3) == ({"num_gpus": 1}, 3)
    assert resources(two, count=2) == ({"num_gpus": 1}, 2)
    assert resources(two, device="cpu") == ({"num_cpus": 8}, 2)
    with pytest.raises(UsageError, match="Try --ray-workers 8"):
        resources(two, workers=9)
    with pytest.raises(UsageError, match="Try --ray-workers 16"):
        resources(two, workers=20, device="cpu")
