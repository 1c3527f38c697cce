"""Views of images: `view = f(seed, view number, image)`, so that whatever depends on a view can be kept.

The parameters of a view are numbers drawn by a counter-based generator from (seed, view number, id of the image):
neither the order of the images, nor their number, nor the batch that they come in changes anything. They are applied to
a batch in a few tensor operations. Imported by `batches.py` and by whoever evaluates a model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import ConfigError, unknown

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# a column's numbers depend on its place alone, so that those that only strong views need are drawn for them only
_COLUMNS = ("shift_x", "shift_y", "scale", "rotate", "flip", "brightness", "contrast")
_STRONG = ("shear_x", "shear_y", "saturation", "erase", "erase_x", "erase_y", "erase_side")


@dataclass(frozen=True)
class ViewPolicy:
    """How far a view may differ from its image; every amount is the half-width of a uniform distribution."""

    shift: float = 0.0
    """Share of the side, in each direction."""
    scale: float = 0.0
    """0.1 for a zoom of 0.9 to 1.1."""
    rotate: float = 0.0
    """Degrees."""
    flip: float = 0.0
    """Probability of a left-right mirror image."""
    brightness: float = 0.0
    """0.2 for a factor of 0.8 to 1.2."""
    contrast: float = 0.0
    """0.2 for a factor of 0.8 to 1.2, about the image's own mean."""
    shear: float = 0.0
    """Tangent of the angle, along both axes."""
    saturation: float = 0.0
    """0.2 for a factor of 0.8 to 1.2, about each pixel's own grey; nothing for grey images."""
    erase: float = 0.0
    """Largest side of a square that half of the views lose, as a share of the side; the image's mean fills it."""

    @property
    def moves(self) -> bool:
        """Whether pixels change places."""
        return any((self.shift, self.scale, self.rotate, self.flip, self.shear))

    @property
    def identity(self) -> bool:
        """Whether a view is the image itself."""
        return not (self.moves or self.brightness or self.contrast or self.saturation or self.erase)

    def describe(self) -> dict[str, Any]:
        """Return the amounts by name, for records and fingerprints."""
        return asdict(self)


POLICIES: dict[str, ViewPolicy] = {
    "none": ViewPolicy(),
    # no mirror images: in a private folder left and right may matter (letters, organs, parts)
    "light": ViewPolicy(shift=0.06, scale=0.1, rotate=8.0, brightness=0.15, contrast=0.15),
    "standard": ViewPolicy(shift=0.125, scale=0.15, flip=0.5, brightness=0.2, contrast=0.2),
    # as far as RandAugment goes at a magnitude of 9 of 30, all at once and each less far; mirror images as for `auto`
    "strong": ViewPolicy(
        shift=0.15,
        scale=0.25,
        rotate=15.0,
        brightness=0.4,
        contrast=0.4,
        shear=0.15,
        saturation=0.4,
        erase=0.4,
    ),
}
_MIRRORABLE = ("cifar10", "cifar100", "fashion_mnist", "pets")


def policy(name: str, source: str) -> ViewPolicy:
    """Return a policy by name; `auto` mirrors only the data sets for which that is known to be right.

    Raises:
        ConfigError: no such policy.
    """
    if name == "auto":
        name = "standard" if source in _MIRRORABLE else "light"
    if name not in POLICIES:
        raise ConfigError(unknown("augmentation", name, [*POLICIES, "auto"]))
    if name == "strong" and source in _MIRRORABLE:
        return replace(POLICIES[name], flip=0.5)
    return POLICIES[name]


