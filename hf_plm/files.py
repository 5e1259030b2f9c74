"""Files that are there whole or not at all."""

import contextlib
import os
from pathlib import Path

from hf_plm.config import UserError


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all, in a folder made if need be; raises `UserError` where it cannot be."""
    unfinished = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; Windows cannot, and does not need to."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
