"""draw(MapConfig) -> AttentionMap: a clip is denoised up to a step, and one head of one layer is looked at there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slagen.attention.block_maps import BlockMap
from slagen.attention.protocol import Grid, Inputs
from slagen.attention.sla.block_map import CRITICAL
from slagen.errors import UsageError
from slagen.events import Event, nth
from slagen.generation.generate import check_memory, enough_gpu_memory
from slagen.generation.prompt_cache import PromptCache
from slagen.generation.resolve import Plan, find_weights, make_plan
from slagen.generation.session import Session
from slagen.io.files import reserved, write_bytes, write_json
from slagen.io.paths import user_path
from slagen.maps.config import PNG, MapConfig, without_map
from slagen.maps.mass import best_curve, block_mass, query_weights, summarise
from slagen.plot import AttentionPicture, draw_attention
from slagen.wan.observe import watching
from slagen.wan.processor import processors

SCHEMA_VERSION = 1
OnEvent = Callable[[Event], None]


class _Seen(Exception):
    """What was wanted has run; the rest of the clip is not denoised."""


@dataclass(frozen=True)
class AttentionMap:
    """What one head of one layer attends to at one step.

    Args:
        layer, head, step: from 0. query: frame, row and column.
        blocks: query and key blocks. density, kept_mass, best_mass: as `summarise` has them.
        query_kept_mass: the share of the one query's softmax on keys that are attended exactly.
        settings: of the run. path, picture: the JSON and the PNG.
    """

    layer: int
    head: int
    step: int
    query: tuple[int, int, int]
    blocks: tuple[int, int]
    density: float
    kept_mass: float
    best_mass: float
    query_kept_mass: float
    settings: dict[str, Any]
    picture: Path

    @property
    def path(self) -> Path:
        """The JSON beside the picture."""
        return self.picture.with_suffix(".json")

    def to_dict(self) -> dict[str, Any]:
        """What the file and --json hold."""
        return {"schema_version": SCHEMA_VERSION, "kind": "attention map", **vars(self), "query": list(self.query),
                "blocks": list(self.blocks), "picture": self.picture.name}  # fmt: skip


def draw(config: MapConfig, on_event: OnEvent = lambda event: None) -> AttentionMap:
    """Denoise a clip up to the step, and draw what a head attends to.

    Raises: UsageError for a layer, head, step or query that there is not, a method without a map of blocks, or a
        picture that exists; other SlagenErrors as `generate`.
    """
    plan = make_plan(config.base, find_weights(config.base, lambda text: on_event(Event("note", text))))
    shape, steps = plan.weights.source.shape, plan.config.steps or 1
    layer = config.chosen("layer", shape.num_layers, shape.num_layers // 2)
    head, step = config.chosen("head", shape.num_heads, 0), config.chosen("step", steps, steps // 2)
    token = config.token(plan.grid)
    for kind, texts in (("note", plan.notes), ("warning", plan.warnings)):
        for text in texts:
            on_event(Event(kind, text))
    prompts = PromptCache([plan], on_event)
    if (doubt := check_memory(plan, text_encoder=not prompts.known)) is not None:
        on_event(Event("warning", doubt))
    picture = _place(config, plan, (layer, head, step, *token))
    with reserved(picture, picture.with_suffix(".json")):
        for file in (picture, picture.with_suffix(".json")):
            if file.exists() and not plan.config.overwrite:
                raise UsageError(f"{file} exists. Choose another --output, or replace it with --overwrite.")
        with enough_gpu_memory(plan.config):
            q, k, found = _capture(plan, prompts, layer, step, on_event)
            made = _measure(q, k, found, head, plan.grid, token)
        numbers, drawn = made
        kept = f"{numbers['kept_mass']:.1%} of the softmax in {numbers['density']:.1%} of all pairs"
        title = f"{plan.method.name}, layer {layer}, head {head}, step {step} of {steps}: {kept}"
        write_bytes(picture, draw_attention(dataclasses.replace(drawn, title=title)))
        settings = {name: value for name, value in plan.recorded.items() if name not in ("output", "overwrite")}
        result = AttentionMap(
            layer, head, step, token, (drawn.mass.shape[0], drawn.mass.shape[1]), settings=settings, picture=picture,
            **numbers,
        )  # fmt: skip
        write_json(result.path, result.to_dict())
    return result


def _capture(
    plan: Plan, prompts: PromptCache, layer: int, step: int, on_event: OnEvent
) -> tuple[Tensor, Tensor, BlockMap]:
    """q and k (1, H, L, D) of a layer in the conditional pass of a step, and what its method keeps of them."""
    on_event(Event("stage", "load"))
    session = Session(plan, not prompts.known, on_event=on_event, several=True)
    if not hasattr(processors(session.pipe.transformer)[layer], "kept_blocks"):
        raise without_map(plan.method.name)
    embeds = prompts.embeds(session, plan)
    for text in session.cuts(plan):
        on_event(Event("warning", text))
    on_event(Event("run", about=f"{nth('clip', 1, 1, plan.config.prompt)} up to step {step}"))
    found: list[tuple[Tensor, Tensor, BlockMap | None]] = []
    passes, guided = 0, (plan.config.guidance_scale or 0) > 1

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def look(module: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, inputs: Inputs) -> None:
        if module.place.index != layer or passes != step * (1 + guided):
            return
        found.append((q, k, module.kept_blocks(q, k, inputs)))
        raise _Seen

    handle = session.pipe.transformer.register_forward_hook(count)
    try:
        with torch.inference_mode(), watching(session.pipe.transformer, look):
            session.denoise(plan, embeds, on_event)
    except _Seen:
        pass
    finally:
        handle.remove()
    q, k, kept = found[0]
    if kept is None:
        raise without_map(plan.method.name)
    return q, k, kept


@torch.inference_mode()
def _measure(
    q: Tensor, k: Tensor, found: BlockMap, head: int, grid: Grid, token: tuple[int, int, int]
) -> tuple[dict[str, float], AttentionPicture]:
    """The numbers of an AttentionMap, and what is drawn."""
    q, k = q[0, head], k[0, head]
    sizes = (grid.num_frames, grid.height, grid.width)
    place = (token[0] * grid.height + token[1]) * grid.width + token[2]
    mass, weights = block_mass(q, k, found.query_blocks, found.key_blocks), query_weights(q, k, place)
    classes = found.classes[0, head]
    seen = classes[found.query_blocks[place]][found.key_blocks] == CRITICAL
    numbers = {**summarise(mass, found, head), "query_kept_mass": float(weights[seen].sum())}
    picture = AttentionPicture(
        mass=mass.cpu().numpy(), classes=classes.cpu().numpy(), weights=weights.view(sizes).cpu().numpy(),
        kept=seen.view(sizes).cpu().numpy(), query=token, best=best_curve(mass, found.query_blocks).cpu().numpy(),
        density=numbers["density"], kept_mass=numbers["kept_mass"],
    )  # fmt: skip
    return numbers, picture


def _place(config: MapConfig, plan: Plan, where: tuple[int, ...]) -> Path:
    """The picture's path: the one that was given, or one in the folder, named by the settings."""
    output = user_path(config.output)
    if output.suffix.lower() == PNG:
        return output
    settings = {name: value for name, value in plan.settings.items() if name not in ("output", "overwrite")}
    digest = hashlib.sha256(json.dumps([settings, where], sort_keys=True).encode()).hexdigest()[:8]
    layer, head, step = where[:3]
    return output / f"attention-{plan.config.slug}-layer{layer}-head{head}-step{step}-{digest}{PNG}"
