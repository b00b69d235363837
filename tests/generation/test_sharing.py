"""Several processes make the video of one: the same latents, one message, and files of the first process only."""

import json
from pathlib import Path

import pytest
import torch
from generate_together import CLIP, FOUR, TWO, command, configs, latents, make
from processes import run_together
from safetensors.torch import load_file
from wan_models import build_pipeline, save_pipeline

import slagen
from slagen.attention import registry
from slagen.attention.sla.config import SLAConfig
from slagen.cli.main import run as run_cli
from slagen.errors import UsageError
from slagen.formats.sla import SLAMetadata, weights_hash
from slagen.generation.config import GenerateConfig
from slagen.generation.provenance import read_made
from slagen.generation.sharing import Sharing
from slagen.processes import Member
from slagen.wan.install import save_sla

# In float32, a part of the tokens or heads is another shape of matrix product, which BLAS sums in another order: a few
# times 6e-8 of each number, over two layers and two steps. A block chosen otherwise would be 1e-2 and more.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline of 4 heads, and weights of SLA whose linear branch counts."""
    folder = tmp_path_factory.mktemp("together")
    save_pipeline(folder / "pipe", num_heads=4)
    pipe = build_pipeline(num_heads=4)
    base = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    config = SLAConfig(sparsity=0.5, block_m=16, block_n=16)
    metadata = SLAMetadata(config, "toy", weights_hash(pipe.transformer), "all", 10)
    slagen.apply_sla(pipe, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "proj_l" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return str(folder / "pipe"), str(save_sla(pipe, folder / "sla", metadata, base))


def assert_same(model, found, cases):
    one = {name: latents(config)[0] for name, config in configs(*model, cases).items()}
    assert found.keys() == one.keys()
    wrong = {name: ((found[name] - x).norm() / x.norm()).item() for name, x in one.items()}
    assert all(error <= ROUNDING for error in wrong.values()), wrong


@pytest.mark.slow
def test_two_processes_make_the_latents_of_one(model, tmp_path):
    """And every attention method gives the output of one process, where it does not say that it cannot."""
    said, other = run_together(make, [*model, str(tmp_path), "two"], tmp_path)
    assert_same(model, load_file(tmp_path / "latents.safetensors"), TWO)
    errors = json.loads(said)
    assert all(error <= ROUNDING for error in errors.values()), errors
    exact = {
        method.name
        for method in registry.METHODS.values()
        if not (method.needs.hidden_states or method.needs.all_heads)
    }
    assert other == "" and errors.keys() == {*exact, "gradient"}


@pytest.mark.slow
def test_four_processes_share_passes_and_tokens(model, tmp_path):
    run_together(make, [*model, str(tmp_path), "four"], tmp_path, 4)
    assert_same(model, load_file(tmp_path / "latents.safetensors"), FOUR)


@pytest.mark.slow
def test_the_command_in_two_processes(model, tmp_path, capsys):
    """One prints, and writes files; a failure of the other is one message, with its exit code, and no file."""
    pipe, weights = model
    line = ["generate", "a red circle", "--model", pipe, "--weights", weights, "--size", "80x80", "--num-frames", "9",
            "--steps", "2", "--seed", "3", "--guidance-scale", "3", "--device", "cpu", "--no-cache"]  # fmt: skip
    video, trace = tmp_path / "good.mp4", tmp_path / "trace" / "of.json"
    trace.parent.mkdir()
    first, second = run_together(command, [[*line, "-o", str(video), "--trace", str(trace)], False], tmp_path)
    assert (first.split(), second.split()) == ([str(video), "0"], ["0"])
    said, other = (Path(tmp_path / f"rank{rank}.txt.err").read_text() for rank in (0, 1))
    assert "2 processes (gloo), 2 heads and 38 of 75 tokens each; measured: communication" in said and other == ""
    report = json.loads((tmp_path / "good.json").read_text())
    assert report["settings"]["processes"] == 2 == read_made(video).settings["processes"]
    shares = report["processes"]["ranks"]
    assert [share["tokens"] for share in shares] == [38, 37] and not report["processes"]["cfg_parallel"]
    assert all(0 < share["communication_ms"] < share["denoise_ms"] for share in shares)
    kinds = [event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]]
    assert (kinds.count("communication"), kinds.count("layer")) == (2 * 2 * (2 * 2 + 1), 2 * 2 * 2)  # steps x passes
    assert run_cli(["info", str(video)]) == 0
    assert "2 processes (gloo)" in " ".join(capsys.readouterr().out.split())
    bad = tmp_path / "bad"
    bad.mkdir()
    codes = run_together(command, [[*line, "--cfg-parallel", "-o", str(bad / "bad.mp4")], True], bad)
    assert [code.strip() for code in codes] == ["1", "5"]
    said, other = (Path(bad / f"rank{rank}.txt.err").read_text() for rank in (0, 1))
    assert "error" not in said and other == "error: in process 1: a layer is broken.\n"
    assert not [path for path in bad.iterdir() if not path.name.startswith("rank")]


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "settings", "said"),
    [
        (3, {}, "pipe has 4 attention heads, which 3 processes cannot share evenly. Try torchrun --nproc-per-node 2."),
        (6, {"cfg_parallel": True}, "which 3 processes cannot share evenly. Try torchrun --nproc-per-node 4."),
        (2, {"attention": "vsa"}, "torchrun gives each of 2 processes only some of them. Give another --attention"),
        (2, {"attention": "sla2"}, "sla2 attention needs all heads of a layer in one process"),
        (2, {"cfg_parallel": True}, "so there is only one pass"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_before_loading(model, size, settings, said):
    config = GenerateConfig("a", model=model[0], allow_untrained=True, **{**CLIP, "guidance_scale": 1.0, **settings})
    with pytest.raises(UsageError, match=said):
        Sharing(Member(0, size, CPU), config.cfg_parallel).plan(config, lambda text: None)
