"""What the words for days and moments mean, as a table that the prompt carries and the examples use.

The model copies dates from the prompt instead of computing them, so each line starts with the user's own word. Every
token of the table is paid for in each training step and each request: a date of this year is written without it.
A week runs from Monday to Sunday.
"""

import calendar
from datetime import date, datetime, timedelta
from typing import NamedTuple

WEEKDAYS = tuple(calendar.day_name)
MONTHS = tuple(calendar.month_name)[1:]
DAYS_AHEAD = (2, 3, 4, 5, 6, 10)
WEEKS_AHEAD = {"in a week": 1, "in two weeks": 2, "in three weeks": 3}
SOON = {
    "in 10 minutes": 10,
    "in 15 minutes": 15,
    "in 20 minutes": 20,
    "in 30 minutes": 30,
    "in 45 minutes": 45,
    "in an hour": 60,
    "in 2 hours": 120,
    "in 3 hours": 180,
}
"""Moments relative to now, in minutes."""

CLOCK_WORDS = {
    "noon": "12",
    "midnight": "00",
    "morning": "09",
    "afternoon": "14",
    "evening": "18",
    "tonight": "20",
    "end of day": "17",
    **{f"{hour}pm": f"{hour + 12}" for hour in range(1, 12)},
}
"""The full hour that each word for a time of day means; a time in the morning is written as it is said.

The hours of the afternoon look superfluous, and are not: a small model trained without them in its prompt takes 4pm for
18:00, whatever the examples say.
"""


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
    for word, weeks in WEEKS_AHEAD.items():
        words[word] = today + timedelta(weeks=weeks)
    words["end of the week"] = friday
    words["end of the month"] = month_end(today)
    return words


def span_words(now: datetime) -> dict[str, Span]:
    """Returns the span of days that each word means at ``now``, in the order of the prompt."""
    today = now.date()
    monday = today - timedelta(days=today.weekday())
    next_month = month_end(today) + timedelta(days=1)
    return {
        "this week": Span(monday, monday + timedelta(days=6)),
        "next week": Span(monday + timedelta(days=7), monday + timedelta(days=13)),
        "this weekend": Span(monday + timedelta(days=5), monday + timedelta(days=6)),
        "this month": Span(today.replace(day=1), month_end(today)),
        "next month": Span(next_month, month_end(next_month)),
    }


def month_years(now: datetime) -> dict[str, int]:
    """Returns the year in which each month is meant: this year's, or next year's for a month that is over."""
    return {name: now.year + (number < now.month) for number, name in enumerate(MONTHS, start=1)}


def month_words(now: datetime) -> dict[str, str]:
    """Returns how a date of each month begins as the table writes it: MM, or YYYY-MM where it is not this year."""
    years = month_years(now)
    return {
        name: f"{number:02d}" if years[name] == now.year else f"{years[name]}-{number:02d}"
        for number, name in enumerate(MONTHS, start=1)
    }


def soon_words(now: datetime) -> dict[str, datetime]:
    """Returns the moment that each of "in 2 hours" and the like means."""
    return {word: now + timedelta(minutes=minutes) for word, minutes in SOON.items()}


def written(day: date, now: datetime) -> str:
    """Returns a day as the table writes it: MM-DD, with its year before it where that is not this year."""
    return day.strftime("%m-%d") if day.year == now.year else str(day)


def written_span(span: Span, now: datetime) -> str:
    """Returns a span of days as the table writes it."""
    return f"{written(span.start, now)} to {written(span.end, now)}"


def written_soon(moment: datetime, now: datetime) -> str:
    """Returns a moment of the next hours as the table writes it: the time, and the word for its day."""
    return f"{moment:%H:%M} {'today' if moment.date() == now.date() else 'tomorrow'}"


def date_block(now: datetime) -> str:
    """Returns the table as text, a word and its meaning a line."""
    lines = [f"now {minute(now)} {WEEKDAYS[now.weekday()]}"]
    lines += [f"{word} {written(day, now)}" for word, day in day_words(now).items()]
    lines += [f"{word} {written_span(span, now)}" for word, span in span_words(now).items()]
    lines += [f"{word} {written_soon(moment, now)}" for word, moment in soon_words(now).items()]
    lines += [f"{word} {begin}" for word, begin in month_words(now).items()]
    return "\n".join(lines)


def fixed_block() -> str:
    """Returns what is the same at every moment: the hours that words mean."""
    return "hours: " + ", ".join(f"{word} {hour}" for word, hour in CLOCK_WORDS.items())


def two_digits(day: int) -> str:
    """Returns a day of the month as people and as dates write it.

    It is noted before the date: right behind the month, a small model goes on with the digit that the user wrote, and
    the 3rd becomes the 30th.
    """
    return f"{day} {day:02d}"


def minute(moment: datetime) -> str:
    """Returns a moment as YYYY-MM-DDTHH:MM."""
    return moment.strftime("%Y-%m-%dT%H:%M")


def month_end(day: date) -> date:
    """Returns the last day of the month."""
    return day.replace(day=calendar.monthrange(day.year, day.month)[1])
