"""Slurm: what a job's environment says, what Slurm says about jobs, and how helper steps are started.

The only package that talks to Slurm.
"""
