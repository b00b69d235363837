"""A model in memory that denoises and decodes the videos of many plans."""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from slagen.attention.learned import SLA_NAME, label, matrix_norms, name_in_files
from slagen.attention.protocol import Method
from slagen.errors import SlagenError, UsageError
from slagen.events import Event, loaded_parts
from slagen.formats.quantised_linear import describe
from slagen.formats.sla import SLAMetadata, find_sla_file, weights_hash
from slagen.generation import report
from slagen.generation.cache_use import describe_use
from slagen.generation.config import vae_bytes
from slagen.generation.config_checks import MOVES_LAYERS
from slagen.generation.denoise import run_denoising
from slagen.generation.fill_defaults import SIGMA_MAX
from slagen.generation.frames import Frames, decode_into
from slagen.generation.lora import asked_loras
from slagen.generation.offload import STAGES, Placement, Sizes, next_setting
from slagen.generation.picture import Picture
from slagen.generation.placing import choose_placement, move, sizes_of
from slagen.generation.preview import Preview
from slagen.generation.resolve import Plan
from slagen.generation.sample import Denoised, Sample, mean
from slagen.generation.stage_clock import StageClock
from slagen.generation.step_cache import use_of
from slagen.generation.video_report import UsedLora, UsedWeights
from slagen.io.paths import user_path
from slagen.io.reading import file_hash
from slagen.io.text import counted, quote
from slagen.timing import StepRecorder
from slagen.wan.compiling import check_compiler, compile_blocks
from slagen.wan.install import install_projections, install_untrained, load_weights
from slagen.wan.loading import load_pipeline
from slagen.wan.lora import Loras
from slagen.wan.observe import take_densities
from slagen.wan.placement import part_bytes, release_text_encoder
from slagen.wan.processor import install_method, remove, set_config
from slagen.wan.samplers import set_sampler
from slagen.wan.texts import describe_cut, load_tokenizer, may_be_cut
from slagen.wan.vae import vae_dtype_of

LARGE = 2**28  # bytes


