"""Files that are there whole or not at all, and never in the place of what was read."""

import contextlib
import os
from collections.abc import Iterable
from glob import glob
from pathlib import Path

from hf_plm.config import UserError

RESULTS = (".json", ".html")
"""What commands write and none reads from a folder of data."""


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


def check_writable(path: Path) -> None:
    """Before long work: raises `UserError` where a file of that name could not be written at its end."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, where the name of a file to write was expected.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no plain file, so it cannot be replaced by one.")
    folder = next(one for one in path.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written: {folder} is no folder that can be written to.")


def keep_inputs(read: Iterable[Path | str | None], *written: Path) -> None:
    """Raises `UserError` where a file to write is one of those to read: files, folders, globs, other names, or None."""
    names = [os.path.expanduser(given) for given in read if given is not None]
    places = {Path(one).resolve() for name in names for one in (name, *glob(str(name), recursive=True))}
    for path in written:
        place = path.expanduser().resolve()
        is_of_folder = place.suffix not in RESULTS and place.is_file() and not places.isdisjoint(place.parents)
        if place in places or is_of_folder:
            raise UserError(f"{path} would be written, but is what is read; name another with --out.")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; Windows cannot, and does not need to."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
