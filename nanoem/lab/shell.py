"""What a command owes the shell: one sentence on stderr instead of a traceback, and a status.

0 is success, 1 a failure, 2 a misuse, 130 a stop by Ctrl-C, as shells have it.
"""

import os
import signal
import sys
from contextlib import contextmanager

import torch

from nanoem import StageFailed, UserError
from nanoem.lab.tables import one_line


def exit_status(work, goes_on="", smaller=""):
    """Do a command's work() and return its status; an error is told in one sentence.

    `goes_on` says what a command that was stopped does when it is given again, `smaller` what to
    try when memory is short. Other errors are ours: they keep their traceback.
    """
    # let no print fail: not every terminal, pipe or file has all that a model may say
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")
    elif hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")

    try:
        with interruptible():
            work()
        return 0
    except UserError as error:
        return complain(error, 2)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # or Python complains, too, when it ends
        return complain(f"nobody reads any more what is printed{goes_on}", 1)
    except (StageFailed, OSError) as error:
        return complain(error, 1)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return complain(f"out of memory{smaller}", 1)
    except KeyboardInterrupt:
        return complain(f"stopped{goes_on}", 130)


@contextmanager
def interruptible():
    """Inside, SIGTERM is what Ctrl-C is, a KeyboardInterrupt; a second one ends all at once."""
    def stop(number, frame):
        for name in handlers:
            signal.signal(name, signal.SIG_DFL)
        raise KeyboardInterrupt

    handlers = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def lacks_memory(error):
    """Was memory short? Some devices raise an exception of its own for it, others only say so."""
    words = ("out of memory", "allocate memory", "not enough memory", "calculation overflowed",
             "ALLOC_FAILED")
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or any(word in str(error) for word in words))


def complain(message, status):
    """Print one sentence on stderr, from one process of a machine; return the exit status."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        if status != 2 and sys.stdout.isatty():
            print()  # the line of progress is open
        print(f"nanoem: {one_line(str(message))}", file=sys.stderr)
    return status
