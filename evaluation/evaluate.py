"""`art-clat evaluate`, without the console script."""

import sys

from art_clat.cli import main

sys.path.pop(0)  # the scripts beside this one are no modules of the user's
main(["evaluate", *sys.argv[1:]])
