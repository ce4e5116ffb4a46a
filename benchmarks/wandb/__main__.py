"""What logging to W&B costs and survives, with the real client and a stand-in for its server on loopback.

  python -m benchmarks.wandb kills --kills 20      a run online and a run offline, killed at random moments
  python -m benchmarks.wandb speed                 step time with a server that is well, slow, silent; ends
  python -m benchmarks.wandb start                 processor time of a start, online and without
  python -m benchmarks.wandb sends                 rows, images, bytes for 1,000 steps of each configuration
  python -m benchmarks.wandb sends --config X ...  the same of one, measured

Exit code 1 if a row of a killed run is missing, there twice, or differs from the undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from wandb_runs import Tiny, clients, end_clients  # noqa: E402
from wandb_server import Server  # noqa: E402

from benchmarks.wandb.bounds import bounds  # noqa: E402
from data.shapes.packer import Settings, pack  # noqa: E402

KINDS = ("process", "group", "client")
PER_KILL = 6
"""Steps of the run for each kill."""
TIMED = (
    "train/step_seconds",
    "train/images_per_second",
    "train/images_per_second_per_device",
    "train/data_wait",
)
"""Values that no two runs share."""


def shapes(folder: Path) -> Path:
    """Pack a few shapes."""
    pack(folder / "shapes", Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
    return folder / "shapes"


def rows(server: Any, run: Tiny) -> list[dict[str, Any]]:
    """Rows of a run on the server, without what no two runs share."""
    own, files = {*TIMED, "_timestamp", "_runtime"}, server.runs[run.id].files

    def shown(value: Any) -> Any:
        return (files[value["path"]], value["caption"]) if isinstance(value, dict) else value

    return [{k: shown(v) for k, v in row.items() if k not in own} for row in server.runs[run.id].rows]


def kill(run: Tiny, options: Sequence[str], kind: str, chance: random.Random) -> str:
    """Start a run, kill something of it at a random moment; return a line of the table."""
    before = len(run.rows)
    with run.started(*options, BENCHMARK_STEP_SECONDS="0.1") as process:
        while process.poll() is None and len(run.rows) < before + 2:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 2.0))
        if kind == "client":
            for number in clients(run.server):
                os.kill(number, signal.SIGKILL)
            time.sleep(0.3)
            process.send_signal(signal.SIGUSR1)
        elif kind == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
    return f"| {kind} | {len(run.rows)} rows in metrics.csv | exit code {process.returncode} |"


def kills(folder: Path, options: argparse.Namespace) -> int:
    """Kill an online and an offline run again and again; compare with an undisturbed one."""
    shards, chance, steps = shapes(folder), random.Random(options.seed), PER_KILL * options.kills + 12
    wrong = 0
    with Server() as server:
        length = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=4"]
        slow = [*length, "--trainer.callbacks+=benchmarks.wandb.clock.Slow"]
        whole = Tiny(shards, folder / "whole", server.environment)
        whole.train(*length, seconds=3000)
        for mode in options.modes:
            run = Tiny(shards, folder / mode, server.environment)
            for number in range(options.kills):
                kind = KINDS[number % len(KINDS)]
                print(mode, kill(run, [*slow, f"--wandb.mode={mode}"], kind, chance), flush=True)
            run.train(*length, f"--wandb.mode={mode}", seconds=3000)
            print(run.command("ldm.sync", run.run).strip(), flush=True)
            expected, found = rows(server, whole), rows(server, run)
            is_same = expected == found
            wrong += not is_same
            places = [row["_step"] for row in found]
            twice, missing = len(places) - len(set(places)), {row["_step"] for row in expected} - set(places)
            verdict = "as undisturbed" if is_same else "DIFFERENT"
            print(
                f"{mode}: {len(found)} rows, {twice} twice, {sorted(missing)} missing: {verdict}", flush=True
            )
        end_clients(server.environment)
    return int(wrong > 0)


@contextmanager
def ill(server: Any, how: str) -> Iterator[None]:
    """Have the server answer late or not at all once a run has begun."""
    if how == "5 s late":
        server.delay = 5.0
    elif how == "silent":
        server.mode = "silent"
    try:
        yield
    finally:
        server.delay, server.mode = 0.0, "well"


def speed(folder: Path, options: argparse.Namespace) -> int:
    """Print step times and ends with each kind of server, in turn."""
    shards = shapes(folder)
    print("| server | processor ms a step | wall ms a step | MiB of the client | seconds to the end | code |")
    with Server() as server:
        for number in range(options.rounds):
            for how in ("disabled", "well", "5 s late", "silent"):
                run = Tiny(shards, folder / f"{how.replace(' ', '')}-{number}", server.environment)
                print(timed(server, run, how, options), flush=True)
    return 0


def timed(server: Any, run: Tiny, how: str, options: argparse.Namespace) -> str:
    """Train with a server that becomes ill after the first steps; return a line of the table."""
    file = run.run.with_suffix(".times")
    mode = "disabled" if how == "disabled" else "online"
    length = [f"--trainer.max_steps={options.steps}", "--trainer.limit_val_batches=0", f"--wandb.mode={mode}"]
    clock = ["--trainer.callbacks+=benchmarks.wandb.clock.Clock", f"--trainer.callbacks.file={file}"]
    memory = 0.0
    with run.started(*length, *clock) as process:
        run.wait_for_steps(process, 3)
        with ill(server, how):
            while not file.exists() and process.poll() is None:
                memory = max([memory, *map(resident, clients(run.server))])
                time.sleep(0.05)
            begin = time.monotonic()
            process.communicate()
    times = [tuple(map(float, line.split())) for line in file.read_text().splitlines()[5:]]
    cpu, wall = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    end = time.monotonic() - begin
    return f"| {how} | {cpu:.2f} | {wall:.2f} | {memory:.0f} | {end:.1f} | {process.returncode} |"


def resident(process: int) -> float:
    """Return MiB of memory of a process; 0 of one that is gone."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 2**20


