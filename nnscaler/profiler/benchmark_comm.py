"""Measures how long collectives take on this machine, and copies of GPUs to their host, for the planner.

    torchrun --nnodes=1 --nproc_per_node=8 -m nnscaler.profiler.benchmark_comm

On several nodes, run it on each with the --nnodes, --node_rank, --master_addr and --master_port of a training run. It
takes about a minute. Times go to communication/<device name>.json in ~/.cache/nnscaler, or in the folder that the
environment variable NNSCALER_CACHE names, on every node; a file that is there is replaced. From then on plans for this
machine, and for its kind of device by name (train.py --hardware), use them in place of the bundled profile.

Measured are all_reduce, all_gather, reduce_scatter and all_to_all, over NCCL on GPUs and gloo on CPUs, in groups of 2,
4, 8 ... devices up to a whole node, and over the nodes where there are several. All groups of one size work at the same
time, as they do in training. A time is the median of the slowest device. The table printed last counts bytes of the
larger of one device's input and output.

Copies of a GPU to its host's memory, back, and both at once are measured while all GPUs of the node copy. Plans that
use the host's memory take these rates in place of the bundled ones.
"""

from __future__ import annotations

from nnscaler.command import ArgumentParser, run


def main() -> None:
    parser = ArgumentParser(prog="benchmark_comm", description=__doc__)
    parser.add_argument(
        "--backend", choices=("gloo", "nccl"), help="nccl times GPUs, gloo CPUs (default: nccl where there are GPUs)"
    )
    options = parser.parse_args()
    from nnscaler.profiler.collectives import measure_and_keep  # torch takes seconds: help does not wait for it

    measure_and_keep(options.backend)


if __name__ == "__main__":
    run(main)
