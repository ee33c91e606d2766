"""Calls and loads of one encoder, kept apart: a call computes with the weights from before a load or from after it."""

from __future__ import annotations

import inspect
import sys
import threading
import time

from torch import nn

_PAUSE = 0.0005  # seconds between two looks


class Call:
    """A forward that is under way."""

    __slots__ = ("thread",)

    def __init__(self, thread: int) -> None:
        self.thread = thread


class Gate:
    """Lets any number of calls in; a load waits until they are out, and keeps new ones waiting until it is done.

    A load that ends with an exception never says that it is done, so whoever waits looks whether its thread still loads.
    """

    def __init__(self) -> None:
        self._calls: set[Call] = set()
        self._loader: int | None = None
        self._one = threading.Lock()

    def enter(self) -> Call:
        """Waits for a load of another thread. What comes back is to be given to `leave`."""
        call = Call(threading.get_ident())
        while True:
            self._calls.add(call)  # before the look, so that either this call sees the load or the load sees this call
            if not self._shut_for(call.thread):
                return call
            self._calls.discard(call)
            time.sleep(_PAUSE)

    def leave(self, call: Call) -> None:
        """The call is over."""
        self._calls.discard(call)

    def shut(self) -> None:
        """Before a load: waits for the calls of other threads."""
        me = threading.get_ident()
        while True:
            with self._one:
                if not self._shut_for(me):
                    self._loader = me
                    break
            time.sleep(_PAUSE)
        while any(call.thread != me for call in tuple(self._calls)):
            time.sleep(_PAUSE)

    def open(self) -> None:
        """After it."""
        self._loader = None

    def _shut_for(self, thread: int) -> bool:
        loader = self._loader
        return loader is not None and loader != thread and _loads(loader)


def _loads(thread: int) -> bool:
    """Whether a thread is inside `load_state_dict`."""
    code = inspect.unwrap(nn.Module.load_state_dict).__code__
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
