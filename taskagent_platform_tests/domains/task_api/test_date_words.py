from datetime import date, datetime

import pytest

from taskagent_platform.domains.task_api.date_words import date_block, day_words, month_years, span_words

MONDAY = datetime(2024, 1, 15, 9)


@pytest.mark.parametrize(
    ("word", "day"),
    [
        ("today", date(2024, 1, 15)),
        ("yesterday", date(2024, 1, 14)),
        ("Monday", date(2024, 1, 22)),
        ("Friday", date(2024, 1, 19)),
        ("next Friday", date(2024, 1, 26)),
        ("in a week", date(2024, 1, 22)),
        ("end of the week", date(2024, 1, 19)),
        ("end of the month", date(2024, 1, 31)),
    ],
)
def test_words_on_a_monday(word, day):
    assert day_words(MONDAY)[word] == day


def test_end_of_the_week_on_a_sunday_is_the_coming_friday():
    assert day_words(datetime(2024, 1, 21, 9))["end of the week"] == date(2024, 1, 26)


def test_spans_cross_the_year_and_know_leap_years():
    assert span_words(datetime(2024, 12, 30, 9))["this week"] == (date(2024, 12, 30), date(2025, 1, 5))
    assert span_words(datetime(2024, 1, 31, 9))["next month"] == (date(2024, 2, 1), date(2024, 2, 29))


def test_months_that_are_over_belong_to_next_year():
    years = month_years(datetime(2024, 11, 22, 9))
    assert (years["March"], years["November"], years["December"]) == (2025, 2024, 2024)


def test_the_block_has_each_word_at_the_start_of_its_line():
    lines = date_block(MONDAY).splitlines()
    assert lines[0] == "now 2024-01-15T09:00 Monday"
    assert "next Friday 01-26" in lines
    assert "this weekend 01-20 to 01-21" in lines
    assert "in 2 hours 11:00 today" in lines


def test_a_moment_after_midnight_names_its_day():
    assert "in 3 hours 01:30 tomorrow" in date_block(datetime(2024, 1, 15, 22, 30)).splitlines()


def test_what_lies_in_another_year_carries_it():
    lines = date_block(datetime(2024, 12, 30, 9)).splitlines()
    assert "tomorrow 12-31" in lines
    assert "Wednesday 2025-01-01" in lines
    assert "this week 12-30 to 2025-01-05" in lines
    assert "March 2025-03" in lines
    assert "December 12" in lines
