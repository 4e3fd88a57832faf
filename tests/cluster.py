"""A real SLURM on this machine for the tests: one controller, two nodes, on free ports and in folders of their own."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from support import ROOT, environment, free_port, until

T = TypeVar("T")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
FirstJobId={first}
KillWait=20
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=16
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=16
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def search_path() -> str:
    """Debian keeps the daemons in sbin, which not every user has on the path."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass
class Slurm:
    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return environment() | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": search_path(),
            "MASTER_ADDR": "127.0.0.1",  # node1 and node2 are this machine, but no name server knows them
            "SCTD_VENV": str(Path(sys.executable).parents[1]),
        }

    def run(self, *command: object, cwd: Path = ROOT, **variables: object) -> str:
        """Standard output of a client command that must succeed."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment | {name: str(value) for name, value in variables.items()},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says of a job, such as JobState or RunTime."""
        return self.run("scontrol", "show", "job", job).split(f"{name}=")[1].split()[0]

    def wait(self, job: str, *states: str, seconds: float = 240) -> str:
        """The state of a job once it is one of `states`."""
        found = lambda: state if (state := self.field(job, "JobState")) in states else ""  # noqa: E731
        return until(found, f"job {job} {states}", seconds)

    def start(self) -> None:
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        for name in ("state", "tmp-node1", "tmp-node2"):  # PMIx keeps a node's sockets in TmpFS
            (self.folder / name).mkdir()
        host = socket.gethostname()
        ports = {name: free_port() for name in ("port", "port1", "port2")}
        ports["first"] = free_port()  # jobs of two clusters on this machine must not meet at one port: slurm/job.sh
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        config = CONFIG.format(host=host, folder=self.folder, user=user, **ports)
        (self.folder / "slurm.conf").write_text(config, encoding="utf-8")
        munge = {name: f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file")}
        self._daemon(
            "munged", "--foreground", "--force", *munge.values(), f"--socket={self.folder}/munge.socket",
            f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munge.log",
        )  # fmt: skip
        until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node)
        until(self._ready, "both nodes idle")

    def _ready(self) -> bool:
        command = ["sinfo", "-h", "-o", "%T %D"]
        return "idle 2" in subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def stop(self) -> None:
        subprocess.run(["scancel", "--user", str(os.getuid())], env=self.environment, check=False, timeout=60)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
