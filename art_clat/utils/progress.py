"""Log lines above a progress bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO

from tqdm.auto import tqdm


class _AboveTheBar:
    """A console stream that writes above the progress bars."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def epoch_bar(done: int, total: int, *, quiet: bool) -> Iterator[tqdm]:
    """Show a progress bar of epochs, with log lines above it; nothing if `quiet`."""
    with (
        nullcontext() if quiet else logging_above_the_bar(),
        tqdm(initial=done, total=total, unit="epoch", disable=quiet) as bar,
    ):
        yield bar


@contextmanager
def logging_above_the_bar() -> Iterator[None]:
    """
    Write what the root logger's console handlers log above the progress bars in this context.

    Unlike ``tqdm.contrib.logging.logging_redirect_tqdm``, it keeps every handler, with its level and filters.
    """
    changed = [
        (handler, handler.stream)
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
    ]
    try:
        for handler, stream in changed:
            handler.setStream(_AboveTheBar(stream))
        yield
    finally:
        for handler, stream in changed:
            handler.setStream(stream)
