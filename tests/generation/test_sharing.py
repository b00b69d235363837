"""Several processes make the video of one: the same latents, one message, and files of the first process only."""

import json

import pytest
import torch
from generate_together import FOUR, TWO, configs, latents, make
from processes import run_together
from safetensors.torch import load_file
from wan_models import build_pipeline, save_pipeline

import slagen
from slagen.attention import registry
from slagen.attention.sla.config import SLAConfig
from slagen.formats.sla import SLAMetadata, weights_hash
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
