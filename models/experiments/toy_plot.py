"""Figure 1 of the paper as a picture of four panels and as an animation, from the views of the one-dimensional game."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from models.experiments.toy import ARROWS, GRID, P_DATA, ToyResult, View, best_discriminator, measured

# The paper's colours; the strokes differ too.
_DATA, _G, _D, _BEST = "black", "#15803d", "#1d4ed8", "#bfdbfe"
_LEFT, _RIGHT = -3.5, 3.5  # the range of x that is shown
_TOP, _X_AXIS, _Z_AXIS = 1.08, -0.05, -0.55  # heights on the one scale of densities and D
_FRAME_MS, _LAST_FRAME_MS = 120, 2_500


def panels(result: ToyResult) -> bytes:
    """The four panels of Figure 1 in a row, as a PNG."""
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    titles = (
        "(a) D is only partly right",
        "(b) the same G, D trained on",
        f"(c) G after {result.panels[2].step} updates",
        f"(d) G after {result.panels[3].step:,} updates",
    )
    for axes, view, title in zip(figure.subplots(1, 4), result.panels, titles, strict=True):
        _draw(axes, view)
        axes.set_title(title, fontsize=11)
    _add_legend(figure, columns=4)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def animation(result: ToyResult) -> bytes:
    """The game as a GIF: first D's inner loop, then both nets in turns."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw(axes, result.frames[0])
    _add_legend(figure, columns=2)
    pictures = []
    for view in result.frames:
        axes.clear()
        _draw(axes, view)
        axes.set_title(f"G after {view.step:,} updates", fontsize=11)
        canvas.draw()  # type: ignore[no-untyped-call]
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))  # type: ignore[no-untyped-call]
    # All frames share the palette of the last, which has every colour: no flicker, and frames that differ little.
    palette = pictures[-1].quantize(32)
    first, *rest = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    film = io.BytesIO()
    durations = [_FRAME_MS] * len(rest) + [_LAST_FRAME_MS]
    first.save(film, "gif", save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)
    return film.getvalue()


def _add_legend(figure: Figure, columns: int) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _draw(axes: Axes, view: View) -> None:
    """One panel: densities and D over x, and below it the arrows from evenly spaced z to G(z)."""
    axes.plot(GRID, P_DATA, color=_DATA, linestyle=":", linewidth=2.2, label="data, $p_{data}$")
    axes.plot(GRID, view.p_g, color=_G, linewidth=2, label="generator, $p_g$")
    best = np.where(measured(view.p_g), best_discriminator(view.p_g), np.nan)
    name = r"best D for this G, $\frac{p_{data}}{p_{data} + p_g}$"
    axes.plot(GRID, best, color=_BEST, linewidth=4, label=name)
    axes.plot(GRID, view.d, color=_D, linestyle="--", linewidth=1.6, label="discriminator, D")
    z = _LEFT + (_RIGHT - _LEFT) * ARROWS
    shown = (view.arrows > _LEFT) & (view.arrows < _RIGHT)
    lines = [((a, _Z_AXIS), (b, _X_AXIS)) for a, b in zip(z[shown], view.arrows[shown], strict=True)]
    axes.add_collection(LineCollection(lines, colors="#6b7280", linewidths=0.7))
    axes.plot(view.arrows[shown], np.full(shown.sum(), _X_AXIS - 0.02), "^", color="#6b7280", markersize=3.5)
    axes.hlines([_X_AXIS, _Z_AXIS], _LEFT, _RIGHT, colors="black", linewidths=1)
    axes.set(xlim=(_LEFT - 0.5, _RIGHT + 0.1), ylim=(_Z_AXIS - 0.1, _TOP), yticks=[0, 0.5, 1], xticks=[])
    for height, name in ((_X_AXIS, "x"), (_Z_AXIS, "z")):
        axes.text(_LEFT - 0.15, height, name, ha="right", va="center", style="italic")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_bounds(0, 1)
