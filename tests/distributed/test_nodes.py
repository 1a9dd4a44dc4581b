"""Two torchrun agents with separate working directories, as two nodes that share nothing but `checkpoint_dir`."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from nnscaler import UserError
from nnscaler import watch as signs
from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.stored import Checkpoint
from nnscaler.processes import join_processes
from tests import tiny
from tests.launch import free_port, run

ROOT = Path(__file__).parents[2]


def agent(node: int, port: int, folder: Path, *flags: str) -> subprocess.Popen:
    (folder / f"node{node}").mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return subprocess.Popen(
        [*launch, str(ROOT / "train.py"), *flags], cwd=folder / f"node{node}", text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_what_one_node_compiles_every_node_runs(tmp_path):
    tiny.write_dataset(tmp_path / "data")
    tiny.write_hardware(tmp_path)
    tiny.write_model(tmp_path / "model")
    port = free_port()
    flags = ["--model_id", str(tmp_path / "model"), "--dataset_path", str(tmp_path / "data"), "--plan_ngpus", "2"]
    flags += ["--hardware", str(tmp_path / "hardware.json"), "--max_train_steps", "3", "--precision", "fp32"]
    flags += ["--checkpoint_dir", str(tmp_path / "checkpoints"), "--learning_rate", "1e-3"]
    flags += ["--explore_pipeline", "--pipeline_pivots", "LlamaDecoderLayer", "--pipeline_nstages", "2"]
    agents = [agent(node, port, tmp_path, *flags) for node in range(2)]
    outputs = []
    try:
        outputs = [node.communicate()[0] for node in agents]
    finally:
        for node in agents:
            node.kill()
    assert [node.returncode for node in agents] == [0, 0], "\n".join(outputs)
    code = [tmp_path / f"node{node}" / ".nnscaler" / "llama" for node in range(2)]
    compiled, taken = ({path.name: path.read_bytes() for path in node.iterdir() if path.is_file()} for node in code)
    assert {"gencode_stage0.py", "gencode_stage1.py", "plan.json"} <= set(compiled)
    assert taken == compiled
    checkpoint = Checkpoint.open(latest_checkpoint(tmp_path / "checkpoints"))
    assert checkpoint.state.step == 3
    for name, shape in checkpoint.shapes().items():
        assert torch.isfinite(checkpoint.read(name, shape)).all()


def come_alone() -> str:
    if os.environ["RANK"] != "0":
        return ""
    meet = dist.rendezvous  # which takes its time, where the machine is busy
    patient = patch.object(dist, "rendezvous", lambda url, timeout: meet(url, timeout=timedelta(minutes=5)))
    with patient, pytest.raises(UserError) as error:
        join_processes(torch.device("cpu"), timedelta(seconds=2))
    return str(error.value)


def test_a_rank_that_does_not_come_is_named():
    line = run(3, come_alone, init=False)[0]
    assert line.startswith("rank 1, 2 of 3 did not start within 2 s")


class Signs:
    """In the place of an event: some beats are over when ranks 0 and 1 have given signs of life."""

    def __init__(self, watch: signs.Watch) -> None:
        self._watch = watch

    def wait(self, seconds: float) -> bool:
        before = now = self._watch._read("beat")
        while seconds > signs._BEAT and any(now.get(rank) == before.get(rank) for rank in (0, 1)):
            time.sleep(0.01)
            now = self._watch._read("beat")
        time.sleep(seconds)
        return False


def fall_silent() -> list[str]:
    """Rank 2 stops after step 4, and rank 1 stays a step behind; says what rank 0 logs of it."""
    rank, lines = int(os.environ["RANK"]), []
    signs._BEAT = 0.1
    watch = join_processes(torch.device("cpu"))
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("nnscaler.watch").addHandler(handler)
    watch.reached(4 if rank else 5)
    dist.barrier()
    if rank == 2:
        watch.close()
    dist.barrier()
    if rank == 0:
        watch._stop = Signs(watch)
        watch.explain()
    dist.barrier()
    return lines


def test_a_rank_that_falls_silent_is_named():
    host = socket.gethostname()
    assert run(3, fall_silent, init=False)[0] == [
        f"after step 5: rank 2 on {host} gives no sign of life; its last step was 4",
        f"after step 5: rank 1 on {host} is behind; its last step was 4",
    ]
