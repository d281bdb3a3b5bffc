"""An archive comes whole or not at all, from a server that does what servers do."""

import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sinkformer_pl.data.archives import obtain
from sinkformer_pl.errors import UserError

CONTENT = b"what was published" * 1000
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.end_headers()
            return
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        sent = {"/whole": CONTENT, "/cut": CONTENT[:5000], "/other": CONTENT[::-1]}[self.path]
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["whole", "moved"])
def test_a_download_is_verified(tmp_path, server, path):
    found = obtain(f"{server}/{path}", CHECKSUM, tmp_path / "a.zip", tmp_path)
    assert found.read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["cut", "other"])
def test_a_download_that_was_cut_off_or_exchanged_is_refused(tmp_path, server, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"{server}/{path}: its SHA256 is .*; try again, or put it there as .*a.zip"):
        obtain(f"{server}/{path}", CHECKSUM, tmp_path / "a.zip", tmp_path / "folder")
    assert not (tmp_path / "a.zip").exists()


def test_an_answer_of_not_found_is_an_error(tmp_path, server):
    with pytest.raises(OSError, match="404"):
        obtain(f"{server}/absent", CHECKSUM, tmp_path / "a.zip", tmp_path)


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    with pytest.raises(UserError, match=r"a\.zip: not a regular file"):
        obtain("http://127.0.0.1:9/a.zip", CHECKSUM, tmp_path / "a.zip", tmp_path)


def test_what_lies_ready_is_verified_without_a_network(tmp_path):
    (tmp_path / "a.zip").write_bytes(CONTENT)
    assert obtain("http://127.0.0.1:9/a.zip", CHECKSUM, tmp_path / "a.zip", tmp_path) == tmp_path / "a.zip"
    (tmp_path / "a.zip").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"a\.zip: its SHA256 is .*: damaged or incomplete; put http"):
        obtain("http://127.0.0.1:9/a.zip", CHECKSUM, tmp_path / "a.zip", tmp_path)
