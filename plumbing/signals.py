"""A signal to end: what is done is saved, what is half done is left or finished, and the process
ends with 75 or 130."""

import signal
from contextlib import contextmanager

from plumbing import parallel

# the terminal is gone; the scheduler will soon end this job
WARNINGS = signal.SIGHUP, signal.SIGUSR1
# what a second one does
ENDS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class Stopped(BaseException):
    """A first signal came while nothing would be lost by leaving."""


class Signals:
    """What SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 do in the loop: sampling and evaluation are left at
    once, an update or a save is finished first; then the last whole step is saved and the process
    ends with 130 for Ctrl-C, else with 75.

    A second SIGTERM or Ctrl-C ends it on the spot; the last checkpoint stands. The other two are
    warnings, which come as often as they like: a terminal that closes sends several, and a
    scheduler's is followed by its SIGTERM. Where a signal is ignored from the start, as SIGHUP is
    by nohup, it stays so; but for Ctrl-C, which shells ignore in background jobs.

    Under torchrun all ranks stop at the same step, whichever of them was told to, and a second
    signal is not heeded: torchrun passes on the first to ranks that have it already, and sends
    SIGKILL half a minute later by itself.
    """

    def __init__(self):
        self.got, self.leave = 0, False

    def __enter__(self):
        self.before = {}
        for number in (*ENDS, *WARNINGS):
            if number in ENDS or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.take)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self, number, frame):
        self.got = number
        if number in ENDS:
            # not what stood before: a shell starts background jobs with SIGINT ignored
            for n, end in ENDS.items():
                signal.signal(n, end if parallel.world() == 1 else signal.SIG_IGN)
        if self.leave:
            self.leave = False  # a second one finds it left already
            raise Stopped

    def agree(self) -> int:
        """The signal that any rank has got; 0 for none. All ranks must ask."""
        self.got = parallel.all_reduce_max(self.got)
        return self.got

    @contextmanager
    def may_leave(self):
        """Work that is worth nothing half done, and costs nothing to leave."""
        if self.got:
            raise Stopped
        self.leave = True
        try:
            yield
        finally:
            self.leave = False
