"""Processes launched by ``torchrun``."""

import socket
import subprocess
import sys


def launch(nb_processes, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(nb_processes),
        *map(str, arguments),
    ]
    if nb_processes > 1:
        command[3:3] = ["--master-port", str(free_port())]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def free_port():
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return port.getsockname()[1]