class Session:
    """A model in memory that makes the videos of every plan with the same weights and attention.

    Args:
        plan: the first of them, which says what to load.
        text_encoder: False where all prompts are encoded already.
        pipe: a pipeline with the plan's attention in it already; None loads one.
        several: plans with another attention, or other scales of LoRAs, will follow. Parts of the model are moved to
            the GPU as a whole then, or not at all, and there is room for the text encoder to stay.
        on_event: called for each part that is loaded. parts: processes that share the tokens of each pass.
    Raises: WeightsError where weights are broken or do not fit, EnvironmentProblem where the kernels do not run.
    """

    def __init__(
        self, plan: Plan, text_encoder: bool = True, pipe: Any = None,
        on_event: Callable[[Event], None] = lambda event: None, *, several: bool = False,
        parts: int = 1,
    ) -> None:  # fmt: skip
        self.several = several or pipe is not None
        self.parts = parts
        self.loras: Loras | None = None
        self.image_encoder: Any = None
        self.image: tuple[Picture, int | None, int | None, int | None] | None = None  # prepared, and for which clip
        self.placement = Placement("none", False, "")
        self.tokenizer = None if pipe is None else pipe.tokenizer
        if pipe is not None:
            self.pipe, self.about = pipe, UsedWeights(model=plan.weights.source.name, used="the pipeline's own")
            return
        weights, vae = plan.weights, plan.config.vae
        _check_kernels(plan)
        self.pipe = load_pipeline(
            weights.source, weights.dtype, None if vae is None else user_path(vae),
            text_encoder=text_encoder, quantised=True, vae_dtype=vae_dtype_of(plan.config.vae_dtype),
            on_part=loaded_parts(on_event),
        )  # fmt: skip
        self.tokenizer = self.pipe.tokenizer
        about = _install_attention(self.pipe, plan, weights_hash(self.pipe.transformer))
        self.about = about if text_encoder else dataclasses.replace(about, cached_prompt=True)
        self._add_loras(plan)
        for text in describe(self.pipe.transformer), self.loras and self.loras.describe():
            if text:
                on_event(Event("note", text))
        self._place(plan, on_event)
        if plan.config.compile:
            compile_blocks(self.pipe.transformer)

    def _place(self, plan: Plan, on_event: Callable[[Event], None]) -> None:
        """Move the model to its device, as its memory allows, and say how."""
        config, device = plan.config, plan.weights.device
        if self.several and config.offload in MOVES_LAYERS:
            raise UsageError(
                f"--offload {config.offload} moves single layers, whose weights cannot be changed between videos, as "
                "prompts with other LoRA scales do. Try --offload model."
            )
        self.placement = choose_placement(
            device, lambda: self._sizes(plan), lambda text: on_event(Event("note", text)), config.offload,
            config.vae_tiling, whole=self.several,
        )  # fmt: skip
        if config.compile and self.placement.offload in MOVES_LAYERS:
            raise UsageError(
                f"--compile needs whole blocks on the GPU, and the model does not fit there: "
                f"{self.placement.reason}. Leave --compile out, or try --offload model."
            )
        with self._within_memory("load", plan):
            move(self.pipe, device, self.placement)

    def _sizes(self, plan: Plan) -> Sizes:
        """What the plan's video takes on a card."""
        c, weights = plan.config, plan.weights
        assert c.width and c.height and c.num_frames
        return sizes_of(
            self.pipe, weights.source.shape, plan.num_tokens, (c.width, c.height, c.num_frames), weights.dtype.itemsize,
            vae_bytes=vae_bytes(c), remembered=plan.remembered.num_bytes,
        )  # fmt: skip

    @contextlib.contextmanager
    def _within_memory(self, stage: str, plan: Plan) -> Iterator[None]:
        """Raise SlagenError where the GPU runs out of memory in a stage: what was free before, what to try next."""
        device, c = plan.weights.device, plan.config
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise SlagenError(
                f"the GPU ran out of memory in {STAGES[stage]} at {c.width}x{c.height}, "
                f"{counted(c.num_frames or 0, 'frame')}; {free / 2**30:.1f} GiB were free before it. "
                f"{next_setting(stage, self.placement, whole=self.several)}"
            ) from error

    def use(self, plan: Plan) -> None:
        """Put another plan's attention, with its weights, into the loaded model. Raises as the constructor."""
        assert self.about.model_hash is not None
        _check_kernels(plan)
        if self.loras is not None:
            self.loras.remove()
        remove(self.pipe.transformer)
        self.about = _install_attention(self.pipe, plan, self.about.model_hash)
        self._add_loras(plan)

    def _add_loras(self, plan: Plan) -> None:
        """Put the LoRAs of a run into the transformer, with a plan's scales."""
        files = plan.weights.loras
        self.loras = Loras(self.pipe, files, merge=not plan.config.live_lora, keep=self.several) if files else None
        self._set_lora_scales(plan)

    def _set_lora_scales(self, plan: Plan) -> None:
        if self.loras is None:
            return
        asked = asked_loras(plan.config.lora, plan.config.lora_scale)
        self.loras.set_scales([lora.scale for lora in asked])
        used = [
            UsedLora(file.path.name, file.sha256, lora.scale)
            for file, lora in zip(plan.weights.loras, asked, strict=True)
            if lora.scale
        ]
        self.about = dataclasses.replace(self.about, loras=used or None)

    @torch.inference_mode()
    def encode(self, plan: Plan) -> dict[str, torch.Tensor | None]:
        """The embeddings of a plan's prompt and, where it is guided, its negative prompt."""
        with self._within_memory("text", plan):
            prompt, negative = self.pipe.encode_prompt(
                prompt=plan.config.prompt, negative_prompt=plan.config.negative_prompt,
                do_classifier_free_guidance=(plan.config.guidance_scale or 0) > 1,
                max_sequence_length=plan.weights.source.defaults.max_sequence_length,
                device=self.pipe._execution_device,
            )  # fmt: skip
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}

    @torch.inference_mode()
    def encode_image(self, plan: Plan, clock: StageClock, on_event: Callable[[Event], None]) -> None:
        """Prepare the image of a plan, where it has one that was not prepared last. Raises: as the constructor."""
        c, picture = plan.config, plan.picture
        if picture is None or self.image == (asked := (picture, c.width, c.height, c.num_frames)):
            return
        assert c.width and c.height and c.num_frames
        clock.begin("image")
        on_event(Event("stage", "image"))
        if self.image_encoder is None:
            from slagen.wan.image_to_video import ImageEncoder  # with CLIP, which no other model needs

            self.image_encoder = ImageEncoder(plan.weights.source.folder)
        with self._within_memory("image", plan):
            self.pipe.encode(self.image_encoder, picture.cropped(c.width, c.height), c.num_frames)
        self.image = asked

    def cuts(self, plan: Plan) -> list[str]:
        """Warnings for a plan's prompt and negative prompt if the text encoder does not read them to the end."""
        limit = plan.weights.source.defaults.max_sequence_length
        texts = dict(zip(("prompt", "negative prompt"), texts_of(plan), strict=False))
        if self.tokenizer is None and any(may_be_cut(text, limit) for text in texts.values()):
            self.tokenizer = load_tokenizer(plan.weights.source.folder)
        found = {name: describe_cut(self.tokenizer, text, limit) for name, text in texts.items()}
        return [f"the {name} {quote(texts[name])} {cut}" for name, cut in found.items() if cut]

    def release_text_encoder(self) -> None:
        """Give its memory back: every prompt is encoded."""
        large = part_bytes(self.pipe)[0] > LARGE
        release_text_encoder(self.pipe)
        if large:  # looking for what nothing refers to takes longer than a small model's video
            free_memory()

    @torch.no_grad()
    def denoise(
        self,
        plan: Plan,
        embeds: dict[str, torch.Tensor | None],
        on_event: Callable[[Event], None],
        after_step: Callable[[], None] = lambda: None,
        preview: Preview | None = None,
    ) -> tuple[torch.Tensor, StepRecorder]:
        """One video's final latents, (1, C, T, h, w), and its steps; `after_step` is called after each, and `preview`
        draws some.

        Raises: SlagenError where the latents are not finite.
        """
        c, pipe = plan.config, self.pipe
        assert c.sampler is not None and c.flow_shift is not None and c.steps
        self._set_lora_scales(plan)
        set_sampler(pipe, c.sampler, c.flow_shift, sigma_max=c.sigma_max or SIGMA_MAX, stochastic=not c.ode)
        if plan.attention is not None:
            set_config(pipe.transformer, plan.method, plan.attention)
        on_event(Event("stage", "denoise", num_steps=c.steps))
        with self._within_memory("denoise", plan):
            latents, recorder = run_denoising(pipe, plan, embeds, on_event, after_step, preview)
        if not torch.isfinite(latents).all():
            raise SlagenError(
                f"the latents for seed {c.seed} contain NaN or Inf, so no video was written. "
                "Try --dtype fp32, or --backend reference to check whether a kernel is the cause."
            )
        return latents, recorder

    @torch.inference_mode()
    def sample(
        self,
        plan: Plan,
        embeds: dict[str, torch.Tensor | None],
        clock: StageClock,
        on_event: Callable[[Event], None],
        preview: Preview | None = None,
        frames: Frames | None = None,
        begin: Callable[[Sample], None] = lambda sample: None,
    ) -> Sample:
        """Denoise and decode one video. Raises SlagenError for latents that are not finite.

        Args: frames: what takes them; None keeps them. begin: called with the sample before its first frame.
        """
        self.encode_image(plan, clock, on_event)
        clock.begin("denoise")
        denoised = self.denoised(plan, embeds, on_event, preview)
        clock.begin("decode")
        clock.set_apart(sum(step.dense.extra_ms for step in denoised.recorder.steps if step.dense) / 1e3)
        clock.set_apart(preview.seconds if preview else 0.0, "preview")
        clock.set_apart(sum(step.compile_ms for step in denoised.recorder.steps) / 1e3, "compile")
        if (use := use_of(plan, denoised.recorder)) is not None:
            on_event(Event("note", describe_use(use)))
        frames = frames or Frames()
        latents = denoised.latents.float().cpu().contiguous()
        sample = Sample(plan, frames, latents, denoised, clock, self.about, self.pipe.vae, placement=self.placement)
        begin(sample)
        with self._within_memory("decode", plan):
            decode_into(frames, self.pipe.vae, denoised.latents, on_event)
        frames.warn_of_one_colour(plan.config.seed or 0, on_event)
        return sample

    @torch.inference_mode()
    def denoised(
        self, plan: Plan, embeds: dict[str, torch.Tensor | None], on_event: Callable[[Event], None],
        preview: Preview | None = None,
    ) -> Denoised:  # fmt: skip
        """Denoise one video, and note what its layers attend to. Raises as `denoise`."""
        transformer, by_step = self.pipe.transformer, list[list[float | None]]()
        take_densities(transformer)  # what a clip that failed has left
        if plan.schedule.by_step is None:
            latents, recorder = self.denoise(plan, embeds, on_event, preview=preview)
            return Denoised(latents, recorder, take_densities(transformer))
        count = lambda: by_step.append(take_densities(transformer))  # noqa: E731
        latents, recorder = self.denoise(plan, embeds, on_event, count, preview)
        return Denoised(latents, recorder, [mean(layer) for layer in zip(*by_step, strict=True)], by_step)


