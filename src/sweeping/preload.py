"""Preloaded by the fork server of the workers: they start with all imports done, and share their memory."""

from src.sweeping.worker import load_training

load_training()
