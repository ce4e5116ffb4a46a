"""Offline records of the real client, read back by its own command."""

import json
import os
import subprocess
import sys


class Records:
    """The records of one offline-run folder.

    Args:
        folder: The folder, once the process that wrote it has ended.
    """

    def __init__(self, folder):
        leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        quiet = {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}
        lines = subprocess.run(leet, check=True, env=os.environ | quiet, capture_output=True, text=True)
        self.records = [json.loads(line) for line in lines.stdout.splitlines()]

    def of(self, kind):
        """All records of one type, in order."""
        return [record[kind] for record in self.records if record["type"] == kind]

    def merged(self, kind):
        """The last value of each key of "config" or "summary"."""
        merged = {}
        for record in self.of(kind):
            merged |= record["update"]
        return merged

    def history(self):
        """The logged rows, in order."""
        return [row["item"] for row in self.of("history")]
