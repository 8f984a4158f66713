"""Sweeps: a search space over the configuration, an Optuna study that survives, workers that stay warm."""
