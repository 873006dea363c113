"""Work in a forked child: its outcome, its time and the memory that it took."""

import json
import os
import resource
import signal
import traceback
from typing import NamedTuple

from recbole_ssm.errors import UserError


class Outcome(NamedTuple):
    """What became of the work.

    ``kind`` is ``done``, ``refused`` (a UserError), ``failed`` (any other exception) or ``died`` (by a signal, of which
    SIGALRM says that it took too long); ``value`` is what it returned, or the message.
    """

    kind: str
    value: object
    memory: int
    """Bytes at the peak above what it started with."""


def in_child(work, seconds=60):
    """Call ``work``, which returns something that JSON can hold, in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            signal.alarm(seconds)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                outcome = ["done", work()]
            except UserError as error:
                outcome = ["refused", str(error)]
            except BaseException:
                outcome = ["failed", traceback.format_exc()]
            with open(writing, "w") as pipe:
                json.dump([*outcome, before], pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    if os.WIFSIGNALED(status) or not text:
        return Outcome("died", f"by signal {os.WTERMSIG(status)}", 0)
    kind, value, before = json.loads(text)
    return Outcome(kind, value, (usage.ru_maxrss - before) * 1024)
