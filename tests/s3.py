"""An S3 endpoint on this machine: moto's server, accessed over HTTP."""

from __future__ import annotations

from typing import Any

KEYS = {
    "AWS_ACCESS_KEY_ID": "keeper",
    "AWS_SECRET_ACCESS_KEY": "s3cret-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class S3:
    """An endpoint on a free port of 127.0.0.1; a context manager that stops it and drops all buckets."""

    def __enter__(self) -> S3:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def bucket(self, name: str) -> str:
        """Creates a bucket; returns its s3:// address."""
        self._client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def keys(self, bucket: str) -> list[str]:
        """The keys in a bucket."""
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def _client(self) -> Any:
        import boto3

        keys = {name.lower(): value for name, value in KEYS.items() if name != "AWS_DEFAULT_REGION"}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name=KEYS["AWS_DEFAULT_REGION"], **keys)
