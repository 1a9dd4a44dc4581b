"""What a resumed run says where its learning rate is to follow another schedule."""

from __future__ import annotations

from dataclasses import asdict

from nnscaler.cli.config import LRSchedulerConfig
from nnscaler.cli.loop import SCHEDULE, changes_of_schedule


def test_only_what_differs_is_said_in_words() -> None:
    before = {"lr": 5e-5, **asdict(LRSchedulerConfig()), "steps": 10}
    assert set(before) == set(SCHEDULE)
    assert changes_of_schedule(before, before) == ""
    now = before | {"schedule": "linear", "steps": 20}
    assert changes_of_schedule(before, now) == "kind linear, which was cosine; steps in all 20, which was 10"
    assert "which was None" in changes_of_schedule({}, now)
