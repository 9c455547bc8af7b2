"""How values are written for people. Knows nothing of what they mean."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

NONE = "–"  # what is not known

# Of limits of a budget.
LIMITS = {
    "candidates": "candidates",
    "example_evaluations": "example evaluations",
    "hours": "time by the clock",
    "gpu_hours": "time of devices",
}


def percent(value: float | None) -> str:
    """Of a share, such as '51.6%'."""
    return NONE if value is None else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """Of a difference of shares, such as '+1.2'."""
    return NONE if value is None else f"{100 * value:+.1f}".replace("-", "−")


def interval(found: Sequence[float] | None) -> str:
    """Of shares, such as '48.1 to 55.0'; empty where there is none."""
    return "" if found is None else f"{100 * found[0]:.1f} to {100 * found[1]:.1f}"


def gain_interval(found: Sequence[float] | None) -> str:
    """Of differences of shares, such as '−1.2 to +3.0'; empty where there is none."""
    return "" if found is None else f"{points(found[0])} to {points(found[1])}"


def p_value(value: float | None) -> str:
    """Such as 'p = 0.012'."""
    if value is None:
        return NONE
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def number(value: float | None) -> str:
    """Of a count; of what is none, three digits."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def span(seconds: float | None) -> str:
    """Such as '1 min 05 s'."""
    if seconds is None:
        return NONE
    if 0 < seconds < 0.1:
        return "< 0.1 s"
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def spent(limit: str, value: float | None) -> str:
    """Of one limit of a budget, used or allowed."""
    if value is None:
        return NONE
    return span(3600 * value) if limit in ("hours", "gpu_hours") else number(value)


def when(at: str | None) -> str:
    """Of a time in ISO 8601, in UTC, such as '2026-03-01 09:30'."""
    if at is None:
        return NONE
    return datetime.fromisoformat(at).astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def plural(count: int, one: str, many: str | None = None) -> str:
    """Such as '1 candidate' and '2 candidates'."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def as_yaml(document: Mapping[str, Any]) -> str:
    """Plain data, as a job file has it."""
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)


def objective(value: float, name: str) -> str:
    """Of what is kept small the value itself, which is stored negated."""
    is_share = name == "score" or name.startswith("task:")
    return percent(value) if is_share else f"{-value:,.4g}"


FILTERS: Mapping[str, Callable[..., str]] = {
    one.__name__: one
    for one in (
        percent,
        points,
        interval,
        gain_interval,
        p_value,
        number,
        span,
        spent,
        when,
        plural,
        as_yaml,
        objective,
    )
}
