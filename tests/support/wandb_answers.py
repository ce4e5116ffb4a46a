"""Answers of the stand-in for W&B's server to GraphQL: runs, files, artifacts, sweeps."""

import json
import re

ENTITY = "me"


class Answers:
    """One answer; the server is locked meanwhile.

    Args:
        store: The server.
    """

    def __init__(self, store):
        self.store = store

    def to(self, text, variables):
        for part, answer in {
            "createAgent": self.new_agent,
            "agentHeartbeat": self.heartbeat,
            "SweepWithRuns": self.sweep,
            "upsertBucket": self.upsert,
            "RunResumeStatus": self.resume,
            "createRunFiles": self.new_files,
            "Viewer": self.viewer,
            "viewer": self.viewer,
        }.items():
            if part in text:
                return answer(variables)
        if "serverInfo" in text:
            return {"serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "9"}}}
        fields = re.findall(r"(\w+)\s*:\s*__type", text)
        return dict.fromkeys([*fields, "__type"])

    def viewer(self, variables):
        user = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        info = {"cliVersionInfo": {"max_cli_version": "9"}, "latestLocalVersionInfo": None, "features": []}
        return {"viewer": {**user, "teams": {"edges": []}}, "serverInfo": info}

    def upsert(self, variables):
        name = variables.get("name") or variables["id"].removeprefix("id-")
        is_new = name not in self.store.runs
        run = self.store.run(name)
        run.project = variables.get("project") or run.project
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        run.attributes |= {key: value for key, value in variables.items() if value not in (None, "")}
        return {"upsertBucket": {"bucket": self.bucket(run), "inserted": is_new}}

    def resume(self, variables):
        run = self.store.runs.get(variables["name"])
        entity = {"id": "e", "name": ENTITY}
        if run is not None and run.project != variables["project"]:
            run = None
        return {
            "model": {
                "id": "p",
                "name": variables["project"],
                "entity": entity,
                "bucket": run and self.bucket(run),
            }
        }

    def bucket(self, run):
        counts = {f"{kind}LineCount": len(run.lines[kind]) for kind in ("history", "events")}
        entity = {"id": "e", "name": ENTITY}
        return {
            **counts,
            "logLineCount": len(run.lines["console"]),
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.attributes.get("displayName", run.name),
            "description": None,
            "notes": None,
            "sweepName": run.attributes.get("sweep"),
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "historyTail": json.dumps(run.lines["history"][-1:]),
            "eventsTail": json.dumps(run.lines["events"][-1:]),
            "wandbConfig": json.dumps({"t": 1}),
            "tags": run.attributes.get("tags", []),
            "project": {"id": "p", "name": run.project, "entity": entity},
        }

    def new_files(self, variables):
        base = f"{self.store.url}/upload/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{base}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def new_agent(self, variables):
        agent = f"{variables['sweep']}/{len(self.store.agents)}"
        self.store.agents[agent] = []
        return {"createAgent": {"agent": {"id": agent}}}

    def sweep(self, variables):
        sweep = self.store.sweeps.get(variables["sweep"])
        found = sweep and {
            "id": "s",
            "name": variables["sweep"],
            "config": sweep.config,
            "runs": {"edges": []},
        }
        return {"project": {"sweep": found}}

    def heartbeat(self, variables):
        """Give an agent its next trial, stop one that is to be stopped, and end it after the last."""
        sweep, running = self.store.sweeps[variables["id"].split("/")[0]], json.loads(variables["runState"])
        commands = [{"type": "stop", "run_id": name} for name in running if name in sweep.stopped]
        if not running and sweep.trials:
            name, arguments = sweep.trials.pop(0)
            self.store.agents[variables["id"]].append(name)
            settings = {key: {"value": value} for key, value in arguments.items()}
            commands = [{"type": "run", "run_id": name, "program": "ldm.fit", "args": settings}]
        elif not running:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}
