"""Imported by the server that workers are forked from: they begin with everything imported, and share its memory."""

from src.sweeping.worker import warmed

warmed()
