"""What a video or its report says of how it was made -> the fields of a GenerateConfig that makes it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slagen.attention import registry
from slagen.errors import UsageError
from slagen.formats.model_files import SLA_FILE
from slagen.generation.config import ATTENTION, GenerateConfig
from slagen.generation.lora import read_lora_option
from slagen.generation.lora_files import lora_file
from slagen.generation.provenance import Made, read_made
from slagen.io.paths import user_path
from slagen.io.reading import file_hash
from slagen.settings import names_where
from slagen.wan.folder import BUNDLED, bundled_folder, is_hub_id
from slagen.wan.models import check_recorded_model
from slagen.wan.presets import PRESETS, recommended_policy

AS_THEY_ARE = names_where(GenerateConfig, lambda option: option.pixels) - {  # recorded under the same name
    "width", "height", "sparsity", "sla_topk", "ode",
}  # fmt: skip
# What belongs to another setting: where that one is changed, these are not taken over.
OF_ATTENTION = names_where(GenerateConfig, lambda option: option.panel == ATTENTION) - {
    "weights", "allow_untrained", "lora", "lora_scale", "lora_merge",
}  # fmt: skip
OF_SAMPLER = {"flow_shift", "sigma_max", "ode"}  # of rcm, or of all but rcm
OF_SPARSITY = {"sparsity", "keep", "sla_topk"}


def fields_again(recorded: Made, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of GenerateConfig that make a video again: those that change its pixels.

    Args:
        given: of model, weights, vae, image and lora those that are not to be looked for where the report says.
    Raises: UsageError for settings that slagen does not support, and for what lies at another place now.
    """
    path, settings = recorded.path, dict(recorded.settings)
    if settings.get("prompt") is None and "prompt_sha256" in settings:
        raise UsageError(
            f"{path} contains only a hash of its prompt, because the prompt is too long for the metadata. Give its "
            ".json report instead."
        )
    with reproducible(path):
        settings["model"] = given.get("model") or _find(path, "model", settings["model"])
        settings["vae"] = given.get("vae") or _find(path, "vae", settings.get("vae"))
        settings["weights"] = given.get("weights") or _find_weights(path, recorded, settings["model"])
        settings["image"] = given.get("image") or _find_image(path, settings)
        settings["lora"] = given.get("lora") or _find_loras(path, recorded)
        fields = {name: settings[name] for name in AS_THEY_ARE if settings.get(name) is not None}
        fields["width"], fields["height"] = (int(size) for size in settings["size"].split("x"))
        if "sparsity" in registry.get(settings["attention"]).option_names:
            fields["sparsity"] = settings["sparsity"]
        for name in ("dense_steps", "dense_layers"):  # what a preset recommends now is not what ran then
            if getattr(recommended_policy(settings["model"], settings["attention"]), name) is not None:
                fields.setdefault(name, "0%")
        fields["attention_options"] = tuple(settings.get("attention_options", {}).items())
        fields["ode"] = bool(settings.get("ode"))
    return fields


