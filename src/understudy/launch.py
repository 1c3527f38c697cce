"""What a launcher says of this process, and how a run is asked to stop. No torch here; any part may import it.

`accelerate launch` and torchrun start one command in several processes and number them in the environment.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def launched() -> tuple[int, int]:
    """Return the rank of this process, 0 for the main one, and the number of processes."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


class Stop:
    """Ctrl-C and `kill` stop a run at the next step, after a checkpoint; a second Ctrl-C stops at once.

    With several processes nothing but the launcher stops at once, which passes on what the terminal has said already.

    Args:
        say: told what happens next.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._asked = False
        self._say = say
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def __call__(self) -> bool:
        """Tell whether the run is to stop."""
        return self._asked

    def _ask(self, number: int, frame: object) -> None:
        several = launched()[1] > 1
        if self._asked and not several:
            raise KeyboardInterrupt
        if not self._asked:
            self._asked = True
            self._say("Stopping soon." if several else "Stopping after this step; press Ctrl-C again to stop at once.")
