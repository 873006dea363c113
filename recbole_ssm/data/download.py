"""Fetching a data set that RecBole knows an address of: whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from recbole_ssm.console import progress_bar
from recbole_ssm.data.archives import DAMAGED

# Seconds without a byte before a download counts as dead.
TIMEOUT = 30


def download(url: str, folder: Path, name: str) -> None:
    """Fetch a zip of atomic files into ``folder``, renamed to ``name``.

    Raises:
        OSError: the network, the server or the disk fails, or the file ends early.
        zipfile.BadZipFile: what came is no zip, or a damaged one, or holds no .inter file.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system as its target, so that a rename is atomic.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        archive, ready = Path(scratch, "archive.zip"), Path(scratch, name)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(archive, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with progress_bar(total=size or None, unit="B", unit_scale=True, desc=f"Download {name}") as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if size and archive.stat().st_size != size:
            raise OSError(f"{archive.stat().st_size} of {size} bytes came")
        ready.mkdir()
        _unpack(archive, ready)
        try:
            if folder.is_dir():
                # It is empty, or nothing would be fetched into it.
                folder.rmdir()
            os.replace(ready, folder)
        except OSError:
            # Where another process fetched it meanwhile, its files stay.
            if not (folder / f"{name}.inter").is_file():
                raise


def _unpack(archive: Path, folder: Path) -> None:
    """The atomic files of one data set in an archive, named like the folder."""
    with zipfile.ZipFile(archive) as content:
        visible = [member for member in content.namelist() if not Path(member).name.startswith(".")]
        members = [member for member in visible if Path(member).suffix in (".inter", ".user", ".item")]
        stems = {Path(member).name.split(".")[0] for member in members if member.endswith(".inter")}
        if len(stems) != 1:
            raise zipfile.BadZipFile("the archive must hold one .inter file")
        stem = stems.pop()
        for member in members:
            target = folder / Path(member).name.replace(stem, folder.name, 1)
            try:
                with content.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
            except (*DAMAGED, RuntimeError) as error:
                # A RuntimeError says that it is encrypted.
                raise zipfile.BadZipFile(f"{member}: {error}") from error