def _check_kernels(plan: Plan) -> None:
    """Raise EnvironmentProblem where the kernels of a plan's backend do not run, or nothing can be compiled."""
    if plan.config.compile:
        check_compiler(plan.weights.device)
    if plan.backend is not None and plan.method.check is not None:
        weights = plan.weights
        plan.method.check(plan.backend, weights.source.head_dim, weights.device, weights.dtype, plan.attention)


def texts_of(plan: Plan) -> list[str]:
    """What the text encoder reads for a plan: the prompt and, where it is guided, the negative prompt."""
    guided = (plan.config.guidance_scale or 0) > 1
    return [plan.config.prompt, plan.config.negative_prompt or ""][: 2 if guided else 1]


def free_memory() -> None:
    """Give back what nothing refers to any more, so that the next video has room for it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _install_attention(pipe: Any, plan: Plan, model_hash: str) -> UsedWeights:
    """Put the planned attention into the pipeline; returns what the report says of the weights."""
    weights, source, config = plan.weights, plan.weights.source, plan.config
    model_file = None if source.weights is None else report.shareable(str(source.weights))
    used = functools.partial(UsedWeights, model=source.name, model_file=model_file, model_hash=model_hash)
    method = plan.method
    if weights.trained_with is None or method.family == "dense":
        install_method(pipe.transformer, method, plan.attention, backend=config.backend)
        attention = "full" if method.family == "dense" else method.name
        return used(used="base" if source.weights is None else f"the model file, with {attention} attention")
    name = label(method.name)
    if weights.sla_path is None:
        install_untrained(pipe, plan.attention, config.backend, method)
        return used(used=f"base with untrained {name}")
    options: dict[str, Any] = {"backend": config.backend, "allow_untrained": config.allow_untrained}
    if not weights.sla_alone:
        install_projections(pipe, weights.sla_path, plan.attention, method=method, **options)
        return used(used=name, sla_file=report.shareable(str(weights.sla_path)), parameter_norms=_norms(pipe, method))
    metadata: SLAMetadata = load_weights(
        pipe, weights.sla_path, method, config=plan.attention, other_blocks=True, base_hash=model_hash, **options
    )
    file = find_sla_file(weights.sla_path)
    return used(
        used=name, sla_file=report.shareable(str(file)), sla_hash=file_hash(file), trained=metadata.trained,
        trained_steps=metadata.steps, trained_sparsity=getattr(metadata.config, "sparsity", None),
        parameter_norms=_norms(pipe, method),
    )  # fmt: skip


def _norms(pipe: Any, method: Method) -> dict[str, list[float]] | None:
    """The norms of what an attention method other than SLA has learned; None where that is nothing."""
    return None if name_in_files(method) == SLA_NAME else matrix_norms(pipe.transformer.state_dict()) or None
