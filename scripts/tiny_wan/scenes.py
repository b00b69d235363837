"""The procedurally drawn clips and captions that the bundled model is trained on.

One object of saturated colour (disc, axis-aligned square, upright triangle, upright five-pointed star) on a plain
background, moving straight across the frame or growing or shrinking in place. Everything is a function of a seed.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

SIZE = 128  # pixels, height = width
NUM_FRAMES = 17
FPS = 8

COLOURS = {
    "red": (225, 30, 35),
    "green": (30, 170, 60),
    "blue": (35, 85, 230),
    "yellow": (250, 220, 40),
    "purple": (140, 50, 190),
    "orange": (250, 135, 20),
    "cyan": (40, 210, 225),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {"black": (12, 12, 14), "white": (245, 245, 245), "gray": (128, 128, 128), "navy": (20, 28, 80)}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = {
    "right": ("moving right", "moving to the right", "moving from left to right", "sliding right",
              "sliding to the right", "sliding from left to right", "moves right", "moves to the right",
              "moves from left to right"),
    "left": ("moving left", "moving to the left", "moving from right to left", "sliding left", "sliding to the left",
             "sliding from right to left", "moves left", "moves to the left", "moves from right to left"),
    "up": ("moving up", "moving upwards", "moving upward", "sliding up", "sliding upwards", "moves up",
           "moves upwards", "rising", "moving from bottom to top"),
    "down": ("moving down", "moving downwards", "moving downward", "sliding down", "sliding downwards", "moves down",
             "moves downwards", "falling", "moving from top to bottom"),
    "growing": ("growing", "getting bigger", "expanding", "grows", "gets bigger", "getting larger"),
    "shrinking": ("shrinking", "getting smaller", "shrinks", "gets smaller", "contracting"),
}  # fmt: skip

# Where an object may be, as fractions of the frame's width: what moves crosses the middle, a token of 16 pixels further
# in each latent frame; what grows or shrinks stays there. With so few places a small model learns them all in an hour.
PATH = (0.25, 0.75)
MIDDLE = 0.5
RADII = (0.171875, 0.1953125)
GROWTHS = ((0.078125, 0.265625), (0.09375, 0.296875))

# Extent of each shape's corners in units of the clip's radius; areas come out alike.
SQUARE_HALF_SIDE, POINTED_RADIUS, STAR_INNER = 0.88, 1.15, 0.45


@dataclass(frozen=True)
class Size:
    """What a clip measures: pixels of a side, and video frames. A scene crosses the same way in all of them."""

    side: int
    frames: int

    def __str__(self) -> str:
        return f"{self.side}x{self.side}x{self.frames}"

    @property
    def tokens(self) -> int:
        """Of the transformer: 16 x 16 pixels of a latent frame, which are 4 video frames and one before the first."""
        return (self.side // 16) ** 2 * ((self.frames - 1) // 4 + 1)


SIZES = (Size(SIZE, NUM_FRAMES), Size(192, 33), Size(256, 33))


@dataclass(frozen=True)
class Scene:
    """What one clip shows. Positions and radii are fractions of the frame's width, at the first and last frame."""

    colour: str
    shape: str
    motion: str
    background: str
    start: tuple[float, float, float]  # x, y, radius
    end: tuple[float, float, float]


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """One in eight (colour, shape, motion) combinations is never trained on: 24 of 192, 6 for each shape."""
    c, s, m = list(COLOURS).index(colour), SHAPES.index(shape), list(MOTIONS).index(motion)
    return (c + 3 * s + 5 * m) % 8 == 4


def place(colour: str, shape: str, motion: str, background: str, variant: int) -> Scene:
    """One of the two scenes, smaller and larger, that a full description leaves open."""
    if motion in ("growing", "shrinking"):
        first, last = GROWTHS[variant] if motion == "growing" else GROWTHS[variant][::-1]
        return Scene(colour, shape, motion, background, (MIDDLE, MIDDLE, first), (MIDDLE, MIDDLE, last))
    radius = RADII[variant]
    first, last = PATH if motion in ("right", "down") else PATH[::-1]
    if motion in ("right", "left"):
        return Scene(colour, shape, motion, background, (first, MIDDLE, radius), (last, MIDDLE, radius))
    return Scene(colour, shape, motion, background, (MIDDLE, first, radius), (MIDDLE, last, radius))


def training_scenes() -> list[Scene]:
    """Every scene that is trained on, once."""
    return [
        place(c, s, m, b, variant)
        for c, s, m, b, variant in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS, range(2))
        if not is_held_out(c, s, m)
    ]


