"""One screen of ``moe-infinity top``: lines, bars and the map of experts, as large as fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from moe_infinity.config import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_RGB = tuple[int, int, int]
# Okabe and Ito's blue and orange beside grey, by tier: not used lately, and used most.
_TIERS: tuple[tuple[_RGB, _RGB], ...] = (
    ((28, 35, 44), (116, 130, 148)),
    ((18, 61, 99), (127, 207, 255)),
    ((91, 55, 9), (255, 195, 92)),
)
_NAMES = ("on disk", "in RAM", "in VRAM")
_PARTS = ("#7f93ad", "#a487d6", "#d3b0e4", "#45b5a8", "#566474", "#3a8bcb")  # of planned memory
_SHADES, _ASCII_SHADES = "·░▒▓█", ".:*%#"  # without colours: disk to the fastest tier
_AS_ASCII = str.maketrans("●━█░■…", "*=#.#~")
_MOST_SCALE = 4  # columns of one expert
_MOST_LINES = 48  # of the map, where no height is given
_MIN_SHARE = 0.22  # used at all is seen at once
_STATES = {"idle": "dim", "prompt": "yellow", "answer": "green"}


class Frame:
    """What is printed of one look at a server. before: the look that rates are measured from.

    height: lines there are; None for as many as it takes."""

    def __init__(
        self,
        now: dict[str, Any],
        url: str,
        before: dict[str, Any] | None = None,
        trouble: str = "",
        height: int | None = None,
    ) -> None:
        self._now, self._url, self._trouble, self._height = now, url, trouble, height
        self._rates = rates(before, now) if before else {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        head, foot = self._head(width), self._foot()
        for line in head:
            yield from _line(console, line, width)
        tiers, uses = self._now["experts"].get("tiers"), self._now["experts"].get("uses")
        room = _MOST_LINES if self._height is None else self._height - len(head) - len(foot)
        if tiers and room > 0:
            yield from _heat(console, tiers, uses, width, room)
        for line in foot:
            is_bottom = line is foot[-1] and self._height is not None
            yield from _line(console, line, width, end="" if is_bottom else "\n")

    def _head(self, width: int) -> list[Text]:
        now, state = self._now, self._now["state"]
        title = Text.assemble((now["model"], "bold"), (f"  {self._url}  up ", "dim"))
        title.append(_seconds(now["uptime_s"]), "dim")
        title.append(f"  ● {state}", "red" if self._trouble else _STATES.get(state, ""))
        lines = [title, self._progress(width), Text(), *self._table(), Text(), *self._memory(width)]
        return [*lines, Text(), self._legend()]

    def _progress(self, width: int) -> Text:
        run, last = self._now["running"], self._now["last"]
        if self._trouble:
            return Text(self._trouble, "red")
        if run is None:
            return Text("no request yet", "dim") if last is None else _answer("last answer", last)
        if self._now["state"] != "prompt":
            return _answer("answer", run)
        done, total = run["prompt_done"], run["prompt_tokens"]
        words = f" prompt: {done} of {total} tokens, {run['reused_tokens']} kept from before"
        size = max(10, min(30, width - len(words)))
        filled = round(size * done / max(1, total))
        return Text.assemble(("━" * filled, "yellow"), ("━" * (size - filled), "dim"), words)

    def _table(self) -> list[Text]:
        prompt, answer = self._now["totals"]["prefill"], self._now["totals"]["decode"]
        rates, phases = self._rates, (prompt, answer)
        is_above = self._now["device"] is not None
        read, tokens = rates.get("read"), rates.get("tokens")
        rows = [
            ("hit rate", _percent(rates.get("hits")), [_percent(p["hit_rate"]) for p in phases]),
            ("waiting", _percent(rates.get("stall")), [_seconds(p["stall_s"]) for p in phases]),
            (
                "read from disk",
                "-" if read is None else f"{read / 1e9:.2f} GB/s",
                [format_bytes(_disk_bytes(p, is_above)) for p in phases],
            ),
            (
                "tokens",
                "-" if tokens is None else f"{tokens:.1f} /s",
                [str(p["num_tokens"]) for p in phases],
            ),
        ]
        lines = [Text(f"{'':<15}{'now':>12}{'prompts':>14}{'answers':>14}", "dim")]
        for name, fresh, totals in rows:
            line = Text(f"{name:<15}")
            line.append(f"{fresh:>12}", "bold")
            lines.append(line.append("".join(f"{total:>14}" for total in totals)))
        return lines

    def _memory(self, width: int) -> list[Text]:
        memory, device = self._now["memory"], self._now["device"]
        parts, budget = memory["planned"], memory["budget_bytes"]
        words = f" {format_bytes(memory['rss_bytes'])} of {format_bytes(budget)}"
        size = max(10, min(60, width - 7 - len(words)))
        bar = _bar(list(parts.values()), budget, size)
        lines = [Text("memory ").append_text(bar).append(words), Text(" " * 7)]
        for colour, (name, size) in zip(_PARTS, parts.items(), strict=False):
            part = f"{name} {format_bytes(size)}  "
            if len(lines[-1]) + len(part) > width:
                lines.append(Text(" " * 7))
            lines[-1].append("■ ", colour).append(part, "dim")
        if device:
            used, budget = device["used_bytes"], device["budget_bytes"]
            words = f" {format_bytes(used)} of {format_bytes(budget)}, {device['name']}"
            bar = _bar([used], budget, max(10, min(60, width - 7 - len(words))), ("#ffc35c",))
            lines.append(Text("device ").append_text(bar).append(words))
        return lines

    def _legend(self) -> Text:
        experts = self._now["experts"]
        line = Text.assemble(("experts ", "bold"))
        tiers = experts.get("tiers") or []
        for tier, name in enumerate(_NAMES):
            count = sum(row.count(str(tier)) for row in tiers)
            if tiers and (tier < 2 or self._now["device"] or count):
                mark = Style(color=Color.from_rgb(*_mix(tier, 6)))
                line.append(" ■ ", mark).append(f"{count} {name} ")
        return line.append(f" {experts['slots']} slots; rows are layers", "dim")

    def _foot(self) -> list[Text]:
        now, experts, queue = self._now, self._now["experts"], self._now["queue"]
        notes = [f"not bit-exact: {text}" for text in now["lossy"]] + now["faults"]
        facts = (
            f"policy {experts['policy']}, prefetch {experts['prefetch']} | queue "
            f"{queue['waiting']} of {queue['limit']} | {now['totals']['requests']} requests | "
            f"{now['memory']['kept_tokens']} of {now['memory']['context_tokens']} tokens kept"
        )
        lines = [Text(f"note: {note}", "yellow") for note in notes[-3:]]
        return [*lines, Text(facts + (" | Ctrl-C ends" if self._height else ""), "dim")]


def rates(before: dict[str, Any], now: dict[str, Any]) -> dict[str, float]:
    """What happened between two looks: ``hits`` and ``stall`` from 0 to 1, ``read`` in bytes and
    ``tokens`` in tokens a second. Empty if nothing can be said, as after a restart."""
    time = now["uptime_s"] - before["uptime_s"]
    old, new = ([look["totals"][p] for p in ("prefill", "decode")] for look in (before, now))

    def grown(key: str) -> float:
        return float(sum(p[key] for p in new) - sum(p[key] for p in old))

    looked_up = grown("hits") + grown("misses") + grown("late")
    if time <= 0 or looked_up < 0:
        return {}
    is_above = now["device"] is not None
    read = sum(_disk_bytes(p, is_above) for p in new) - sum(_disk_bytes(p, is_above) for p in old)
    found = {
        "stall": min(1.0, grown("stall_s") / time),
        "read": read / time,
        "tokens": grown("num_tokens") / time,
    }
    return found | ({"hits": grown("hits") / looked_up} if looked_up else {})


def _disk_bytes(phase: dict[str, Any], has_device: bool) -> int:
    """Without a device what is loaded is loaded from disk; with one that lies a tier beneath."""
    if has_device:
        return int(phase["disk_bytes"])
    return int(phase["demand_bytes"] + phase["prefetch_bytes"])


def _answer(title: str, run: dict[str, Any]) -> Text:
    speed, first = run["tokens_per_s"], run["ttft_s"]
    words = [f"{run['new_tokens']} tokens"]
    words += [] if speed is None else [f"{speed:.1f} tok/s"]
    words += [] if first is None else [f"first token after {first:.2f} s"]
    return Text(f"{title}: {', '.join(words)}")


def _bar(sizes: Sequence[int], end: int, width: int, colours: Sequence[str] = _PARTS) -> Text:
    bar, at, total = Text(), 0, 0
    for size, colour in zip(sizes, colours, strict=False):
        total += size
        edge = min(width, round(width * total / max(1, end)))
        bar.append("█" * (edge - at), colour)
        at = max(at, edge)
    return bar.append("░" * (width - at), "dim")


def _line(console: Console, text: Text, width: int, end: str = "\n") -> Iterator[Segment]:
    """Exactly one line of the terminal, whatever a server calls things."""
    text.plain = "".join(char if char.isprintable() else " " for char in text.plain)
    text.truncate(width, overflow="ellipsis")
    if console.options.ascii_only:
        text.plain = text.plain.translate(_AS_ASCII).encode("ascii", "replace").decode()
    yield from text.render(console, end=end)


def _mix(tier: int, use: int) -> _RGB:
    low, high = _TIERS[tier]
    share = _MIN_SHARE + (1 - _MIN_SHARE) * use / 9 if use else 0.0
    r, g, b = (round(x + (y - x) * share) for x, y in zip(low, high, strict=True))
    return r, g, b


_COLOURS = [[_mix(tier, use) for use in range(10)] for tier in range(3)]


@lru_cache(maxsize=1024)  # of 30 colours above and below
def _style(upper: _RGB, lower: _RGB | None) -> Style:
    back = None if lower is None else Color.from_rgb(*lower)
    return Style(color=Color.from_rgb(*upper), bgcolor=back)


def _heat(
    console: Console, tiers: list[str], uses: list[str], width: int, room: int
) -> Iterator[Segment]:
    """The map. Two rows share a line with colours: the upper half of a block and what is behind.
    Where experts or layers are too many, neighbours are one cell, the most used of them: a
    mean would hide the hot and muddle the hues."""
    has_colours = console.color_system is not None and not console.no_color
    is_ascii = console.options.ascii_only
    num_experts = max(map(len, tiers))
    columns = _bins(num_experts, width)
    if is_ascii or not has_colours:
        yield from _shaded(tiers, _bins(len(tiers), room), columns, is_ascii)
        return
    rows = _bins(len(tiers), 2 * room)
    scale = max(1, min(width // num_experts, 2 * room // len(tiers), _MOST_SCALE))
    cells = [[_hottest(tiers, uses, r, c) for c in columns] for r in rows for _ in range(scale)]
    nothing: list[_RGB | None] = [None] * len(columns)
    for upper, lower in itertools.zip_longest(cells[::2], cells[1::2], fillvalue=nothing):
        for pair in zip(upper, lower, strict=True):
            yield _halves(*pair, scale)
        yield Segment("\n")


def _halves(upper: _RGB | None, lower: _RGB | None, scale: int) -> Segment:
    if upper is not None:
        return Segment("▀" * scale, _style(upper, lower))
    return Segment(" " * scale) if lower is None else Segment("▄" * scale, _style(lower, None))


def _shaded(
    tiers: list[str], rows: list[range], columns: list[range], is_ascii: bool
) -> Iterator[Segment]:
    """The map without colours: the fuller a block, the faster the tiers its experts are in."""
    shades = _ASCII_SHADES if is_ascii else _SHADES
    best = max(1, *(int(max(row)) for row in tiers))
    for row in rows:
        line = ""
        for column in columns:
            found = [
                int(digit) for layer in row for digit in tiers[layer][column.start : column.stop]
            ]
            line += shades[round(4 * sum(found) / len(found) / best)] if found else " "
        yield Segment(line + "\n")


def _bins(num: int, room: int) -> list[range]:
    """``num`` things in at most ``room`` runs of the same length, the last perhaps shorter."""
    size = -(-num // max(1, room))
    return [range(start, min(num, start + size)) for start in range(0, num, size)]


def _hottest(tiers: list[str], uses: list[str], rows: range, columns: range) -> _RGB | None:
    cells = [
        (int(uses[row][column]), min(2, int(tiers[row][column])))
        for row in rows
        for column in columns
        if column < len(tiers[row])
    ]
    if not cells:
        return None
    use, tier = max(cells)
    return _COLOURS[tier][use]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _seconds(time: float) -> str:
    if time < 100:
        return f"{time:.1f} s"
    hours, minutes = divmod(int(time) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(time) % 60} s"
