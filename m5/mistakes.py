"""The paragraph that tells a user's mistake, or a full disk, from a fault of the program."""

from __future__ import annotations

import errno

# Errors of the file system that the user can do something about.
REMEDIES = {
    errno.ENOSPC: "The disk is full: what was being written has replaced nothing. Free some space, then run it again.",
    errno.EDQUOT: "Your disk quota is used up: what was being written has replaced nothing. Free some space.",
    errno.ENOENT: "Check the path.",
    errno.EACCES: "Check the permissions, or choose another path.",
    errno.EPERM: "Check the permissions, or choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ESTALE: "The network file system has lost that file; mount it again.",
    errno.EROFS: "That file system is read-only; choose another path.",
    errno.ENOTDIR: "Part of that path is a file; check the path.",
    errno.EISDIR: "That is a folder, and a file is expected.",
}


def explain(error: Exception) -> str | None:
    """The paragraph for a mistake of the user's or a full disk; None for anything else."""
    from m5.config import ConfigError
    from m5.schema import DataError

    if isinstance(error, DataError | ConfigError):
        return str(error)
    number = error.errno if isinstance(error, OSError) else None
    # Arrow, safetensors and torch wrap the system's error and keep only its words.
    if number is None and "No space left on device" in str(error):
        number = errno.ENOSPC
    if number not in REMEDIES:
        return None
    words = str(error) if not isinstance(error, OSError) or error.strerror is None else error.strerror
    name = getattr(error, "filename", None)
    return f"{f'{name}: ' if name else ''}{words.rstrip('.')}. {REMEDIES[number]}"
