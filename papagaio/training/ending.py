"""How several processes end if one of them fails or is lost: one line says which and why, and none waits for ever.

A rank that fails writes why into the store, and closes its connections. The others notice it at their next collective operation,
read the store, and end with the same status. A rank that has been killed writes nothing: a roll call finds out which one it is.
A machine that is switched off closes no connections: its signs of life are missed.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from papagaio.errors import MachineError, UserError

BEAT, SILENCE = 5.0, 50.0  # seconds: each rank gives a sign of life; after this time without one it is lost
ROLL_CALL = 5.0  # seconds in which the ranks that notice a loss say so: those that do not are lost
KEPT = "what was saved is kept, --resume goes on from there"


class Ending:
    """What one rank of `size` does so that all of them end together. `store` holds small values that all can read."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, args=(store.clone(),), daemon=True)
        self.thread.start()

    def stop_watching(self) -> None:
        self.over.set()
        self.thread.join(1)  # a thread inside the store would crash the interpreter at its end

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks of the error that ends this one. Raises another error to be printed instead of it, or SystemExit
        if another rank prints what has happened."""
        self.stop_watching()
        try:
            self._fail(error)
        except MachineError:
            raise
        except RuntimeError:  # the store is gone, and rank 0 or the launcher with it
            if self.rank == 1:
                raise MachineError(f"rank 0 or its launcher is lost; {KEPT}") from None
            sys.exit(1)

    def _fail(self, error: BaseException) -> None:
        status = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        status = error.code if isinstance(error, SystemExit) else status
        broken = _is_connection_lost(error)
        self.store.set(f"failed/{self.rank}", json.dumps({"broken": broken, "status": status, "text": str(error)}))
        until = time.monotonic() + ROLL_CALL
        if not broken:
            if isinstance(error, SystemExit) or self.rank == 0:
                return
            if self._told_by(0, until).get("text") == str(error):  # all ranks make the same mistake; rank 0 prints it
                sys.exit(status)
            if isinstance(error, UserError | MachineError):
                raise type(error)(f"rank {self.rank}: {error}") from None
            print(f"rank {self.rank}:", file=sys.stderr)
            return
        others = {each: self._told_by(each, until) for each in range(self.size) if each != self.rank}
        if own := [found for found in others.values() if found and not found["broken"]]:
            sys.exit(own[0]["status"])  # that rank prints what has happened
        if self.store.add("announced", 1) > 1:
            sys.exit(1)
        lost = [each for each, found in others.items() if not found]
        what = f"{listed(lost)} lost: killed, or the machine is down" if lost else f"the ranks lost touch: {error}"
        raise MachineError(f"{what}; {KEPT}") from None

    def _told_by(self, rank: int, until: float) -> dict[str, Any]:
        """What a rank has told about its end; empty if it does not in time."""
        key = f"failed/{rank}"
        while not self.store.check([key]):
            if time.monotonic() > until:
                return {}
            time.sleep(0.05)
        return json.loads(self.store.get(key))

    def _watch(self, store: Any) -> None:
        """In a thread: give signs of life, and end the process if another rank gives none. Rank 0 watches all, the others it."""
        watched = range(1, self.size) if self.rank == 0 else range(1)
        seen = {each: (-1, time.monotonic()) for each in watched}
        message = ""
        while not message and not self.over.wait(BEAT):
            try:
                store.add(f"beat/{self.rank}", 1)
                for each in watched:
                    beats = store.add(f"beat/{each}", 0)
                    if beats != seen[each][0]:
                        seen[each] = beats, time.monotonic()
                if silent := [each for each, (_, when) in seen.items() if time.monotonic() - when > SILENCE]:
                    first = store.add("announced", 1) == 1
                    message = (
                        f"error: {listed(silent)} lost: no sign of life for {SILENCE:.0f} seconds; {KEPT}\n" if first else " "
                    )
            except RuntimeError:
                self.over.wait(ROLL_CALL)  # the main thread usually knows more
                message = f"error: rank 0 or its launcher is lost; {KEPT}\n" if self.rank == 1 else " "
        if message and not self.over.is_set():
            os.write(2, message.lstrip().encode())
            os._exit(1)


def _is_connection_lost(error: BaseException) -> bool:
    """Whether a collective operation broke off, which is another rank's failure and not this one's."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def listed(ranks: Iterable[int]) -> str:
    """rank 3 is, or ranks 3, 5 are."""
    names = [str(each) for each in ranks]
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16:,} more" if len(names) > 16 else "")
    return f"rank {shown} is" if len(names) == 1 else f"ranks {shown} are"
