"""Writes small Wan transformers with the gates of FastVideo's VSA, key by key as they are published."""

import torch
from public_forms import fastvideo


def gates(num_layers=2, channels=128, seed=6):
    """A trained gate for every layer: {layer: (weight, bias)}."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: (torch.randn(shape, generator=generator) * 0.1).bfloat16().float()  # noqa: E731
    return {layer: (draw(channels, channels), draw(channels)) for layer in range(num_layers)}


def spell_gates(pairs, place=""):
    """Their names in a file: beside to_q in FastVideo's names and on the hub, or in attn1."""
    return {
        f"blocks.{layer}.{place}to_gate_compress.{kind}": tensor.clone()
        for layer, pair in pairs.items()
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }


FORMS = {
    "hub": lambda state, pairs: {**state, **spell_gates(pairs)},  # FastWan2.1-T2V-1.3B-Diffusers
    "fastvideo": lambda state, pairs: {**fastvideo(state), **spell_gates(pairs)},
    "in-attn1": lambda state, pairs: {**state, **spell_gates(pairs, "attn1.")},
    "prefixed": lambda state, pairs: {
        f"model.{name}": tensor for name, tensor in {**fastvideo(state), **spell_gates(pairs)}.items()
    },
}
