"""hub.py: a cache laid out as the library lays it out, damaged in many ways, and a hub on the
loopback that hangs."""

import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, errors

from plumbing import download

COMMIT = "c" * 40
LARGE = (".parquet", ".safetensors")  # in git LFS, and so named by SHA-256 in the cache
ROOT = Path(download.__file__).parents[1]


def blob_name(name, content):
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fill(cache, kind, repo, files, commit=COMMIT):
    """Write {name: bytes} into a cache as huggingface_hub does: blobs named by hash, links to
    them. The snapshot."""
    folder = cache / f"{kind}s--{repo.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for name, content in files.items():
        blob = folder / "blobs" / blob_name(name, content)
        blob.write_bytes(content)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder / "snapshots" / commit


def empty_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and an empty one of this project."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return empty_cache(tmp_path, monkeypatch)


def damage(path, how):
    """Put what a bad week leaves in place of a file's content; the file's own blob, its name as it
    was."""
    content = bytearray(path.read_bytes())
    if how == "zeros":
        content = bytes(len(content))
    elif how == "short":
        content = content[: len(content) // 2]
    elif how == "a portal's page":
        content = b"<!DOCTYPE html><html><body>Log in to the wireless network</body></html>"
    else:
        content[how // 8] ^= 1 << how % 8
    path.resolve().write_bytes(content)


# ------------------------------------------------------------------ what a path in the cache says


def test_a_path_in_the_cache_tells_its_repository_and_commit(cache, tmp_path, monkeypatch):
    folder = fill(
        cache, "model", "Some-one/a.model", {"config.json": b"{}", "x/model.safetensors": b"x"}
    )
    assert download.commit(folder) == download.commit(folder / "config.json") == COMMIT
    assert download.origin(folder / "x" / "model.safetensors") == (
        "model",
        "Some-one/a.model",
        COMMIT,
        "x/model.safetensors",
    )
    monkeypatch.chdir(folder)
    assert download.commit(".") == COMMIT  # as it is, not as its links are
    assert (
        download.commit(tmp_path) is None
        and download.origin(cache / "model--x" / "snapshots" / "main") is None
    )
    data = fill(cache, "dataset", "openai/gsm8k", {"main/test.parquet": b"x"})
    assert download.again(data / "main" / "test.parquet") == (
        "run `hf download openai/gsm8k main/test.parquet --force-download --repo-type dataset "
        f"--revision {COMMIT}`"
    )
    assert (
        download.again(folder)
        == f"run `hf download Some-one/a.model --force-download --revision {COMMIT}`"
    )
    assert download.again(tmp_path / "x.parquet") == "fetch or write it again"


# ---------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", ["test.parquet", "test.jsonl"])
@pytest.mark.parametrize("how", ["zeros", "short", "a portal's page", *range(0, 4000, 97)])
def test_damaged_file_in_the_cache_is_named_with_the_command_that_mends_it(cache, name, how):
    file = fill(cache, "dataset", "a/b", {name: b"0123456789" * 50}) / name
    download.check(file)
    damage(file, how)
    with pytest.raises(download.HubError, match="is damaged") as e:
        download.check(file)
    message = str(e.value)
    assert "\n" not in message and str(file) in message
    assert (
        f"`hf download a/b {name} --force-download --repo-type dataset --revision {COMMIT}`"
        in message
    )


def test_what_has_no_hash_is_checked_by_the_one_that_is_known(cache):
    folder = fill(cache, "model", "a/b", {"config.json": b"{}"})
    (folder / "copied.json").write_bytes(b"{}")  # a cache on a system without links
    download.check(folder / "copied.json")
    right = hashlib.sha256(b"{}").hexdigest()
    download.check(folder / "copied.json", right)
    with pytest.raises(download.HubError, match="hf download a/b copied.json --force-download"):
        download.check(folder / "copied.json", "0" * 64)
    (folder / "config.json").resolve().rename(folder / "etag-of-a-mirror")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("etag-of-a-mirror")
    download.check(folder / "config.json")  # a mirror's names need not be hashes
    plain = hashlib.sha1(b"{}").hexdigest()
    (folder / "etag-of-a-mirror").rename(folder / plain)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(plain)
    download.check(folder / "config.json")  # or another kind of hash
    damage(folder / "config.json", 0)
    with pytest.raises(download.HubError, match="damaged"):
        download.check(folder / "config.json")


def test_blob_that_is_itself_a_link_keeps_its_name(cache):
    """Newer libraries keep one copy for all repositories, under another hash."""
    file = fill(cache, "dataset", "a/b", {"x.parquet": b"content"}) / "x.parquet"
    store = cache / "blobs" / ("5" * 64)
    store.parent.mkdir()
    blob = file.resolve()
    blob.rename(store)
    blob.symlink_to(store)
    download.check(file)
    store.write_bytes(b"Content")
    with pytest.raises(download.HubError, match="damaged"):
        download.check(file)


def test_weights_are_read_once(cache, tmp_path, monkeypatch):
    file = fill(cache, "model", "a/b", {"model.safetensors": b"weights"}) / "model.safetensors"
    reads = []
    whole = download._hashes
    monkeypatch.setattr(download, "_hashes", lambda *a: reads.append(a) or whole(*a))
    download.check(file, once=True)
    download.check(file, once=True)
    assert len(reads) == 1
    download.check(file)
    assert len(reads) == 2  # small files are read every time
    os.utime(file.resolve(), ns=(1, 1))
    download.check(file, once=True)
    assert len(reads) == 3  # something has written to it
    damage(file, 3)
    os.utime(file.resolve(), ns=(2, 2))
    for _ in range(2):
        with pytest.raises(download.HubError, match="damaged"):
            download.check(file, once=True)  # a bad verdict is not remembered
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a folder that cannot be made
    damage(file, 3)
    download.check(file, once=True)


# ----------------------------------------------------------------- the cache first, or not at all


def test_what_is_cached_costs_no_request(cache, monkeypatch):
    data = fill(cache, "dataset", "a/b", {"x/y.jsonl": b"{}"})
    model = fill(cache, "model", "a/b", {"config.json": b"{}"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *a: pytest.fail("asked the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started a download"))
    for revision in (COMMIT, "main"):
        assert download.fetch("dataset", "a/b", revision, "x/y.jsonl") == data / "x" / "y.jsonl"
    for revision in (COMMIT, "main", None):
        assert download.snapshot("a/b", revision, ["*.json"], lambda folder: True) == model


def test_missing_and_offline_is_said_at_once(cache, monkeypatch):
    fill(cache, "model", "a/b", {"config.json": b"{}"})
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started a download"))
    for ask in (
        lambda: download.fetch("dataset", "a/b", COMMIT, "x.jsonl"),
        lambda: download.snapshot("a/b", None, ["*"], lambda folder: False),  # there, but not whole
        lambda: download.snapshot("a/b", "other", ["*"], lambda folder: True),
    ):
        with pytest.raises(download.HubError, match="HF_HUB_OFFLINE is set") as e:
            ask()
        for part in ("a/b", str(cache), "`hf download a/b", "HF_HOME"):
            assert part in str(e.value)


class Reply:
    status_code, headers, request = 404, {}, None


def reply(kind):
    return kind("first line\nsecond line", response=Reply())


NOT_THERE = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)  # newer, older


@pytest.mark.parametrize(
    "error, said",
    [
        (reply(errors.GatedRepoError), "access is restricted"),
        (reply(errors.RepositoryNotFoundError), "a private one"),
        (reply(errors.RevisionNotFoundError), "no such revision"),
        (reply(NOT_THERE), "no such file"),
        (errors.LocalEntryNotFoundError("x\ny"), "not in the cache"),
        (errors.OfflineModeIsEnabled("x"), "not in the cache"),
        (reply(errors.HfHubHTTPError), "HfHubHTTPError: first line second line"),
        (RuntimeError("broken\npipe"), "RuntimeError: broken pipe"),
        (OSError(28, "No space left on device"), "No space left"),
        (TimeoutError("x"), "does not answer within"),
    ],
)
def test_why(error, said):
    assert said in download.why(error) and "\n" not in download.why(error)


# -------------------------------------------------------------------------- a hub on the loopback


class Hub(http.server.BaseHTTPRequestHandler):
    """Speaks as much of the hub's protocol as the library needs for one file or one model."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        self.server.asked.append(f"{self.command} {self.path}")

    def answer(self, content, headers=()):
        self.send_response(200)
        for name, value in (*headers, ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self):
        server, (_, _, rest) = self.server, self.path.partition(f"/resolve/{COMMIT}/")
        if self.path.startswith("/api/agent"):
            return self.answer(b"{}")
        if server.mode == "hangs":
            server.over.wait(30)
            return None
        if rest in server.files:
            content = server.files[rest]
            etag = f'"{blob_name(rest, content)}"'
            if self.command == "GET" and server.mode == "slow":
                return self.drip(etag)
            return self.answer(content, [("X-Repo-Commit", COMMIT), ("ETag", etag)])
        listing = [
            {"type": "file", "path": name, "size": len(content), "oid": blob_name(name, content)}
            for name, content in server.files.items()
        ]
        if "/tree/" in self.path:
            return self.answer(json.dumps(listing).encode())
        if "/revision/" in self.path or self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in server.files]
            about = {"id": "a/b", "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.answer(json.dumps(about).encode())
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def drip(self, etag):
        self.send_response(200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", "1000000000")
        self.end_headers()
        self.server.dripping.set()
        while not self.server.over.wait(0.01):
            try:
                self.wfile.write(b"x" * 1000)
            except OSError:
                self.server.gone.set()
                return


@pytest.fixture
def server(cache, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.mode, server.asked, server.files = "", [], {}
        server.over, server.dripping, server.gone = (threading.Event() for _ in range(3))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(cache.parent))  # its cache is HF_HOME/hub
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        yield server
        server.over.set()
        server.shutdown()


def test_missing_file_is_fetched_once_with_one_line(cache, server, capfd):
    server.files = {"x/y.parquet": b"content"}
    path = download.fetch("dataset", "a/b", COMMIT, "x/y.parquet")
    assert path.read_bytes() == b"content" and download.commit(path) == COMMIT
    download.check(path)
    said = capfd.readouterr().err
    assert said.startswith(
        f"fetching x/y.parquet of the hub's dataset a/b at revision {COMMIT} from http"
    )
    assert said.count("fetching") == 1
    server.asked.clear()
    assert download.fetch("dataset", "a/b", COMMIT, "x/y.parquet") == path
    assert not server.asked
    with pytest.raises(download.HubError, match="no such file in it"):
        download.fetch("dataset", "a/b", COMMIT, "nothing.parquet")


def test_model_is_fetched_whole_and_then_taken_from_the_cache(cache, server):
    server.files = {"config.json": b"{}", "model.safetensors": b"weights", "other.bin": b"no"}
    folder = download.snapshot("a/b", None, ["config.json", "*.safetensors"], lambda folder: True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert download.commit(folder) == COMMIT
    server.asked.clear()
    assert (
        download.snapshot("a/b", None, ["config.json", "*.safetensors"], lambda folder: True)
        == folder
    )
    assert download.snapshot("a/b", COMMIT, ["config.json"], lambda folder: True) == folder
    assert not server.asked


def test_hub_that_never_answers_is_left_after_the_limit(cache, server, capfd):
    server.mode = "hangs"
    began = time.time()
    with pytest.raises(download.HubError, match=r"does not answer within 1 s \(\w*Timeout\w*\)"):
        download.fetch("dataset", "a/b", COMMIT, "x.parquet")
    assert time.time() - began < 20  # the library by itself takes minutes
    assert "Traceback" not in capfd.readouterr().err


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
from plumbing import download
try:
    download.fetch("dataset", "a/b", "{commit}", "x.parquet")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_a_download_at_once(cache, server, number, code):
    """Ctrl-C, and also a death that nothing can be done about: no download goes on behind
    anybody's back."""
    server.mode, server.files = "slow", {"x.parquet": b"content"}
    script = SCRIPT.format(commit=COMMIT)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE)
    assert server.dripping.wait(30)
    process.send_signal(number)
    assert process.wait(10) == code
    assert server.gone.wait(10)
    said = process.stderr.read().decode()
    process.stderr.close()
    assert "Traceback" not in said
    left = [*cache.glob("*/snapshots/*/*"), *cache.glob("*/blobs/*")]
    # nothing that would be taken for the file; older libraries keep a part to go on from
    assert all(path.suffix == ".incomplete" for path in left)
