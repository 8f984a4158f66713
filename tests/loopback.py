"""An HTTP(S) server on 127.0.0.1 that fails, drops, hangs and redirects on request, for the tests of downloads."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import re
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self


class Request(NamedTuple):
    """A request of a client."""

    path: str
    headers: Message


@dataclass
class _Resource:
    """See `Host.serve`."""

    data: bytes
    failures: list[int]
    drops: int
    status: int = 200
    retry_after: str | None = None
    drop_after: int | None = None
    hang_after: int | None = None
    drip: float | None = None
    ranges: bool = True
    shift: int = 0
    portion: int | None = None
    sized: bool = True
    redirect: str | None = None
    content_type: str = "application/octet-stream"
    validators: dict[str, str] = field(default_factory=dict)


class Host:
    """Serves on 127.0.0.1 while the `with` block lasts; `requests` lists the requests, in order.

    With `certificate`, a path to write to, it serves https with a self-signed certificate; clients trust it through
    that file (`REQUESTS_CA_BUNDLE`).
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.requests: list[Request] = []
        self.resources: dict[str, _Resource] = {}
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            _write_certificate(certificate)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        # With the default poll interval every shutdown would take half a second.
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def serve(
        self,
        path: str,
        data: bytes = b"",
        *,
        failures: Sequence[int] = (),
        drop_after: int | None = None,
        drops: int = 1,
        etag: str | None = None,
        last_modified: str | None = None,
        **behaviour: Any,
    ) -> str:
        """Makes `data` available at `path` and returns its URL. Serving a path again replaces its content.

        Args:
            failures: HTTP statuses of the first responses, in order; `retry_after` is their Retry-After header.
            drop_after: bytes of the body after which the connection closes, in the first `drops` responses.
            etag, last_modified: validators that If-Range is checked against.
            behaviour: `status`, `content_type`; `hang_after`: bytes after which nothing more is sent; `drip`: seconds
                between single bytes; `ranges=False` ignores Range; `shift`: bytes by which a range starts too late;
                `portion`: the largest range, bytes; `sized=False` sends no Content-Length; `redirect`: a URL.
        """
        validators = {"ETag": etag, "Last-Modified": last_modified}
        self.resources[path] = _Resource(
            data,
            failures=list(failures),
            drop_after=drop_after,
            drops=drops,
            validators={name: value for name, value in validators.items() if value},
            **behaviour,
        )
        return self.url + path


def _handler(host: Host) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            host.requests.append(Request(self.path, self.headers))
            resource = host.resources.get(self.path)
            if resource is None:
                self._respond(404, b"no such file", {})
            elif resource.failures:
                headers = {"Retry-After": resource.retry_after} if resource.retry_after else {}
                self._respond(resource.failures.pop(0), b"a failure", headers)
            elif resource.redirect:
                self._respond(302, b"", {"Location": resource.redirect})
            else:
                self._serve(resource)

        def _respond(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")
            if length is None or length >= 0:
                self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def _serve(self, resource: _Resource) -> None:
            data, status = resource.data, resource.status
            headers = {"Content-Type": resource.content_type, **resource.validators}
            requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            condition = self.headers.get("If-Range")
            if requested and resource.ranges and (condition is None or condition in resource.validators.values()):
                start = int(requested[1]) + resource.shift
                if start >= len(data):
                    self._respond(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                    return
                total, data = len(data), data[start:][: resource.portion]
                status, headers["Content-Range"] = (206, f"bytes {start}-{start + len(data) - 1}/{total}")
            stop = len(data) if resource.hang_after is None else resource.hang_after
            if resource.drop_after is not None and resource.drops > 0:
                stop, resource.drops = resource.drop_after, resource.drops - 1
            length = len(data) if resource.sized else -1
            if resource.drip is None:
                self._respond(status, data[:stop], headers, length)
            else:
                self._respond(status, b"", headers, length)
                for byte in data:
                    if host.closing.wait(resource.drip):
                        return
                    self.wfile.write(bytes([byte]))
            if resource.hang_after is not None:
                host.closing.wait()

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client closed the connection
                super().handle()

    return Handler


def _write_certificate(path: Path) -> None:
    """Writes a private key and a self-signed certificate for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
