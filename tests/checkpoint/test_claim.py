"""A run continues only itself, and finds a folder that is nobody else's."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from nnscaler import UserError
from nnscaler.checkpoint import claim as claims
from nnscaler.checkpoint.claim import CLAIM, Claim, claim, find_own
from nnscaler.checkpoint.folder import own_checkpoints, remove_old
from nnscaler.checkpoint.owner import Process, job, keeper
from nnscaler.checkpoint.resume import where_to_begin
from tests.checkpoint.jobs import publish_one


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Makes this process a worker of a torchrun job, all of which have the run id "none"."""

    def become(log: str, attempt: int = 0) -> str:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/{log}/attempt_{attempt}/0/error.json")
        return job()

    return become


def killed(holding) -> None:
    """As SIGKILL leaves it: the claim stands, the lock is free."""
    holding._stop.set()
    os.close(holding._lock)


def of_dead_process(folder) -> None:
    present = Claim.read(folder)
    dataclasses.replace(present, keeper=dataclasses.replace(present.keeper, started="1")).write(folder)


def test_a_restart_is_known_by_its_job_and_not_by_the_run_id(tmp_path, worker):
    first = worker("none_a")
    held = claim(tmp_path, "run", None, None, [first])
    publish_one(held.folder, 1, 1.0)
    killed(held)
    assert worker("none_b") != first
    assert find_own(tmp_path, [job()]) is None
    assert worker("none_a", attempt=1) == first
    folder, since = find_own(tmp_path, [first])
    assert (folder, since) == (held.folder, held.claim.since)
    again = claim(tmp_path, "run", None, folder, [first])
    assert (again.folder, again.claim.run, again.claim.since) == (held.folder, held.claim.run, since)
    again.release()
    assert find_own(tmp_path, [first]) is not None  # one that ended well on rank 0 may be restarted too


def test_what_nothing_restarts_has_no_job(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert job() is None
    assert keeper() == Process.of(os.getpid())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/x/none_7/attempt_0/0/error.json")
    assert keeper().pid != os.getpid()
    assert job().endswith("/none_7")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert job() is not None


def test_nodes_may_be_replaced_but_not_all(tmp_path):
    killed(claim(tmp_path, "run", None, None, ["a", "b"]))
    assert find_own(tmp_path, ["b", "c"]) is not None
    assert find_own(tmp_path, ["c", "d"]) is None
    assert find_own(tmp_path, []) is None
    claim(tmp_path, "run", None, tmp_path / "run", ["b", "c"]).release()
    assert find_own(tmp_path, ["c", "d"]) is not None


def test_one_that_is_restarted_goes_on_from_what_it_saved_and_not_from_what_it_was_told_to_resume(tmp_path):
    source = publish_one(tmp_path / "elsewhere", 4, 1.0)
    assert where_to_begin(tmp_path, source, ["a"]) == ([source], None)
    held = claim(tmp_path, "run", source, None, ["a"])
    killed(held)
    assert where_to_begin(tmp_path, source, ["a"]) == ([source], held.folder), "nothing was saved yet"
    saved = publish_one(held.folder, 2**40, 1.0)  # which was saved then, in seconds since the epoch
    assert where_to_begin(tmp_path, source, ["a"]) == ([saved], held.folder)
    assert where_to_begin(tmp_path, source, ["b"]) == ([source], None)


def test_of_several_folders_of_a_job_the_last_that_it_claimed_is_its_own(tmp_path):
    for name in ("m", "a", "z", "b"):
        held = claim(tmp_path, name, None, None, ["a"])
        killed(held)
        assert find_own(tmp_path, ["a"]) == (tmp_path / name, held.claim.since)


def test_the_agent_is_found_above_a_script_and_a_nested_torchrun(tmp_path, monkeypatch):
    """Its environment is not the worker's, whatever other job's it has."""
    code = "from nnscaler.checkpoint.owner import keeper; print(keeper().pid)"
    worker = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": "/x/none_1/attempt_0/0/e.json"}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/x/none_0/attempt_0/0/error.json")
    command = ["sh", "-c", f"'{sys.executable}' -c '{code}'; true"]
    assert int(subprocess.run(command, env=worker, capture_output=True, check=True).stdout) == os.getpid()


def test_a_living_run_keeps_its_folder(tmp_path):
    first = claim(tmp_path, "run", None, None, ["a"])
    second = claim(tmp_path, "run", None, None, ["b"])
    assert (first.folder.name, second.folder.name) == ("run", "run-2")
    saved = publish_one(first.folder, 1, 1.0)
    reader = claim(tmp_path, "run", saved, None, ["c"])  # it reads from a run that goes on
    assert reader.folder.name == "run-3"
    first.release()
    assert claim(tmp_path, "run", saved, None, ["d"]).folder.name == "run"
    second.release()
    assert claim(tmp_path, "run", None, None, ["e"]).folder.name == "run-2"  # nothing was saved there