def uniforms(ids: np.ndarray, *, seed: int, view: int, columns: int) -> np.ndarray:
    """Return float32 [images, columns] in [0, 1), a pure function of (seed, view, id, column).

    Source: the mixing function of SplitMix64 (Steele, Lea, Flood, 2014, figure 19), used as a counter-based generator.

    Args:
        ids: uint64 [images].
        seed: any int.
        view: any int >= 0.
        columns: how many numbers each image gets.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        key = _mix(np.array([seed & (2**64 - 1)], np.uint64) + _GOLDEN)
        key = _mix(key ^ np.uint64(view) * _GOLDEN)
        counters = np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(_mix(ids[:, None] ^ key) + counters[None, :])
    top = np.asarray(bits >> np.uint64(40), dtype=np.float32)
    return top * np.float32(2.0**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


@dataclass(frozen=True, eq=False)
class Draw:
    """The parameters of one view of many images, one row each."""

    theta: Tensor | None
    """float32 [images, 2, 3]: from the view's coordinates to the frame's, both in [-1, 1]; None where nothing moves."""
    brightness: Tensor | None
    """float32 [images, 1, 1, 1] factors."""
    contrast: Tensor | None
    """float32 [images, 1, 1, 1] factors."""
    saturation: Tensor | None = None
    """float32 [images, 1, 1, 1] factors."""
    erase: Tensor | None = None
    """float32 [images, 3]: centre and half of the side of what is erased, in [0, 1]; a side of 0 erases nothing."""

    def to(self, device: torch.device) -> Draw:
        """Return the same draw on a device."""
        return Draw(*(None if part is None else part.to(device) for part in self._parts()))

    def __getitem__(self, rows: Tensor) -> Draw:
        return Draw(*(None if part is None else part[rows] for part in self._parts()))

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.theta, self.brightness, self.contrast, self.saturation, self.erase


def draw(ids: np.ndarray, policy: ViewPolicy, *, seed: int, view: int) -> Draw:
    """Draw the parameters of view number `view` for all images at once."""
    if policy.identity:
        return Draw(None, None, None)
    columns = (*_COLUMNS, *_STRONG) if policy.shear or policy.saturation or policy.erase else _COLUMNS
    table = torch.from_numpy(uniforms(ids, seed=seed, view=view, columns=len(columns)))
    signed = dict(zip(columns, (2 * table - 1).unbind(1), strict=True))
    return Draw(
        theta=_theta(policy, signed) if policy.moves else None,
        brightness=_factor(signed["brightness"], policy.brightness),
        contrast=_factor(signed["contrast"], policy.contrast),
        saturation=_factor(signed["saturation"], policy.saturation) if policy.saturation else None,
        erase=_square(signed, policy.erase) if policy.erase else None,
    )


@dataclass(frozen=True, eq=False)
class Later:
    """A draw whose parameters are made for the rows that are asked for: of many images they would fill the memory."""

    ids: np.ndarray
    """uint64 [images]."""
    policy: ViewPolicy
    seed: int
    view: int

    def __getitem__(self, rows: Tensor) -> Draw:
        """Return the same as `draw(...)[rows]`, on the device of `rows`."""
        drawn = draw(self.ids[rows.cpu().numpy()], self.policy, seed=self.seed, view=self.view)
        return drawn.to(rows.device)


def _factor(signed: Tensor, amount: float) -> Tensor | None:
    return (1 + amount * signed).view(-1, 1, 1, 1) if amount else None


def _square(signed: dict[str, Tensor], largest: float) -> Tensor:
    side = largest * (signed["erase_side"] + 1) / 2 * (signed["erase"] < 0)
    centre = ((signed[name] + 1) / 2 for name in ("erase_x", "erase_y"))
    return torch.stack([*centre, side / 2], 1)


def _theta(policy: ViewPolicy, signed: dict[str, Tensor]) -> Tensor:
    angle = torch.deg2rad(policy.rotate * signed["rotate"])
    zoom = 1 / (1 + policy.scale * signed["scale"])  # a larger picture shows less of the frame
    mirror = torch.where((signed["flip"] + 1) / 2 < policy.flip, -1.0, 1.0)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # a shift is a share of the side, which is 2 long in these coordinates
    x, y = 2 * policy.shift * signed["shift_x"], 2 * policy.shift * signed["shift_y"]
    rows = [torch.stack([mirror * cos, -sin, x], 1), torch.stack([mirror * sin, cos, y], 1)]
    theta = torch.stack(rows, 1)
    if not policy.shear:
        return theta
    one, lean_x, lean_y = torch.ones_like(x), policy.shear * signed["shear_x"], policy.shear * signed["shear_y"]
    lean = torch.stack([torch.stack([one, lean_x], 1), torch.stack([lean_y, one], 1)], 1)
    return torch.cat([theta[:, :, :2] @ lean, theta[:, :, 2:]], 2)


def whole(frames: Tensor, size: int) -> Tensor:
    """Return the unchanged view that models are judged on.

    Args:
        frames: uint8 [batch, channels, side, side].
        size: side of the view; the frame is resized to it, antialiased, where it differs.

    Returns:
        float32 [batch, channels, size, size] in [0, 1].
    """
    images = frames.float().div_(255)
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def apply(frames: Tensor, drawn: Draw, size: int) -> Tensor:
    """Return the views that `drawn` describes, row by row.

    Args:
        frames: uint8 [batch, channels, side, side].
        drawn: one row per frame, on the same device.
        size: side of the views.

    Returns:
        float32 [batch, channels, size, size] in [0, 1].
    """
    images = whole(frames, size) if drawn.theta is None else _warp(frames, drawn.theta, size)
    if drawn.contrast is not None:
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * drawn.contrast + mean
    if drawn.saturation is not None and images.shape[1] == 3:
        grey = images.mean(dim=1, keepdim=True)
        images = (images - grey) * drawn.saturation + grey
    if drawn.brightness is not None:
        images = images * drawn.brightness
    if drawn.contrast is not None or drawn.brightness is not None or drawn.saturation is not None:
        images = images.clamp_(0, 1)
    return images if drawn.erase is None else _erased(images, drawn.erase)


def _erased(images: Tensor, squares: Tensor) -> Tensor:
    """Fill a square of each image with the image's mean."""
    size = images.shape[-1]
    axis = (torch.arange(size, dtype=torch.float32, device=images.device) + 0.5) / size
    within = (axis - squares[:, :2, None]).abs() < squares[:, 2, None, None]
    mask = (within[:, 0, None, :] & within[:, 1, :, None])[:, None]
    return torch.where(mask, images.mean(dim=(1, 2, 3), keepdim=True), images)


def _warp(frames: Tensor, theta: Tensor, size: int) -> Tensor:
    """Resample once for shift, zoom, rotation and flip together; what lies outside is mirrored in."""
    # bilinear sampling reads four pixels: a frame much larger than the view must be made smaller first
    images = whole(frames, size) if frames.shape[-1] > 1.5 * size else frames.float().div_(255)
    grid = _grid(theta, size)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _grid(theta: Tensor, size: int) -> Tensor:
    """Return what `F.affine_grid` returns for squares, [images, size, size, 2]; its product of matrices is slow."""
    axis = (2 * torch.arange(size, dtype=torch.float32, device=theta.device) + 1) / size - 1
    along_x, along_y, shift = theta[..., None, None].unbind(2)
    return (along_x * axis + (along_y * axis[:, None] + shift)).permute(0, 2, 3, 1)
