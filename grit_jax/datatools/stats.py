"""What data holds under given limits: rows, tokens, lengths, and how full packed rows are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grit_jax.config import Config
from grit_jax.data.index import ReadFile, num_targets
from grit_jax.data.indexing import build_indexes
from grit_jax.data.packing import ranges
from grit_jax.data.schedule import Schedule
from grit_jax.data.sources import find_files
from grit_jax.data.streams import all_streams
from grit_jax.data.streams.base import Stream
from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer

_RECORDS_AT_ONCE = 1 << 20
_STEPS = 32  # over which the fill is averaged
_LONGEST = 1 << 14  # lengths are counted one by one up to here; longer texts count as this long in percentiles
_EDGES = np.unique(np.round(2 ** np.arange(0, 14.01, 0.25)).astype(int))  # of the picture's bars: quarters of octaves
_PERCENTILES = (50, 90, 99)

_LIMITED = {"query": "queries", "positive": "passages", "negative": "passages"}  # in the picture; others get an s
_COLORS = {"query": "#4c78a8", "positive": "#54a24b", "negative": "#e45756", "conversation": "#b279a2"}
_OTHER_COLOR = "#9d755d"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the texts of one kind in one file.

    Attributes:
      texts: How many.
      tokens: Of all of them.
      counts: int64 [16385]; texts by length.
      longest: Tokens of the longest.
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
        """A length that this share (in percent) of the texts does not exceed."""
        return int(np.searchsorted(np.cumsum(self.counts), self.texts * share / 100))


@dataclasses.dataclass(frozen=True)
class FileStats:
    """One file."""

    name: str
    stream: str
    records: int
    bad: int
    lengths: dict[str, Lengths]

    @property
    def tokens(self) -> int:
        """Of all its texts."""
        return sum(lengths.tokens for lengths in self.lengths.values())


@dataclasses.dataclass(frozen=True)
class Fill:
    """How full the rows of a stream's steps are.

    Attributes:
      rows: Mean rows of a step.
      row_length: Tokens of a row.
      tokens: Mean tokens of a step.
      texts: Mean texts of a step; without packing each has a row.
      epoch_steps: Steps of an epoch.
    """

    rows: float
    row_length: int
    tokens: float
    texts: float
    epoch_steps: float

    @property
    def packed(self) -> float:
        """Share of the batch that is no padding."""
        return self.tokens / (self.rows * self.row_length)

    @property
    def unpacked(self) -> float:
        """The same if every text had a row of its own."""
        return self.tokens / (self.texts * self.row_length)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Everything."""

    files: tuple[FileStats, ...]
    fills: dict[str, Fill]
    notes: tuple[str, ...]

    @property
    def roles(self) -> list[str]:
        """Kinds of texts, those of one stream after the other."""
        files = sorted(self.files, key=lambda file: file.stream)
        return list(dict.fromkeys(kind for file in files for kind in file.lengths))

    @property
    def kinds(self) -> list[str]:
        """What texts are in their records, those of one stream after the other."""
        files = sorted(self.files, key=lambda file: file.stream)
        return list(dict.fromkeys(kind for file in files for kind in file.lengths))

    def total(self, kind: str) -> Lengths | None:
        """The texts of one kind in all files."""
        parts = [file.lengths[kind] for file in self.files if kind in file.lengths]
        return _joined(parts) if parts else None


def measure(config: Config, tokenizer: Tokenizer, streams: Sequence[Stream] | None = None) -> Stats:
    """Counts the files of `data.train` and packs some of its steps.

    Args:
      config: The settings.
      tokenizer: The model's.
      streams: Streams that may read the files; those of this package without.

    Raises:
      InputError: Files are missing or malformed.
    """
    data = config.data
    streams = all_streams(config) if streams is None else streams
    read = build_indexes(find_files(data.train), tokenizer, streams, skip_bad=data.skip_bad, tokens=False)
    files = tuple(map(_file_stats, read))
    streams = [stream for stream in streams if any(file.stream is stream for file in read)]
    try:
        schedule = Schedule(read, streams, data=data, train=config.train, num_shards=1)
    except InputError as error:  # the limits leave nothing: the lengths say why
        return Stats(files, {}, (str(error),))
    return Stats(files, _fills(schedule, files, streams), tuple(schedule.report()))


