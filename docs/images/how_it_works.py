"""Draw ``how_it_works.png``: one step of the method, and its features during thirty epochs.

    python docs/images/how_it_works.py

A network is trained on the digits that ship with scikit-learn, with D = 3, so that its features and
targets can be drawn on a map of the sphere. Takes about half a minute on 2 CPU cores. The numbers
in the picture are stored in the PNG file as text (``facts``); a test computes them again.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from nat_jax import assign, losses, models, optim
from nat_jax import targets as noise
from nat_jax.input import pipeline, transforms
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import open_source
from nat_jax.models.frontend import sobel
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, create_state
from nat_jax.training.host_matching import compile_step

OUTPUT = Path(__file__).with_suffix(".png")

SEED, DIM, BATCH, PERIOD = 0, 3, 128, 3
SNAPSHOTS = (0, 1, 6, 30)  # epochs done; the last is the length of the training
SHOWN = (0, 1, 3, 4, 6, 7)  # digits of the twelve test images, two of each
EXAMPLE_NOISE = 41  # a draw whose rows do not overlap on the map
NEIGHBOURS = 10

INK, FAINT, GRID = "#1c2430", "#667080", "#c9ced6"
FEATURE, TARGET = "#0072b2", "#d55e00"  # distinguishable with any colour vision (Okabe and Ito)
# Ten colours distinguishable with any colour vision (Paul Tol's "muted", with grey).
OF_DIGIT = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933"]
OF_DIGIT += ["#ddcc77", "#cc6677", "#882255", "#aa4499", "#8a8a8a"]


class Snapshot(NamedTuple):
    """The features of all training images after some epochs.

    Attributes:
        epoch: epochs done.
        features: float32[N, 3].
        cosine: mean cosine between the features and the targets that their images own.
        same: share of each feature's nearest others that are of the same digit.
    """

    epoch: int
    features: np.ndarray
    cosine: float
    same: float


class Example(NamedTuple):
    """Twelve images and their matching.

    Attributes:
        images: uint8[12, 8, 8].
        gradients: float32[12, 8, 8, 2], across and down.
        features: float32[12, 3].
        targets: float32[12, 3]; image i owns row i before the matching.
        cosine: float32[12, 12], of features and targets.
        matched: int32[12], the row of each image after the matching.
        gap: a bound on what another matching could gain.
        pull: float32[12, 3], minus the gradient of each image's loss by its feature before it is
            normalised, for features of unit length.
    """

    images: np.ndarray
    gradients: np.ndarray
    features: np.ndarray
    targets: np.ndarray
    cosine: np.ndarray
    matched: np.ndarray
    gap: float
    pull: np.ndarray


class Drawn(NamedTuple):
    """The data of the picture.

    Attributes:
        labels: int[N], the digits of the training images.
        snapshots: one for each of the epochs asked for.
        example: one matching, by the network of the last snapshot.
    """

    labels: np.ndarray
    snapshots: list[Snapshot]
    example: Example


def compute(epochs: tuple[int, ...] = SNAPSHOTS) -> Drawn:
    """Train on the digits; return the features after ``epochs``, an increasing tuple."""
    source = open_source("digits", "train")
    transform = transforms.train_transform(image_size=8, pad=1)
    steps = pipeline.steps_per_epoch(len(source), BATCH)
    model = models.make_model(
        "convnet", dim=DIM, image_size=8, frontend="sobel", widths=(32, 64, 128), pools=2
    )
    total = SNAPSHOTS[-1] * steps
    optimizer = optim.Optimizer(0.1, "cosine", momentum=0.9, total_steps=total)
    step = Step(model, optimizer, sharding.make_mesh(1, 1, devices=jax.devices()[:1]))
    key = jax.random.key(SEED)
    rows, _ = noise.make_targets("sphere", len(source), DIM, jax.random.fold_in(key, 1))
    dealt = noise.initial_assignment("sphere", len(source), jax.random.fold_in(key, 2))
    state = create_state(model, optimizer, dealt, jax.random.fold_in(key, 0))
    features = jax.jit(lambda state, images: _z(model, state, images))
    train_steps = {matching: compile_step(step, reassign=matching) for matching in (True, False)}
    images = _colours([source[i]["image"] for i in range(len(source))])
    labels = np.asarray(source.labels)

    batches = pipeline.train_batches(
        source,
        transform,
        batch_size=BATCH,
        seed=SEED,
        start_step=0,
        num_steps=epochs[-1] * steps,
        cache=ImageCache(),
    )
    snapshots = []
    for epoch in range(epochs[-1] + 1):
        if epoch in epochs:
            z = np.asarray(features(state, images))
            owned = np.asarray(rows.gather(state.assignment))
            cosine = float(np.mean(np.sum(z * owned, axis=1)))
            snapshots.append(Snapshot(epoch, z, cosine, same_digit(z, labels)))
        if epoch < epochs[-1]:
            for _ in range(steps):
                batch = next(batches)
                batch = {name: batch[name] for name in ("image", "index", "weight")}
                state, _ = train_steps[epoch % PERIOD == 0](state, rows, batch)
    batches.close()

    test = open_source("digits", "test")
    chosen = np.concatenate([np.flatnonzero(np.asarray(test.labels) == k)[:2] for k in SHOWN])
    new = _colours([test[int(i)]["image"] for i in chosen])
    fresh = noise.sphere_rows(jax.random.fold_in(key, EXAMPLE_NOISE), np.arange(len(new)), DIM)
    return Drawn(labels, snapshots, match(new, np.asarray(features(state, new)), np.asarray(fresh)))


def _z(model: models.Model, state, images):
    return model.apply(state.params, state.batch_stats, images)[0]["z"]


def _colours(images: list[np.ndarray]) -> np.ndarray:
    """Stack grey images [H, W] as uint8[N, H, W, 3]."""
    return np.repeat(np.stack(images).reshape(len(images), 8, 8, 1), 3, axis=3)


def same_digit(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of each feature's nearest neighbours whose images show the same digit."""
    cosine = features @ features.T
    np.fill_diagonal(cosine, -2)
    near = np.argpartition(-cosine, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    return float(np.mean(labels[near] == labels[:, None]))


def match(images: np.ndarray, features: np.ndarray, targets: np.ndarray) -> Example:
    """Match the targets to the images, and compute the gradient of the loss at the features."""
    cosine = features @ targets.T
    solution = assign.auction(-cosine).check()
    matched = np.asarray(solution.col4row)

    def loss(raw):
        z = raw / jax.numpy.linalg.norm(raw, axis=1, keepdims=True)
        return len(raw) * losses.squared_loss(z, targets[matched], np.ones(len(raw), np.float32))

    pull = -np.asarray(jax.grad(loss)(features))
    gradients = np.asarray(sobel(images))
    return Example(
        images[..., 0], gradients, features, targets, cosine, matched, float(solution.gap), pull
    )


def facts(drawn: Drawn) -> dict[str, list[float]]:
    """Return the numbers in the picture."""
    example = drawn.example
    return {
        "epoch": [shot.epoch for shot in drawn.snapshots],
        "cosine": [round(shot.cosine, 4) for shot in drawn.snapshots],
        "same_digit": [round(shot.same, 4) for shot in drawn.snapshots],
        "matched": example.matched.tolist(),
        "before_and_after": [round(value, 4) for value in means(example)],
    }


def means(example: Example) -> tuple[float, float]:
    """Return the mean cosine before and after the matching."""
    after = np.take_along_axis(example.cosine, example.matched[:, None], axis=1)
    return float(np.mean(np.diag(example.cosine))), float(np.mean(after))


def draw(drawn: Drawn) -> Figure:
    """Draw the picture, 12 inches wide."""
    example, each = drawn.example, np.arange(len(drawn.example.images))
    before, after = means(example)
    with plt.rc_context({"font.size": 11, "font.family": "DejaVu Sans", "text.color": INK}):
        figure = plt.figure(figsize=(12, 9.6), facecolor="white")
        _draw_input(figure, example)
        _title(figure, 0.622, 0.972, 4, "unit features, and the noise they own")
        _draw_pairs(_map_at(figure, 0.622, 0.724, 0.365), example, each)
        words = "blue: features, orange: noise, lines: owned targets."
        _note(figure, 0.622, 0.712, f"{words}\nMean cosine of the pairs {before:.2f}")
        _draw_costs(figure, example)
        _title(figure, 0.300, 0.640, 6, "the same noise, reassigned")
        _draw_pairs(_map_at(figure, 0.300, 0.392, 0.365), example, example.matched)
        _note(figure, 0.300, 0.380, f"mean cosine {after:.2f}, the maximum")
        _draw_pull(figure, example)
        _draw_snapshots(figure, drawn)
    return figure


def _title(figure: Figure, x: float, y: float, number: int, words: str) -> None:
    disc = {"boxstyle": "circle,pad=0.22", "facecolor": INK, "edgecolor": "none"}
    style = {"fontsize": 10.5, "color": "white", "fontweight": "bold", "bbox": disc}
    figure.text(x + 0.008, y, str(number), ha="center", va="center", **style)
    figure.text(x + 0.026, y, words, ha="left", va="center", fontsize=13, fontweight="bold")


def _note(figure: Figure, x: float, y: float, words: str) -> None:
    figure.text(x, y, words, fontsize=11, color=FAINT, va="top", linespacing=1.35)


def _arrow(figure: Figure, start: float, end: float, y: float) -> None:
    style = "simple,head_length=7,head_width=8,tail_width=2"
    figure.add_artist(FancyArrowPatch((start, y), (end, y), arrowstyle=style, color=FAINT, lw=0))


def _draw_input(figure: Figure, example: Example) -> None:
    largest = np.abs(example.gradients).max()
    signed = {"cmap": "RdBu", "vmin": -largest, "vmax": largest}
    tiles = (
        (0.012, "twelve digits,\nno labels", example.images, {"cmap": "gray_r"}),
        (0.165, "across", example.gradients[..., 0], signed),
        (0.295, "down", example.gradients[..., 1], signed),
    )
    for x, words, stack, colours in tiles:
        axes = figure.add_axes((x, 0.724, 0.115, 0.228))
        rows = [np.hstack([np.pad(tile, 1) for tile in stack[i : i + 3]]) for i in range(0, 12, 3)]
        axes.imshow(np.vstack(rows), **colours)
        axes.axis("off")
        _note(figure, x, 0.712, words)
    for start in (0.131, 0.414, 0.578):
        _arrow(figure, start, start + 0.030, 0.838)
    _title(figure, 0.012, 0.972, 1, "images")
    _title(figure, 0.165, 0.972, 2, "their gradients")
    _title(figure, 0.448, 0.972, 3, "a network")
    axes = figure.add_axes((0.454, 0.736, 0.114, 0.204))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    sides = [(0, 0), (0, 1), (1, 0.68), (1, 0.32)]
    axes.add_patch(Polygon(sides, facecolor="#e9edf2", edgecolor=GRID))
    words = "convolutions,\nlinear layer,\nnormalised\nto length 1"
    axes.text(0.47, 0.5, words, ha="center", va="center", fontsize=11, linespacing=1.4)
    _note(figure, 0.448, 0.712, "D = 3 numbers\nper image")


def _map_at(figure: Figure, x: float, y: float, width: float) -> Axes:
    """Add an equal-area map of the sphere."""
    size = figure.get_size_inches()
    axes = figure.add_axes((x, y, width, width / 2 * size[0] / size[1]), projection="mollweide")
    axes.set(xticks=np.radians(range(-120, 121, 60)), yticks=np.radians(range(-60, 61, 30)))
    axes.set(xticklabels=[], yticklabels=[])
    axes.grid(color=GRID, linewidth=0.6, alpha=0.6)
    axes.spines["geo"].set(color=GRID, linewidth=1.0)
    axes.set_axisbelow(True)
    return axes


def on_map(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return longitude and latitude in radians of unit vectors [..., 3]."""
    return np.arctan2(points[..., 1], points[..., 0]), np.arcsin(np.clip(points[..., 2], -1, 1))


def great_circle(start: np.ndarray, end: np.ndarray, count: int = 80) -> np.ndarray:
    """Return points [count, 3] of the geodesic on the sphere."""
    along = np.linspace(0, 1, count)[:, None]
    angle = np.arccos(np.clip(start @ end, -1, 1))
    return (np.sin((1 - along) * angle) * start + np.sin(along * angle) * end) / np.sin(angle)


def _draw_pairs(axes: Axes, example: Example, rows: np.ndarray) -> None:
    for feature, target in zip(example.features, example.targets[rows], strict=True):
        longitude, latitude = on_map(great_circle(feature, target))
        longitude[1:][np.abs(np.diff(longitude)) > np.pi] = np.nan  # across the edge of the map
        axes.plot(longitude, latitude, color=FAINT, linewidth=1.3, zorder=2)
    axes.scatter(*on_map(example.targets), marker="X", s=62, color=TARGET, lw=0.6, ec="w", zorder=6)
    for image, x, y in zip(example.images, *on_map(example.features), strict=True):
        tile = OffsetImage(_ink(image), zoom=2.3, interpolation="nearest")
        axes.add_artist(AnnotationBbox(tile, (x, y), frameon=False, pad=0, zorder=5))


def _ink(image: np.ndarray) -> np.ndarray:
    """Return a grey image uint8[H, W] as strokes in the colour of features, with a soft ground."""
    strokes = image[..., None] / 255.0
    blue = np.array(to_rgb(FEATURE))
    rgb = strokes * blue + (1 - strokes)
    return np.concatenate([rgb, 0.25 + 0.75 * strokes], axis=-1)


def _draw_costs(figure: Figure, example: Example) -> None:
    _title(figure, 0.012, 0.640, 5, "cosines of images and noise")
    axes = figure.add_axes((0.032, 0.392, 0.184, 0.230))
    shown = axes.imshow(example.cosine, cmap="PuOr_r", vmin=-1, vmax=1)
    count = len(example.images)
    for image, row in enumerate(example.matched):
        axes.add_patch(Rectangle((image - 0.5, image - 0.5), 1, 1, fill=False, ec=INK, lw=0.9))
        axes.plot(row, image, "o", color=INK, markersize=6.5)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    axes.set_xlabel("noise", fontsize=11, color=TARGET, labelpad=3)
    axes.set_ylabel("images", fontsize=11, color=FEATURE, labelpad=3)
    axes.spines[:].set_color(GRID)
    bar = figure.colorbar(shown, cax=figure.add_axes((0.224, 0.392, 0.009, 0.230)))
    bar.set_ticks([-1, 0, 1], labels=["−1", "0", "1"])
    bar.ax.tick_params(labelsize=10.5, color=FAINT, labelcolor=FAINT, length=2)
    bar.outline.set_edgecolor(GRID)
    _note(figure, 0.012, 0.365, "boxes: owned before,\ndots: chosen by the auction")


def _draw_pull(figure: Figure, example: Example) -> None:
    """Draw the pair with the largest angle, in its own plane, and its gradient to scale."""
    _title(figure, 0.700, 0.640, 7, "the loss, and its pull")
    cosines = np.sum(example.features * example.targets[example.matched], axis=1)
    widest = int(np.argmin(cosines))
    angle, length = np.arccos(cosines[widest]), np.linalg.norm(example.pull[widest])
    axes = figure.add_axes((0.706, 0.392, 0.282, 0.230))
    axes.set(xlim=(-1.2, 1.2), ylim=(-0.1, 1.47), aspect="equal")
    axes.axis("off")
    turn = np.linspace(0, np.pi, 200)
    axes.plot(np.cos(turn), np.sin(turn), color=GRID, lw=1.5)
    z, c = ([np.cos(t), np.sin(t)] for t in ((np.pi + angle) / 2, (np.pi - angle) / 2))
    for end in (z, c):
        axes.plot([0, end[0]], [0, end[1]], color=GRID, lw=1.2)
    axes.plot([z[0], c[0]], [z[1], c[1]], color=FAINT, lw=1.4, ls="--")
    tip = (z[0] + length * z[1], z[1] - length * z[0])  # along the tangent
    arrow = {"arrowstyle": "-|>,head_width=0.3,head_length=0.6", "color": FEATURE, "lw": 2.4}
    axes.annotate("", tip, z, arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0})
    axes.plot(*z, "o", color=FEATURE, ms=9)
    axes.plot(*c, "X", color=TARGET, ms=10, mec="w", mew=0.6)
    words = {"ha": "center", "va": "center", "fontsize": 12}
    axes.text(1.16 * z[0] - 0.02, 1.1 * z[1], "z", color=FEATURE, fontweight="bold", **words)
    axes.text(1.16 * c[0] + 0.02, 1.1 * c[1], "c", color=TARGET, fontweight="bold", **words)
    axes.text(0, 0.30, "θ", color=FAINT, **words)
    cosine = cosines[widest]
    loss = f"loss ½|z − c|² = 1 − cos θ = {1 - cosine:.2f}"
    _note(figure, 0.700, 0.380, f"{loss}\npull sin θ = {length:.2f}, along the sphere")


def _draw_snapshots(figure: Figure, drawn: Drawn) -> None:
    last = drawn.snapshots[-1].epoch
    words = f"{last} epochs of training: all {len(drawn.labels):,} features, coloured by digit"
    _title(figure, 0.012, 0.275, 8, words)
    order = np.random.default_rng(0).permutation(len(drawn.labels))  # no digit always on top
    colours = np.array(OF_DIGIT)[drawn.labels]
    for k, shot in enumerate(drawn.snapshots):
        x = 0.012 + 0.2475 * k
        axes = _map_at(figure, x, 0.100, 0.234)
        longitude, latitude = on_map(shot.features)
        axes.scatter(longitude[order], latitude[order], c=colours[order], s=6, lw=0)
        when = f"after {shot.epoch} epoch{'s' * (shot.epoch > 1)}" if shot.epoch else "untrained"
        cosine = f"{shot.cosine:.2f}".replace("-", "−")
        said = f"cosine with own noise {cosine}\nsame digit nearby {shot.same:.0%}"
        figure.text(x, 0.088, when, fontweight="bold", va="top")
        _note(figure, x, 0.064, said)
    for k, (x, y) in enumerate(zip(*on_map(middles(shot.features, drawn.labels)), strict=True)):
        halo = [withStroke(linewidth=3.5, foreground="white")]
        style = {"fontsize": 15, "fontweight": "bold", "ha": "center", "va": "center"}
        axes.text(x, y, str(k), color=INK, path_effects=halo, zorder=7, **style)
        figure.text(0.692 + 0.031 * k, 0.275, "●", color=OF_DIGIT[k], va="center", fontsize=12)
        figure.text(0.705 + 0.031 * k, 0.275, str(k), va="center", fontsize=12)


def middles(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return for each digit the feature with most neighbours of the same digit, [10, 3]."""
    found = []
    for k in range(10):
        own = features[labels == k]
        found.append(own[np.argmax(np.sum(np.exp(20 * (own @ own.T)), axis=1))])
    return np.stack(found)


def kept(path: Path = OUTPUT) -> dict[str, list[float]]:
    """Return the ``facts`` that are stored in the picture."""
    with Image.open(path) as picture:
        return json.loads(picture.info["Description"])


if __name__ == "__main__":
    everything = compute()
    text = {"Title": "How NAT works", "Description": json.dumps(facts(everything))}
    draw(everything).savefig(OUTPUT, dpi=150, metadata=text)
    print(f"{OUTPUT.name}: {text['Description']}")
