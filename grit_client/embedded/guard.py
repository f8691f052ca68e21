"""Become another program that dies with its parent: `python guard.py PARENT PROGRAM ARG...`.

Run as a script with an isolated interpreter, so it imports next to nothing. On Linux the kernel
kills the process when the supervisor is gone, however that ended; elsewhere the supervisor's pid
file is how leftovers are found.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Bind our life to the parent's, then become the program."""
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call: nobody will tell us
            sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - argv from the supervisor, no shell


if __name__ == "__main__":
    main()