def start(folder: Path, options: argparse.Namespace) -> int:
    """Print the processor time of a run of one step, online and without, in turn."""
    shards = shapes(folder)
    seconds: dict[str, list[float]] = {"disabled": [], "online": []}
    with Server() as server:
        for number in range(options.rounds):
            for mode, times in seconds.items():
                run = Tiny(shards, folder / f"{mode}{number}", server.environment)
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                run.train(f"--wandb.mode={mode}", "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    middle = {mode: statistics.median(times) for mode, times in seconds.items()}
    extra = middle["online"] - middle["disabled"]
    print(f"processor seconds of a run of one step: {seconds}; online takes {extra:.2f} more")
    return 0


def sends(folder: Path, options: argparse.Namespace) -> int:
    """Print what a configuration sends for 1,000 steps, from a run of it with the options that are given.

    Without options what all configurations send, by their settings.
    """
    if not options.fit:
        print("\n".join(bounds()))
        return 0
    with Server() as server:
        home = Tiny(folder, folder / "run", server.environment)
        command = [sys.executable, "-m", "ldm.fit", *options.fit, "--wandb.mode=online", f"--run={home.run}"]
        subprocess.run(command, env=home.environment(), check=True)
        run = server.runs[home.id]
        steps = 1 + max(row["trainer/global_step"] for row in run.rows)
        grids = [file for name, file in run.files.items() if name.startswith("media/")]
        console = sum(map(len, run.lines["console"]))
        counts = {"rows": len(run.rows), "grids": len(grids), "KiB of grids": sum(map(len, grids)) / 1024}
        counts["KiB of rows"] = sum(len(line) for line in run.lines["history"]) / 1024
        counts["KiB in all"] = run.sent / 1024
        print(f"{steps} steps: " + ", ".join(f"{name} {count:.0f}" for name, count in counts.items()))
        per = 1000 / steps
        print("for 1,000 steps: " + ", ".join(f"{name} {per * count:.0f}" for name, count in counts.items()))
        print(f"console {console / 1024:.1f} KiB, system metrics {len(run.lines['events'])} rows")
    return 0


def main() -> int:
    """Run one of the parts; return its exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.wandb", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--kills", type=int, default=20, help="Of each run.")
    parser.add_argument("--modes", nargs="+", default=["online", "offline"], help="Of `kills`.")
    parser.add_argument("--steps", type=int, default=200, help="Of each run of `speed`.")
    parser.add_argument("--rounds", type=int, default=3, help="Of `speed` and `start`.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments of kills.")
    options, fit = parser.parse_known_args()
    options.fit = fit
    with tempfile.TemporaryDirectory(prefix="wandb-") as folder:
        return next(part for part in PARTS if part.__name__ == options.part)(Path(folder), options)


PARTS = (kills, speed, start, sends)

if __name__ == "__main__":
    sys.exit(main())
