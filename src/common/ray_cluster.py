"""Connects to a Ray cluster, which is an optional package."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from src.common.errors import Failure

SETTINGS = {"RAY_DEDUP_LOGS": "0"}  # lines of different tasks are not repetitions
CONNECT_TIMEOUT_S = 10.0


def connect(key: str, variables: Mapping[str, str]) -> Any:
    """The module `ray`, connected to the cluster at RAY_ADDRESS; its tasks get these environment variables.

    `key` is the configuration's key that asks for a cluster, for messages.

    Raises:
        Failure: Ray is not installed, or there is no cluster.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        remedy = "pip install ray (the extra `cluster` of pyproject.toml)"
        raise Failure(f"{key} needs Ray, which is not installed: {remedy}") from None
    address = os.environ.get("RAY_ADDRESS", "auto")
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        if parts.hostname and parts.port:  # Ray itself would try for minutes
            socket.create_connection((parts.hostname, parts.port), CONNECT_TIMEOUT_S).close()
        ray.init(address=address, runtime_env={"env_vars": dict(variables)}, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise Failure(f"{key}: no Ray cluster at RAY_ADDRESS={address}: {message}") from None
    return ray
