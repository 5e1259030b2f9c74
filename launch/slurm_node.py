"""`accelerate launch` on one node of a Slurm job: it outlives what stops the run, and its exit status says what did.

Slurm signals every process of a job: SIGUSR1 before the time limit, SIGTERM at preemption. The trainer answers with a
checkpoint, however long that takes. The launcher would die of the first, kill its workers 30 seconds after the second,
and return 1 whatever happened. Here it takes note of both and waits for its workers.

Exit status: 0 finished, 128 + signal stopped, 255 failed. srun returns the highest of all nodes, and when one fails it
sends SIGTERM to the others, so a failure has to be higher than a stop.
"""

import os
import signal
import sys

# The agent would put its own handlers in place of ours; one signal has to be left to it.
os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"

from accelerate.commands.launch import main

FAILED = 255


def launch() -> int:
    """Run the launcher on `sys.argv` and return the exit status of this node."""
    received: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # A handler, where ignoring would do for the launcher: ignored signals are inherited, and a worker that has not
        # reached its first step would miss them.
        signal.signal(number, lambda number, frame: received.append(number))
    sys.argv[1:1] = ["--machine_rank", os.environ["SLURM_NODEID"]]
    try:
        main()
    except (Exception, SystemExit) as error:
        if received:
            return 128 + received[0]
        print(error, file=sys.stderr)
        return FAILED
    finally:
        # srun sends SIGTERM as soon as another node has ended, and Python gives up its handlers before its exit status.
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(launch())
