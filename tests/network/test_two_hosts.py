"""Two hosts with addresses of their own: torchrun trains over them, and ends when one is cut off."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.shapes.packer import Settings, pack

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 10


class Hosts:
    """Two network namespaces, joined by a cable."""

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self.names = [f"ldm-{os.getpid()}-{i}" for i in (0, 1)]
        self.cables = [f"ldm{os.getpid()}{end}" for end in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(self, *arguments: str) -> None:
        subprocess.run([self._ip, *arguments], check=True, capture_output=True, text=True)

    def connect(self) -> None:
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        one, two = self.cables
        self.ip(
            "link", "add", one, "netns", self.names[0], "type", "veth", "peer", two, "netns", self.names[1]
        )
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            self.ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            self.ip("-n", name, "link", "set", cable, "up")

    def cut(self) -> None:
        self.ip("-n", self.names[1], "link", "set", self.cables[1], "down")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run([self._ip, "netns", "delete", name], capture_output=True)

    def torchrun(self, host: int, log: Path, *arguments: str) -> subprocess.Popen:
        """One process per host; rank 0 on the first."""
        command = [
            *(self._ip, "netns", "exec", self.names[host]),
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *(f"--node-rank={host}", f"--master-addr={self.addresses[0]}", "--master-port=29400"),
            *(
                "-m",
                "--",
                "ldm.fit",
                "--trainer.num_nodes=2",
                "--trainer.devices=1",
                "--trainer.strategy=ddp",
            ),
            *arguments,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": self.cables[host]}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT
        )


@pytest.fixture
def hosts(programs):
    (ip,) = programs("iproute2", "ip")
    hosts = Hosts(ip)
    try:
        try:
            hosts.connect()
        except subprocess.CalledProcessError as error:
            forbidden = f"no network namespaces here: {error.stderr.strip()}"
            (pytest.fail if os.environ.get("LDM_CI") else pytest.skip)(forbidden)
        yield hosts
    finally:
        hosts.remove()


def train(hosts, folder, steps):
    """Start a process on each host; return the processes and their logs."""
    pack(folder / "shards", Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
    options = {
        "run": folder / "run",
        "wandb.mode": "disabled",
        "data.train": folder / "shards" / "train-{000000..000002}.tar",
        "data.val": folder / "shards" / "val-000000.tar",
        "data.batch_size": 4,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.log_every_n_steps": 1,
        "trainer.strategy": "ddp",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "sample_grid.num": 2,
        "watchdog.timeout": TIMEOUT,
    }
    arguments = ["--config", "configs/demo/autoencoder.yaml", *(f"--{k}={v}" for k, v in options.items())]
    logs = [folder / f"{host}.log" for host in (0, 1)]
    return [hosts.torchrun(host, logs[host], *arguments) for host in (0, 1)], logs


@pytest.mark.slow
def test_two_hosts_train_to_the_end(hosts, tmp_path):
    processes, logs = train(hosts, tmp_path, 10)
    try:
        assert [process.wait(200) for process in processes] == [0, 0], logs[0].read_text()
    finally:
        for process in processes:
            process.kill()
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["global_step"], last["progress"]["samples"]) == (10, 10 * 2 * 4)


@pytest.mark.slow
def test_a_host_that_is_cut_off_ends_the_job_within_the_timeout_and_by_its_name(hosts, tmp_path):
    processes, logs = train(hosts, tmp_path, 100_000)
    metrics = tmp_path / "run" / "metrics.csv"
    try:
        started = time.monotonic()
        while not metrics.exists() or metrics.read_text().count("\n") < 4:
            assert time.monotonic() - started < 200, logs[0].read_text()
            time.sleep(0.2)
        hosts.cut()
        assert all(process.wait(200) != 0 for process in processes)
    finally:
        for process in processes:
            process.kill()
    outputs = [log.read_text() for log in logs]
    assert f"(--watchdog.timeout {TIMEOUT}): process 1 (" in outputs[0]
    assert "cannot be heard: killed, stopped, or cut off" in outputs[0]
    assert "process 0 cannot be heard: killed, stopped, or cut off from this one" in outputs[1]
