"""Download weights with one attempt and short timeouts; errors state the fix. Imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from neco_bench.core.errors import MissingError

TIMEOUT = 5.0  # seconds without an answer or without data


def offline() -> bool:
    """Return whether downloads are switched off by NECO_BENCH_OFFLINE or HF_HUB_OFFLINE."""
    switches = (os.environ.get(name, "0").lower() for name in ("NECO_BENCH_OFFLINE", "HF_HUB_OFFLINE"))
    return any(switch in ("1", "true", "yes") for switch in switches)


def reachable(url: str) -> bool:
    """Return whether the server of `url` answers within `TIMEOUT`. False when offline."""
    if offline():
        return False
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - the hub, or an address of zoo.toml
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT):  # noqa: S310 - as above
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def hub_reachable() -> bool:
    """Return whether the Hugging Face hub answers. Call this first, because its client retries for half a minute."""
    return reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def fetch_url(url: str, path: Path) -> Path:
    """Download `url` to `path` atomically, unless the file exists, and return `path`.

    Raises `MissingError`, whose message names the URL and the target file.
    """
    if path.is_file():
        return path
    reason = "downloads are switched off (NECO_BENCH_OFFLINE or HF_HUB_OFFLINE)"
    if not offline():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:  # noqa: S310 - an address of zoo.toml
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
                    try:
                        shutil.copyfileobj(answer, part, 1 << 20)
                        part.close()
                        expected = answer.headers.get("Content-Length")
                        if expected and Path(part.name).stat().st_size != int(expected):
                            raise OSError("the connection closed early")
                        os.replace(part.name, path)
                    finally:
                        Path(part.name).unlink(missing_ok=True)
            return path
        except OSError as error:
            reason = str(error)
    raise missing_weights(url, path, reason)


def fetch_hub_file(repo: str, name: str, path: Path) -> Path:
    """Return a file of a Hugging Face repository: `path` if it exists, else from the hub's cache, else downloaded.

    Raises `MissingError`, whose message names the URL and the target file.
    """
    # slow to import
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    if path.is_file():
        return path
    try:
        local = not hub_reachable()
        return Path(hf_hub_download(repo, name, etag_timeout=TIMEOUT, local_files_only=local))
    except (OSError, HfHubHTTPError) as error:
        reason = "the Hugging Face hub cannot be reached" if local else str(error).splitlines()[0]
        raise missing_weights(f"https://huggingface.co/{repo}/resolve/main/{name}", path, reason) from error


def missing_weights(url: str, path: Path, reason: str) -> MissingError:
    """Return the error for weights that are not on this machine and cannot be downloaded."""
    return MissingError(
        f"Weights are not on this machine and could not be downloaded ({reason}). Get {url} and save it as {path}, "
        f"or pass --weights FILE."
    )
