"""Seeded surface defects for the demo: scratch, stain, hole, smear and foreign body, lit like the surface they lie on.

A surface is a grey image (H, W), float64 in [0, 1]; lengths are in pixels. Each kind is a function that gives
(altered, coverage), both (H, W): the surface as the defect alone would look, and how much of it shows at each pixel,
from 0 to 1 with soft edges.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from skimage.filters import gaussian
from skimage.measure import label
from skimage.transform import AffineTransform, warp

Defect = Callable[[np.ndarray, np.random.Generator, np.ndarray, float], tuple[np.ndarray, np.ndarray]]

AREA_LIMITS = (0.002, 0.03)  # the share of the image that a defect covers
VISIBLE = 0.12  # a thinner coverage shows nothing: it is cut off, so that a mask ends where a person would end it
MASKING = 32.0  # contrast of a defect per mean contrast of the fine texture, which hides what is weaker than itself


def add_defect(
    surface: np.ndarray, kind: str, rng: np.random.Generator, light: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A defect of one of KINDS somewhere on the surface: (defective surface (H, W), mask (H, W) bool).

    The mask is one region whose share of the image is within AREA_LIMITS; outside it nothing changes. `light` is the
    unit vector (x, y) towards the light. A rougher surface gets a stronger defect, about equally easy to notice, but
    none is brighter or darker than the surface itself somewhere is: no threshold on grey levels finds it.
    """
    strength = MASKING * np.abs(surface - gaussian(surface, 4.0)).mean()
    darkest, brightest = surface.min(), surface.max()
    while True:
        altered, coverage = KINDS[kind](surface, rng, light, strength)
        mask = _largest_region(coverage >= VISIBLE)
        if AREA_LIMITS[0] <= mask.mean() <= AREA_LIMITS[1]:
            return np.where(mask, surface + coverage * (np.clip(altered, darkest, brightest) - surface), surface), mask


