"""Commands under torchrun: what several processes cannot do is refused, one of them prints, and one message is said."""

import pytest
import torch
import torch.distributed as dist

from slagen.cli import ranks
from slagen.cli.main import run
from slagen.errors import FAILED_IN, Interrupted, PeerFailed, SlagenError, UsageError
from slagen.generation.api import generate
from slagen.generation.config import GenerateConfig
from slagen.processes import joined

CPU = torch.device("cpu")


@pytest.fixture
def torchrun(monkeypatch):
    """Have this process be one of several; the result of the fixture says which."""

    def be(rank, size):
        for name, value in (("TORCHELASTIC_RUN_ID", "test"), ("RANK", rank), ("WORLD_SIZE", size)):
            monkeypatch.setenv(name, str(value))

    return be


@pytest.mark.parametrize(
    ("size", "command", "said"),
    [
        (1, "generate x --cfg-parallel", "needs an even number of processes. Start them with torchrun"),
        (3, "generate x --cfg-parallel", "needs an even number of processes, but torchrun started 3."),
        (2, "generate x --cfg-parallel --guidance-scale 1", "the guidance scale is 1, so there is only one pass."),
        (2, "generate x --offload group", "--offload group does not run in several processes"),
        (2, "generate x --measure-dense 2", "--measure-dense runs in one process. Leave it out"),
        (2, "generate x --compile", "--compile runs in one process. Leave it out"),
        (2, "generate x --cache first-block", "--cache runs in one process. Leave it out"),
        (2, "generate x --device cuda:1", "names one GPU, but under torchrun each process takes its own"),
        (2, "generate x --dry-run", "--dry-run runs in one process, but torchrun started 2 processes."),
        (2, "generate --prompts p.txt", "--prompts runs in one process, but torchrun started 2 processes."),
        (1, "generate --prompts p.txt --cfg-parallel", "--cfg-parallel is for one video, but --prompts gives many."),
        (2, "batch p.txt", "slagen batch runs in one process, but torchrun started 2 processes. Start it without"),
        (2, "bench", "slagen bench runs in one process"),
        (2, "finetune data videos -o out", "slagen finetune data runs in one process"),
        (1, "batch p.txt --cfg-parallel", "No such option: --cfg-parallel"),
    ],
)  # fmt: skip
def test_what_processes_cannot_do_together_is_refused(torchrun, capsys, size, command, said):
    torchrun(0, size)
    assert run(command.split()) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_python_runs_in_one_process():
    with pytest.raises(UsageError, match="--cfg-parallel is for the command under torchrun"):
        generate("a red circle", cfg_parallel=True)
    assert not GenerateConfig("a").cfg_parallel


def test_the_first_process_alone_prints(torchrun, capsys):
    for rank, said in ((0, "slagen"), (1, "")):
        torchrun(rank, 2)
        assert run(["--version"]) == 0
        assert capsys.readouterr().out.startswith(said) and bool(said) == (rank == 0)


def test_who_says_an_error(torchrun, capsys, monkeypatch):
    """Of an error that every process finds, the first; of one that only another finds, that one, once."""
    waited, alone = [], []
    monkeypatch.setattr(ranks, "_wait", lambda seconds: waited.append(seconds) or bool(alone))
    for rank, said in ((0, True), (1, False), (1, True)):
        torchrun(rank, 2)
        assert run(["generate", "x", "--offload", "group"]) == 2
        assert ("error: --offload group" in capsys.readouterr().err) == said
        alone += [True] * rank  # from then on, nobody ends this process while it waits
    assert waited == [10.0, 10.0]
    failed = SlagenError("no.")
    failed.add_note(f"{FAILED_IN}1")
    assert ranks.worded(failed, "no.") == "in process 1: no."
    assert ranks.worded(Interrupted("stopped."), "stopped.") is None and len(waited) == 2
    assert ranks.worded(PeerFailed(), "no.") is None and waited[2:] == [2.0]


def test_the_wait_ends_when_torchrun_ends_the_process(monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    assert ranks._wait(0.0)
    monkeypatch.setattr(ranks.time, "sleep", interrupted)
    assert not ranks._wait(1.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_to_fail_says_why(monkeypatch, rank):
    """The others, whose connections to it end then, say nothing."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(store, rank, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("it might wait for the others"))
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2")
    with pytest.raises(SlagenError, match="ended without a message. The system may have") as found, joined(CPU):
        raise lost
    assert getattr(found.value, "__notes__", []) == ([] if rank == 0 else ["in process 1"])
    for error in (lost, SlagenError("no.")):
        with pytest.raises(PeerFailed), joined(CPU):
            raise error
    with pytest.raises(PeerFailed if rank == 0 else KeyboardInterrupt), joined(CPU):
        raise KeyboardInterrupt
