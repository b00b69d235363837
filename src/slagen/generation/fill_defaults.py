"""Fill in the model's defaults, and choose the sampler that its weights are made for. No torch."""

import dataclasses

from slagen.attention import registry
from slagen.attention.choices import for_all_steps
from slagen.errors import UsageError
from slagen.generation.config import GenerateConfig
from slagen.generation.picture import Picture, look_at
from slagen.generation.sizes import check_grid
from slagen.wan.defaults import ModelDefaults
from slagen.wan.folder import check_image
from slagen.wan.presets import check_sampler, recommended_policy

SIGMA_MAX = 80.0  # of the rCM sampler: what TurboDiffusion's text-to-video script takes
FILLED = ("width", "height", "num_frames", "fps", "steps", "guidance_scale", "flow_shift", "negative_prompt")


def fill_defaults(
    config: GenerateConfig, defaults: ModelDefaults, distilled: bool, warnings: list[str]
) -> GenerateConfig:
    """A config with every default filled in but the seed.

    Args:
        defaults: the model's own. distilled: whether the weights that run are made for the rCM sampler.
        warnings: takes what looks wrong.
    Raises: WeightsError for a sampler that the weights are not made for, UsageError for what it does not take.
    """
    defaults = for_weights(defaults, distilled)
    config = choose_sampler(config, defaults, distilled, warnings)
    missing = {name: getattr(defaults, name) for name in FILLED if getattr(config, name) is None}
    warnings += registry.without_effect(name for name, value in config.attention_options if value is not None)
    if not distilled:
        missing |= _recommended(config)
    return dataclasses.replace(config, **missing)


def with_image(
    config: GenerateConfig, name: str, takes_image: bool, defaults: ModelDefaults, spatial_grid: int = 16
) -> tuple[GenerateConfig, Picture | None]:
    """The image of a config, and the config in its aspect ratio and the area of the model's clips, where no size is
    asked for.

    Args: name, takes_image: of the model.
    Raises: UsageError for an image that is none, and unless one is given to a model that takes one.
    """
    check_image(name, takes_image, config.image is not None)
    if config.image is None:
        return config, None
    picture = look_at(config.image)
    if config.width is None and config.height is None:
        width, height = picture.size_of(defaults.width * defaults.height, max(16, spatial_grid))
        config = dataclasses.replace(config, width=width, height=height)
    return config, picture


def _recommended(config: GenerateConfig) -> dict[str, str]:
    """What the model's preset would run dense with the attention that is asked for, as far as nothing is asked for."""
    policy = recommended_policy(config.model, config.attention)
    dense = {"dense_steps": policy.dense_steps, "dense_layers": policy.dense_layers}
    return {name: text for name, text in dense.items() if text is not None and getattr(config, name) is None}


def recommended_notes(asked: GenerateConfig, filled: GenerateConfig) -> list[str]:
    """One line on what runs dense because a preset recommends it; none where it is asked for, or nothing is."""
    names = [name for name in ("dense_steps", "dense_layers") if getattr(asked, name) != getattr(filled, name)]
    if not names or filled.attention != asked.attention:
        return []
    options = {f"--{name.replace('_', '-')}": getattr(filled, name) for name in names}
    chosen = " and ".join(f"{option} {value}" for option, value in options.items())
    none = " and ".join(f"{option} 0%" for option in options)
    return [
        f"using {chosen}, as recommended for {filled.model} with {filled.attention} attention; to turn this off, "
        f"give {none}"
    ]


def with_trained_layers(config: GenerateConfig, layers: tuple[float, ...] | None) -> GenerateConfig:
    """A config with the sparsity that each layer was trained with, where no other is asked for.

    Args: layers: as in SLAMetadata.
    """
    asked = (config.sparsity, config.sla_topk, config.sparsity_schedule)
    if layers is None or any(each is not None for each in asked):
        return config
    return dataclasses.replace(config, sparsity_schedule=for_all_steps(layers))


def check_size(config: GenerateConfig, spatial_grid: int) -> tuple[int, int, int]:
    """Width, height and frames of a filled config. Raises UsageError as `check_grid`."""
    assert config.width and config.height and config.num_frames
    check_grid(config.width, config.height, spatial_grid)
    return config.width, config.height, config.num_frames


def for_weights(defaults: ModelDefaults, distilled: bool) -> ModelDefaults:
    """The model's own, but where its weights were replaced by ones of another kind of sampler."""
    if distilled and defaults.sampler != "rcm":
        return dataclasses.replace(defaults, steps=4, guidance_scale=1.0, sampler="rcm", negative_prompt="")
    if not distilled and defaults.sampler == "rcm":
        return dataclasses.replace(defaults, steps=50, guidance_scale=5.0, sampler="unipc")
    return defaults


def choose_sampler(
    config: GenerateConfig, defaults: ModelDefaults, distilled: bool, warnings: list[str]
) -> GenerateConfig:
    """Choose the sampler that the weights are made for. Raises WeightsError if another is asked for."""
    sampler = config.sampler or defaults.sampler
    check_sampler(sampler, distilled)
    if sampler == "rcm":
        if config.flow_shift is not None:
            raise UsageError("the rcm sampler has no flow shift. Leave --flow-shift out.")
        if config.steps is not None and config.steps > 4:
            raise UsageError(f"steps is {config.steps}, but the rcm sampler takes 1 to 4. Try --steps 4.")
        if config.guidance_scale is not None and config.guidance_scale > 1:
            warnings.append(
                f"the guidance scale is {config.guidance_scale:g}, but these weights are distilled with guidance, "
                "so it should be 1"
            )
        return dataclasses.replace(config, sampler=sampler, sigma_max=config.sigma_max or SIGMA_MAX)
    if config.sigma_max is not None or config.ode:
        raise UsageError(
            f"--sigma-max and --ode are for the rcm sampler, but the sampler is {sampler}. Leave them out."
        )
    return dataclasses.replace(config, sampler=sampler)
