"""How methods that keep a number of key blocks rank them: `--selector`. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from slagen.attention.protocol import Addition
from slagen.settings import option

Selector = Literal["pooled", "subblock", "random"]

PARTS = 4  # means of a block that "subblock" takes

_HELP = "How key blocks are ranked: pooled (by their mean), subblock (by four means of each) or random (as a control)."


def _named(name: Selector, kind: str, summary: str) -> Addition:
    example = f"--selector {name}"
    return Addition(name, kind, f"{example}: {summary}", help="", example=example, beside="mean")


SELECTORS = (
    _named("pooled", "selector", "ranks key blocks by the product of mean query and mean key (the default)"),
    _named("subblock", "selector", "ranks key blocks by the log-sum-exp over four means of each query and key block"),
    _named(
        "random", "control", "keeps the same number of key blocks, chosen at random once for each layer and head: a "
        "control for comparison",
    ),
)  # fmt: skip


def selector_option() -> Any:
    """The field `selector` of a method's config."""
    return option("pooled", _HELP, prompt_line=True, later=True)


def note_of_selector(selector: Selector) -> str:
    """What a note on a clip adds for its selector; empty for pooled."""
    return "" if selector == "pooled" else f", {selector} selector"


def score_flops(selector: Selector, query_blocks: int, key_blocks: int, head_dim: int) -> int:
    """FLOPs of the scores of every pair of blocks of one head."""
    pairs = {"pooled": 1, "subblock": PARTS**2, "random": 0}
    return 2 * pairs[selector] * query_blocks * key_blocks * head_dim
