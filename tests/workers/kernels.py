"""Kernels for notebooks that begin with torch and transformers loaded: seconds less for each page.

    python kernels.py SOCKET              loads them, then forks a kernel for whoever asks
    python kernels.py SOCKET ARGUMENTS    is a kernel with these: asks for one, and stays until it has ended

A forked kernel takes over the folder, the environment and the outputs of the process that asked. The names that a page uses are
still its own to import.
"""

import json
import os
import select
import signal
import socket
import sys


def ask(path: str, *arguments: str) -> None:
    """Have a kernel forked, hand signals on to it, and end when it does."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        told = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(line, [len(told).to_bytes(8, "big")], [0, 1, 2])
        line.sendall(told)
        kernel = int.from_bytes(line.recv(8), "big")
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda number, _: os.kill(kernel, number))
        line.recv(1)  # nothing comes: the end of the kernel closes the line


def be_kernel(line: socket.socket) -> None:
    """In the forked process: become the kernel that was asked for."""
    size, outputs, *_ = socket.recv_fds(line, 8, 3)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += line.recv(1 << 16)
    arguments, folder, environment = json.loads(told)
    for number, output in enumerate(outputs):
        os.dup2(output, number)
    os.environ.clear()
    # the process that forked us is another than the one that waits for us
    os.environ.update({name: value for name, value in environment.items() if name != "JPY_PARENT_PID"})
    os.chdir(folder)
    line.sendall(os.getpid().to_bytes(8, "big"))
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=arguments)


def serve(path: str) -> None:
    """Load what takes seconds, and fork a kernel for each who asks, until the standard input is closed."""
    from peft import get_peft_model  # noqa: F401
    from transformers import AutoModelForCausalLM, BertForSequenceClassification, LlamaForCausalLM, Trainer  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            line, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return be_kernel(line)
            line.close()


if __name__ == "__main__":
    ask(*sys.argv[1:]) if len(sys.argv) > 2 else serve(sys.argv[1])
