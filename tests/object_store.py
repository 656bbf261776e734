"""An S3 server on loopback, named by the environment as a user would name one."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

SECRETS = ("testing-access-key", "testing-secret-key")
Address = tuple[str, int]


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[Address]:
    """A server with nothing but an empty bucket, for as long as the context lasts; gives host and port."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[1])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address[0]}:{address[1]}")
    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the endpoint that it first saw
    connection = http.client.HTTPConnection(*address)
    connection.request("POST", "/moto-api/reset")  # what it stores is the process's
    connection.getresponse().read()
    boto3.client("s3").create_bucket(Bucket=bucket)
    try:
        yield address
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
