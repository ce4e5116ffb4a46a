"""What W&B refuses is one clear line: the real client and the stand-in for its server."""

import json
import os
import subprocess
import sys

import pytest
from wandb_server import Server

from ldm.cli import LIMIT

CODE = """
import json, sys
from ldm.io import wandb_client
from ldm.loggers import client

wandb_client.TIMEOUT = 6
for line in sys.stdin:
    try:
        run = client.begin({"id": "abc12345", "resume": "allow", "dir": sys.argv[1], **json.loads(line)})
        print("begun", flush=True)
        sys.stdin.readline()
        run.log({"train/loss": 1.0}, step=0)
        print(client.end(run, 0, 20, lambda: False), flush=True)
    except ValueError as error:
        print(f"{error.exit_code if hasattr(error, 'exit_code') else 2} {error}", flush=True)
"""


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    """Begins runs, one after the other, in a process whose home and configuration cannot be written."""
    folder = tmp_path_factory.mktemp("run")
    home = {"HOME": "/proc/nowhere", "WANDB_CACHE_DIR": str(folder), "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", CODE, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **server.environment, **home}, **pipes) as process:

        def ask(line):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline().rstrip("\n")

        yield lambda **settings: ask(json.dumps({"project": "ldm", **settings}))
        assert process.communicate(timeout=60)[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("entity nobody not found", "check --wandb.project and --wandb.entity"),
        ("storage quota exceeded", "set --wandb.mode to offline"),
        ("run abc12345 was previously created and deleted", "delete wandb-id.txt in the run's folder"),
    ],
)
def test_what_the_server_refuses_is_one_line(server, client, message, advice):
    server.refusals = {"upsertBucket": message}
    line = client()
    server.refusals = {}
    assert line.startswith("2 wandb.mode: W&B cannot start (") and message in line and advice in line
    assert len(line) <= LIMIT


@pytest.mark.slow
def test_a_project_that_cannot_be_is_one_line(client):
    line = client(project="a/b")
    assert (
        line.startswith("2 wandb.mode: W&B cannot start (Invalid project name 'a/b'") and len(line) <= LIMIT
    )


@pytest.mark.slow
@pytest.mark.parametrize(("status", "code"), [(401, 2), (404, 2), (429, 75), (500, 75)])
def test_a_status_that_may_pass_may_be_repeated(server, client, status, code):
    server.mode = status
    line = client()
    server.mode = "well"
    assert line.startswith(f"{code} wandb.mode: ") and str(status) in line


@pytest.mark.slow
def test_rows_that_the_server_refuses_later_are_reported(server, client):
    """The client drops them, and ends as if it had sent them."""
    assert client() == "begun"
    server.mode = 403
    assert client() == "rows were refused with HTTP status 403"
    server.mode = "well"
    assert client() == "begun"
    assert client() == "None"
