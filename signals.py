"""SIGTERM and Ctrl-C: what is done is saved, what is half done is left or finished, and the process ends with 75 or 130."""
import signal
from contextlib import contextmanager

import parallel


class Stopped(BaseException):
    """A first SIGTERM or Ctrl-C came while nothing would be lost by leaving."""


class Signals:
    """What SIGTERM and Ctrl-C do in the loop: sampling and evaluation are left at once, an update or a save is finished first; then the
    last whole step is saved and the process ends with 75 or 130. A second signal ends it on the spot; the last checkpoint stands.

    Under torchrun all ranks stop at the same step, whichever of them was told to, and a second signal is not heeded: torchrun passes on
    the first to ranks that have it already, and sends SIGKILL half a minute later by itself.
    """

    def __init__(self): self.got, self.leave = 0, False

    def __enter__(self): self.before = {number: signal.signal(number, self.take) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_):
        for number, handler in self.before.items(): signal.signal(number, handler)

    def take(self, number, frame):
        self.got = number
        # what a second one does; not what stood before: a shell starts background jobs with SIGINT ignored
        ends = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        for n in self.before: signal.signal(n, ends[n] if parallel.world() == 1 else signal.SIG_IGN)
        if self.leave: raise Stopped

    def agree(self) -> int:
        """The signal that any rank has got; 0 for none. All ranks must ask."""
        self.got = parallel.largest(self.got)
        return self.got

    @contextmanager
    def may_leave(self):
        """Work that is worth nothing half done, and costs nothing to leave."""
        if self.got: raise Stopped
        self.leave = True
        try:
            yield
        finally:
            self.leave = False
