"""Videos of a tiny Wan made by some processes together, and by one: final latents, and what the command says."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from wan_models import build_transformer

from slagen.attention import registry
from slagen.cli.main import run
from slagen.errors import WeightsError
from slagen.generation.config import GenerateConfig
from slagen.generation.prompt_cache import PromptCache
from slagen.generation.session import Session
from slagen.generation.sharing import sharing
from slagen.processes import Member, joined
from slagen.wan.processor import denoising, install_method
from slagen.wan.sequence_parallel import split_tokens

# 80 x 80 pixels and 9 frames are 3 x 5 x 5 = 75 tokens: 5 blocks of 16, the last one of 11. 2 processes have 38 and 37.
CLIP = {
    "width": 80,
    "height": 80,
    "num_frames": 9,
    "steps": 2,
    "seed": 3,
    "device": "cpu",
    "guidance_scale": 3.0,
    "no_cache": True,
}
SMALL = {"block_m": 16, "block_n": 16}
BLOCKS = {"sparsity": 0.5, **SMALL}
CUBES = (("order", "cube"),)
TWO = {
    "sla": BLOCKS,
    "sla-cube": {**BLOCKS, "attention_options": CUBES},
    "dense": {"attention": "dense", "width": 64, "height": 64},  # 48 tokens
    "sol-cube": {"attention": "sol", **SMALL, "attention_options": CUBES},
    "sla-cfg": {**BLOCKS, "cfg_parallel": True},
}
FOUR = {"sla-cfg": TWO["sla-cfg"]}
# A pass of the transformer with every method that is exact; each leaves something out.
METHODS: dict[str, dict] = {
    "sla": BLOCKS, "sparse": BLOCKS, "linear": BLOCKS, "mean": {**BLOCKS, "selector": "random"},
    "sol": SMALL, "dense": {}, "radial": {}, "nabla": {"top_p": 0.5}, "rettention": {"refresh_steps": 2},
}  # fmt: skip


def configs(model: str, weights: str, cases: dict[str, dict]) -> dict[str, GenerateConfig]:
    """A config for each case; SLA has trained weights."""
    own = {name: {} if case.get("attention", "sla") != "sla" else {"weights": weights} for name, case in cases.items()}
    return {
        name: GenerateConfig("a red circle", model=model, allow_untrained=True, **{**CLIP, **own[name], **case})
        for name, case in cases.items()
    }


def latents(config: GenerateConfig) -> tuple[torch.Tensor, list[float | None]]:
    """Final latents, and what each layer's heads here attended exactly."""
    with sharing(config) as shared:
        plan = shared.plan(config, lambda text: None)
        prompts = PromptCache([plan], lambda event: None, use=shared.first)
        session = shared.load(plan, prompts, lambda event: None)
        done = session.denoised(plan, shared.encode(session, prompts, plan), lambda event: None)
    return done.latents, list(done.densities)


def pass_errors(member: Member) -> dict[str, float]:
    """How far each method's output, and with SLA the gradient of a weight, are from those of one process."""
    x = torch.randn(1, 4, 3, 18, 18, generator=torch.Generator().manual_seed(0))  # 3 x 9 x 9 = 243 tokens
    text = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, options in METHODS.items():
        method, outputs, gradients = registry.get(name), [], []
        for together in (False, True):
            model = build_transformer(num_heads=4)
            install_method(model, method, method.config(**options))
            if together:
                split_tokens(model, dist.group.WORLD)
            with denoising(model, 2) as end_step:
                for _ in range(2):
                    output = model(hidden_states=x, timestep=torch.tensor([500]), encoder_hidden_states=text)[0]
                    end_step()
            outputs.append(output.detach())
            if name == "sla":
                output.square().sum().backward()
                gradient = model.blocks[0].attn1.to_q.weight.grad
                gradients.append(sum(member.collected(gradient)) if together else gradient)
        found[name] = _distance(*outputs)
        if gradients:
            found["gradient"] = _distance(*gradients)
    return found


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


def make(model: str, weights: str, out: str, which: str) -> None:
    """Save the latents of every case, and print the errors of passes."""
    torch.set_num_threads(1)
    cases = configs(model, weights, {"two": TWO, "four": FOUR}[which])
    with joined(torch.device("cpu")) as member:
        found = {name: latents(config)[0] for name, config in cases.items()}
        errors = pass_errors(member) if which == "two" else {}
        same = member.collected({name: x.sum().item() for name, x in found.items()})
        assert all(each == same[0] for each in same)
        if member.first:
            print(json.dumps(errors))
            save_file(found, Path(out) / "latents.safetensors")


def command(arguments: list[str], fails: bool) -> None:
    """Run a command as `slagen` would, and print its exit code. One that fails does so in the second process only."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if fails and os.environ["RANK"] == "1":
            patch.setattr(Session, "denoised", _fail)
        print(run(arguments), flush=True)


def _fail(*args: object, **options: object) -> None:
    raise WeightsError("a layer is broken.")
