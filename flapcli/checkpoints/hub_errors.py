"""Why the hub did not serve: the network, its own answer, or this machine's disk.

huggingface_hub and datasets wrap what happened, each in its own classes, and pass on those of the HTTP library below
(requests, httpx, ...), whichever that is.
"""

import errno
import os
import re
import ssl
from collections.abc import Iterator

from flapcli.errors import first_line

DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EEXIST,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE,
}  # fmt: skip
UNREACHED = "the hub can't be reached"


def why(error: BaseException, absent: str) -> str:
    """What happened, and what to do, by the first that says it of an error and its causes.

    `absent` follows what is the network's fault: that a copy was looked for in vain.
    """
    for each in _causes(error):
        if code := _disk_error(each):
            name = getattr(each, "filename", None)
            where = f" ({name})" if name else ""
            return (
                f"the download can't be kept{where}: {os.strerror(code)}; make room, or give a cache folder that is "
                "writable (--cache-dir, HF_HOME)"
            )
        if status := getattr(getattr(each, "response", None), "status_code", None):
            hint = {401: ": set HF_TOKEN", 403: ": set HF_TOKEN", 429: " (too many requests): try again later"}
            return f"the hub answers {status}{hint.get(status, '' if status < 500 else ': try again later')}"
        if _is_networks(each):
            return f"{UNREACHED}{absent}"
    return f"{first_line(error)}{absent}" if isinstance(error, FileNotFoundError) else first_line(error)


def is_unreached(error: BaseException) -> bool:
    """Whether the network is at fault."""
    return why(error, "") == UNREACHED


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def _disk_error(error: BaseException) -> int | None:
    """The system's number of what the disk refused; hf_xet, written in Rust, has it in its text alone."""
    code = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    if isinstance(error, RuntimeError) and (told := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(told[1])
    return code if code in DISK else None


def _is_networks(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    own = ("builtins", "huggingface_hub")
    library = tuple(base for base in HfHubHTTPError.__mro__ if base.__module__.split(".")[0] not in own)
    return isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError, *library))
