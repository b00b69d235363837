"""One video made by all processes that torchrun started: who computes what, and what each of them did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from slagen import torchrun
from slagen.errors import UsageError
from slagen.events import Event
from slagen.generation.config import GenerateConfig
from slagen.generation.frames import Frames
from slagen.generation.preflight import one_pass
from slagen.generation.preview import Preview
from slagen.generation.prompt_cache import PromptCache
from slagen.generation.resolve import Plan, find_weights, make_plan
from slagen.generation.sample import Denoised, Sample, mean
from slagen.generation.session import Session
from slagen.generation.stage_clock import StageClock
from slagen.generation.video_report import Processes, ProcessShare
from slagen.io.text import counted
from slagen.machine import pick_device
from slagen.processes import Member, joined
from slagen.wan.guidance_parallel import split_guidance
from slagen.wan.sequence_parallel import split_tokens


@dataclass(frozen=True)
class Sharing:
    """This process's part of each video.

    The first process encodes the prompt, decodes and writes; all of them denoise. Those of a token group share the
    tokens of a forward pass (Ulysses). With --cfg-parallel there are two such groups, for the passes with the prompt
    and without; the processes at the same place in both exchange what comes out of a pass.

    Args:
        member: this process. cfg_parallel: whether the passes are shared.
        tokens: the process group that shares a pass's tokens, and pair: that which shares the passes; None for none.
    """

    member: Member
    cfg_parallel: bool = False
    tokens: Any = None
    pair: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.member.first

    @property
    def parts(self) -> int:
        """The number of processes that share a pass's tokens."""
        return self.member.size // (2 if self.cfg_parallel else 1)

    def plan(self, config: GenerateConfig, on_note: Callable[[str], None]) -> Plan:
        """The plan of the run: that of the first process, which may download the model and draw the seed, then those of
        the others. Raises: as `make_plan`; UsageError where the processes cannot share such a video."""
        if self.member.size > 1:
            offload = "none" if config.offload == "auto" else config.offload
            config = dataclasses.replace(config, device=str(self.member.device), offload=offload)
        plan = self._plan(config, on_note) if self.first else None
        seed = self.member.told(None if plan is None else plan.config.seed)
        return plan or self._plan(dataclasses.replace(config, seed=seed), on_note)

    def _plan(self, config: GenerateConfig, on_note: Callable[[str], None]) -> Plan:
        plan = make_plan(config, find_weights(config, on_note))
        if self.parts > 1:
            plan.method.check_context_parallel(
                f"torchrun gives each of {self.parts} processes", "Give another --attention, or start one process"
            )
            _check_heads(plan, self.parts, self.member.size)
        if self.cfg_parallel and (plan.config.guidance_scale or 0) <= 1:
            raise one_pass(plan.config.guidance_scale or 0)
        return plan

    def load(self, plan: Plan, prompts: PromptCache, on_event: Callable[[Event], None]) -> Session:
        """The model of this process. Raises: as `Session`."""
        session = Session(plan, text_encoder=self.first and not prompts.known, on_event=on_event, parts=self.parts)
        if self.tokens is not None:
            split_tokens(session.pipe.transformer, self.tokens)
        if self.pair is not None:
            split_guidance(session.pipe.transformer, self.pair)
        return session

    def encode(self, session: Session, prompts: PromptCache, plan: Plan) -> dict[str, torch.Tensor | None]:
        """The embeddings of a plan's texts, which the first process knows or computes."""
        embeds = prompts.embeds(session, plan) if self.first else {}
        if self.member.size == 1:
            return embeds
        told = self.member.told({name: None if x is None else x.cpu() for name, x in embeds.items()})
        return {name: None if x is None else x.to(self.member.device) for name, x in told.items()}

    def sample(
        self, session: Session, plan: Plan, embeds: dict[str, torch.Tensor | None], clock: StageClock,
        on_event: Callable[[Event], None], preview: Preview | None, frames: Frames, begin: Callable[[Sample], None],
    ) -> Sample | None:  # fmt: skip
        """Denoise one video, and decode it in the first process; None in the others. Raises: as `Session.sample`."""
        if self.first:
            sample = session.sample(plan, embeds, clock, on_event, preview, frames, begin)
            if self.member.size == 1:
                return sample
            own: Denoised = sample.denoised
        else:
            session.encode_image(plan, StageClock(), on_event)
            sample, own = None, session.denoised(plan, embeds, on_event)
        done = self.member.collected((self._share(plan, own), own.densities, own.step_densities))
        if sample is None:
            return None
        shares, densities, by_step = zip(*done, strict=True)
        steps = [_means(step) for step in zip(*by_step, strict=True)]
        denoised = dataclasses.replace(own, densities=_means(densities), step_densities=steps)
        return dataclasses.replace(
            sample, denoised=denoised, processes=Processes(dist.get_backend(), self.cfg_parallel, list(shares))
        )

    def _share(self, plan: Plan, done: Denoised) -> ProcessShare:
        rank, shape = self.member.rank % self.parts, plan.weights.source.shape
        most = -(-plan.num_tokens // self.parts)
        steps = done.recorder.steps
        timed = done.recorder.enabled
        return ProcessShare(
            rank=self.member.rank,
            device=str(self.member.device),
            passes=("conditional", "unconditional")[self.member.rank // self.parts] if self.cfg_parallel else "all",
            heads=shape.num_heads // self.parts,
            tokens=min(plan.num_tokens, most * (rank + 1)) - min(plan.num_tokens, most * rank),
            denoise_ms=sum(step.latency_ms or 0.0 for step in steps) if timed else None,
            attention_ms=sum(sum(step.attention_ms) for step in steps) if timed and steps[0].num_spans else None,
            communication_ms=sum(step.communication_ms or 0.0 for step in steps) if timed else None,
        )


@contextmanager
def sharing(config: GenerateConfig) -> Iterator[Sharing]:
    """Join the processes that torchrun started to make a config's videos together. Raises: as `joined`."""
    if torchrun.size() == 1:
        yield ALONE
        return
    with joined(pick_device(config.device)) as member:
        parts = member.size // (2 if config.cfg_parallel else 1)
        starts = range(0, member.size, parts)
        tokens = [dist.new_group(range(i, i + parts)) for i in starts] if parts > 1 else []
        pairs = [dist.new_group((i, i + parts)) for i in range(parts)] if config.cfg_parallel else []
        yield Sharing(
            member, config.cfg_parallel, tokens[member.rank // parts] if tokens else None,
            pairs[member.rank % parts] if pairs else None,
        )  # fmt: skip


ALONE = Sharing(Member(0, 1, torch.device("cpu")))


def _means(densities: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Of what each process says of every layer, the mean: all have equally many heads, tokens and passes."""
    return [mean(layer) for layer in zip(*densities, strict=True)]


def _check_heads(plan: Plan, parts: int, size: int) -> None:
    """Raise UsageError where the heads cannot be shared evenly."""
    source = plan.weights.source
    heads = source.shape.num_heads
    if heads % parts:
        most = next(n for n in range(parts - 1, 0, -1) if heads % n == 0)
        raise UsageError(
            f"{source.name} has {counted(heads, 'attention head')}, which {parts} processes cannot share evenly. "
            f"Try torchrun --nproc-per-node {most * size // parts}."
        )
