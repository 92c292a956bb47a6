"""Statistics of data under given limits: records, tokens, lengths, and how full packed rows are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grit_jax.config import Config
from grit_jax.data.index_builder import build_indexes
from grit_jax.data.schedule import Schedule
from grit_jax.data.sources import find_files
from grit_jax.data.streams import all_streams
from grit_jax.data.streams.stream import Stream
from grit_jax.data.token_index import IndexedFile, num_targets
from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RECORDS_AT_ONCE = 1 << 20
_STEPS = 32  # to average the fill over
_LONGEST = 1 << 14  # longer texts count as this long in percentiles
_EDGES = np.unique(np.round(2 ** np.arange(0, 14.01, 0.25)).astype(int))  # of the plot's bars: quarters of octaves
_PERCENTILES = (50, 90, 99)

_LIMITED = {"query": "queries", "positive": "passages", "negative": "passages"}  # plurals in the plot; others get an s
_COLORS = {"query": "#4c78a8", "positive": "#54a24b", "negative": "#e45756", "conversation": "#b279a2"}
_OTHER_COLOR = "#9d755d"
_SHOWN_FILES = 16


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of the texts of one role in one file.

    Attributes:
      texts: Number of texts.
      tokens: Tokens of all of them.
      counts: int64 [16385]; texts by length.
      longest: Tokens of the longest text.
      cut: Texts over their limit.
      limit: Their limit.
      targets: Pooled or scored tokens within the limit.
    """

    texts: int
    tokens: int
    counts: np.ndarray
    longest: int
    cut: int
    limit: int
    targets: int

    def percentile(self, share: int) -> int:
        """The length that this share, in percent, of the texts does not exceed."""
        return int(np.searchsorted(np.cumsum(self.counts), self.texts * share / 100))


@dataclasses.dataclass(frozen=True)
class FileStats:
    """One file; `lengths` are by role."""

    name: str
    stream: str
    records: int
    bad: int
    lengths: dict[str, Lengths]

    @property
    def tokens(self) -> int:
        """Tokens of all its texts."""
        return sum(lengths.tokens for lengths in self.lengths.values())


@dataclasses.dataclass(frozen=True)
class Fill:
    """How full the rows of a stream's steps are.

    Attributes:
      rows: Mean rows of a step.
      row_length: Tokens of a row.
      tokens: Mean tokens of a step.
      texts: Mean texts of a step; without packing each has its own row.
      epoch_steps: Steps of an epoch.
    """

    rows: float
    row_length: int
    tokens: float
    texts: float
    epoch_steps: float

    @property
    def packed(self) -> float:
        """Share of the batch that is not padding."""
        return self.tokens / (self.rows * self.row_length)

    @property
    def unpacked(self) -> float:
        """The same if every text had its own row."""
        return self.tokens / (self.texts * self.row_length)


@dataclasses.dataclass(frozen=True)
class Stats:
    """All files; `fills` are by stream, and `notes` are lines to show."""

    files: tuple[FileStats, ...]
    fills: dict[str, Fill]
    notes: tuple[str, ...]

    @property
    def roles(self) -> list[str]:
        """The roles of texts in their records, stream by stream."""
        files = sorted(self.files, key=lambda file: file.stream)
        return list(dict.fromkeys(role for file in files for role in file.lengths))

    def total(self, role: str) -> Lengths:
        """The texts of one role in all files."""
        return _joined([file.lengths[role] for file in self.files if role in file.lengths])


def measure(config: Config, tokenizer: Tokenizer, streams: Sequence[Stream] | None = None) -> Stats:
    """Measures the files of `data.train`, and packs some steps.

    Args:
      config: The settings.
      tokenizer: The model's tokenizer.
      streams: Streams that may read the files; None for those of this package.

    Raises:
      InputError: Files are missing or malformed.
    """
    data = config.data
    streams = all_streams(config) if streams is None else streams
    indexed = build_indexes(find_files(data.train), tokenizer, streams, skip_bad=data.skip_bad, tokens=False)
    files = tuple(map(_file_stats, indexed))
    streams = [stream for stream in streams if any(file.stream is stream for file in indexed)]
    try:
        schedule = Schedule(indexed, streams, data=data, train=config.train, num_shards=1)
    except InputError as error:  # the limits leave no text; the lengths say why
        return Stats(files, {}, (str(error),))
    return Stats(files, _fills(schedule, files, streams), tuple(schedule.summary()))


