"""replay(path) -> a comparison of a video with the same one generated again from its report or metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen import packages
from slagen.attention import registry
from slagen.errors import UsageError, WeightsError
from slagen.events import Event
from slagen.formats.model_files import SLA_FILE
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.lora import read_lora_option
from slagen.generation.lora_files import lora_file
from slagen.generation.provenance import Made, read_made
from slagen.interrupts import telling_what_is_kept
from slagen.io.files import scratch
from slagen.io.paths import user_path
from slagen.io.reading import file_hash
from slagen.settings import names_where
from slagen.wan.folder import BUNDLED, bundled_folder, is_hub_id
from slagen.wan.models import check_recorded_model
from slagen.wan.presets import PRESETS, recommended_policy

AS_THEY_ARE = names_where(GenerateConfig, lambda option: option.pixels) - {  # recorded under the same name
    "width", "height", "sparsity", "sla_topk", "ode",
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One hash of the old and of the new video."""

    before: str
    now: str
    same: bool


@dataclass(frozen=True)
class ReplayResult:
    """A comparison of a video with the same one generated again.

    Args:
        path: of what was replayed. output: where the new video was kept; None if it was not.
        hashes: by what they are of: latents, weights, frames, from a report the file.
        versions_changed: by package, the old version and the new; None where it was or is not installed.
    """

    path: Path
    hashes: dict[str, Compared]
    versions_changed: dict[str, tuple[str | None, str | None]]
    output: str | None

    @property
    def same(self) -> bool:
        """Whether every hash is; with the same frames, a file differs in its metadata only."""
        decisive = self.hashes.keys() - ({"file"} if "frames" in self.hashes else set())
        return all(self.hashes[name].same for name in decisive)

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "path": str(self.path), "same": self.same,
            "hashes": {name: dict(vars(row)) for name, row in self.hashes.items()},
            "versions_changed": {name: list(pair) for name, pair in self.versions_changed.items()},
            "output": self.output,
        }  # fmt: skip


def replay(
    path_text: str, output: str | None = None, on_event: Callable[[Event], None] = lambda event: None, *,
    model: str | None = None, weights: str | None = None, vae: str | None = None,
    local_files_only: bool = False,
) -> ReplayResult:  # fmt: skip
    """Make a video again and compare.

    Args:
        path_text: a video that slagen made, or the JSON beside it.
        output: keep the new video here; None throws it away.
        model, weights, vae: where they are now, if they have moved.
        local_files_only: download nothing.
    Returns: the old and new hashes of what both recorded, and which versions differ.
    Raises: UsageError for a file that is neither, weights that are not found, a hub model that only the
        file names and that is not on this machine, or settings that slagen does not support;
        WeightsError for other weights; and what `generate` raises.
    """
    path = user_path(path_text)
    recorded = read_made(path)
    settings = dict(recorded.settings)
    if settings.get("prompt") is None and "prompt_sha256" in settings:
        raise UsageError(
            f"{path} contains only a hash of its prompt, because the prompt is too long for the metadata. Give its "
            ".json report instead."
        )
    try:
        settings["model"] = model or _find(path, "model", settings["model"])
        settings["vae"] = vae or _find(path, "vae", settings.get("vae"))
        settings["weights"] = (
            _checked(weights, recorded) if weights else _find_weights(path, recorded, settings["model"])
        )
        settings["lora"] = _find_loras(path, recorded)
        fields = {name: settings[name] for name in AS_THEY_ARE if settings.get(name) is not None}
        width, height = (int(size) for size in settings["size"].split("x"))
        if "sparsity" in registry.get(settings["attention"]).option_names:
            fields["sparsity"] = settings["sparsity"]
        for name in ("dense_steps", "dense_layers"):  # what a preset recommends now is not what ran then
            if getattr(recommended_policy(settings["model"], settings["attention"]), name) is not None:
                fields.setdefault(name, "0%")
        fields["attention_options"] = tuple(settings.get("attention_options", {}).items())
        with scratch() as folder:
            config = GenerateConfig(
                **fields, width=width, height=height, ode=bool(settings.get("ode")),
                local_files_only=local_files_only, output=output or str(folder / f"replay{recorded.suffix}"),
                crf=settings.get("crf"), no_metadata=bool(settings.get("no_metadata")),
            )  # fmt: skip
            with telling_what_is_kept(lambda: "Nothing was written. Run the same command again.", instead=True):
                made = generate(config, on_event).videos[0].record
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} has settings that this version of slagen cannot reproduce: {error}.") from error
    before, after = recorded.hashes, made.hashes
    compared = {
        name: Compared(before[name], after[name], before[name] == after[name]) for name in before if name in after
    }
    old, new = recorded.versions, packages.versions()
    changed = {name: (old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)}
    return ReplayResult(path, compared, changed, output)


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


def _checked(weights: str, recorded: Made) -> str:
    """Weights that are given, if they are those that made the video. Raises WeightsError."""
    path, expected = user_path(weights), recorded.hashes.get("SLA weights")
    if expected is not None and path.is_file() and file_hash(path) != expected:
        raise WeightsError(
            f"{path} is not the weights file that this video was made with. Give the file that has "
            f"the SHA-256 {expected}."
        )
    return weights


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