def test_a_new_run_says_which_one_it_does_not_continue(tmp_path, caplog):
    first = claim(tmp_path, "run", None, None, ["a"])
    second = claim(tmp_path, "run", None, None, ["b"])
    assert f"'{tmp_path}/run': another run's; this new run saves to '{tmp_path}/run-2'" in caplog.text
    claim(tmp_path, "run", None, None, ["x"]).release()
    assert f"'{tmp_path}/run', '{tmp_path}/run-2': another run's; this new run saves to" in caplog.text
    publish_one(first.folder, 1, 1.0)
    publish_one(first.folder, 3, 2.0)
    first.release()
    caplog.clear()
    third = claim(tmp_path, "run", None, None, ["c"], lambda name: name != "run")  # whose logs are there too
    assert f"'{tmp_path}/run' holds another run, up to step_00000003: this is a new run" in caplog.text
    assert f"saves to '{third.folder}'" in caplog.text
    assert caplog.text.rstrip().endswith(f"give --resume_path {tmp_path}/run")
    caplog.clear()
    for held in (second, third):
        held.release()
    claim(tmp_path, "other", None, None, ["d"]).release()
    assert caplog.text == ""


def test_one_killed_is_dead_though_its_process_id_is_given_again(tmp_path):
    held = claim(tmp_path, "run", None, None, ["a"])
    killed(held)
    assert claim(tmp_path, "run", None, None, ["b"]).folder.name == "run-2"  # its agent may still start it again
    of_dead_process(held.folder)
    assert claim(tmp_path, "run", None, None, ["c"]).folder == held.folder


def test_a_process_is_known_by_more_than_its_number():
    mine = Process.of(os.getpid())
    assert mine.lives is True
    assert dataclasses.replace(mine, started="1").lives is False
    assert dataclasses.replace(mine, boot="another").lives is None
    assert dataclasses.replace(mine, namespace="pid:[1]").lives is None
    child = subprocess.Popen(["true"])
    zombie = Process.of(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still in the table of processes
    assert zombie.lives is False
    child.wait()
    assert zombie.lives is False
    gone = Process.of(child.pid)
    assert (gone.pid, gone.started, gone.lives) == (child.pid, "", False), "there is none"
    assert keeper() == mine


def test_one_that_cannot_be_seen_lives_while_it_renews_its_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "LIFELESS", 60.0)  # in which it renews its claim, however busy the machine is
    monkeypatch.setattr(claims, "BEAT", 0.05)
    held = claim(tmp_path, "run", None, None, ["a"])
    elsewhere = dataclasses.replace(held.claim, keeper=dataclasses.replace(held.claim.keeper, boot="another"))
    elsewhere.write(held.folder)
    os.close(held._lock)  # as where the file system does not share it
    assert claim(tmp_path, "run", None, None, ["b"]).folder.name == "run-2"
    held._stop.set()
    held._thread.join()
    monkeypatch.setattr(claims, "LIFELESS", 0.5)
    assert claim(tmp_path, "run", None, None, ["c"]).folder.name == "run"
    with pytest.raises(UserError, match="no longer this run's"):
        held.check()


def test_a_run_that_is_continued_while_it_hangs_no_longer_owns_its_folder(tmp_path):
    held = claim(tmp_path, "run", None, None, ["a"])
    saved = publish_one(held.folder, 1, 1.0)
    killed(held)
    of_dead_process(held.folder)
    again = claim(tmp_path, "run", saved, None, ["b"])
    assert (again.folder, again.claim.run) == (held.folder, held.claim.run), "the same run, by another owner"
    assert again.is_mine
    with pytest.raises(UserError, match="no longer this run's"):
        held.check()
    again.release()


def test_only_the_run_of_the_same_name_and_folder_is_continued(tmp_path):
    """Another name or folder, or a copy of the folder, gives a new run, which only reads."""
    held = claim(tmp_path / "a", "exp", None, None, [])
    saved = publish_one(held.folder, 1, 1.0)
    held.release()
    before = {path.name for path in held.folder.rglob("*")}
    for directory, name, expected in (("a", "exp_lr", "a/exp_lr"), ("b", "exp", "b/exp")):
        other = claim(tmp_path / directory, name, saved, None, [])
        assert other.folder == tmp_path / expected
        assert other.claim.run != held.claim.run
        other.release()
    assert {path.name for path in held.folder.rglob("*")} == before
    again = claim(tmp_path / "a", "exp", held.folder / "last", None, [])
    assert (again.folder, again.claim.run) == (held.folder, held.claim.run)
    again.release()
    held.folder.rename(tmp_path / "a" / "copy")
    assert claim(tmp_path / "a", "copy", tmp_path / "a" / "copy" / saved.name, None, []).claim.run != held.claim.run


