"""A file that one process holds, so that two do not write to one place."""

import errno
import os
import platform
import sys
from pathlib import Path
from typing import IO

from hf_plm.config import UserError


def locked(path: Path, doing: str, otherwise: str = "") -> IO[str]:
    """A file held by this process while it is open. Where another has it, a `UserError` says who is `doing` what.

    Raises `OSError` where it cannot be written.
    """
    lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as it is held)
    try:
        _lock(lock)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise UserError(f"Process {holder} {doing}; wait for it or stop it{otherwise}.") from None
        print(f"{path} cannot be locked ({error.strerror}): take care that no other process writes there.", flush=True)
    lock.truncate(0)
    lock.write(f"{os.getpid()} of {platform.node()}\n")
    lock.flush()
    return lock


def _lock(file: IO[str]) -> None:
    """Raises OSError where another process holds the file; the system lets go of it when its holder dies."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # Not flock, which forked workers would go on holding after the death of the run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
