"""The record of a run: a local journal, and what carries it to MLflow."""
