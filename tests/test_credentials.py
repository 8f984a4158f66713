"""Texts that name addresses: what is masked in them and what stays readable."""

from __future__ import annotations

import pytest

from src.common.credentials import masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/x failed", "https://user:***@host/x failed"),
        ("postgresql://user:p@ss:word@host:5432/db", "postgresql://user:***@host:5432/db"),
        ("https://ghp_token@host/x", "https://***@host/x"),
        ("host=x password=secret dbname=y", "host=x password=*** dbname=y"),
        ("https://host/x?sig=abc&part=2", "https://host/x?sig=***&part=2"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?X-Amz-Signature=***"),
        ("https://host/a@b and mail@host", "https://host/a@b and mail@host"),
        ("sqlite:////data/mlflow.db, key=1", "sqlite:////data/mlflow.db, key=1"),
    ],
)
def test_passwords_and_tokens_are_masked_and_the_rest_of_a_text_stays(text: str, shown: str) -> None:
    assert masked(text) == shown
