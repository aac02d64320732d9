import io
import logging
from contextlib import redirect_stderr

import pytest
from tqdm.auto import tqdm

from art_clat.utils.progress import logging_above_the_bar


@pytest.fixture
def console():
    """A console with two handlers of the root logger, for warnings and for everything."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers = [logging.StreamHandler(stream) for _ in range(2)]
    handlers[0].setLevel(logging.WARNING)
    handlers[0].setFormatter(logging.Formatter("warned: %(message)s"))
    level = root.level
    root.setLevel(logging.DEBUG)
    for handler in handlers:
        root.addHandler(handler)
    yield stream, handlers
    root.setLevel(level)
    for handler in handlers:
        root.removeHandler(handler)


def test_every_handler_keeps_its_level_and_its_format(console):
    stream, _ = console
    with redirect_stderr(stream), logging_above_the_bar():
        logging.getLogger("any").debug("a detail")
        logging.getLogger("any").warning("a warning")
    assert stream.getvalue().splitlines() == ["a detail", "warned: a warning", "a warning"]


def test_lines_go_above_the_bar(console):
    stream, _ = console
    with redirect_stderr(stream), logging_above_the_bar(), tqdm(total=2, file=stream, mininterval=0) as bar:
        bar.update()
        logging.getLogger("any").warning("a warning")
        bar.update()
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert "a warning" in lines and not any("a warning" in line and "it/s" in line for line in lines)


def test_streams_are_put_back_after_an_exception(console):
    stream, handlers = console
    with pytest.raises(KeyboardInterrupt), redirect_stderr(stream), logging_above_the_bar():
        assert handlers[0].stream is not stream
        raise KeyboardInterrupt
    assert all(handler.stream is stream for handler in handlers)
