"""Which run owns a folder of checkpoints.

A run has a folder, and is alive or dead. It writes `claim.json` there, and holds a lock (`.claim.lock`) as long as it
runs.

A run is alive while its lock is held, or while the process is there that would start it again (torchrun's agent;
without torchrun, the run itself). A process on another machine, or in another container, cannot be seen. Then the run
is alive if its claim is younger than LIFELESS seconds by the file system's clock: a run renews its claim every BEAT
seconds. So a run that has died in any way, even with its machine, is recognised as dead.

A run continues only itself:

* When torchrun restarts it, it continues in the folder whose claim names its own job. A job has a name on each of its
  nodes (see `nnscaler.checkpoint.owner.job`). One name in common is enough, so that nodes may be replaced.
* When it is told to resume from a checkpoint in the folder of its own name, it continues in that folder, unless another
  run there is alive.
* Otherwise it is a new run. It takes a folder `name`, or `name-2`, ..., that has no checkpoints, no other run's logs,
  and no run that is alive. From elsewhere it only reads.

It removes only checkpoints that it saved itself (`nnscaler.checkpoint.folder.remove_old`), and saves nothing more once
its folder has become another run's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nnscaler.checkpoint.folder import is_checkpoint, own_checkpoints, remove_unfinished, run_name, saved_at
from nnscaler.checkpoint.owner import Process, keeper
from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

CLAIM, _LOCK = "claim.json", ".claim.lock"
BEAT, LIFELESS = 5.0, 30.0  # seconds
_PREDECESSOR = 60.0  # seconds that processes of this run, which torchrun has ended, may take to let go


@dataclass(frozen=True)
class Claim:
    """What `claim.json` says.

    run       a name that no other run has; it is kept when the run is continued
    folder    the name of the folder; a copy of the folder has another name, and is not this run
    jobs      names of the job that runs it, on each node (see `nnscaler.checkpoint.owner.job`)
    keeper    the process that is there as long as the run
    since     when it was claimed, in seconds since the epoch
    released  whether the run has ended
    """

    run: str
    folder: str
    jobs: list[str]
    keeper: Process
    since: float
    released: bool = False

    @staticmethod
    def read(folder: Path) -> Claim | None:
        """The claim of a folder. None where there is none, or it is a copy of another folder's."""
        try:
            fields = json.loads((folder / CLAIM).read_text())
            claim = Claim(**{**fields, "keeper": Process(**fields["keeper"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return claim if claim.folder == folder.resolve().name else None

    def write(self, folder: Path) -> None:
        new = folder / f".{CLAIM}.new"
        new.write_text(json.dumps(asdict(self), indent=1))
        new.replace(folder / CLAIM)

    def is_of(self, jobs: Collection[str]) -> bool:
        return not set(jobs).isdisjoint(self.jobs)

    def lives(self, folder: Path) -> bool:
        """Whether the run is alive, apart from what its lock says. This may take LIFELESS seconds."""
        if self.released:
            return False
        seen = self.keeper.lives
        return _is_renewed(folder) if seen is None else seen


def _is_renewed(folder: Path) -> bool:
    """Whether the claim is renewed: it is younger than LIFELESS seconds, and gets younger while one looks."""
    first = (folder / CLAIM).stat().st_mtime
    while (age := _now(folder) - (folder / CLAIM).stat().st_mtime) < LIFELESS:
        if (folder / CLAIM).stat().st_mtime != first:
            return True
        time.sleep(min(1.0, LIFELESS - age + 0.01))
    return False


def _now(folder: Path) -> float:
    """The time, by the clock that the file system gives files their times with."""
    probe = folder / ".claim.now"
    probe.write_bytes(b"")
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now


class Holding:
    """A folder that this process has claimed for its run, until `release`. Only rank 0 has one."""

    def __init__(self, folder: Path, claim: Claim, lock: int | None) -> None:
        self.folder, self.claim, self._lock = folder, claim, lock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="claim")
        self._thread.start()

    def _renew(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                os.utime(self.folder / CLAIM)
            except OSError:
                continue  # a disk in trouble may recover

    @property
    def is_mine(self) -> bool:
        """Whether no other run has taken the folder since, because it held this run for dead."""
        now = Claim.read(self.folder)
        return now is not None and (now.run, now.since) == (self.claim.run, self.claim.since)

    def check(self) -> None:
        """Raises UserError where the folder has become another run's."""
        if not self.is_mine:
            raise UserError(f"'{self.folder}' is no longer this run's: another one has claimed it")

    def release(self) -> None:
        """Gives the folder free. To be called when the run ends, in whatever way."""
        self._stop.set()
        self._thread.join()
        try:
            if self.is_mine:
                replace(self.claim, released=True).write(self.folder)
        except OSError as error:
            logger.warning("cannot write '%s': %s", self.folder / CLAIM, error.strerror or error)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def find_own(directory: Path, jobs: Collection[str]) -> tuple[Path, float] | None:
    """(the folder that this job claimed before torchrun restarted it, when it did). None: it was not restarted."""
    claims = [(path.parent, Claim.read(path.parent)) for path in directory.glob(f"*/{CLAIM}")]
    own = [(folder, claim.since) for folder, claim in claims if claim is not None and claim.is_of(jobs)]
    return max(own, key=lambda found: found[1], default=None)


def saved_since(folder: Path, since: float) -> list[Path]:
    """The checkpoints that a run saved since then, the newest first."""
    return [path for path in reversed(own_checkpoints(folder)) if saved_at(path) >= since]


def claim(
    directory: Path, name: str, loaded: Path | None, own: Path | None, jobs: Collection[str],
    is_free: Callable[[str], bool] = lambda folder_name: True,
) -> Holding:  # fmt: skip
    """Claims a folder for this run, by the rule above, and removes what a killed run left half written there.

    directory  in which runs have their folders
    name       of the run
    loaded     the checkpoint that training continues from; None: it begins anew
    own        the folder that the run claimed before it was restarted; None: it was not
    jobs       names of this run's job, on each node
    is_free    whether no other run has logs under a folder's name
    Raises UserError where the folder cannot be written.
    """
    if own is not None:
        return _take_own(own, jobs)
    if loaded is not None and _is_run_of(loaded.resolve(), directory, name):
        holding = _take(loaded.resolve().parent, jobs, lambda folder: True)
        if holding is not None:
            return holding
        logger.warning("'%s' is a run that goes on elsewhere: this is a new run", loaded.resolve().parent)
    passed: list[Path] = []
    for folder in _candidates(directory, name):
        is_new = is_free(folder.name)
        holding = _take(folder, jobs, lambda folder: not own_checkpoints(folder)) if is_new else None
        if holding is not None:
            if passed:
                logger.warning("%s", _why_not(passed, folder))
            return holding
        passed.append(folder)
    raise AssertionError("there is always another number")


def _why_not(passed: list[Path], taken: Path) -> str:
    """What people are told of a new run that did not get the folders `passed`, but `taken`."""
    saved = [folder for folder in passed if own_checkpoints(folder)]
    if not saved:
        folders = ", ".join(f"'{folder}'" for folder in passed)
        return f"{folders}: another run's; this new run saves to '{taken}'"
    last = own_checkpoints(saved[-1])[-1].name
    return (
        f"'{saved[-1]}' holds another run, up to {last}: this is a new run, which saves to '{taken}'; to continue that "
        f"one, when it has ended, give --resume_path {saved[-1]}"
    )


def _is_run_of(checkpoint: Path, directory: Path, name: str) -> bool:
    """Whether a checkpoint was saved by the run `name` in `directory`, whose folder may have a number at its end."""
    folder = checkpoint.parent
    return (
        is_checkpoint(checkpoint)
        and folder.parent == directory.resolve()
        and name in (folder.name, run_name(checkpoint))
    )


def _candidates(directory: Path, name: str) -> Iterator[Path]:
    count = 1
    while True:
        yield directory / (f"{name}-{count}" if count > 1 else name)
        count += 1


def _take_own(folder: Path, jobs: Collection[str]) -> Holding:
    deadline = time.monotonic() + _PREDECESSOR
    while (holding := _take(folder, jobs, lambda folder: True)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"processes of this run, before torchrun restarted it, still write into '{folder}'")
        time.sleep(0.5)
    return holding


def _take(folder: Path, jobs: Collection[str], may: Callable[[Path], bool]) -> Holding | None:
    """Claims a folder. None where another run there is alive, or `may` says no to the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / _LOCK)
        if lock is None:
            return None
        try:
            present = _claimable(folder, jobs) if may(folder) else None
            if present is not None:
                now = Claim(present.run, folder.resolve().name, sorted(jobs), keeper(), present.since)
                now.write(folder)
                remove_unfinished(folder)
                return Holding(folder, now, lock)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None
    except OSError as error:
        raise UserError(f"cannot write checkpoints into '{folder}': {error.strerror or error}") from error


def _lock(path: Path) -> int | None:
    """A handle that holds the lock of a file, where the file system has locks. None where another process holds it."""
    for mode in (os.O_RDONLY, os.O_RDWR):  # NFS locks only what is open for writing, which keeps a disk from unmounting
        lock = os.open(path, mode | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                return lock  # there are no locks: the claim alone has to tell
            os.close(lock)
            if isinstance(error, BlockingIOError):
                return None
            if error.errno != errno.EBADF or mode == os.O_RDWR:
                raise
    raise AssertionError("the last mode returns or raises")


def _claimable(folder: Path, jobs: Collection[str]) -> Claim | None:
    """The claim to continue with: the folder is this job's, or its run is dead. None where another run is alive."""
    there = Claim.read(folder)
    if there is not None and there.is_of(jobs):
        return there
    if there is not None and there.lives(folder):
        return None
    continued = there.run if there is not None and own_checkpoints(folder) else str(uuid.uuid4())
    return Claim(continued, "", [], keeper(), time.time())
