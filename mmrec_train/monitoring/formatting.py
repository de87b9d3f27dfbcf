"""Numbers as people read them, the same on the console and in the report."""

import math


def format_count(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 1.20M, 7.90B."""
    if not math.isfinite(value):
        return str(value)
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Half a unit of the last digit below: 999 999 is 1.00M, not 1000k.
        if abs(value) >= unit * 0.9995:
            digits = abs(value) / unit
            return f"{value / unit:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f}{suffix}"
    return f"{value:.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.1f}"


def format_bytes(value: float) -> str:
    """Binary units: 512 B, 3.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Hours, minutes, seconds: 0:03:12, with days in front where there are any: 2d 04:05:06."""
    days, rest = divmod(round(seconds), 86400)
    hours, minutes = divmod(rest // 60, 60)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest % 60:02}"
    return f"{hours}:{minutes:02}:{rest % 60:02}"