@contextmanager
def reproducible(path: Path) -> Iterator[None]:
    """Say that a report has settings of another kind where the block fails over them."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} has settings that this version of slagen cannot reproduce: {error}.") from error


def changed_again(text: str, settings: Mapping[str, Any], typed: set[str]) -> dict[str, Any]:
    """The fields of GenerateConfig that make a video again, with what was typed in place of what it was made with.

    Args:
        text: the path of a report or video, as typed.
        settings: the fields of GenerateConfig by the command line, with `prompt` where one is given.
        typed: the names of the options that were typed.
    Raises: as `read_made` and `fields_again`.
    """
    recorded = read_made(user_path(text))
    fields = fields_again(recorded, {name: value for name, value in settings.items() if name in typed})
    own = {setting.field for setting in registry.own_settings(GenerateConfig)}
    if "attention" in typed and settings["attention"] != fields.get("attention"):
        fields = {name: value for name, value in fields.items() if name not in OF_ATTENTION}
    if typed & OF_SPARSITY:
        fields = {name: value for name, value in fields.items() if name not in OF_SPARSITY}
    if "sampler" in typed and (settings["sampler"] == "rcm") != (fields.get("sampler") == "rcm"):
        fields = {name: value for name, value in fields.items() if name not in OF_SAMPLER}
    if typed & own:
        options = {**dict(fields.get("attention_options", ())), **dict(settings["attention_options"])}
        fields["attention_options"] = tuple(options.items())
    names = {*typed, *(("sparsity",) if "keep" in typed else ())}
    names |= {"width", "height"} if typed & {"size", "resolution", "width", "height"} else set()
    return {**settings, **fields, **{name: settings[name] for name in names if name in settings}}


def _find(path: Path, option: str, name: str | None) -> str | None:
    """A model or VAE that a report names, where it lies now: there, or beside the report. Raises UsageError."""
    if name is None or name in (BUNDLED, *PRESETS) or user_path(name).exists():
        return name
    if (path.parent / name).exists():
        return str(path.parent / name)
    if option == "model" and is_hub_id(name):
        check_recorded_model(path, name)
        return name
    raise UsageError(f"{path} was made with the {option} {name}, which cannot be found. Give it with --{option}.")


def _find_weights(path: Path, recorded: Made, model: str) -> str | None:
    """The weights that a report names, where they lie now; None for the model's own.

    Earlier reports name the model's own too, where they lay on the machine that made the video.
    Raises: UsageError where they are not found.
    """
    name, expected = recorded.settings.get("weights"), recorded.hashes.get("SLA weights")
    if name is None:
        return None
    for candidate in (user_path(name), path.parent / name):
        if candidate.exists() and (expected is None or not candidate.is_file() or file_hash(candidate) == expected):
            return str(candidate)
    if model in PRESETS and (PRESETS[model].weights or "/").replace("/", "--") in name:  # in a cache of the hub's
        return None
    own = _own_weights(model)
    if own is not None and (file_hash(own) == expected if expected else own.name == Path(name).name):
        return None
    wanted = f" (SHA-256 {expected[:16]}...)" if expected else ""
    raise UsageError(
        f"{path} was made with the weights {name}{wanted}, which cannot be found. Give them with --weights."
    )


def _find_image(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The image that a report names, where it lies now; None where there is none. Raises UsageError."""
    name, expected = settings.get("image"), settings.get("image_sha256")
    if name is None:
        return None
    for candidate in (user_path(name), path.parent / name):
        if candidate.is_file() and file_hash(candidate) == expected:
            return str(candidate)
    raise UsageError(
        f"{path} was made with the image {name} (SHA-256 {str(expected)[:16]}...), which cannot be found. Copy it to "
        f"{path.parent}, or give it with --image to slagen generate --from."
    )


def _find_loras(path: Path, recorded: Made) -> list[str] | None:
    """The LoRAs that a report names with their scales, where they lie now; None where there are none.

    Raises: UsageError where one is not found.
    """
    hashes = [lora["sha256"] for lora in recorded.content.get("weights", {}).get("loras") or ()]
    found = []
    for text, expected in zip(recorded.settings.get("lora") or (), hashes, strict=True):
        lora = read_lora_option(text)
        places = (lora_file(user_path(lora.path)), lora_file(path.parent / lora.path))
        place = next((each for each in places if each.is_file() and file_hash(each) == expected), None)
        if place is None:
            raise UsageError(
                f"{path} was made with the LoRA {lora.path} (SHA-256 {expected[:16]}...), which cannot be found. Copy "
                f"it to {path.parent}."
            )
        found.append(str(dataclasses.replace(lora, path=str(place))))
    return found or None


def _own_weights(model: str) -> Path | None:
    """The SLA weights in a model's own folder."""
    folder = bundled_folder() if model == BUNDLED else user_path(model)
    return folder / SLA_FILE if (folder / SLA_FILE).is_file() else None
