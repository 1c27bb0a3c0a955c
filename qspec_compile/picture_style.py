"""What every picture is made with: the style, captions, axes, and labels beside what they name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .picture_sheet import INK, STYLE
from .versions import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .picture_figure import Picture

_LINE_HEIGHT = 1.25

_Draw = TypeVar("_Draw", bound=Callable[..., Any])


def styled(draw: _Draw) -> _Draw:
    """``draw`` in :data:`STYLE`; it raises ``ImportError`` where matplotlib is missing."""

    @functools.wraps(draw)
    def in_style(*args: Any, **options: Any) -> Any:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise ImportError(f"pictures are drawn with matplotlib: {install_command('plot')}") from error
        with rc_context(STYLE):
            return draw(*args, **options)

    return in_style  # type: ignore[return-value]


def new_figure(size: tuple[float, float], title: str = "", description: str = "") -> Picture:
    """An empty picture of ``size`` inches; ``title`` and ``description`` are for those who cannot see it."""
    from .picture_figure import Picture

    # Without pyplot: no window, and nothing to close.
    return Picture(title, description, figsize=size, layout="constrained")


def caption(figure: Figure, *parts: str | None) -> None:
    """Small text under a picture: the model, the device and the date of what it shows; None is left out."""
    text = ", ".join(part for part in parts if part)
    figure.supxlabel(text, x=0.01, ha="left", fontsize="small", color=INK)


class Label(NamedTuple):
    """Text in the colour of the line whose last point is ``(x, y)``, which it names."""

    text: str
    x: float
    y: float
    color: str


def label_lines(labels: Mapping[Axes, Sequence[Label]]) -> None:
    """Name lines to the right of their ends, instead of in a legend; labels that would touch move apart.

    Call it when everything else is drawn, since places are those of the axes' final sizes and limits.
    """
    texts = {
        axes: [
            axes.annotate(label.text, label[1:3], (7, 0), textcoords="offset points", va="center", color=label.color)
            for label in sorted(of_axes, key=lambda label: label.y)
        ]
        for axes, of_axes in labels.items()
    }
    for figure in {axes.get_figure(root=True) for axes in labels}:
        assert figure is not None
        figure.draw_without_rendering()
    for axes, of_axes in texts.items():
        points = 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
        ends = [axes.transData.transform(text.xy)[1] * points for text in of_axes]
        gap = _LINE_HEIGHT * max((float(text.get_fontsize()) for text in of_axes), default=0)
        for text, end, place in zip(of_axes, ends, apart(ends, gap), strict=True):
            text.xyann = (7, place - end)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending ``places`` moved until neighbours are ``gap`` apart; those that were nearer keep their centre."""
    clusters: list[list[float]] = []
    for place in places:
        clusters.append([place])
        while len(clusters) > 1 and _start(clusters[-1], gap) < _start(clusters[-2], gap) + gap * len(clusters[-2]):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [_start(cluster, gap) + gap * index for cluster in clusters for index in range(len(cluster))]


def _start(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def tokens(count: float) -> str:
    """``count`` as people write it: 32k, 1,000."""
    count = int(count)
    return f"{count // 1024}k" if count and count % 1024 == 0 else f"{count:,}"


def context_axis(axes: Axes, contexts: Sequence[int]) -> None:
    """A logarithmic x axis of contexts, each with its tick."""
    axes.set(xscale="log", xlabel="context, tokens")
    axes.set_xticks(contexts, [tokens(context) for context in contexts])
    axes.minorticks_off()


def times_axis(axes: Axes) -> None:
    """A y axis of speeds over another's, which stands at 1."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
