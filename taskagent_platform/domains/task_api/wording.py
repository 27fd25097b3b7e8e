"""What fills the slots of a request: values and the many ways people write them."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from taskagent_platform.domains.example_writer import Filled, values
from taskagent_platform.domains.phrasing import Slot
from taskagent_platform.domains.task_api.date_words import (
    CLOCK_WORDS,
    DAYS_AHEAD,
    MONTHS,
    WEEKDAYS,
    Span,
    day_words,
    minute,
    month_end,
    month_years,
    soon_words,
    span_words,
    two_digits,
    written,
    written_soon,
    written_span,
)

VALUES = Path(__file__).parent / "phrasings" / "values"
_ADJECTIVES = {
    "high": ("high-priority", "high priority", "urgent", "top priority", "top-priority", "critical", "important"),
    "medium": ("medium-priority", "medium priority", "normal priority", "normal-priority"),
    "low": ("low-priority", "low priority", "minor", "lowest priority"),
}
_SHORT_DAYS = {"Monday": "Mon", "Tuesday": "Tue", "Wednesday": "Wed", "Thursday": "Thu", "Friday": "Fri"}
_SHORT_TOMORROW = ("tmrw", "tmr", "tomorow")
_COMPOSED = 0.4
"""How many titles, things and names are put together from single words."""
_NUMBER_WORDS = dict(
    enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], start=1
    )
)
_PAST = {5: "five past", 10: "ten past", 15: "quarter past", 20: "twenty past", 25: "twenty-five past", 30: "half past"}
_TO = {35: "twenty-five to", 40: "twenty to", 45: "quarter to", 50: "ten to", 55: "five to"}
_SPOKEN_MINUTES = (0, 0, 0, 15, 15, 15, 30, 30, 30, 45, 45, 10, 20, 40, 50)
"""Minutes of the times that are written in words; most are those that people round to."""
_HOURS = {"morning": range(6, 12), "afternoon": range(12, 18), "evening": range(17, 22)}
"""Hours of each part of the day."""


def _ordinal(day: int) -> str:
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def _weekday(day: date) -> str:
    return WEEKDAYS[day.weekday()]


def _month_name(day: date) -> str:
    return MONTHS[day.month - 1]


def _on(day: str) -> str:
    """Returns the preposition that stands before a day in a sentence, if one does."""
    return "on " if day[:1].isupper() or day[:1].isdigit() or re.match(r"the \d", day) else ""


class _Day(NamedTuple):
    """A day as the user writes it, and the note that gives its date."""

    text: str
    day: date
    note: str

    def filled(self) -> Filled:
        return Filled(self.text, str(self.day), note=self.note)

    def at(self, text: str, clock: "_Clock") -> Filled:
        """Returns a moment on this day."""
        note = ", ".join(part for part in (self.note, clock.note) if part)
        return Filled(text, f"{self.day}T{clock.value}", note=note)


class _Clock(NamedTuple):
    """A time of day as the user writes it, as HH:MM, and the note that gives it."""

    text: str
    value: str
    note: str


class Wording:
    """Draws fillings for the slots of one request.

    Args:
        rng: the source of all choices.
        now: when the request is made.
    """

    def __init__(self, rng: random.Random, now: datetime) -> None:
        self.rng = rng
        self.now = now
        self._days = day_words(now)
        self._spans = span_words(now)
        self._used: set[str] = set()
        self._last_date: date | None = None
        self._levels: list[str] = []

    def fill(self, slot: Slot) -> Filled:
        """Draws a filling for a slot. Raises KeyError for a kind that nobody defined."""
        makers: dict[str, Callable[[], Filled]] = {
            "title": lambda: self._fresh("titles"),
            "noun": lambda: self._fresh("nouns"),
            "Name": self._label,
            "name": lambda: self._fresh("names"),
            "tag": lambda: self._fresh("tags"),
            "desc": lambda: self._fresh("descriptions"),
            "event": self._event,
            "id": self._task_id,
            "task": self._task,
            "proj": self._project,
            "date": lambda: self._date(slot.draw),
            "when": self._when,
            "day": self._day,
            "onday": self._on_day,
            "range": self._range,
            "month": self._month,
            "at": self._moment,
            "time": self._time,
            "priority": lambda: self._priority(slot.draw),
            "prio": lambda: self._adjective(slot.draw),
        }
        return makers[slot.kind]()

    def _fresh(self, name: str) -> Filled:
        """Draws a value that this request does not hold yet."""
        composed = {"titles": self._composed_title, "nouns": self._composed, "names": self._composed_name}
        if name in composed and self.rng.random() < _COMPOSED:
            value = composed[name]()
        else:
            drawn = self.rng.sample(values(VALUES / f"{name}.txt"), 8)
            value = self.rng.choice([v for v in drawn if v not in self._used])
        self._used.add(value)
        return Filled(value, value)

    def _composed(self) -> str:
        """Returns a thing of two words that nobody wrote down: what is new has to be copied, not remembered."""
        return f"{self._one('modifiers')} {self._one('heads')}"

    def _composed_title(self) -> str:
        article = self.rng.choice(("the ", "the ", "a ", "my ", "our ", "", ""))
        head = self._composed() if self.rng.random() < 0.6 else self._one("heads")
        if article == "a " and head[0] in "aeiou":
            article = "an "
        return f"{self._one('verbs')} {article}{head}"

    def _composed_name(self) -> str:
        return self._composed().title()

    def _one(self, name: str) -> str:
        return self.rng.choice(values(VALUES / f"{name}.txt"))

    def _label(self) -> Filled:
        if self.rng.random() < 0.6:
            return self._fresh("labels")
        title = self._fresh("titles").value
        title = title[0].upper() + title[1:] if self.rng.random() < 0.6 else title.title().replace("'S", "'s")
        return Filled(title, title)

    def _number(self) -> int:
        return self.rng.choice((self.rng.randint(1, 99), self.rng.randint(100, 999), self.rng.randint(1000, 9999)))

    def _task_id(self) -> Filled:
        number = self._number()
        kind = self.rng.random()
        if kind < 0.4:
            value = f"task_{number:03d}"
            return Filled(value, value)
        if kind < 0.92:
            wording = self.rng.choice(("task {}", "task {}", "#{}", "task #{}", "task number {}", "task no. {}"))
            return Filled(wording.format(number), str(number))
        value = self.rng.choice(("T-{}", "TASK-{}", "t{}", "OPS-{}")).format(number)
        return Filled(value, value)

    def _task(self) -> Filled:
        kind = self.rng.random()
        if kind < 0.4:
            return self._task_id()
        if kind < 0.75:
            noun = self._fresh("nouns").value
            wordings = ("the {}", "the {}", "my {}", "the {} task", "my {} task", "that {} one", "the {} item")
            return Filled(self.rng.choice(wordings).format(noun), noun)
        value = self._label().value if self.rng.random() < 0.6 else self._fresh("titles").value
        return Filled(f'"{value}"', value)

    def _event(self) -> Filled:
        """Draws an event as people name it; its value is the calendar's title."""
        title = self._fresh("events").value
        text = title if self.rng.random() < 0.5 else title.lower()
        return Filled(self.rng.choice(("{}", "{}", "the {}", "the {}", "my {}")).format(text), title)

    def _project(self) -> Filled:
        kind = self.rng.random()
        if kind < 0.45:
            value = f"proj_{self.rng.randint(1, 250):03d}"
            return Filled(value, value)
        if kind < 0.6:
            number = str(self.rng.randint(1, 250))
            return Filled(f"project {number}", number)
        name = self._fresh("names").value
        return Filled(name, name)

    def _calendar_date(self) -> _Day:
        """Draws a date written with its month or as numbers, the next such day from now on; most are soon."""
        day = self.now.date() + timedelta(days=self.rng.randint(1, 60 if self.rng.random() < 0.6 else 330))
        if self.rng.random() < 0.3 and (early := day.replace(day=self.rng.randint(1, 9))) > self.now.date():
            day = early  # the days that a date writes otherwise than people do
        # The years of the prompt's month table decide; a day of this month that is over would be disputed.
        if month_years(self.now)[_month_name(day)] != day.year:
            day = self.now.date() + timedelta(days=self.rng.randint(1, 60))
            if month_years(self.now)[_month_name(day)] != day.year:
                day = self.now.date() + timedelta(days=1)
        month = _month_name(day)
        nth = _ordinal(day.day)
        wordings = (
            f"{month} {nth}", f"{month} {nth}", f"{month} {day.day}", f"{month} {day.day}", f"{day.day} {month}",
            f"the {nth} of {month}", f"{month[:3]} {day.day}", f"{day.day} {month[:3]}", f"{month} {nth}, {day.year}",
            f"{month} the {nth}", f"{day.month}/{day.day}", f"{day.month}/{day.day}", f"{_weekday(day)}, {month} {nth}",
            f"{_weekday(day)} {month} {day.day}",
        )  # fmt: skip
        return _Day(self.rng.choice(wordings), day, f"{two_digits(day.day)}, {month} {written(day, self.now)}")

    def _day_of_month(self) -> _Day:
        """Draws "the 26th" or "Friday the 26th", the next such day."""
        day = self.now.date() + timedelta(days=self.rng.randint(1, 27))
        nth = _ordinal(day.day)
        note = f"{two_digits(day.day)}, {self._line('today')}, {nth} {written(day, self.now)}"
        return _Day(f"the {nth}" if self.rng.random() < 0.6 else f"{_weekday(day)} the {nth}", day, note)

    def _end_of_month(self) -> _Day:
        """Draws the last day of a month that is named."""
        day = self._month_ahead(120).end
        month = _month_name(day)
        text = self.rng.choice((f"the end of {month}", f"the end of {month}", f"end of {month}"))
        return _Day(text, day, f"end of {month} {written(day, self.now)}")

    def _named_day(self) -> _Day:
        """Draws a day that a single word names: today, tomorrow, a weekday, next Monday."""
        kind = self.rng.random()
        if kind < 0.14:
            return self._word("today")
        if kind < 0.36:
            return self._word("tomorrow", self._tomorrow())
        if kind < 0.42:
            return self._word("day after tomorrow", "the day after tomorrow")
        weekday = self.rng.choice(WEEKDAYS)
        if kind < 0.62:
            return self._word(f"next {weekday}")
        written = weekday
        if self.rng.random() < 0.12:
            written = _SHORT_DAYS.get(weekday, weekday[:3])
        elif self.rng.random() < 0.12:
            written = f"this {weekday}"
        elif self.rng.random() < 0.06:
            written = f"this coming {weekday}"
        return self._word(weekday, written)

    def _word(self, word: str, text: str | None = None) -> _Day:
        """Returns a day of the prompt's table, written as the table does or otherwise."""
        return _Day(text or word, self._days[word], self._line(word))

    def _line(self, word: str) -> str:
        """Returns the prompt's line for a day."""
        return f"{word} {written(self._days[word], self.now)}"

    def _tomorrow(self) -> str:
        return self.rng.choice(_SHORT_TOMORROW) if self.rng.random() < 0.1 else "tomorrow"

    def _date(self, draw: str) -> Filled:
        """Draws a day as a noun; a second draw in one request lies after the first."""
        for _ in range(50):
            found = self._any_date()
            if not draw[-1:].isdigit() or self._last_date is None or found.day > self._last_date:
                break
        else:
            found = self._iso((self._last_date or self.now.date()) + timedelta(days=self.rng.randint(1, 9)))
        self._last_date = found.day
        return found.filled()

    def _iso(self, day: date) -> _Day:
        return _Day(str(day), day, "")

    def _any_date(self) -> _Day:
        kind = self.rng.random()
        if kind < 0.52:
            return self._named_day()
        if kind < 0.74:
            return self._calendar_date()
        if kind < 0.84:
            return self._iso(self.now.date() + timedelta(days=self.rng.randint(0, 400)))
        if kind < 0.88:
            return self._day_of_month()
        if kind < 0.9:
            return self._end_of_month()
        if kind < 0.94:
            words = ("end of the week", "the end of the week", "end of week", "the end of this week")
            return self._word("end of the week", self.rng.choice(words))
        if kind < 0.97:
            ends = ("end of the month", "the end of the month", "month end", "the end of this month")
            return self._word("end of the month", self.rng.choice(ends))
        word = self.rng.choice(("next week", "next month"))
        return _Day(word, self._spans[word].start, self._span_note(word))

    def _span_note(self, word: str) -> str:
        return f"{word} {written_span(self._spans[word], self.now)}"

    def _ahead(self) -> _Day:
        """Draws "in 3 days" and its like."""
        kind = self.rng.random()
        if kind < 0.55:
            days = self.rng.choice(DAYS_AHEAD)
            number = str(days) if self.rng.random() < 0.65 else _NUMBER_WORDS[days]
            text = f"in {number} days" if self.rng.random() < 0.75 else f"{number} days from now"
            return self._word(f"in {days} days", text)
        if kind < 0.8:
            one = ("in a week", "in one week", "a week from today", "a week from now", "in 1 week", "in 7 days")
            return self._word("in a week", self.rng.choice(one))
        if kind < 0.92:
            two = ("in two weeks", "in 2 weeks", "two weeks from now", "in a fortnight", "in 14 days")
            return self._word("in two weeks", self.rng.choice(two))
        three = ("in three weeks", "in 3 weeks", "three weeks from now", "in 21 days")
        return self._word("in three weeks", self.rng.choice(three))

    def _when(self) -> Filled:
        if self.rng.random() < 0.3:
            return self._ahead().filled()
        noun = self._date("")
        before = self.rng.choice(("by", "by", "due", "for", "before", "no later than", "due by", "due on"))
        if before == "due on" and not noun.text[:1].isupper():
            before = "due"
        return replace(noun, text=f"{before} {noun.text}")

    def _day(self) -> Filled:
        return self._single_day().filled()

    def _single_day(self) -> _Day:
        kind = self.rng.random()
        if kind < 0.68:
            return self._named_day()
        return self._calendar_date() if kind < 0.92 else self._day_of_month()

    def _on_day(self) -> Filled:
        kind = self.rng.random()
        if kind < 0.12:
            return self._ahead().filled()
        found = self._single_day()
        return replace(found.filled(), text=_on(found.text) + found.text)

    def _range(self) -> Filled:
        word = self.rng.choice(("this week", "this week", "next week", "next week", "this weekend", "this month",
                                "next month"))  # fmt: skip
        span = self._spans[word]
        parts = {"start": str(span.start), "end": str(span.end)}
        text = self.rng.choice(("the weekend", word)) if word == "this weekend" else word
        return Filled(text, parts["start"], parts, self._span_note(word))

    def _month(self) -> Filled:
        """Draws a whole month by its name, this one or one of the next."""
        span = self._month_ahead(150)
        month = _month_name(span.start)
        parts = {"start": str(span.start), "end": str(span.end)}
        return Filled(month, parts["start"], parts, f"{month} {written_span(span, self.now)}")

    def _month_ahead(self, days: int) -> Span:
        """Draws the month of a day at most so many days ahead."""
        day = self.now.date() + timedelta(days=self.rng.randint(0, days))
        return Span(day.replace(day=1), month_end(day))

    def _clock(self) -> _Clock:
        """Draws a clock time."""
        kind = self.rng.random()
        if kind < 0.08:
            return self._clock_word("noon", "noon" if kind < 0.06 else "midday")
        if kind < 0.28:
            part = self.rng.choice(tuple(_HOURS))
            spoken = self._spoken(_HOURS[part])
            return spoken._replace(text=f"{spoken.text} in the {part}")
        hour = self.rng.choice((*range(6, 23), 8, 9, 9, 10, 14, 15, 16, 17, 18))
        minutes = self.rng.choice((0, 0, 0, 30, 30, 15, 45, self.rng.randrange(5, 60, 5)))
        value = f"{hour:02d}:{minutes:02d}"
        if kind < 0.48:
            return _Clock(value if self.rng.random() < 0.5 else value.removeprefix("0"), value, "")
        half = "am" if hour < 12 else "pm"
        number = str((hour - 1) % 12 + 1) + (f":{minutes:02d}" if minutes else "")
        written = self.rng.choice((half, half, f" {half}", f" {half.upper()}", half.upper(), f" {half[0]}.m."))
        return _Clock(number + written, value, f"{number}{half} {value}")

    def _spoken(self, hours: Sequence[int]) -> _Clock:
        """Draws a time as people say it, "half past nine", its half of the day left out; the note has it in digits."""
        hour, minutes = self.rng.choice(hours), self.rng.choice(_SPOKEN_MINUTES)
        shown = hour + (minutes > 30)
        number = (shown - 1) % 12 + 1
        name = _NUMBER_WORDS[number] if self.rng.random() < 0.7 else str(number)
        before = (_PAST | _TO).get(minutes)
        if minutes == 30 and self.rng.random() < 0.2:
            before = "half"
        article = "a " if minutes in (15, 45) and self.rng.random() < 0.25 else ""
        text = f"{article}{before} {name}" if before else name
        digits = str((hour - 1) % 12 + 1) + (f":{minutes:02d}" if minutes else "")
        value = f"{hour:02d}:{minutes:02d}"
        return _Clock(text, value, f"{digits}{'am' if hour < 12 else 'pm'} {value}")

    def _clock_word(self, word: str, text: str) -> _Clock:
        """Returns a time of the prompt's table, written as the table does or otherwise."""
        value = f"{CLOCK_WORDS[word]}:00"
        return _Clock(text, value, f"{word} {value}")

    def _time(self) -> Filled:
        clock = self._clock()
        return Filled(clock.text, clock.value, note=clock.note)

    def _soon(self) -> Filled:
        """Draws a moment a while from now."""
        word, moment = self.rng.choice(tuple(soon_words(self.now).items()))
        others = {
            "in an hour": ("in one hour", "in 1 hour", "an hour from now"),
            "in 30 minutes": ("in half an hour", "in 30 min", "in 30 mins"),
            "in 2 hours": ("in two hours", "two hours from now"),
            "in 3 hours": ("in three hours", "3 hours from now"),
            "in 15 minutes": ("in a quarter of an hour", "in 15 min", "in fifteen minutes"),
            "in 10 minutes": ("in ten minutes", "in 10 min", "10 minutes from now"),
            "in 20 minutes": ("in twenty minutes", "in 20 min", "in 20 mins"),
        }
        text = self.rng.choice((word, word, *others.get(word, ())))
        # The line ends in the word for the day, whose own line gives the date.
        clock, day = written_soon(moment, self.now).split()
        return Filled(text, minute(moment), note=f"{word} {clock} {self._line(day)}")

    def _moment(self) -> Filled:
        """Draws a moment as a whole adverbial."""
        kind = self.rng.random()
        today = self._word("today")
        if kind < 0.13:
            return self._soon()
        if kind < 0.27:
            clock = self._clock()
            return today.at(f"at {clock.text}", clock)
        if kind < 0.31:
            return today.at("tonight", self._clock_word("tonight", "tonight"))
        if kind < 0.34:
            return today.at("at the end of the day", self._clock_word("end of day", "end of day"))
        if kind < 0.43:
            part = self.rng.choice(("morning", "afternoon", "evening"))
            clock = self._clock_word(part, part)
            found = self._named_day()
            return found.at(self._day_part(found, part), clock)
        if kind < 0.56:
            return self._moment_of_part()
        found = self._single_day()
        if kind > 0.95:
            found = self._iso(self.now.date() + timedelta(days=self.rng.randint(1, 300)))
        elif kind > 0.91:
            found = self._ahead()
        clock = self._clock()
        said, word = clock.text, found.text
        on = _on(word)
        texts = [f"{on}{word} at {said}", f"{on}{word} at {said}", f"at {said} {on}{word}"]
        # Digits after digits are told apart where both have their signs: 2024-01-18 16:00.
        apart = not word[-1:].isdigit() or ("-" in word and ":" in said)
        texts.append(f"{word} {said}" if said[:1].isdigit() and apart else texts[0])
        return found.at(self.rng.choice(texts), clock)

    def _moment_of_part(self) -> Filled:
        """Draws a part of a day and a time in it, such as "tomorrow morning at half past nine"."""
        part = self.rng.choice(tuple(_HOURS))
        clock = self._spoken(_HOURS[part])
        found = self._named_day()
        word = self._day_part(found, part)
        if word == "this evening" and self.rng.random() < 0.5:
            word = "tonight"
        return found.at(f"{word} at {clock.text}" if self.rng.random() < 0.6 else f"at {clock.text} {word}", clock)

    def _day_part(self, day: _Day, part: str) -> str:
        """Returns a part of a day as an adverbial: "this morning", "on Friday evening"."""
        if day.text == "today":
            return f"this {part}"
        if day.text.startswith("the day"):
            return f"{day.text} in the {part}"
        return f"{_on(day.text) if self.rng.random() < 0.7 else ''}{day.text} {part}"

    def _priority(self, draw: str) -> Filled:
        value = self._level(draw)
        return Filled(value, value)

    def _adjective(self, draw: str) -> Filled:
        value = self._level(draw)
        return Filled(self.rng.choice(_ADJECTIVES[value]), value)

    def _level(self, draw: str) -> str:
        """Draws a priority; a second draw in one request is another one."""
        levels: tuple[str, ...] = ("high", "high", "medium", "low")
        if draw[-1:].isdigit():
            levels = tuple(level for level in levels if level not in self._levels) or levels
        self._levels.append(self.rng.choice(levels))
        return self._levels[-1]
