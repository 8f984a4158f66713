"""Training: checkpoints, determinism, provenance, and what is told to MLflow."""
