import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from lightning_fedsparse.datasets.download import DownloadError, RemoteFile, data_root, fetch

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """A local HTTP server; ``files`` is what it has, ``cut`` after how many bytes it hangs up, ``ranges`` whether it
    honours ranges; ``asked`` notes path and Range of each request."""

    def __init__(self):
        self.files = {"/good": CONTENT}
        self.cut = None
        self.ranges = True
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def url(self, path):
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def answer(self, request):
        asked = request.headers.get("Range")
        self.asked.append((request.path, asked))
        content = self.files.get(request.path)
        if content is None:
            request.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start and start >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        request.wfile.write(content[start:][: self.cut])

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.stop()


def remote(server, *paths, **arguments):
    return RemoteFile("file.bin", tuple(server.url(path) for path in paths), **{"digest": SHA256, **arguments})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_downloads_once(server, tmp_path):
    folder = tmp_path / "new" / "folder"
    path = fetch(remote(server, "/good"), folder)
    assert path == folder / "file.bin"
    assert path.read_bytes() == CONTENT
    assert fetch(remote(server, "/good"), folder) == path
    assert server.asked == [("/good", None)]
    assert names(folder) == ["file.bin"]


def test_a_file_placed_by_hand_is_taken(tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert fetch(RemoteFile("file.bin", (), SHA256), tmp_path).read_bytes() == CONTENT


def test_cut_off_transfer_is_continued_by_the_next_call(server, tmp_path):
    server.cut = 1000
    with pytest.raises(DownloadError, match=r"broke off after 1000 of 10240 bytes.*: call again to continue"):
        fetch(remote(server, "/good"), tmp_path)
    assert names(tmp_path) == ["file.bin.part"]
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:1000]
    server.cut = None
    assert fetch(remote(server, "/good"), tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/good", None), ("/good", "bytes=1000-")]
    assert names(tmp_path) == ["file.bin"]


def test_starts_over_where_the_server_ignores_ranges(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.ranges = False
    assert fetch(remote(server, "/good"), tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/good", "bytes=1000-")]


def test_complete_part_needs_no_bytes(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(remote(server, "/good"), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("stale", [b"stale" * 10, b"stale" * 9999], ids=["shorter", "longer"])
def test_stale_part_is_dropped(server, tmp_path, stale):
    (tmp_path / "file.bin.part").write_bytes(stale)
    assert fetch(remote(server, "/good"), tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/good", f"bytes={len(stale)}-"), ("/good", None)]


def test_wrong_range_is_refused(server, tmp_path, monkeypatch):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    answer = Server.answer

    def shifted(self, request):
        request.headers.replace_header("Range", "bytes=2000-")
        answer(self, request)

    monkeypatch.setattr(Server, "answer", shifted)
    with pytest.raises(DownloadError, match="asked for bytes from 1000, got bytes 2000-10239/10240"):
        fetch(remote(server, "/good"), tmp_path)


def test_wrong_content_is_removed(server, tmp_path):
    server.files["/bad"] = b"bad"
    found = hashlib.sha256(b"bad").hexdigest()
    with pytest.raises(DownloadError, match=f"/bad: sha256 is {found}, expected {SHA256}"):
        fetch(remote(server, "/bad"), tmp_path)
    assert names(tmp_path) == []


def test_mirrors_are_tried_in_order(server, tmp_path):
    server.files["/bad"] = b"bad"
    path = fetch(remote(server, "/missing", "/bad", "/good"), tmp_path)
    assert path.read_bytes() == CONTENT
    assert [asked for asked, _ in server.asked] == ["/missing", "/bad", "/good"]


def test_no_network_says_where_to_place_the_file(server, tmp_path):
    file = remote(server, "/good")
    server.stop()
    with pytest.raises(DownloadError, match=r"could not download file.bin \(.*\): .*or place the file at ") as caught:
        fetch(file, tmp_path)
    assert str(caught.value).endswith(str(tmp_path / "file.bin"))
    assert isinstance(caught.value, OSError)


def test_a_wrong_local_file_is_left_alone(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(DownloadError, match=f"has sha256 .*, expected {SHA256}: remove it to download it again"):
        fetch(remote(server, "/good"), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert server.asked == []


def test_a_publishers_md5_is_checked_too(server, tmp_path):
    good, bad = (hashlib.md5(content).hexdigest() for content in (CONTENT, b"bad"))
    assert fetch(remote(server, "/good", digest=good, algorithm="md5"), tmp_path).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=f"has md5 {good}, expected {bad}"):
        fetch(remote(server, "/good", digest=bad, algorithm="md5"), tmp_path)


@pytest.mark.parametrize("level", [1, 9])
def test_checksum_of_the_content_admits_any_compression(server, tmp_path, level):
    server.files["/packed"] = gzip.compress(CONTENT, level, mtime=0)
    path = fetch(remote(server, "/packed", unpacked=True), tmp_path)
    assert gzip.decompress(path.read_bytes()) == CONTENT


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(CONTENT, mtime=0)[:-9], gzip.compress(CONTENT, mtime=0)[:9]]
)
def test_what_does_not_unpack_is_refused(server, tmp_path, content):
    server.files["/packed"] = content
    with pytest.raises(DownloadError, match="sha256 is of no complete gzip file, expected"):
        fetch(remote(server, "/packed", unpacked=True), tmp_path)


def test_data_root(monkeypatch):
    monkeypatch.setenv("FEDSPARSE_DATA", "/somewhere")
    assert data_root() == Path("/somewhere")
    assert data_root("/else") == Path("/else")
    monkeypatch.delenv("FEDSPARSE_DATA")
    assert data_root() == Path.home() / ".cache" / "lightning-fedsparse"
