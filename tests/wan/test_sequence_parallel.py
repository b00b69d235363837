"""A method that needs more of a layer than one process has is refused where processes share a clip's tokens."""

import dataclasses

import pytest
from wan_models import build_transformer

from slagen.attention import registry
from slagen.attention.protocol import Needs
from slagen.errors import UsageError
from slagen.wan.processor import install_method
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
