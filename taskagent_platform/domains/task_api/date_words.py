"""What the words for days and moments mean, as a table that the prompt carries and the examples use.

The model copies dates from the prompt instead of computing them, so each line starts with the user's own word.
A week runs from Monday to Sunday.
"""

import calendar
from datetime import date, datetime, timedelta
from typing import NamedTuple

WEEKDAYS = tuple(calendar.day_name)
MONTHS = tuple(calendar.month_name)[1:]
DAYS_AHEAD = (2, 3, 4, 5, 10)
SOON = {"in 30 minutes": 30, "in an hour": 60, "in 2 hours": 120, "in 3 hours": 180}
"""Moments relative to now, in minutes."""

CLOCK_WORDS = {
    "noon": "12:00",
    "midnight": "00:00",
    "morning": "09:00",
    "afternoon": "14:00",
    "evening": "18:00",
    "tonight": "20:00",
    "end of day": "17:00",
    **{f"{hour}pm": f"{hour + 12}:00" for hour in range(1, 12)},
}
"""What the words for times of day mean; a time in the morning is written as it is said."""


class Span(NamedTuple):
    """The first and the last day of a span, both included."""

    start: date
    end: date


def day_words(now: datetime) -> dict[str, date]:
    """Returns the day that each word means at ``now``, in the order of the prompt."""
    today = now.date()
    monday = today - timedelta(days=today.weekday())
    # On a weekend "the end of the week" is that of the week to come.
    friday = monday + timedelta(days=4 if today.weekday() <= 4 else 11)
    words = {
        "yesterday": today - timedelta(days=1),
        "today": today,
        "tomorrow": today + timedelta(days=1),
        "day after tomorrow": today + timedelta(days=2),
    }
    for index, name in enumerate(WEEKDAYS):
        words[name] = today + timedelta(days=(index - today.weekday() - 1) % 7 + 1)
    for index, name in enumerate(WEEKDAYS):
        words[f"next {name}"] = monday + timedelta(days=7 + index)
    for days in DAYS_AHEAD:
        words[f"in {days} days"] = today + timedelta(days=days)
    words["in a week"] = today + timedelta(days=7)
    words["in two weeks"] = today + timedelta(days=14)
    words["end of the week"] = friday
    words["end of the month"] = _month_end(today)
    return words


def span_words(now: datetime) -> dict[str, Span]:
    """Returns the span of days that each word means at ``now``, in the order of the prompt."""
    today = now.date()
    monday = today - timedelta(days=today.weekday())
    next_month = _month_end(today) + timedelta(days=1)
    return {
        "this week": Span(monday, monday + timedelta(days=6)),
        "next week": Span(monday + timedelta(days=7), monday + timedelta(days=13)),
        "this weekend": Span(monday + timedelta(days=5), monday + timedelta(days=6)),
        "this month": Span(today.replace(day=1), _month_end(today)),
        "next month": Span(next_month, _month_end(next_month)),
    }


def month_years(now: datetime) -> dict[str, int]:
    """Returns the year in which each month is meant: this year's, or next year's for a month that is over."""
    return {name: now.year + (number < now.month) for number, name in enumerate(MONTHS, start=1)}


def soon_words(now: datetime) -> dict[str, datetime]:
    """Returns the moment that each of "in 2 hours" and the like means."""
    return {word: now + timedelta(minutes=minutes) for word, minutes in SOON.items()}


def date_block(now: datetime) -> str:
    """Returns the table as text, a word and its meaning a line."""
    lines = [f"now {minute(now)} {WEEKDAYS[now.weekday()]}"]
    lines += [f"{word} {day}" for word, day in day_words(now).items()]
    lines += [f"{word} {span.start} to {span.end}" for word, span in span_words(now).items()]
    lines += [f"{word} {minute(moment)}" for word, moment in soon_words(now).items()]
    lines += [", ".join(f"{word} {year}" for word, year in month_years(now).items())]
    return "\n".join(lines)


def clock_block() -> str:
    """Returns the times of day as text, the same at every moment."""
    return ", ".join(f"{word} {clock}" for word, clock in CLOCK_WORDS.items())


def minute(moment: datetime) -> str:
    """Returns a moment as YYYY-MM-DDTHH:MM."""
    return moment.strftime("%Y-%m-%dT%H:%M")


def _month_end(day: date) -> date:
    return day.replace(day=calendar.monthrange(day.year, day.month)[1])
