"""The store: checkpoints on shared storage, the user's own. Knows neither Slurm nor CRIU."""
