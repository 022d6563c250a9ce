"""Files that are fetched once: local cache, checksum, resumed transfers, mirrors.

A file appears under its name only when it is complete and its checksum is right: bytes are collected in ``NAME.part``,
which a later call continues, and then renamed.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["DownloadError", "RemoteFile", "data_root", "fetch"]

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30
# what a broken connection, a refusing server or a malformed answer raises
_TRANSFER_ERRORS = (OSError, http.client.HTTPException)


class DownloadError(OSError):
    """A file could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class RemoteFile:
    """A file known by its content.

    Args:
        name: File name in the local folder.
        urls: Where it can be had, tried in order.
        digest: Hex digest of the file, or of what it unpacks to.
        unpacked: Whether ``digest`` is of the gunzipped content: the same data are around in several compressions.
        algorithm: What ``digest`` was made with; ``"md5"`` where publishers state no other.
    """

    name: str
    urls: tuple[str, ...]
    digest: str
    unpacked: bool = False
    algorithm: Literal["sha256", "md5"] = "sha256"


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of all data sets: ``root``, else ``$FEDSPARSE_DATA``, else ``~/.cache/lightning-fedsparse``."""
    return Path(root or os.environ.get("FEDSPARSE_DATA") or Path.home() / ".cache" / "lightning-fedsparse")


def fetch(file: RemoteFile, folder: Path) -> Path:
    """Return the local path of a file, downloaded into ``folder`` unless it is there.

    Raises:
        DownloadError: If a file that is there has another checksum (it is left alone), or no URL gave the right one.
            What came of a transfer that broke off stays in ``folder`` and the next call continues it.
    """
    path = folder / file.name
    if path.exists():
        found = _digest(path, file)
        if found != file.digest:
            raise DownloadError(
                f"{path} has {file.algorithm} {found}, expected {file.digest}: remove it to download it again"
            )
        return path
    part = folder / f"{file.name}.part"
    failures = []
    for url in file.urls:
        _log.info("downloading %s to %s", url, path)
        resumed = part.exists()
        failure = _attempt(file, url, part)
        if failure and resumed and not part.exists():
            # wrong content may be the fault of an older part that was continued: once more from the start
            failure = _attempt(file, url, part)
        if not failure:
            os.replace(part, path)
            return path
        failures.append(f"{url}: {failure}")
    raise DownloadError(
        f"could not download {file.name} ({'; '.join(failures)}): call again to continue, or place the file at {path}"
    )


def _attempt(file: RemoteFile, url: str, part: Path) -> str | None:
    """Complete ``part`` from one URL; return what went wrong. A part with wrong content is removed."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _transfer(url, part)
    except _TRANSFER_ERRORS as error:
        return str(error) or type(error).__name__
    found = _digest(part, file)
    if found == file.digest:
        return None
    part.unlink()
    return f"{file.algorithm} is {found}, expected {file.digest}"


def _transfer(url: str, part: Path) -> None:
    """Append to ``part`` what it still lacks of ``url``; start over if the server does not send ranges."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "lightning-fedsparse"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send: the checksum tells whether the part is the file
        raise
    with response:
        continues = response.status == http.client.PARTIAL_CONTENT
        if continues and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise DownloadError(f"asked for bytes from {have}, got {response.headers.get('Content-Range')}")
        length = response.headers.get("Content-Length")
        received = 0
        with part.open("ab" if continues else "wb") as out:
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                received += len(chunk)
            # on disk before the rename makes it look complete
            out.flush()
            os.fsync(out.fileno())
        if length is not None and received < int(length):
            raise DownloadError(f"the transfer broke off after {received} of {length} bytes")


def _digest(path: Path, file: RemoteFile) -> str:
    """Hex digest of what lies at ``path`` or of its gunzipped content; a remark if it does not gunzip."""
    # against accidents, not attacks: so MD5 will do, also on systems that forbid it for security
    digest = hashlib.new(file.algorithm, usedforsecurity=False)
    try:
        with gzip.open(path) if file.unpacked else path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return "of no complete gzip file"
    return digest.hexdigest()