def test_a_run_whose_folder_has_a_number_is_continued_by_its_name(tmp_path):
    first, second = (claim(tmp_path, "model", None, None, [job]) for job in "ab")
    saved = publish_one(second.folder, 1, 1.0)
    second.release()
    again = claim(tmp_path, "model", saved, None, ["c"])
    assert (again.folder, again.claim.run) == (tmp_path / "model-2", second.claim.run)
    assert first.folder == tmp_path / "model"


def test_a_run_with_a_number_in_its_own_name_is_not_another_s(tmp_path):
    """Whether `model-2` is the run of this name or a second one called `model`, its checkpoints say."""
    held = claim(tmp_path, "model-2", None, None, ["a"])
    saved = publish_one(held.folder, 1, 1.0)
    state = json.loads((saved / "trainer.json").read_text())
    (saved / "trainer.json").write_text(json.dumps(state | {"model": "model-2"}))
    held.release()
    other = claim(tmp_path, "model", saved, None, ["b"])
    assert other.folder == tmp_path / "model"
    assert claim(tmp_path, "model-2", saved, None, ["c"]).claim.run == held.claim.run


def test_a_twelfth_run_of_a_name_gets_the_number_12_and_a_damaged_claim_is_no_job_s(tmp_path):
    for number in range(1, 12):
        publish_one(tmp_path / (f"run-{number}" if number > 1 else "run"), 1, 1.0)
    held = claim(tmp_path, "run", None, None, ["a"])
    assert held.folder.name == "run-12"
    (tmp_path / "run-3" / CLAIM).write_text("{")
    assert find_own(tmp_path, ["a"]) == (held.folder, held.claim.since)


def test_who_takes_a_folder_that_was_left_without_a_checkpoint_is_another_run(tmp_path):
    first = claim(tmp_path, "run", None, None, ["a"])
    first.release()
    second = claim(tmp_path, "run", None, None, ["b"])
    assert (second.folder, second.claim.run == first.claim.run) == (first.folder, False)
    assert second.claim.since >= first.claim.since
    assert second.claim.jobs == ["b"]


def test_a_folder_whose_logs_are_another_runs_is_not_taken(tmp_path):
    assert claim(tmp_path, "run", None, None, [], lambda name: name != "run").folder.name == "run-2"


def test_a_run_removes_what_it_saved_and_nothing_else(tmp_path):
    for step in range(1, 4):
        publish_one(tmp_path, step, None, owner="other")
        publish_one(tmp_path, 10 + step, None, owner="me", keep=0)
        publish_one(tmp_path, 20 + step, None, owner="me", keep=1)
        publish_one(tmp_path / "nested", step, None, owner="me", keep=1)
    remove_old(tmp_path, 1, "me")
    found = [path.name for path in own_checkpoints(tmp_path)]
    assert sorted(found) == [f"step_{step:08d}" for step in (1, 2, 3, 11, 12, 13, 23)]
    assert len(own_checkpoints(tmp_path / "nested")) == 3


def test_what_is_half_written_is_removed_by_none_but_who_takes_the_folder(tmp_path):
    held = claim(tmp_path, "run", None, None, ["a"])
    halves = [held.folder / name for name in (".step_00000002.writing", ".step_00000001.removing")]
    for half in halves:
        half.mkdir()
        (half / "trainer.json").write_text("{}")
    other = claim(tmp_path, "run", None, None, ["b"])
    assert other.folder.name == "run-2"
    assert all(half.exists() for half in halves), "it is being written"
    killed(held)
    of_dead_process(held.folder)
    again = claim(tmp_path, "run", None, None, ["c"])
    assert again.folder == held.folder
    assert not any(half.exists() for half in halves)


def test_a_claim_says_who_holds_the_folder_and_since_when(tmp_path):
    before = time.time()
    held = claim(tmp_path, "run", None, None, ["b", "a"])
    found = Claim.read(held.folder)
    assert found == held.claim
    assert (found.folder, found.jobs, found.keeper, found.released) == ("run", ["a", "b"], keeper(), False)
    assert before <= found.since <= time.time()
    held.release()
    assert Claim.read(held.folder) == dataclasses.replace(held.claim, released=True)
    assert not Claim.read(held.folder).lives(held.folder)
    assert held._lock is None
    other = claim(tmp_path, "run", None, None, ["c"])
    held.claim.write(tmp_path)
    assert Claim.read(tmp_path) is None, "of a folder of another name"
    held.release()
    assert Claim.read(other.folder).run == other.claim.run, "it is no longer its own to give free"
    assert other.is_mine


def test_a_damaged_claim_is_none(tmp_path):
    held = claim(tmp_path, "run", None, None, ["a"])
    killed(held)
    (held.folder / CLAIM).write_text('{"agent": "an older form"}')
    assert Claim.read(held.folder) is None
    assert claim(tmp_path, "run", None, None, ["b"]).folder == held.folder
