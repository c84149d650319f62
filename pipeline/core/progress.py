"""Progress of long work: done, rate and time left; one line that is rewritten on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Self

from pipeline.core import signals

SECONDS_BETWEEN_LINES = {True: 0.2, False: 5.0}  # on a terminal, elsewhere


def duration(seconds: float) -> str:
    """Write seconds as a person says them: 9 s, 2 min 05 s, 3 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Counts work done and says so on standard error; its attribute `note` is, or gives, what stands at the line's end.

    Args:
        total: units of work in all; of none nothing is said.
        unit: what is counted, in the plural ("images").
        what: the work, as the line's first words ("prepare: train").
        done: units that an earlier run did already; they do not count for the rate.
        quiet: say nothing (the other processes of a distributed run).
    """

    def __init__(self, total: int, unit: str, what: str, done: int = 0, quiet: bool = False):
        self.total, self.unit, self.what, self.done, self.quiet = total, unit, what, done, quiet
        self.before, self.said = done, -1
        self.started = self.last_line = time.monotonic()
        self.first: tuple[float, int] | None = None  # when the first work was done, and what was done then
        self.note: str | Callable[[], str] = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: type[BaseException] | None, *rest: object) -> None:
        if self.said != self.done or sys.stderr.isatty():
            try:
                self._say(ended=True)
            except OSError:
                if exception is None:  # else it would hide what has ended the work: Ctrl-C ends `tee`, too
                    raise

    def update(self, count: int = 1) -> None:
        """Add `count` units of finished work.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM was to stop it, and was not heard where it came.
        """
        self.done += count
        self.first = self.first or (time.monotonic(), self.done)
        if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES[sys.stderr.isatty()]:
            self._say()
        signals.stop_if_asked()

    def line(self, now: float) -> str:
        """Write the line for a moment.

        The rate is that since the first work, before which workers may have to start; at the end that of the whole.

        Args:
            now: of time.monotonic().
        """
        begun, had = self.first or (now, self.done)
        if self.done == self.total:
            begun, had = self.started, self.before
        rate = (self.done - had) / max(now - begun, 1e-9)
        words = [f"{self.what}: {self.done:,}/{self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"]
        if self.done > had:
            words.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
            left = (self.total - self.done) / rate
            words.append(f"{duration(left)} left" if left > 0 else f"took {duration(now - begun)}")
        note = self.note() if callable(self.note) else self.note
        return ", ".join(words + ([note] if note else []))

    def _say(self, ended: bool = False) -> None:
        if self.quiet or not self.total:
            return
        self.last_line, self.said = time.monotonic(), self.done
        line = self.line(self.last_line)
        if sys.stderr.isatty():
            print(f"\r{line}\033[K", end="\n" if ended else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
