"""Processes joined by gloo, for the tests of several."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT_S = 280


def environment(**more):
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_ranks(code, ranks=2):
    """Run `code` in so many processes, as torchrun would start them; one that hangs fails the test."""
    joined = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **joined),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(outputs)
    return outputs


def launch(flags, arguments, ranks=2):
    """`accelerate launch FLAGS ARGUMENTS`; its whole process group ends with the test."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_processes", str(ranks)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", free_port(), *arguments]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output = process.communicate(timeout=TIMEOUT_S)[0].decode()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output
