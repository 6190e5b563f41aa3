"""Checkpoint/restart of whole multi-node MPI jobs under Slurm with CRIU."""

__version__ = "0.1.0"
