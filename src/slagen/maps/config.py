"""MapConfig: the settings of one call of `slagen attention`, checked where it is made. No torch here."""

from dataclasses import dataclass

from slagen.attention import registry
from slagen.attention.protocol import Grid
from slagen.errors import UsageError
from slagen.generation.config import OUTPUT, GenerateConfig
from slagen.io.forms import shown
from slagen.io.paths import check_folder
from slagen.settings import option

WHERE = "Where to look"
PNG = ".png"


def read_query(text: str) -> tuple[int, int, int]:
    """Frame, row and column of "2,4,4". Raises UsageError."""
    try:
        frame, row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"query is {shown(text)}, but must be three numbers: a latent frame, a row and a column. Try --query 0,4,4."
        ) from None
    return frame, row, column


def without_map(name: str) -> UsageError:
    """The error for a method that attends to all keys, or by another pattern than blocks."""
    return UsageError(
        f"{name} attention does not select key blocks, so there is no block map to draw. Give another --attention, "
        "such as sla, mean or sol."
    )


@dataclass(frozen=True)
class MapConfig:
    """One call of `slagen attention`.

    Args:
        base: the video and its attention.
        layer, head, step: where to look, from 0, or from the end where negative; None is the middle, or the first head.
        query: latent frame, row and column of the query token that is shown alone; None is the middle of the clip.
        output: a file that ends in .png, or a folder in which it is named by the settings.
    Raises: UsageError for an output that is neither, and for dense attention.
    """

    base: GenerateConfig
    layer: int | None = option(None, "Layer, from 0; -1 is the last. Default: the middle one.", panel=WHERE)
    head: int | None = option(None, "Head, from 0; -1 is the last. Default: 0.", panel=WHERE)
    step: int | None = option(None, "Denoising step, from 0; -1 is the last. Default: the middle one.", panel=WHERE)
    query: tuple[int, int, int] | None = option(
        None,
        "Latent frame, row and column of the query token to show, such as 2,4,4. Default: the middle of the clip.",
        panel=WHERE, metavar="T,Y,X", kind=str, read=read_query,
    )  # fmt: skip

    output: str = option("outputs", "A folder, or a file that ends in .png.", panel=OUTPUT, short="-o")

    def __post_init__(self) -> None:
        if registry.get(self.base.attention).family == "dense":
            raise without_map(self.base.attention)
        if not self.output.lower().endswith(PNG):
            check_folder("output", self.output, f"a folder, or a file that ends in {PNG}")

    def chosen(self, name: str, count: int, default: int) -> int:
        """A layer, head or step as a number from 0. Raises UsageError where there is none."""
        value = getattr(self, name)
        if value is None:
            return default
        if not -count <= value < count:
            raise UsageError(
                f"{name} is {shown(value)}, but must be from 0 to {count - 1}, or -1 for the last. "
                f"Try --{name} {default}."
            )
        return value % count

    def token(self, grid: Grid) -> tuple[int, int, int]:
        """The query token. Raises UsageError where the grid has none there."""
        if self.query is None:
            return grid.num_frames // 2, grid.height // 2, grid.width // 2
        sizes = (grid.num_frames, grid.height, grid.width)
        if any(not 0 <= place < size for place, size in zip(self.query, sizes, strict=True)):
            given = ",".join(map(str, self.query))
            last = ",".join(str(size - 1) for size in sizes)
            raise UsageError(
                f"query is {given}, but the tokens of this clip run from 0,0,0 to {last}. Try --query {last}."
            )
        return self.query