def _scratch(
    surface: np.ndarray, rng: np.random.Generator, light: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """A long shallow groove: abraded inside, the wall that faces the light bright and the other one dark."""
    length, width = rng.uniform(0.45, 0.7) * surface.shape[0], rng.uniform(2.0, 3.0)
    distance, along, across = _stroke(surface.shape, rng, length, light)
    pressure = np.sin(np.pi * np.clip(along, 0.03, 0.97)) ** 0.5 * (1.0 + 0.25 * _noise(surface.shape, rng, 6.0))
    coverage = _smoothstep((width * np.clip(pressure, 0.2, 1.3) - distance) / 1.5 + 0.5)
    shade = np.sin(np.pi * np.clip(across / width, -1.0, 1.0))  # +1 on the light's side, whose wall leans away from it
    abraded = 0.2 * surface + 0.8 * gaussian(surface, 4.0)
    return abraded + strength * (0.08 - 0.15 * shade), coverage


def _stain(
    surface: np.ndarray, rng: np.random.Generator, light: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """A liquid that soaked in and dried: darker, flatter in contrast, darkest along the rims where its edge stood."""
    depth = _blob(surface.shape, rng, rng.uniform(0.018, 0.026), rng.uniform(1.0, 1.7), 0.3, rng.uniform(0.0, np.pi))
    outer, inner = (np.exp(-(((depth - stood) / 1.5) ** 2)) for stood in (2.2, rng.uniform(6.0, 9.0)))
    darkening = 0.18 + 0.2 * outer + 0.12 * inner + 0.03 * _noise(surface.shape, rng, 5.0)
    tone = gaussian(surface, 3.0)
    soaked = tone + 0.6 * (surface - tone)
    return soaked * np.clip(1.0 - strength * darkening, 0.25, 1.0), _smoothstep((depth + 0.5) / 3.0)


def _hole(
    surface: np.ndarray, rng: np.random.Generator, light: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """A pit: the wall on the light's side lies in shade, the opposite wall catches the light, the rim is chipped."""
    depth = _blob(surface.shape, rng, rng.uniform(0.012, 0.024), rng.uniform(1.0, 1.6), 0.35, rng.uniform(0.0, np.pi))
    pit = np.clip(depth - 2.5, 0.0, 8.0) + 0.7 * _noise(surface.shape, rng, 1.8)
    chipped = np.exp(-(((depth - 0.5) / 1.3) ** 2))
    lit = 1.0 + strength * (0.55 * _slope(gaussian(pit, 0.8), light) + 0.9 * chipped)
    return 0.5 * gaussian(surface, 8.0) * np.clip(lit, 0.1, 2.4), _smoothstep((depth + 0.5) / 2.0)


def _smear(
    surface: np.ndarray, rng: np.random.Generator, light: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """A paste wiped across: it hides most of the texture under fine ridges, at the surface's own tone."""
    angle = rng.uniform(0.0, np.pi)
    depth = _blob(surface.shape, rng, rng.uniform(0.021, 0.028), rng.uniform(1.6, 2.4), 0.2, angle)
    wipe = np.array([np.cos(angle), np.sin(angle)])
    grain = _noise(surface.shape, rng, 1.0)
    ridges = np.mean([_shifted(grain, step * wipe) for step in range(-14, 15)], axis=0)
    tone = gaussian(surface, 6.0)
    paste = tone + 0.1 * (surface - tone) + strength * 0.08 * ridges / ridges.std()
    return paste, _smoothstep((depth + 0.5) / 4.0)


def _foreign_body(
    surface: np.ndarray, rng: np.random.Generator, light: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """A screw that lies on top, shaded as a round solid with a thread, and its soft shadow."""
    half_length, radius = rng.uniform(18.0, 26.0), rng.uniform(5.5, 7.0)
    centre, angle = _place(surface.shape, rng, half_length + 16.0), rng.uniform(0.0, 2.0 * np.pi)
    along, across = _turned(surface.shape, centre, angle)
    depth = _screw(along, across, half_length, radius)
    shadow_depth = _screw(*_turned(surface.shape, centre - 3.5 * light, angle), half_length, radius)
    thread = np.where(along < half_length - 2.0, 0.6 * np.cos(2.0 * np.pi * (along + 0.3 * across) / 5.0), 0.0)
    roundness = radius * np.sqrt(1.0 - (1.0 - np.clip(depth / radius, 0.0, 1.0)) ** 2)
    facing = np.clip(-_slope(gaussian(roundness + thread, 0.7), light), -1.0, 1.0)
    gloss = np.clip(facing, 0.0, 1.0) ** 3
    metal = surface.mean() * (rng.uniform(0.9, 1.2) + strength * 0.25 * (facing + gloss))
    body, shadow = _smoothstep((depth + 0.7) / 1.4), 0.4 * _smoothstep((shadow_depth + 3.0) / 5.0)
    lying = body * metal + (1.0 - body) * (1.0 - shadow) * surface
    return lying, (np.maximum(body, shadow) > VISIBLE).astype(float)


KINDS: dict[str, Defect] = {
    "scratch": _scratch,
    "stain": _stain,
    "hole": _hole,
    "smear": _smear,
    "foreign_body": _foreign_body,
}


def _stroke(
    shape: tuple[int, ...], rng: np.random.Generator, length: float, light: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A gently bending line inside the image, as seen from every pixel, three arrays (H, W).

    The distance to the line, the place of its nearest point along it (0 to 1), and the offset from that point,
    positive on the side of the light.
    """
    steps = int(length)
    curvature = rng.normal(0.0, 0.007) + np.cumsum(rng.normal(0.0, 0.001, steps))
    heading = rng.uniform(0.0, 2.0 * np.pi) + np.cumsum(curvature)
    line = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    room = np.maximum(np.array(shape[::-1]) - np.ptp(line, axis=0) - 16.0, 0.0)
    line += 8.0 - line.min(axis=0) + rng.uniform(0.0, 1.0, 2) * room
    x, y = _grid(shape)
    squared_x, squared_y = np.float32(x[0, :, None] - line[:, 0]) ** 2, np.float32(y[:, :1] - line[:, 1]) ** 2
    nearest = (squared_y[:, None] + squared_x[None]).argmin(axis=-1)
    offset = np.stack([x, y], axis=-1) - line[nearest]
    normal = np.stack([-np.sin(heading), np.cos(heading)], axis=1)
    normal *= np.where(normal @ light < 0.0, -1.0, 1.0)[:, None]
    return np.hypot(*np.moveaxis(offset, -1, 0)), nearest / (steps - 1), (offset * normal[nearest]).sum(axis=-1)


def _blob(
    shape: tuple[int, ...], rng: np.random.Generator, area: float, elongation: float, roughness: float, angle: float
) -> np.ndarray:
    """Depth (H, W), about in pixels, under the edge of a rough ellipse that covers the share `area` of the image."""
    radius = np.sqrt(area * shape[0] * shape[1] / np.pi)
    along, across = _turned(shape, _place(shape, rng, 1.4 * radius * np.sqrt(elongation)), angle)
    reach = np.hypot(along / np.sqrt(elongation), across * np.sqrt(elongation))
    waves, ripples = _noise(shape, rng, 0.5 * radius), _noise(shape, rng, 0.15 * radius)
    reach *= np.exp(roughness * (0.7 * waves + 0.2 * ripples))
    return np.quantile(reach, area) - reach


def _screw(along: np.ndarray, across: np.ndarray, half_length: float, radius: float) -> np.ndarray:
    """Depth (H, W) under the edge of a screw whose point is at -half_length and whose flat head is at +half_length."""
    taper = np.clip((along + half_length + 6.0) / 10.0, 0.3, 1.0)
    shaft = 0.75 * radius * taper - np.hypot(np.maximum(np.abs(along) - half_length, 0.0), across)
    head = np.minimum(1.6 * radius - np.abs(across), 2.5 - np.abs(along - half_length))
    return np.maximum(shaft, head)


def _largest_region(mask: np.ndarray) -> np.ndarray:
    regions = label(mask, connectivity=2)
    return (regions > 0) & (regions == np.bincount(regions[mask], minlength=1).argmax())


def _place(shape: tuple[int, ...], rng: np.random.Generator, margin: float) -> np.ndarray:
    """A point (x, y) at least `margin` from every border."""
    return rng.uniform(margin, np.array(shape[::-1]) - margin)


def _grid(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    return x, y


def _turned(shape: tuple[int, ...], centre: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel's coordinates (H, W) from a centre: along a direction and across it."""
    x, y = _grid(shape)
    x, y = x - centre[0], y - centre[1]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _noise(shape: tuple[int, ...], rng: np.random.Generator, scale: float) -> np.ndarray:
    """Noise (H, W) of zero mean and unit variance, smooth over about `scale` pixels."""
    field = gaussian(rng.standard_normal(shape), scale, mode="wrap")  # as strong at the border as elsewhere
    return (field - field.mean()) / field.std()


def _smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _slope(height: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Rise per pixel towards a direction (x, y)."""
    along_y, along_x = np.gradient(height)
    return along_x * direction[0] + along_y * direction[1]


def _shifted(surface: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return warp(surface, AffineTransform(translation=offset), order=1, mode="reflect")
