"""Imports that cost little, and errors that say no more than a user needs."""

from __future__ import annotations

import gc
import logging
import traceback

import pytest

from nnscaler.errors import UserError, told_briefly
from nnscaler.lazy import lazily, seldom_collected, uncollected


def test_a_name_is_imported_when_it_is_asked_for():
    find = lazily("a package", {"sqrt": "math", "nothing": "math"})
    assert find("sqrt")(9.0) == 3.0
    with pytest.raises(AttributeError, match="module 'a package' has no attribute 'cosine'"):
        find("cosine")


def test_the_garbage_collector_rests_inside_and_never_looks_at_what_was_made():
    frozen = gc.get_freeze_count()
    try:
        with uncollected():
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(made)
        with pytest.raises(ZeroDivisionError), uncollected():
            raise ZeroDivisionError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_an_error_of_the_user_comes_without_the_way_through_the_package(caplog):
    def deep(error: Exception) -> None:
        raise error

    @told_briefly
    def published(value: int, *, error: Exception | None = None) -> int:
        if error is not None:
            deep(error)
        return value + 1

    assert published(1) == 2
    assert published.__name__ == "published"
    with caplog.at_level(logging.DEBUG, "nnscaler"), pytest.raises(UserError, match="bad input") as told:
        published(1, error=UserError("bad input"))
    assert "deep" not in [frame.name for frame in traceback.extract_tb(told.tb)]
    assert told.value.__cause__ is None
    (record,) = caplog.records
    assert "deep" in [frame.name for frame in traceback.extract_tb(record.exc_info[2])], "the log has the whole way"
    with pytest.raises(ValueError, match="a defect") as other:
        published(1, error=ValueError("a defect"))
    assert "deep" in [frame.name for frame in traceback.extract_tb(other.tb)]


def test_the_collector_runs_seldom_inside_and_as_before_outside():
    before = gc.get_threshold()
    with seldom_collected():
        assert gc.get_threshold()[0] == 50_000
    assert gc.get_threshold() == before
    with pytest.raises(ZeroDivisionError), seldom_collected():
        1 / 0  # noqa: B018
    assert gc.get_threshold() == before
