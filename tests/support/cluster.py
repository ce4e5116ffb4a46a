"""A real SLURM of four nodes on one machine, in one folder, without root's configuration.

Jobs of two nodes run on node1 and node2 (partition main), and on node3 and node4, which the partitions shared
and urgent have in common: there a job of urgent drives one of shared out.
"""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "slurmctld", "slurmd", "munged", "munge")
NODES = ("node1", "node2", "node3", "node4")
PATH = os.environ["PATH"] + ":/usr/sbin"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
ReturnToService=2
KillWait=20
MinJobAge=3600
FirstJobId={first_job}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/log/slurmctld
SlurmdPidFile={dir}/%n.pid
SlurmdLogFile={dir}/log/%n
SlurmdSpoolDir={dir}/spool-%n
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=node1,node2 PriorityTier=1 Default=YES MaxTime=60 State=UP
PartitionName=shared Nodes=node3,node4 PriorityTier=1 GraceTime=60 MaxTime=60 State=UP
PartitionName=urgent Nodes=node3,node4 PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""
NODE = "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=64000"


class Cluster:
    """SLURM's daemons, and jobs on them.

    Args:
        folder: Of short path: a Unix socket lies in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",  # left over in the shell that submits: several jobs cannot all take it
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        for name in ("munge", "state", "log", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self._configure()
        self._start_munge()
        conf = self.environment["SLURM_CONF"]
        self.run("slurmctld", "-c", "-f", conf)
        self.wait_for(lambda: "is UP" in self.query("scontrol", "ping"))
        for node in NODES:
            self.run("slurmd", "-N", node, "-f", conf)
        states = ("sinfo", "-h", "-N", "-p", "main,shared", "-o", "%T")
        self.wait_for(lambda: self.run(*states).split() == ["idle"] * len(NODES))

    def _configure(self) -> None:
        first, *ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = [
            NODE.format(node=node, host=host, port=port) for node, port in zip(NODES, ports, strict=True)
        ]
        names = {"dir": self.folder, "host": host, "user": getpass.getuser(), "nodes": "\n".join(nodes)}
        conf = CONF.format(**names, first_job=os.getpid() % 9000 + 1, port=first)
        (self.folder / "slurm.conf").write_text(conf)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        options = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self.run("munged", "--force", *(f"--{option}={folder / name}" for option, name in options.items()))

    def stop(self) -> None:
        self.query("scancel", "--user", getpass.getuser())
        with contextlib.suppress(AssertionError):
            self.wait_for(lambda: not self.query("squeue", "-h"))
        for file in (*(f"{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid"):
            with contextlib.suppress(OSError):
                os.kill(int((self.folder / file).read_text()), signal.SIGTERM)

    def run(self, *command: str) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def query(self, *command: str) -> str:
        """Answer of a command that may fail."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120
        ).stdout

    def submit(self, *arguments: str) -> str:
        return self.run("sbatch", "--parsable", "--time=10", *arguments)

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def wait(self, job: str, seconds: float = 240) -> str:
        self.wait_for(lambda: self.state(job) in FINAL, seconds)
        return self.state(job)

    def wait_for(self, condition, seconds: float = 120) -> None:
        """Wait until something is so: SLURM does nothing at once."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "timed out"
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
