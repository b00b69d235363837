"""What `attention` prints: how much of the softmax the kept blocks hold, and the picture's path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slagen.cli.console import log, write, write_json

if TYPE_CHECKING:
    from slagen.maps.run import AttentionMap


def show_map(result: AttentionMap, as_json: bool) -> None:
    """Print a map's numbers on stderr and its path on stdout, or JSON alone on stdout."""
    if as_json:
        write_json(result.to_dict(), allow_nan=False)
        return
    log(
        f"layer {result.layer}, head {result.head}, step {result.step}: {result.density:.1%} of all query-key pairs "
        f"are attended exactly. They hold {result.kept_mass:.1%} of the softmax; the best choice of as many blocks "
        f"would hold {result.best_mass:.1%}."
    )
    frame, row, column = result.query
    log(f"For query {frame},{row},{column}, {result.query_kept_mass:.1%} of the softmax is attended exactly.")
    write(str(result.picture))
