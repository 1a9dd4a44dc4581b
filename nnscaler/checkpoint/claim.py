"""Which folder of checkpoints is a run's own, and how a run that torchrun restarted finds it again.

A run claims its folder when it begins: the file `claim.json` there says which torchrun started it and when. torchrun
--max-restarts starts the same command again in new processes. They recognise a claim as their own by the torchrun
agent above them (host, process id and when that started), or, where that agent is another one because the node was
replaced, by TORCHELASTIC_RESTART_COUNT > 0 and the same TORCHELASTIC_RUN_ID (torchrun --rdzv_id). They continue in that
folder from the newest checkpoint saved since the claim; before the first one, they begin as the run began.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nnscaler.checkpoint.folder import complete_checkpoints, is_checkpoint, remove_unfinished, saved_at
from nnscaler.errors import UserError

CLAIM = "claim.json"


@dataclass(frozen=True)
class Claim:
    """The run that a folder belongs to.

    agent   the torchrun process of rank 0; empty: not started by torchrun
    run_id  torchrun's name of the job
    since   seconds since the epoch
    """

    agent: str
    run_id: str
    since: float

    @staticmethod
    def now() -> Claim:
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return Claim(_agent() if run_id else "", run_id, time.time())

    @property
    def is_mine(self) -> bool:
        """Whether this process continues the run that made the claim."""
        now = Claim.now()
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        return bool(now.run_id) and (self.agent == now.agent or (restarted and self.run_id == now.run_id))


def _agent() -> str:
    """The parent process, by a name that no later process has."""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]  # see proc(5): starttime
    except OSError:
        began = ""
    return f"{socket.gethostname()}:{parent}:{began}"


def find_own(directory: Path, resume: Path | None) -> tuple[Path, float] | None:
    """The run folder that this run claimed before it was restarted, and when; None: it was not restarted.

    directory  of the runs' folders
    resume     what the run was told to continue from, in whose folder it may have gone on
    """
    folders = [path.parent for path in directory.glob(f"*/{CLAIM}")]
    if resume is not None and is_checkpoint(resume):
        folders.append(resume.resolve().parent)
    claims = [(claim.since, folder) for folder in folders if (claim := _read(folder)) is not None and claim.is_mine]
    return max(((folder, since) for since, folder in claims), key=lambda found: found[1], default=None)


def _read(folder: Path) -> Claim | None:
    try:
        return Claim(**json.loads((folder / CLAIM).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def saved_since(folder: Path, since: float) -> list[Path]:
    """A run's own checkpoints, the newest first."""
    return [path for path in reversed(complete_checkpoints(folder)) if saved_at(path) >= since]


def claim(directory: Path, name: str, loaded: Path | None, own: Path | None) -> Path:
    """Makes a folder this run's and clears what a killed run left half written there.

    directory, name  of the runs' folders, and of the run
    loaded           the checkpoint that training continues from, if it does: it goes on in the same folder
    own              the folder that the run has claimed already, before it was restarted
    Returns `own`, the folder of `loaded`, or one that holds no other run's checkpoints: `name`, or `name-2`, ...
    Raises UserError where it cannot be written.
    """
    folder = own or (loaded.parent if loaded is not None else _new_run_folder(directory, name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        if own is None:
            new = folder / f".{CLAIM}.new"
            new.write_text(json.dumps(asdict(Claim.now())))
            new.replace(folder / CLAIM)
    except OSError as error:
        raise UserError(f"cannot write checkpoints into '{folder}': {error.strerror or error}") from error
    return folder


def _new_run_folder(directory: Path, name: str) -> Path:
    candidate, count = directory / name, 1
    while complete_checkpoints(candidate):
        count += 1
        candidate = directory / f"{name}-{count}"
    return candidate
