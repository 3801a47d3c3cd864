"""Files of the Hugging Face hub: from its cache if they are there, and only if they are what the
hub has.

    fetch("dataset", "openai/gsm8k", revision, "main/test-00000-of-00001.parquet")   a path
    snapshot("Qwen/Qwen3-4B", None, ["config.json", "*.safetensors"], complete)      a folder
    commit(folder)                                              the commit that it stands for

What the cache holds costs no request. What is missing is asked for with one line and a time limit,
by a process of its own: Ctrl-C ends that one at once, whatever moves its bytes. The cache names
each file by the hash of its content, and `check` compares: a cut file, a captive portal's page or a
flipped bit ends in one line with the command that mends it.

HF_HUB_OFFLINE=1 (not one request), HF_HOME, HF_ENDPOINT, HF_HUB_ETAG_TIMEOUT (seconds that the hub
has to answer, 10) and the token of `hf auth login` work as they do everywhere.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

COMMIT = r"[0-9a-f]{40}"
REASONS = {  # exception of the hub's library: what it means; the first that fits
    "GatedRepoError": "access is restricted (403): ask on its page, then `hf auth login`",
    "RepositoryNotFoundError": "none of that name, or a private one: `hf auth login`",
    "RevisionNotFoundError": "there is no such revision",
    "LocalEntryNotFoundError": "it is not in the cache and the hub cannot be asked",
    "OfflineModeIsEnabled": "it is not in the cache and the hub cannot be asked",
    "EntryNotFoundError": "there is no such file in it",
}


class HubError(ValueError):
    """A file of the hub cannot be had, or is damaged. One line: what, where, and what to do."""


def origin(path):
    """(kind, repository, commit, file) of a path in the hub's cache, None for any other path.

    CACHE/datasets--openai--gsm8k/snapshots/COMMIT/main/test.parquet is file main/test.parquet of
    dataset openai/gsm8k.
    """
    # not resolved: a snapshot's files are links that lead out of it
    path = Path(os.path.abspath(path)).as_posix()
    found = re.search(rf"/(model|dataset)s--([\w.-]+)/snapshots/({COMMIT})(?:/(.*))?$", path)
    if not found:
        return None
    kind, repo, name, file = found.groups(default="")
    return kind, repo.replace("--", "/"), name, file


def commit(path):
    """The commit (40 hex digits) whose files a folder of the hub's cache holds; None for a folder
    from elsewhere."""
    found = origin(path)
    return found and found[2]


def command(kind, repo, revision=None, file="", force=""):
    """The `hf download` that fetches it."""
    kind = "--repo-type dataset" if kind == "dataset" else ""
    revision = f"--revision {revision}" if revision else ""
    return " ".join(filter(None, ["hf download", repo, file, force, kind, revision]))


def again(path):
    """What to do about a damaged file, for the end of a message. Only --force-download replaces
    one in the cache."""
    found = origin(path)
    if not found:
        return "fetch or write it again"
    return f"run `{command(*found, force='--force-download')}`"


# ------------------------------------------------------------------------- is it what the hub has


def check(path, sha256=None, once=False):
    """Raise HubError if the file's content is not the one it should be.

    sha256: its hash where it is known, else the name of its blob in the cache: SHA-256 of a large
    file, git's SHA-1 of a small one. A file that has neither (copied, or a cache without links)
    cannot be checked.
    once: remember the verdict in the user's cache folder, until the file's size or time changes
    (for weights).
    """
    blob = os.readlink(path) if os.path.islink(path) else ""
    wanted = sha256 or os.path.basename(blob)
    if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", wanted):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    marker, about = cache / "nanobupo" / "checked" / wanted, os.stat(path)
    stamp = f"{about.st_size} {about.st_mtime_ns}"
    if once:
        with contextlib.suppress(OSError, ValueError):  # no marker, or no text
            if marker.read_text() == stamp:
                return
        if about.st_size > 1e9:
            size = f"{about.st_size / 1e9:.1f} GB"
            print(f"checking {path} ({size}), once", file=sys.stderr, flush=True)
    found = _hashes(path, about.st_size, wanted)
    if wanted not in found:
        raise HubError(
            f"{path}: the file is damaged (its hash is {found[0][:12]}, that of the hub's file "
            f"{wanted[:12]}); {again(path)}"
        )
    if once:
        # a home that cannot be written to: the next start reads the weights once more
        with contextlib.suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(stamp)


def _hashes(path, size, wanted):
    """SHA-256; where `wanted` is shorter git's SHA-1 and the plain one, as some mirrors have it."""
    digests = [hashlib.sha256()]
    if len(wanted) == 40:
        digests = [hashlib.sha1(f"blob {size}\0".encode()), hashlib.sha1()]
    with open(path, "rb") as f:
        while piece := f.read(1 << 22):
            for digest in digests:
                digest.update(piece)
    return [digest.hexdigest() for digest in digests]


