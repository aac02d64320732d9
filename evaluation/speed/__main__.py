"""``python evaluation/speed``, or ``python -m speed`` with ``evaluation`` on the path."""

import logging
import os.path
import sys

if not __package__:  # Run as a folder: the package's parent belongs on the path, its modules do not.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from speed.command_line import main

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
