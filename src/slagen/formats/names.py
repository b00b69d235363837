"""Names of tensors as they stand in a file: prefixes, wrappers, several transformers, and parts of all-in-one files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

from slagen.formats.layouts import LAYOUTS, leading

# An all-in-one file's parts beside the transformer, and what training code leaves inside names.
_OTHER_PARTS = re.compile(
    r"(text_encoders?|text_model|cond_stage_model|conditioner|clip_vision|clip|image_encoder|vae|first_stage_model)\."
)
_WRAPPER = re.compile(r"(?<![^./])(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")


def is_untuned(names: Collection[str]) -> bool:
    """Whether tensors' names are surely those of a Wan transformer alone, without SLA weights and in no 8-bit form."""
    found = list(transformers(names).values())
    plain = inside(names, found[0], found).values() if len(found) == 1 else ()
    return bool(plain) and any(all(map(layout.rename, plain)) for layout in LAYOUTS.values())


def transformers(names: Iterable[str]) -> dict[str, str]:
    """What leads the names of each transformer in a file, by a short name for it.

    There is one, as a rule, and two where a training run's average lies beside it: {"generator": "generator/model.",
    "generator_ema": "generator_ema/model."}. None is in a file of anything else.
    """
    counts = Counter(prefix for name in names if (prefix := leading(_WRAPPER.sub("", name))) is not None)
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if 2 * count > most]
    short = {re.split("[./]", prefix)[0] or "top": prefix for prefix in prefixes}
    return short if len(short) == len(prefixes) else {prefix.strip("./") or "top": prefix for prefix in prefixes}


def inside(names: Iterable[str], prefix: str, others: Collection[str] = ()) -> dict[str, str]:
    """{a name in the file: the same without prefix and wrappers} for all that is the transformer's under a prefix.

    Left out are the other parts of an all-in-one file, what lies in other dictionaries of a pickle, and, beside other
    transformers, all else. What is not under the prefix otherwise keeps its name, so that it is reported as a fault.

    Args:
        others: what leads the names of every transformer in the file.
    """
    place = prefix[: prefix.rfind("/") + 1]
    longer = tuple(other for other in others if len(other) > len(prefix))
    found = {}
    for name in names:
        plain = _WRAPPER.sub("", name)
        if plain.startswith(prefix) and not (longer and plain.startswith(longer)):
            plain = plain.removeprefix(prefix)
        elif len(others) > 1 or not plain.startswith(place):
            continue
        if not _OTHER_PARTS.match(plain):
            found[name] = plain
    return found


def other_parts(names: Iterable[str]) -> list[str]:
    """The parts of an all-in-one file beside the transformer, such as "vae"."""
    return sorted({match[1] for name in names if (match := _OTHER_PARTS.match(name))})