# ------------------------------------------------------------------ the cache first, then the hub


def fetch(kind, repo, revision, file):
    """Path of one file of a repository ("model" or "dataset") in the cache, downloaded if it is
    not there."""

    def cached():
        path = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision, repo_type=kind)
        return path if isinstance(path, str) else None

    return _get(cached, kind=kind, repo=repo, revision=revision, file=file)


def snapshot(repo, revision, patterns, complete):
    """Folder of a model's files that match `patterns`, downloaded if the cache has not all of
    them.

    revision: a branch, tag or commit; None is the main branch, as it was when the cache first saw
    it.
    complete(folder) -> bool: whether the cache has what is needed. Older libraries cannot tell,
    newer ones know the list.
    """

    def cached():
        try:
            folder = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        except FileNotFoundError:  # not there, or by the library's own list not whole
            return None
        return folder if complete(Path(folder)) else None

    return _get(cached, kind="model", repo=repo, revision=revision, patterns=patterns)


def _get(cached, kind, repo, revision, file="", patterns=None):
    """Path from the cache, else from the hub. Whatever fails on the way is a HubError from here."""
    what = f"{file or 'the files'} of the hub's {kind} {repo}"
    what += f" at revision {revision}" if revision else ""
    try:
        path = cached()
        if path is None:
            if constants.HF_HUB_OFFLINE:
                raise HubError("it is not in the cache, and HF_HUB_OFFLINE is set")
            if os.environ.get("RANK", "0") == "0":  # under torchrun one rank says it for all
                print(f"fetching {what} from {constants.ENDPOINT}", file=sys.stderr, flush=True)
            path = _ask(dict(kind=kind, repo=repo, revision=revision, file=file, patterns=patterns))
        return Path(path)
    except Exception as e:
        raise HubError(
            f"cannot get {what}: {why(e)}. Cache folder: {constants.HF_HUB_CACHE}. "
            f"Run `{command(kind, repo, revision, file)}` where there is a network, or set HF_HOME "
            "to a folder whose cache has it, or give the path of a local copy"
        ) from None


def _ask(request):
    """The path that a process of its own answers once it has downloaded. Raises HubError with its
    reason. Ctrl-C, and whatever else ends the wait, ends that process."""
    request["cache"] = str(constants.HF_HUB_CACHE)
    theirs, ours = os.pipe()  # ours is open for as long as this process lives: see `main`
    try:
        child = subprocess.run(
            [sys.executable, __file__, json.dumps(request)],
            stdin=theirs,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(theirs)
        os.close(ours)
    said = [f"the download ended with code {child.returncode}", *child.stdout.splitlines()]
    if child.returncode:
        raise HubError(said[-1])
    return said[-1]


# --------------------------------------------------------------------- the process that downloads


def why(error):
    """One line about an exception of the hub's library; its http client's and the system's have no
    common class."""
    from huggingface_hub import errors  # here: it takes a quarter of a second

    if isinstance(error, HubError):
        return str(error)
    for name, text in REASONS.items():
        if isinstance(error, getattr(errors, name)):
            return text
    name = type(error).__name__
    if "Timeout" in name:
        return (
            f"{constants.ENDPOINT} does not answer within {constants.HF_HUB_ETAG_TIMEOUT} s "
            f"({name}); HF_HUB_ETAG_TIMEOUT gives it more"
        )
    return f"{name}: {' '.join(str(error).split())[:160]}"


def download(kind, repo, revision, file, patterns, cache):
    """Path of the file, or folder of the files that match the patterns, downloaded by the hub's
    library.

    The library asks a hub that does not answer for many minutes. So it is asked once, with a
    limit, before.
    """
    about = dict(repo_type=kind, revision=revision)
    limit = constants.HF_HUB_ETAG_TIMEOUT
    if file:
        url = huggingface_hub.hf_hub_url(repo, file, **about)
        huggingface_hub.get_hf_file_metadata(url, timeout=limit)
        return huggingface_hub.hf_hub_download(repo, file, cache_dir=cache, **about)
    huggingface_hub.HfApi().repo_info(repo, timeout=limit, **about)
    return huggingface_hub.snapshot_download(
        repo, allow_patterns=patterns, cache_dir=cache, **about
    )


def main(request):
    """Answer one request of `_ask` on stdout: the path, or with exit code 1 why there is none."""

    def end_with_parent():
        os.read(0, 1)  # returns when the other process has ended, however that came
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        print(download(**json.loads(request)), flush=True)
    except KeyboardInterrupt:
        os._exit(130)  # the other process says so
    except Exception as e:
        print(why(e), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
