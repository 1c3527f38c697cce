"""How numbers become text in a report; only the report imports it.

Every function takes None and NaN and answers with a dash. Text uses no-break spaces, so that a number keeps its unit.
"""

from __future__ import annotations

import math

from understudy.record import Interval

MISSING = "—"
SPACE = "\u00a0"


def known(value: float | None) -> bool:
    """Return whether `value` is a finite number."""
    return value is not None and math.isfinite(value)


def percent(value: float | None) -> str:
    """Write a share in [0, 1] as `91.2 %`."""
    return MISSING if value is None or not known(value) else f"{100 * value:.1f}{SPACE}%"


def points(value: float | None) -> str:
    """Write a difference of two shares in percentage points, with its sign: `+1.8`."""
    if value is None or not known(value):
        return MISSING
    rounded = round(100 * value, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def percent_range(interval: Interval | None) -> str:
    """Write the ends of an interval of shares as `89.9 to 92.4`."""
    if interval is None or not (known(interval.low) and known(interval.high)):
        return MISSING
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}".replace(" ", SPACE)


def points_range(interval: Interval) -> str:
    """Write the ends of an interval of differences as `+0.9 to +2.7`."""
    return f"{points(interval.low)} to {points(interval.high)}"


def decimal(value: float | None, digits: int = 3) -> str:
    """Write a plain number with a fixed number of decimals."""
    return MISSING if value is None or not known(value) else f"{value:.{digits}f}"


def amount(value: float | None) -> str:
    """Write a large number as `277 k`, `11.2 M` or `1.8 G`."""
    return _scaled(value, ("", "k", "M", "G", "T"))


def size(value: float | None) -> str:
    """Write a number of bytes as `1.1 MB`; 1 kB is 1000 bytes."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def milliseconds(value: float | None) -> str:
    """Write a latency with three significant digits: `0.29 ms`."""
    return MISSING if value is None or not known(value) else f"{_significant(value)}{SPACE}ms"


def duration(seconds: float | None) -> str:
    """Write a time as `3.2 s`, `5 min 12 s` or `1 h 05 min`."""
    if seconds is None or not known(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest:02d}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60:02d}{SPACE}min"


def times(ratio: float | None, better: str, worse: str) -> str:
    """Write a ratio of two costs as `×41 smaller`, or as `×2.0 larger` where it is below 1; empty where unknown."""
    if ratio is None or not known(ratio) or ratio <= 0:
        return ""
    word, factor = (better, ratio) if ratio >= 1 else (worse, 1 / ratio)
    if factor < 1.05:
        return "same"
    return f"×{factor:.1f} {word}" if factor < 9.95 else f"×{factor:,.0f} {word}"


def tied(text: str) -> str:
    """Forbid line breaks before `%` and around `=` in a sentence."""
    return text.replace(" %", f"{SPACE}%").replace(" = ", f"{SPACE}={SPACE}")


def count(value: int, one: str, many: str | None = None) -> str:
    """Write `1 image` or `1,204 images`."""
    return f"{value:,}{SPACE}{one if value == 1 else many or one + 's'}"


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None or not known(value):
        return MISSING
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    text = f"{value:.0f}" if step == 0 else _significant(value)
    return f"{text}{SPACE}{units[step]}".rstrip(SPACE)


def _significant(value: float) -> str:
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{min(digits, 4)}f}"