def sample_scene(
    rng: random.Random, colour: str = "", shape: str = "", motion: str = "", background: str = ""
) -> Scene:
    """Draw a scene; attributes that are not given are drawn from the combinations that are trained on."""
    while True:
        c = colour or rng.choice(list(COLOURS))
        s = shape or rng.choice(SHAPES)
        m = motion or rng.choice(list(MOTIONS))
        if (colour and shape and motion) or not is_held_out(c, s, m):
            break
    return place(c, s, m, background or rng.choice(list(BACKGROUNDS)), rng.randrange(2))


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene in one of the wordings there are."""
    article = "an" if scene.colour == "orange" else "a"
    motion = rng.choice(MOTIONS[scene.motion])
    text = f"{article} {scene.colour} {scene.shape} {motion}"
    if scene.background == "black" and rng.random() < 0.5:
        return text
    shade = "grey" if scene.background == "gray" and rng.random() < 0.3 else scene.background
    over = "on" if rng.random() < 0.7 else "over"
    return f"{text} {over} a {shade} background"


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {"a", "an", "on", "over", "background", "grey", *COLOURS, *BACKGROUNDS, *SHAPES}
    for phrases in MOTIONS.values():
        for phrase in phrases:
            words.update(phrase.split())
    return sorted(words)


def _polygon_distance(points: torch.Tensor, corners: list[tuple[float, float]]) -> torch.Tensor:
    """Signed distance (negative inside) of points (..., 2) to a simple polygon."""
    best = torch.full(points.shape[:-1], math.inf)
    inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        edge = torch.tensor([bx - ax, by - ay])
        rel = points - torch.tensor([ax, ay])
        t = ((rel * edge).sum(-1) / (edge * edge).sum()).clamp(0, 1)
        best = torch.minimum(best, (rel - t[..., None] * edge).norm(dim=-1))
        y = points[..., 1]
        crosses = (ay > y) != (by > y)
        x_cross = ax + (y - ay) / (by - ay if by != ay else 1.0) * (bx - ax)
        inside ^= crosses & (points[..., 0] < x_cross)
    return torch.where(inside, -best, best)


_TABLE_HALF, _TABLE_SIZE = 2.0, 513


@cache
def _distance_tables() -> torch.Tensor:
    """(4, 1, S, S) signed distance of each shape of radius 1 on [-2, 2] x [-2, 2], y downwards."""
    axis = torch.linspace(-_TABLE_HALF, _TABLE_HALF, _TABLE_SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x, y], -1)
    s = SQUARE_HALF_SIDE
    ring = [(POINTED_RADIUS * (1 if i % 2 == 0 else STAR_INNER), math.pi * (i / 5 - 0.5)) for i in range(10)]
    star = [(r * math.cos(a), r * math.sin(a)) for r, a in ring]
    triangle = [(POINTED_RADIUS * math.cos(a), POINTED_RADIUS * math.sin(a))
                for a in (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)]  # fmt: skip
    square = [(-s, -s), (s, -s), (s, s), (-s, s)]
    tables = [points.norm(dim=-1) - 1, *(_polygon_distance(points, p) for p in (square, triangle, star))]
    return torch.stack(tables)[:, None]


def render(
    scenes: list[Scene],
    num_frames: int = NUM_FRAMES,
    size: int = SIZE,
    window: list[tuple[int, int, int]] | None = None,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Draw scenes with antialiased edges.

    Args:
        scenes: B scenes.
        window: for each scene (left, top, side) in pixels, the part of the frame to draw; default the whole frame.
    Returns: (B, 3, num_frames, side, side) float32 in [-1, 1].
    """
    batch = len(scenes)
    side = window[0][2] if window else size
    corner = torch.tensor([(left, top) for left, top, _ in window] if window else [(0, 0)] * batch, device=device)
    start = torch.tensor([s.start for s in scenes], device=device)  # (B, 3)
    end = torch.tensor([s.end for s in scenes], device=device)
    progress = torch.linspace(0, 1, num_frames, device=device)[None, :, None]
    x, y, radius = ((start[:, None] * (1 - progress) + end[:, None] * progress) * size).unbind(-1)  # each (B, F)
    pixel = torch.arange(side, device=device) + 0.5
    gx = (pixel + corner[:, :1])[:, None, None, :] - x[:, :, None, None]  # (B, F, 1, W)
    gy = (pixel + corner[:, 1:])[:, None, :, None] - y[:, :, None, None]  # (B, F, H, 1)
    scale = (radius * _TABLE_HALF)[:, :, None, None]
    grid = torch.stack(torch.broadcast_tensors(gx / scale, gy / scale), -1)  # (B, F, H, W, 2)
    tables = _distance_tables().to(device)[[SHAPES.index(s.shape) for s in scenes]]
    distance = F.grid_sample(
        tables, grid.reshape(batch, num_frames * side, side, 2), padding_mode="border", align_corners=True
    ).view(batch, 1, num_frames, side, side)
    cover = (0.5 - distance * radius[:, None, :, None, None]).clamp(0, 1)
    fore = torch.tensor([COLOURS[s.colour] for s in scenes], device=device, dtype=torch.float32)[..., None, None, None]
    back = torch.tensor([BACKGROUNDS[s.background] for s in scenes], device=device, dtype=torch.float32)
    clips = back[..., None, None, None] * (1 - cover) + fore * cover
    return clips / 127.5 - 1
