"""Processes, by names that no other process ever has; and what the workers of a torchrun job share over its
restarts."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_WORKER = "TORCHELASTIC_ERROR_FILE"  # each worker's own: <the job's own folder>/attempt_<n>/<local rank>/error.json


@dataclass(frozen=True)
class Process:
    """A process, on any machine and in any container.

    host       the name of its machine
    boot       names the start of the system; it is another after each restart
    namespace  in which `pid` counts: each container has its own
    started    in clock ticks since `boot`, so that a later process with an equal `pid` is another one

    `boot`, `namespace` and `started` are empty where the system does not tell.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @staticmethod
    def of(pid: int) -> Process:
        status = _status(pid)
        return Process(socket.gethostname(), *_here(), pid, status[1] if status else "")

    @property
    def lives(self) -> bool | None:
        """Whether it is there. None: it is on a machine, or in a container, that this process cannot see."""
        if not self.boot or (self.boot, self.namespace) != _here():
            return None
        status = _status(self.pid)
        return status is not None and status[0] not in "ZX" and status[1] == self.started


def _here() -> tuple[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _status(pid: int) -> tuple[str, str] | None:
    """State and start of a process (proc(5): stat); None: there is none, or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return fields[0], fields[19]


def keeper() -> Process:
    """The process that is there as long as this run: torchrun's agent, which restarts workers; or this process."""
    return Process.of(_agent() if _under_torchrun() else os.getpid())


def job() -> str | None:
    """A name that the workers of one torchrun job on this node share, before and after a restart, and no other job has.

    It is made of torchrun's agent and the folder that the agent makes for the job: one agent may run several jobs, one
    after the other. (torchrun's run id is "none" by default, and says nothing.) None: nothing would restart this
    process.
    """
    if not _under_torchrun():
        return None
    own = Path(os.environ.get(_WORKER, "")).parents
    return "/".join(map(str, vars(keeper()).values())) + (f"/{own[2].name}" if len(own) > 2 else "")


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _agent() -> int:
    """The nearest process above this one that is not a worker itself, as a script around this command would be."""
    mine = f"{_WORKER}={os.environ.get(_WORKER, '')}".encode()
    pid = os.getppid()
    while pid > 1:
        try:
            if mine not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                break
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            break
    return pid