def _file_stats(file: IndexedFile) -> FileStats:
    _, index, stream = file
    parts: dict[str, list[Lengths]] = {}
    for start in range(0, index.num_records, _RECORDS_AT_ONCE):
        stop = min(start + _RECORDS_AT_ONCE, index.num_records)
        texts, counts, text = index.texts_of(start, stop)
        lengths = np.asarray(index.lengths[texts])
        for role, mine, limit in stream.roles(text, np.repeat(index.num_positives[start:stop], counts)):
            if mine.any():
                targets = num_targets(index, limit, texts, first=stream.first_target)[mine]
                parts.setdefault(role, []).append(_lengths(lengths[mine], limit, targets))
    joined = {role: _joined(of_role) for role, of_role in parts.items()}
    return FileStats(index.name, stream.name, index.num_records, sum(bad.count for bad in index.bad), joined)


def _lengths(lengths: np.ndarray, limit: int, targets: np.ndarray) -> Lengths:
    return Lengths(
        texts=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        counts=np.bincount(np.minimum(lengths, _LONGEST), minlength=_LONGEST + 1),
        longest=int(lengths.max()),
        cut=int(np.sum(lengths > limit)),
        limit=limit,
        targets=int(targets.sum(dtype=np.int64)),
    )


def _joined(parts: Sequence[Lengths]) -> Lengths:
    sums: dict[str, Any] = {
        name: sum(getattr(part, name) for part in parts) for name in ("texts", "tokens", "counts", "cut", "targets")
    }
    return Lengths(**sums, longest=max(part.longest for part in parts), limit=parts[0].limit)


def _fills(schedule: Schedule, files: Sequence[FileStats], streams: Sequence[Stream]) -> dict[str, Fill]:
    fills = {}
    for stream in streams:
        epoch_steps = sum(file.records for file in files if file.stream == stream.name) / stream.batch_size
        steps = np.unique(np.linspace(0, max(_STEPS, int(epoch_steps)) - 1, _STEPS).astype(int)).tolist()
        plans = [schedule.stream_plan(k, stream.name).rows for k in steps]
        fills[stream.name] = Fill(
            rows=float(np.mean([plan.num_rows for plan in plans])),
            row_length=stream.row_length,
            tokens=float(np.mean([plan.length.sum() for plan in plans])),
            texts=float(np.mean([len(plan.length) for plan in plans])),
            epoch_steps=epoch_steps,
        )
    return fills


def as_lines(stats: Stats) -> Iterator[str]:
    """The figures as lines of text."""
    width = max(len("all files"), *(len(file.name) for file in stats.files))
    yield (
        f"{'file':<{width}}  {'role':<12}  {'texts':>11}  {'tokens':>14}  {'mean':>6}  "
        + "  ".join(f"{f'{share} %':>6}" for share in _PERCENTILES)
        + f"  {'longest':>8}  {'limit':>6}  {'cut':>7}"
    )
    rows = [(file.name, role, lengths) for file in stats.files for role, lengths in file.lengths.items()]
    if len(stats.files) > 1:
        rows += [("all files", role, stats.total(role)) for role in stats.roles]
    for name, role, lengths in rows:
        yield (
            f"{name:<{width}}  {role:<12}  {lengths.texts:>11,}  {lengths.tokens:>14,}  "
            f"{lengths.tokens / lengths.texts:>6,.0f}  "
            + "  ".join(f"{lengths.percentile(share):>6,}" for share in _PERCENTILES)
            + f"  {lengths.longest:>8,}  {lengths.limit:>6,}  {lengths.cut / lengths.texts:>7.1%}"
        )
    for stream, fill in stats.fills.items():
        yield (
            f"{stream}: {fill.texts:,.0f} texts and {fill.tokens:,.0f} tokens a step in {fill.rows:,.1f} rows of "
            f"{fill.row_length:,}: {fill.packed:.1%} are not padding (one text per row: {fill.unpacked:.1%})"
        )
    yield from stats.notes


