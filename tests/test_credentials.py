"""Texts that name addresses: what is masked in them and what stays readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.common.credentials import masked
from src.common.errors import ConfigError
from src.compose import compose_data
from src.configuration.composing import compose, write_resolved
from src.configuration.fingerprints import archive_fingerprint
from src.tracking.run_facts import run_parameters


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/x failed", "https://user:***@host/x failed"),
        ("postgresql://user:p@ss:word@host:5432/db", "postgresql://user:***@host:5432/db"),
        ("https://ghp_token@host/x", "https://***@host/x"),
        ("host=x password=secret dbname=y", "host=x password=*** dbname=y"),
        ("https://host/x?sig=abc&part=2", "https://host/x?sig=***&part=2"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?X-Amz-Signature=***"),
        ("postgresql://USER@HOST/DATABASE", "postgresql://USER@HOST/DATABASE"),  # a form that a message shows
        ("https://host/a@b and mail@host", "https://host/a@b and mail@host"),
        ("sqlite:////data/mlflow.db, key=1", "sqlite:////data/mlflow.db, key=1"),
    ],
)
def test_passwords_and_tokens_are_masked_and_the_rest_of_a_text_stays(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_configuration_is_recorded_without_the_credentials_of_its_archive(tmp_path: Path) -> None:
    words = ["experiment=mnist_mlp", "profile=full", "output=out"]
    config = compose([*words, 'data.archive="https://me:hunter2@host/x?sig=hunter2"'])
    write_resolved(tmp_path / "config.yaml", config.record())
    assert "me:***@host/x?sig=***" in (tmp_path / "config.yaml").read_text()
    assert "hunter2" not in (tmp_path / "config.yaml").read_text() + str(run_parameters(config))
    recorded = compose([*words, 'data.archive="https://me:***@host/x?sig=***"'])
    assert archive_fingerprint(recorded) == archive_fingerprint(config)  # so that the record finds the same data


def test_dvc_gets_no_credential_to_record() -> None:
    params = {"profile": "full", "run": {"mnist_mlp": "mnist"}, "data": {"mnist": {"archive": "https://a:b@h/x"}}}
    with pytest.raises(ConfigError, match=r"data\.mnist\.archive: .* ~/\.netrc"):
        compose_data(params, "mnist")
