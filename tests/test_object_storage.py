"""Datasets in a bucket: an S3 server on this machine, met as Amazon's would be."""

import concurrent.futures
import http.server
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest
from tiny_datasets import ID, append

from data import store
from data.store import storage


def ask(url, method, body=None):
    request = urllib.request.Request(url, body, {"Content-Type": "text/plain"}, method=method)
    urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture(scope="module")
def server():
    """Its URL; there is one bucket, `mine`."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        ask(f"{url}/mine", "PUT")
        yield url
    running.stop()


def rewards(dataset):
    return [float(part.read(["reward"], 3, 9, 1)["reward"][0]) for part in dataset.parts(ID)]


@pytest.mark.usefixtures("server")
def test_a_bucket_is_written_and_read_and_parts_and_groups_are_added_and_removed():
    dataset = append(append(store.create_dataset("s3://mine/a/b", {"seed": 1}), value=1), "x/other")
    append(store.open_dataset("s3://mine/a/b"), value=2)  # the same command, later
    dataset = store.open_dataset(dataset.url)
    assert dataset.ids == (ID, "x/other") and rewards(dataset) == [1, 2]
    store.verify_dataset(dataset)
    with pytest.raises(store.StoreError, match="seed was 1"):
        store.create_dataset("s3://mine/a/b", {"seed": 2})
    assert store.remove_group(dataset, ID).ids == store.open_dataset(dataset.url).ids == ("x/other",)
    assert not dataset.storage.list(f"{ID}/")


@pytest.mark.usefixtures("server")
def test_of_many_that_write_to_one_group_of_a_bucket_none_loses_a_part():
    def write(number):
        append(store.create_dataset("s3://mine/many"), steps=9, value=number)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(8)))
    dataset = store.open_dataset("s3://mine/many")
    store.verify_dataset(dataset)
    assert sorted(rewards(dataset)) == [*range(8)]


WRITER = """
import sys
import threading
sys.path.insert(0, sys.argv[1])
import tiny_datasets
dataset = tiny_datasets.store.create_dataset(sys.argv[2])
for value in range(1000):
    dataset = tiny_datasets.append(dataset, steps=9, value=value)
    print(value, flush=True)
"""


@pytest.mark.usefixtures("server")
def test_a_writer_that_is_killed_leaves_a_bucket_whole_and_another_goes_on():
    url = "s3://mine/killed"
    command = [sys.executable, "-c", WRITER, str(pathlib.Path(__file__).parent), url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = 1 + len(process.stdout.read().split())
    process.wait()
    dataset = store.open_dataset(url)
    store.verify_dataset(dataset)
    kept = len(dataset.parts(ID))
    assert said <= kept <= said + 1 and rewards(dataset) == [*range(kept)]
    dataset = append(dataset, steps=9, value=kept)
    store.verify_dataset(dataset)
    assert rewards(dataset) == [*range(kept + 1)]


@pytest.mark.usefixtures("server")
def test_a_bucket_that_is_not_there_is_said_to_be_missing():
    for use in (store.open_dataset, store.create_dataset):
        with pytest.raises(store.StoreError, match=r"s3://none/x: NOT_FOUND: NoSuchBucket.* See to the bucket's name"):
            use("s3://none/x")
    with pytest.raises(store.StoreError, match="there is no dataset at s3://mine/nothing"):
        store.open_dataset("s3://mine/nothing")
    with pytest.raises(store.StoreError, match=r"cannot open s3://Bucket_/x: Invalid S3 bucket name"):
        store.open_dataset("s3://Bucket_/x")


def test_a_bucket_without_permission_is_said_to_be_one(server):
    append(store.create_dataset("s3://mine/secret"), steps=9)
    dataset = store.open_dataset("s3://mine/secret")
    ask(f"{server}/moto-api/reset-auth", "POST", b"0")  # from now on it looks at the credentials
    try:
        for use in (
            lambda: store.open_dataset("s3://mine/secret"),
            lambda: store.create_dataset("s3://mine/new"),
            lambda: append(dataset, steps=9),
            lambda: dataset.card(ID),
        ):
            with pytest.raises(store.StoreError, match=r"PERMISSION_DENIED.*your credentials and what they") as caught:
                use()
            assert "delete the group" not in str(caught.value) and "\n" not in str(caught.value)
    finally:
        ask(f"{server}/moto-api/reset-auth", "POST", b"inf")


def test_a_bucket_that_does_not_answer_is_said_to_be_out_of_reach(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_RETRIES", 1)
    monkeypatch.setattr(storage, "ANSWERED_S", 1.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(store.StoreError, match=r"cannot reach s3://mine/a: no answer within 1 s. See to the net"):
            store.open_dataset("s3://mine/a")
    with pytest.raises(store.StoreError, match=r"cannot reach s3://mine/a: .*[Cc]onnect.*See to the network"):
        store.create_dataset("s3://mine/a")


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A server of Google's for whom nobody is allowed anything."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "you may not"}}')

    def log_message(self, *args):
        pass


def test_a_google_bucket_is_asked_by_its_own_driver_and_says_what_it_refuses(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as refusing:
        refusing.asked = []
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{refusing.server_port}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        with pytest.raises(store.StoreError, match=r"gs://mine/a: PERMISSION_DENIED: you may not.* See to the bucket"):
            store.open_dataset("gs://mine/a")
        refusing.shutdown()
    assert refusing.asked and refusing.asked[0].startswith("/storage/v1/b/mine/o/a%2Fmanifest.json")