def plot(stats: Stats, out: Path) -> None:
    """Draws lengths and their limits, tokens by file, and the fill, as PNG."""
    from matplotlib.figure import Figure

    files = sorted(stats.files, key=lambda file: -file.tokens)
    shown = files[:_SHOWN_FILES]
    figure = Figure(figsize=(15, max(4.2, 1.6 + 0.26 * len(shown))), layout="constrained")
    lengths_axis, files_axis, fill_axis = figure.subplots(1, 3, width_ratios=(1.45, 1.15, 0.8))
    colors = {role: _COLORS.get(role, _OTHER_COLOR) for role in stats.roles}
    _plot_lengths(lengths_axis, stats, colors)
    _plot_files(files_axis, shown, files[_SHOWN_FILES:], colors)
    _plot_fills(fill_axis, stats.fills)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontweight("bold")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def _plot_lengths(axis: Axes, stats: Stats, colors: dict[str, str]) -> None:
    limits: dict[int, list[str]] = {}
    longest = 1
    for role, color in colors.items():
        total = stats.total(role)
        share = np.add.reduceat(total.counts, _EDGES[:-1]) / total.texts
        axis.stairs(share * 100, _EDGES, color=color, fill=True, alpha=0.16)
        axis.stairs(share * 100, _EDGES, color=color, lw=1.8, label=f"{role}  ({_short(total.texts)})")
        limits.setdefault(total.limit, []).append(role)
        longest = max(longest, total.longest, total.limit)
    top = axis.get_ylim()[1]
    axis.set_ylim(0, top * 1.3)
    for number, (limit, roles) in enumerate(sorted(limits.items())):
        axis.axvline(limit, color="#555555", lw=1, ls=(0, (4, 3)))
        cut, texts = (sum(getattr(stats.total(role), name) for role in roles) for name in ("cut", "texts"))
        what = " and ".join(dict.fromkeys(_LIMITED.get(role, f"{role}s") for role in roles))
        axis.annotate(
            f"{what}:\n{limit:,}, {cut / texts:.1%} cut", (limit, top * (1.28 - 0.12 * number)), xytext=(-4, 0),
            textcoords="offset points", ha="right", va="top", fontsize=8, color="#555555",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlim(4, longest * 1.15)
    axis.set(xlabel="tokens of a text", ylabel="% of the texts with this role", title="Lengths")
    axis.legend(frameon=False, loc="upper left")


def _plot_files(axis: Axes, shown: Sequence[FileStats], rest: Sequence[FileStats], colors: dict[str, str]) -> None:
    bars, left = np.arange(len(shown)), np.zeros(len(shown))
    for role, color in colors.items():
        tokens = np.array([file.lengths[role].tokens if role in file.lengths else 0 for file in shown], float)
        axis.barh(bars, tokens, left=left, color=color, height=0.72)
        left += tokens
    for y, file, end in zip(bars, shown, left, strict=True):
        axis.annotate(
            f"{_short(file.tokens)}, {_short(file.records)} records", (end, y), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axis.set_yticks(bars, [_clipped(file.name) for file in shown])
    axis.invert_yaxis()
    axis.set_xlim(0, left.max() * 1.38)
    axis.xaxis.set_major_formatter(lambda value, _: _short(value))
    more = f" (and {len(rest)} smaller files, {_short(sum(file.tokens for file in rest))} tokens)" if rest else ""
    axis.set(xlabel="tokens", title=f"Tokens by file{more}")


def _plot_fills(axis: Axes, fills: dict[str, Fill]) -> None:
    names = [f"{stream}\n{layout}" for stream in fills for layout in ("packed", "one text\na row")]
    heights = np.array([[fill.packed, fill.unpacked] for fill in fills.values()], float).reshape(-1) * 100
    axis.bar(np.arange(len(names)), 100, color="#eeeeee", width=0.72)
    axis.bar(np.arange(len(names)), heights, width=0.72, color=["#4c78a8", "#b8c9dd"] * len(fills))
    for x, height in enumerate(heights):
        inside = height > 88
        axis.annotate(
            f"{height:.1f} %", (x, height), xytext=(0, -12 if inside else 3), textcoords="offset points", ha="center",
            fontsize=9, color="white" if inside else "black",
        )  # fmt: skip
    axis.set_xticks(np.arange(len(names)), names, fontsize=8)
    axis.set(ylim=(0, 100), ylabel="% of a batch that is not padding", title="Fill")


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _clipped(name: str) -> str:
    return name if len(name) <= 28 else name[:25] + "..."
