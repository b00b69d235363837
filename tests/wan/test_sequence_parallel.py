"""A method that needs more of a layer than one process has is refused where processes share a clip's tokens."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from wan_models import build_transformer

from slagen.attention import registry
from slagen.attention.protocol import Inputs, Needs
from slagen.errors import UsageError
from slagen.wan.processor import install_method, processors
from slagen.wan.sequence_parallel import split_tokens


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (Needs(hidden_states=True), "sla attention needs the hidden states of all tokens of a layer in one process"),
        (Needs(all_heads=True), "needs all heads of a layer"),
        (Needs(hidden_states=True, all_heads=True), "the hidden states of all tokens and all heads of a layer"),
    ],
)
def test_it_is_refused_before_anything_is_changed(needs, said):
    """Its hidden states were None there, and an error in the first forward pass said so."""
    model, method = build_transformer(), dataclasses.replace(registry.get("sla"), needs=needs)
    install_method(model, method, method.config())
    with pytest.raises(UsageError, match=said):
        split_tokens(model, None)
    assert not model.rope._forward_hooks and not model.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("name", ["mean", "sparse"])
def test_random_blocks_are_those_of_one_process(name, monkeypatch):
    """Every process took the seeds of the first heads, whichever heads it had."""
    models, method = [build_transformer() for _ in range(2)], registry.get(name)
    config = method.config(sparsity=0.5, block_m=16, block_n=16, selector="random")
    for model in models:
        install_method(model, method, config)
    whole, split = (processors(model)[1] for model in models)
    q = torch.randn(3, 1, 2, 128, 16, generator=torch.Generator().manual_seed(0))
    o = torch.nn.Module.__call__(whole, *q, Inputs(whole.place, whole.context))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    split_tokens(models[1], None)
    own = torch.nn.Module.__call__(split, *q[:, :, 1:], Inputs(split.place, split.context))
    torch.testing.assert_close(own, o[:, 1:])
