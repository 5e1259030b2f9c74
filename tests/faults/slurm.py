"""A private Slurm: two nodes on this machine, with ports, keys and folders of their own, gone when it is closed."""

import getpass
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("127.0.0.1", "127.0.0.2")  # names that every machine resolves, as processes of several nodes must

# cred_expire is also how long a requeued job waits (120 s unless told). linuxproc finds processes by their parents and
# needs no cgroups; pgid would miss the workers, which have sessions of their own. A limit of one minute is the shortest
# there is, and OverTimeLimit gives a slow machine one more before the job is killed.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
OverTimeLimit=1
ReturnToService=2
NodeName={nodes[0]} NodeHostName={host} Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName={nodes[1]} NodeHostName={host} Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no Slurm here, or nothing."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if absent:
        return f"needs Slurm and munge (no {', '.join(absent)}); Debian: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "needs root, whom munge and slurmd insist on"


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])


def wait_until(is_so: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


class Slurm:
    """Two nodes of two cores; partition `high` preempts `low`, whose jobs are given a minute's grace."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self.folder, self.daemons = folder, list[subprocess.Popen[bytes]]()
        names = {"host": platform.node(), "user": getpass.getuser(), "folder": folder, "nodes": NODES}
        (folder / "slurm.conf").write_text(CONFIG.format(ports=_free_ports(3), **names))
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        for name in ("state", *NODES):
            (folder / name).mkdir()
        files = {name: str(folder / f"munge.{name}") for name in ("socket", "pid", "seed", "log", "key")}
        flags = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
        try:
            self._start("munged", "--foreground", "--force", *flags)
            wait_until((folder / "munge.socket").exists, "munged answers")
            self._start("slurmctld", "-D")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            wait_until(lambda: self.call("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2", "two idle nodes")
        except BaseException:
            self.close()
            raise

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}{len(self.daemons)}.log").open("wb") as log:
            # A group of its own: Ctrl-C in pytest is not meant for the daemons, which close() still needs.
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def close(self) -> None:
        if len(self.daemons) > 1:
            self.call("scancel", "--user", getpass.getuser(), check=False)
            wait_until(lambda: not self.call("squeue", "-h", check=False), "no jobs left")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(timeout=60)

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, **variables: str) -> "Job":
        export = "--export=" + ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
        number = self.call("sbatch", "--parsable", export, f"--output={self.folder}/job-%j.out", *words)
        return Job(self, number)


class Job:
    def __init__(self, slurm: Slurm, number: str) -> None:
        self.slurm, self.number = slurm, number

    def facts(self) -> dict[str, str]:
        words = self.slurm.call("scontrol", "show", "job", "--oneliner", self.number).split()
        return dict(word.partition("=")[::2] for word in words)

    def output(self) -> str:
        path = self.slurm.folder / f"job-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def end(self) -> dict[str, str]:
        """What Slurm says of the job when it has ended for good: JobState, Restarts, ExitCode, ..."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        try:
            wait_until(lambda: self.facts()["JobState"] in ends, f"job {self.number} ends", 300)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.facts()}\n{self.output()}") from None
        return self.facts()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
