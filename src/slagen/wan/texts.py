"""How much of a prompt the text encoder reads: it is cut at a number of tokens, and the cut is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from slagen.io.text import quote

SHOWN = 40  # characters on each side of the cut


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a pipeline's folder, without the rest."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def may_be_cut(text: str, limit: int) -> bool:
    """Whether a text may have more tokens than that: a byte is at most one, beside a first mark and a last."""
    return len(prompt_clean(text).encode()) + 2 > limit


def describe_cut(tokenizer: Any, text: str, limit: int) -> str | None:
    """How much of a text the encoder reads, and the words at the cut; None where it reads all.

    Args:
        limit: tokens that are read, the end mark among them.
    """
    if not may_be_cut(text, limit):
        return None
    text = prompt_clean(text)
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    marks = found["special_tokens_mask"]
    if len(marks) <= limit:
        return None
    ends = [end for (_, end), mark in zip(found["offset_mapping"], marks, strict=True) if not mark]
    place = ends[max(0, limit - sum(marks) - 1)]
    return (
        f"has {len(marks):,} tokens, but the model reads only the first {limit:,}: it reads up to "
        f"{quote(_last(text[:place]))} and ignores everything from {quote(_first(text[place:]))} on"
    )


def _last(text: str) -> str:
    """The last words of a text."""
    text = text.strip()
    return text if len(text) <= SHOWN else text[-SHOWN:].partition(" ")[2] or text[-SHOWN:]


def _first(text: str) -> str:
    """The first words of a text."""
    text = text.strip()
    return text if len(text) <= SHOWN else text[:SHOWN].rpartition(" ")[0] or text[:SHOWN]
