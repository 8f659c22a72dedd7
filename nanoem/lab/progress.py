"""One line that says how far a training is, and when it will end."""

import sys
import time

from nanoem.lab import parallel


class Progress:
    """One line that says step, percent, losses, tokens/s and the time left.

    On a terminal the line is rewritten in place; in a file a new line is written now and then.
    """

    def __init__(self, name, steps):
        self.name, self.steps = name, steps
        # Several processes sum the losses they show, so they must all show the same steps.
        self.live = sys.stdout.isatty() and parallel.n_processes() == 1
        self.tenth = max(1, steps // 10)
        self.every = max(1, steps // 50) if self.live else self.tenth
        self.n_tokens, self.seconds, self.started = 0, 0.0, time.perf_counter()
        self.line_is_open = False

    def due(self, step, n_tokens):
        self.n_tokens += n_tokens
        return step % self.every == 0 or self.is_tenth(step)

    def is_tenth(self, step):
        """Is this step kept in the history? The same ones on a terminal as in a file."""
        return step % self.tenth == 0 or step == self.steps - 1

    def show(self, step, values):
        done = (step + 1) / self.steps
        seconds = self.seconds + time.perf_counter() - self.started
        left = round(seconds / done - seconds)
        terms = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        rate = self.n_tokens / seconds / 1000
        line = (f"{self.name:<10} {step + 1:>5}/{self.steps} {done:>4.0%}  {terms}  "
                f"{rate:6.1f}k tokens/s  ETA {left // 60}:{left % 60:02d}")
        print(f"\r{line}\033[K" if self.live else line, end="" if self.live else "\n", flush=True)
        self.line_is_open = self.live

    def pause(self):
        """Stop the clock and close the line, so that others can print."""
        self.seconds += time.perf_counter() - self.started
        if self.line_is_open:
            print()
            self.line_is_open = False

    def go_on(self):
        self.started = time.perf_counter()
