"""A run's numbers as pictures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from grit_jax import files
from grit_jax.errors import InputError
from grit_jax.runs import folder
from grit_jax.runs.goodput import CAUSES, Goodput
from grit_jax.runs.history import (
    STREAMS,
    Lines,
    duration,
    file_losses,
    read_history,
    running_mean,
    scorecard_names,
    series,
)

_TRAIN, _HELD_OUT, _OTHER, _BAD = "#2563a8", "#d97706", "#3f8f5f", "#c0392b"
_MOST_FILES = 8

_RIGHT = "#7d5ba6"  # of curves with their own axis on the right


def plot_run(path: files.PathLike, out: files.PathLike) -> None:
    """Draws a run folder as PNG.

    Raises:
      InputError: No step has been logged there.
    """
    from matplotlib.figure import Figure

    history = read_history(path)
    lines, bad = history.metrics, history.bad_batches
    if not lines:
        raise InputError(f"{path}: no step in {folder.METRICS}; name a run folder whose run has begun")
    figure = Figure(figsize=(15, 12), layout="constrained")
    panels = figure.subplots(3, 3)
    _losses(panels[0, :2], lines, bad)
    _scorecard(panels[0, 2], lines)
    _file_losses(panels[1, 0], lines)
    _health(panels[1, 1], lines)
    _gradient(panels[1, 2], lines, bad)
    _learning_rate(panels[2, 0], lines)
    _speed(panels[2, 1], lines)
    _goodput(panels[2, 2], history.goodput)
    figure.suptitle(f"{path}   step {lines[-1]['step']:,}", fontsize=13, x=0.01, ha="left", weight="bold")
    _save(figure, out)


def plot_losses(path: files.PathLike, out: files.PathLike) -> None:
    """Draws both losses of a run folder as PNG."""
    from matplotlib.figure import Figure

    history = read_history(path)
    figure = Figure(figsize=(10, 4), layout="constrained")
    _losses(figure.subplots(1, 2), history.metrics, history.bad_batches)
    _save(figure, out)


def _save(figure: Any, out: files.PathLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    files.write_bytes(out, buffer.getvalue())


def _dress(panel: Any, title: str) -> None:
    panel.set_title(title, loc="left", fontsize=11)
    panel.grid(alpha=0.25, linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=9)


def _smooth(panel: Any, lines: Lines, name: str, colour: str, label: str | None = None) -> np.ndarray:
    """Draws every step faintly and the running mean on top; returns the values."""
    steps, values = series(lines, name)
    if len(steps):
        width = max(1, len(values) // 25)
        panel.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        panel.plot(steps, running_mean(values, width), color=colour, linewidth=1.8, label=label)
    return values


def _inside(panel: Any, values: np.ndarray) -> None:
    """Sets limits that ignore a few outliers above, and says how many there are."""
    values = values[np.isfinite(values)]
    if len(values) >= 20:
        low, high = np.percentile(values, [0, 98])
        margin = 0.12 * (high - low or 1.0)
        panel.set_ylim(low - margin, high + 2 * margin)
        if above := int(np.sum(values > high + 2 * margin)):
            panel.text(0.99, 0.98, f"↑ {above} above", transform=panel.transAxes, ha="right", va="top", fontsize=8)


def _marks(panel: Any, bad: Lines) -> None:
    """Draws skipped steps and spikes as vertical lines."""
    for reason, style, label in (("not finite", "-", "skipped"), ("spike", ":", "spike")):
        for number, line in enumerate(line for line in bad if line["reason"] == reason):
            panel.axvline(
                line["step"], color=_BAD, alpha=0.55, linewidth=1, linestyle=style, label=None if number else label
            )


def _nothing(panel: Any, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="#888888", fontsize=10)
    panel.set(xticks=[], yticks=[])


def _legend(panel: Any, **options: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if labels:
        panel.legend(handles, labels, frameon=False, fontsize=8, **options)


def _losses(panels: Any, lines: Lines, bad: Lines) -> None:
    _loss(panels[0], lines, bad, "loss/embedding", "contrastive loss")
    _loss(panels[1], lines, bad, "loss/generative", "language-modelling loss")


def _loss(panel: Any, lines: Lines, bad: Lines, name: str, title: str) -> None:
    _dress(panel, title)
    values = _smooth(panel, lines, name, _TRAIN, "training")
    if not len(values):
        return _nothing(panel, "not trained")
    _inside(panel, values)
    steps, held_out = series(lines, f"validation/{name}")
    if len(steps):
        panel.plot(steps, held_out, "o-", color=_HELD_OUT, markersize=4, linewidth=1.4, label="held out")
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, held_out.min()), max(high, held_out.max()))
    _marks(panel, bad)
    _legend(panel)


def _scorecard(panel: Any, lines: Lines) -> None:
    """Draws both skills and their weighted mean, and single tasks faintly."""
    _dress(panel, "scorecard")
    found = {name: series(lines, f"scorecard/{name}") for name in scorecard_names(lines)}
    if not found:
        return _nothing(panel, "no scorecard")
    shown = {"embedding": _TRAIN, "generative": _HELD_OUT, "both": _OTHER}
    for name, (steps, values) in found.items():
        if name not in shown and np.all(np.abs(values) <= 1):  # a loss has another scale
            panel.plot(steps, values, color="#999999", linewidth=0.9, alpha=0.6)
            panel.annotate(name[-24:], (steps[-1], values[-1]), fontsize=7, color="#777777", ha="right", va="bottom")
    for name, colour in shown.items():
        if name in found:
            panel.plot(*found[name], "o-", color=colour, markersize=4, label=f"{name}  {found[name][1][-1]:.3f}")
    _legend(panel)
    return None


def _file_losses(panel: Any, lines: Lines) -> None:
    """Draws running means of the highest file losses, for the stream with more files."""
    names = {stream: {name for line in lines for name in file_losses(line, stream)} for stream in STREAMS}
    stream = max(STREAMS, key=lambda name: len(names[name]))
    _dress(panel, f"loss by file, {stream}")
    ranked = []
    for name in sorted(names[stream]):
        steps, values = series(lines, f"loss/{stream}/{name}")
        smooth = running_mean(values, max(1, len(values) // 10))
        ranked.append((smooth[-1], name, steps, smooth))
    if not ranked:
        return _nothing(panel, "no losses by file")
    ranked.sort(key=lambda item: -item[0])
    for last, name, steps, smooth in ranked[:_MOST_FILES]:
        marker = "o" if len(steps) < 3 else None
        panel.plot(steps, smooth, linewidth=1.4, marker=marker, markersize=3, label=f"{name[-28:]}  {last:.3f}")
    _legend(panel, title=None if len(ranked) <= _MOST_FILES else f"{_MOST_FILES} highest of {len(ranked)}")
    return None


def _health(panel: Any, lines: Lines) -> None:
    _dress(panel, "embeddings of a batch")
    shown = (("alignment", _TRAIN), ("uniformity", _HELD_OUT), ("mean_cosine", _OTHER))
    for name, colour in shown:
        steps, values = series(lines, f"embedding/{name}")
        if len(steps):
            width = max(1, len(values) // 25)
            panel.plot(steps, running_mean(values, width), color=colour, linewidth=1.6, label=name.replace("_", " "))
    steps, values = series(lines, "embedding/effective_rank")
    if not len(steps):
        if not len(series(lines, "embedding/alignment")[0]):
            _nothing(panel, "no embedding batches")
        return
    other = panel.twinx()
    other.plot(steps, values, color=_RIGHT, linewidth=1.6, linestyle="--", label="effective rank (right)")
    other.set_ylim(0, None)
    other.spines["top"].set_visible(False)
    other.tick_params(labelsize=9, colors=_RIGHT)
    handles, labels = (a + b for a, b in zip(panel.get_legend_handles_labels(), other.get_legend_handles_labels()))
    panel.legend(handles, labels, frameon=False, fontsize=8)


def _gradient(panel: Any, lines: Lines, bad: Lines) -> None:
    _dress(panel, "gradient norm")
    _smooth(panel, lines, "grad_norm", _TRAIN, "all")
    for name, colour in (("embedding", _HELD_OUT), ("generative", _OTHER)):
        steps, values = series(lines, f"grad_norm/{name}")
        if len(steps):
            panel.plot(steps, values, ".-", color=colour, markersize=4, linewidth=1, label=name)
    panel.set_yscale("log")
    for axis_format in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis_format(lambda value, _: f"{value:g}")
    panel.set_xlabel("step", fontsize=9)
    _marks(panel, bad)
    _legend(panel)


def _learning_rate(panel: Any, lines: Lines) -> None:
    _dress(panel, "learning rate")
    panel.plot(*series(lines, "learning_rate"), color=_TRAIN, linewidth=1.8)
    panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    panel.set(ylim=(0, None))
    panel.set_xlabel("step", fontsize=9)


def _speed(panel: Any, lines: Lines) -> None:
    _dress(panel, "tokens per second")
    values = _smooth(panel, lines, "tokens_per_second", _TRAIN)
    if len(values):
        panel.axhline(
            np.median(values), color="#888888", linewidth=1, linestyle=":", label=f"median {np.median(values):,.0f}"
        )
        panel.set_ylim(0, 1.25 * np.percentile(values, 95))
    _, mfu = series(lines, "mfu")
    if len(mfu):
        panel.plot([], [], " ", label=f"MFU {np.median(mfu):.1%}")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_xlabel("step", fontsize=9)
    _legend(panel, loc="lower right")


def _goodput(panel: Any, goodput: Goodput) -> None:
    wall = goodput.wall_seconds
    if not wall:
        _dress(panel, "goodput")
        return _nothing(panel, "no times recorded")
    _dress(panel, f"goodput {goodput.ratio:.1%} of {duration(wall)}, {goodput.sessions} session(s)")
    causes = [cause for cause in CAUSES if goodput.seconds.get(cause, 0.0) / wall >= 5e-4 or cause == "useful"][::-1]
    shares = [goodput.seconds.get(cause, 0.0) / wall for cause in causes]
    colours = [_OTHER if cause == "useful" else "#b9c4d0" for cause in causes]
    panel.barh(causes, shares, color=colours)
    for index, (cause, share) in enumerate(zip(causes, shares)):
        text = f" {share:.1%}  {duration(goodput.seconds.get(cause, 0.0))}"
        panel.text(share, index, text, va="center", fontsize=8)
    panel.set_xlim(0, 1.45 * max(shares))
    panel.grid(visible=False)
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)
    return None