def _file_stats(file: ReadFile) -> FileStats:
    _, index, stream = file
    parts: dict[str, list[Lengths]] = {}
    for start in range(0, index.num_records, _RECORDS_AT_ONCE):
        bounds = np.asarray(index.text_starts[start : start + _RECORDS_AT_ONCE + 1])
        counts = np.diff(bounds)
        text = ranges(np.zeros(len(counts), np.int64), counts)
        positives = np.repeat(index.num_positives[start : start + len(counts)], counts)
        chosen = slice(int(bounds[0]), int(bounds[-1]))
        lengths = np.asarray(index.lengths[chosen])
        for kind, mine, limit in stream.roles(text, positives):
            if mine.any():
                targets = num_targets(index, limit, chosen, first=stream.first_target)[mine]
                parts.setdefault(kind, []).append(_lengths(lengths[mine], limit, int(targets.sum(dtype=np.int64))))
    joined = {kind: _joined(of_kind) for kind, of_kind in parts.items()}
    return FileStats(index.name, stream.name, index.num_records, sum(bad.count for bad in index.bad), joined)


def _lengths(lengths: np.ndarray, limit: int, targets: int) -> Lengths:
    counts = np.bincount(np.minimum(lengths, _LONGEST), minlength=_LONGEST + 1)
    return Lengths(
        len(lengths),
        int(lengths.sum(dtype=np.int64)),
        counts,
        int(lengths.max()),
        int(np.sum(lengths > limit)),
        limit,
        targets,
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
        rows = [schedule.stream_plan(k, stream.name).rows for k in steps]
        fills[stream.name] = Fill(
            rows=float(np.mean([plan.num_rows for plan in rows])),
            row_length=stream.row_length,
            tokens=float(np.mean([plan.length.sum() for plan in rows])),
            texts=float(np.mean([len(plan.length) for plan in rows])),
            epoch_steps=epoch_steps,
        )
    return fills


def as_lines(stats: Stats) -> Iterator[str]:
    """The figures for people."""
    names = [file.name for file in stats.files]
    width = max(len("all files"), *map(len, names))
    yield (
        f"{'file':<{width}}  {'kind':<12}  {'texts':>11}  {'tokens':>14}  {'mean':>6}  "
        + "  ".join(f"{f'{share} %':>6}" for share in _PERCENTILES)
        + f"  {'longest':>8}  {'limit':>6}  {'cut':>7}"
    )
    rows = [(file.name, kind, lengths) for file in stats.files for kind, lengths in file.lengths.items()]
    rows += [
        ("all files", kind, total) for kind in stats.kinds if len(stats.files) > 1 and (total := stats.total(kind))
    ]
    for name, kind, lengths in rows:
        yield (
            f"{name:<{width}}  {kind:<12}  {lengths.texts:>11,}  {lengths.tokens:>14,}  "
            f"{lengths.tokens / lengths.texts:>6,.0f}  "
            + "  ".join(f"{lengths.percentile(share):>6,}" for share in _PERCENTILES)
            + f"  {lengths.longest:>8,}  {lengths.limit:>6,}  {lengths.cut / lengths.texts:>7.1%}"
        )
    for stream, fill in stats.fills.items():
        yield (
            f"{stream}: {fill.texts:,.0f} texts and {fill.tokens:,.0f} tokens a step in {fill.rows:,.1f} rows of "
            f"{fill.row_length:,}: {fill.packed:.1%} are no padding (one text a row: {fill.unpacked:.1%})"
        )
    yield from stats.notes


def plot(stats: Stats, out: Path) -> None:
    """Draws lengths against their limits, tokens by file, and the fill, as PNG."""
    from matplotlib.figure import Figure

    colors = {kind: _COLORS.get(kind, _OTHER_COLOR) for kind in stats.kinds}
    files = sorted(stats.files, key=lambda file: -file.tokens)
    shown, rest = files[:16], files[16:]
    figure = Figure(figsize=(15, max(4.2, 1.6 + 0.26 * len(shown))), layout="constrained")
    lengths_axis, files_axis, fill_axis = figure.subplots(1, 3, width_ratios=(1.45, 1.15, 0.8))

    limits: dict[int, list[str]] = {}
    longest = 1
    for kind, color in colors.items():
        total = stats.total(kind)
        if total is None:
            continue
        share = np.add.reduceat(total.counts, _EDGES[:-1]) / total.texts
        lengths_axis.stairs(share * 100, _EDGES, color=color, fill=True, alpha=0.16)
        lengths_axis.stairs(share * 100, _EDGES, color=color, lw=1.8, label=f"{kind}  ({_short(total.texts)})")
        limits.setdefault(total.limit, []).append(kind)
        longest = max(longest, total.longest, total.limit)
    top = lengths_axis.get_ylim()[1]
    lengths_axis.set_ylim(0, top * 1.3)
    for number, (limit, kinds) in enumerate(sorted(limits.items())):
        lengths_axis.axvline(limit, color="#555555", lw=1, ls=(0, (4, 3)))
        cut = sum(total.cut for kind in kinds if (total := stats.total(kind)))
        texts = sum(total.texts for kind in kinds if (total := stats.total(kind)))
        what = " and ".join(dict.fromkeys(_LIMITED.get(kind, f"{kind}s") for kind in kinds))
        lengths_axis.annotate(
            f"{what}:\n{limit:,}, {cut / texts:.1%} cut", (limit, top * (1.28 - 0.12 * number)), xytext=(-4, 0),
            textcoords="offset points", ha="right", va="top", fontsize=8, color="#555555",
        )  # fmt: skip
    lengths_axis.set_xscale("log", base=2)
    lengths_axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lengths_axis.set_xlim(4, longest * 1.15)
    lengths_axis.set(xlabel="tokens of a text", ylabel="% of the texts of its kind", title="Lengths")
    lengths_axis.legend(frameon=False, loc="upper left")

    place = np.arange(len(shown))
    left = np.zeros(len(shown))
    for kind, color in colors.items():
        tokens = np.array([file.lengths[kind].tokens if kind in file.lengths else 0 for file in shown], float)
        files_axis.barh(place, tokens, left=left, color=color, height=0.72)
        left += tokens
    for y, file, end in zip(place, shown, left, strict=True):
        files_axis.annotate(
            f"{_short(file.tokens)}, {_short(file.records)} rows", (end, y), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    files_axis.set_yticks(place, [_clipped(file.name) for file in shown])
    files_axis.invert_yaxis()
    files_axis.set_xlim(0, left.max() * 1.38)
    files_axis.xaxis.set_major_formatter(lambda value, _: _short(value))
    more = f" (and {len(rest)} smaller files, {_short(sum(file.tokens for file in rest))} tokens)" if rest else ""
    files_axis.set(xlabel="tokens", title=f"Tokens by file{more}")

    bars = [
        (f"{stream}\n{name}", share)
        for stream, fill in stats.fills.items()
        for name, share in (("packed", fill.packed), ("one text\na row", fill.unpacked))
    ]
    heights = np.array([share for _, share in bars], float) * 100
    fill_axis.bar(np.arange(len(bars)), 100, color="#eeeeee", width=0.72)
    fill_axis.bar(
        np.arange(len(bars)),
        heights,
        width=0.72,
        color=["#4c78a8" if i % 2 == 0 else "#b8c9dd" for i in range(len(bars))],
    )
    for x, height in enumerate(heights):
        inside = height > 88
        fill_axis.annotate(
            f"{height:.1f} %", (x, height), xytext=(0, -12 if inside else 3), textcoords="offset points", ha="center",
            fontsize=9, color="white" if inside else "black",
        )  # fmt: skip
    fill_axis.set_xticks(np.arange(len(bars)), [name for name, _ in bars], fontsize=8)
    fill_axis.set(ylim=(0, 100), ylabel="% of a batch that is no padding", title="Fill")

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontweight("bold")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _clipped(name: str) -> str:
    return name if len(name) <= 28 else name[:25] + "..."
