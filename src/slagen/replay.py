"""replay(path) -> what came of making a video again, from its report or from what the video says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slagen import report
from slagen.config import GenerateConfig, user_path
from slagen.errors import UsageError
from slagen.files import scratch
from slagen.generate import Event, generate
from slagen.told import describe

AS_THEY_ARE = (  # settings that are fields of GenerateConfig under the same name
    "prompt", "negative_prompt", "model", "weights", "vae", "allow_untrained", "attention", "backend", "num_frames",
    "fps", "steps", "guidance_scale", "sampler", "flow_shift", "sigma_max", "seed", "dtype", "device",
)  # fmt: skip


def replay(
    path_text: str, output: str | None = None, on_event: Callable[[Event], None] = lambda event: None
) -> dict[str, Any]:
    """Make a video again and compare.

    Args:
        path_text: a video that slagen made, or the JSON beside it.
        output: keep the new video here; None throws it away.
    Returns: a dict: `same`, the old and new hashes of latents, frames and (from a report) the file, and which versions
        differ.
    Raises: UsageError for a file that is neither, or settings that slagen does not take; as `generate` besides.
    """
    path = user_path(path_text)
    told = describe(path)
    if told is None:
        raise UsageError(f"{path} is neither a video that slagen made nor its report. Give an .mp4 or its .json.")
    settings = told["settings"]
    try:
        fields = {name: settings[name] for name in AS_THEY_ARE if settings.get(name) is not None}
        width, height = (int(size) for size in settings["size"].split("x"))
        if settings["attention"] in ("sla", "sparse", "linear"):
            fields["sparsity"] = settings["sparsity"]
        with scratch() as folder:
            config = GenerateConfig(
                **fields, width=width, height=height, ode=bool(settings.get("ode")),
                output=output or str(folder / "replay.mp4"),
            )  # fmt: skip
            made = generate(config, on_event).videos[0].report
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} has settings that this slagen cannot run again: {error}.") from error
    # The file's own hash is in its report only.
    before = {"latents": told["latents_hash"], **_hashes(told)}
    after = {"latents": made["latents_hash"], **_hashes(made)}
    compared = {
        name: {"before": before[name], "now": after[name], "same": before[name] == after[name]} for name in before
    }
    old, new = told.get("versions", {}), report.versions()
    changed = {name: [old.get(name), new.get(name)] for name in sorted({*old, *new}) if old.get(name) != new.get(name)}
    return {"path": str(path), "same": all(row["same"] for row in compared.values()), "hashes": compared,
            "versions_changed": changed, "output": output}  # fmt: skip


def _hashes(content: dict[str, Any]) -> dict[str, str]:
    video = content["video"]
    return {"frames": video["frames_hash"], **({"file": video["sha256"]} if "sha256" in video else {})}
