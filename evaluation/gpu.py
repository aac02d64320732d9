"""
One command for a machine that has a GPU for minutes, torch and timm, and nothing else of ours.

    python evaluation/gpu.py --pack DIR --data data     # here: collect what must travel, in pieces under 64 MB
    python evaluation/gpu.py --part tests --minutes 9   # there: the tests marked ``cuda``
    python evaluation/gpu.py --part speed --minutes 9   # there: epochs of ResNet-18 in float32, TF32 and bfloat16
    python evaluation/gpu.py --part train --minutes 9   # there: a short training of ResNet-18 on CIFAR-10

A part ends before the minutes are over; the same command does what is left. Results are files of at most 16 MiB in
``OUTPUT/PART``. ``result.json`` says what passed, what failed, and whether all is done. With ``--device cpu`` each part
runs in a small form, which shows that it runs.
"""

import os
import sys

# The code beside this file comes first. Packages that travelled with it come last: the machine may have its own.
sys.path.insert(1, os.path.dirname(sys.path[0]))
sys.path.append(os.path.join(sys.path[1], "packages"))

from bare_machine.command_line import main

if __name__ == "__main__":
    main()
