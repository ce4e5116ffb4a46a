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
            "query ArtifactType": self.artifact_type,
            "query ArtifactMembershipByName": self.membership,
            "query FetchArtifactManifest": self.manifest,
            "query GetArtifactMembershipFileUrls": self.file_urls,
            "useArtifact(": self.use,
            "createAgent": self.new_agent,
            "createArtifactManifest": self.new_manifest,
            "updateArtifactManifest": self.new_manifest,
            "createArtifactFiles": self.new_artifact_files,
            "commitArtifact": self.commit,
            "createArtifact(": self.new_artifact,
            "agentHeartbeat": self.heartbeat,
            "SweepWithRuns": self.sweep,
            "upsertBucket": self.upsert,
            "UpsertView2": self.view,
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

    def view(self, variables):
        self.store.views.append(variables)
        return {"upsertView": {"view": {"id": "v", "name": "nw-view-v"}, "inserted": True}}

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

    def new_artifact(self, variables):
        """Make a version, unless one of its name has these contents: then that one gets the aliases."""
        given = variables["input"]
        same = self.versions(given["entityName"], given["projectName"], given["artifactCollectionName"])
        found = next((each for each in same if each["digest"] == given["digest"]), None)
        if found is None:
            name = f"artifact-{len(self.store.artifacts)}"
            found = {**given, "id": name, "state": "PENDING", "version": len(same), "aliases": []}
            self.store.artifacts[name] = found
        for alias in given["aliases"]:
            for each in same:
                each["aliases"] = [kept for kept in each["aliases"] if kept["alias"] != alias["alias"]]
            found["aliases"].append(alias)
        artifact = {key: found[key] for key in ("id", "state", "digest")} | {"versionIndex": found["version"]}
        sequence = {"id": "sequence", "latestArtifact": None, "state": "READY", "name": "sequence"}
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": sequence}}}

    def new_manifest(self, variables):
        name = variables.get("artifactID") or variables["artifactManifestID"].removeprefix("manifest-")
        upload = {"uploadUrl": f"{self.store.url}/upload/{name}/manifest", "uploadHeaders": []}
        manifest = {"id": f"manifest-{name}", "file": {"id": "file", **upload}}
        answer = {"artifactManifest": manifest}
        return {"createArtifactManifest": answer, "updateArtifactManifest": answer}

    def new_artifact_files(self, variables):
        edges = []
        for file in variables["input"]["artifactFiles"]:
            name, path = file["artifactID"], file["name"]
            url = f"{self.store.url}/upload/{name}/{path}"
            node = {"storagePath": path, "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": {**node, "artifact": {"id": name}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def commit(self, variables):
        artifact = self.store.artifacts[variables["artifactID"]]
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": artifact["digest"]}}}

    def artifact_type(self, variables):
        found = self.find_artifact(variables)
        return {"project": {"artifact": found and {"artifactType": {"name": found["artifactTypeName"]}}}}

    def membership(self, variables):
        found = self.find_artifact(variables)
        if found is None:
            return {"project": {"artifactCollectionMembership": None}}
        project = {
            "id": "p",
            "internalId": "1",
            "name": found["projectName"],
            "entity": {"id": "e", "name": ENTITY},
        }
        name = found["artifactCollectionName"]
        collection = {"__typename": "ArtifactSequence", "id": "c", "name": name, "project": project}
        aliases = [{"__typename": "ArtifactAlias", "id": "a", "alias": x["alias"]} for x in found["aliases"]]
        dates = {"createdAt": "2026-01-01T00:00:00", "updatedAt": None}
        artifact = {
            **{key: found[key] for key in ("description", "metadata", "digest", "historyStep")},
            **dates,
            "__typename": "Artifact",
            "id": found["id"],
            "artifactSequence": collection,
            "versionIndex": found["version"],
            "artifactType": {"name": found["artifactTypeName"]},
            "ttlDurationSeconds": -1,
            "ttlIsInherited": False,
            "tags": [],
            "state": "COMMITTED",
            "size": 1,
            "commitHash": None,
            "fileCount": 1,
            "aliases": [{**alias, "artifactCollection": collection} for alias in aliases],
        }
        member = {"__typename": "ArtifactCollectionMembership", "id": "m", **dates}
        member["versionIndex"] = found["version"]
        member |= {"aliases": aliases, "artifactCollection": collection, "artifact": artifact}
        return {"project": {"artifactCollectionMembership": member}}

    def use(self, variables):
        given = variables.get("input", variables)
        self.store.run(given["runName"]).used.append(given["artifactID"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def manifest(self, variables):
        url = f"{self.store.url}/upload/{variables['id']}/manifest"
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def file_urls(self, variables):
        name = f"{variables['collection']}:{variables['alias']}"
        found = self.find_artifact({**variables, "name": name})
        files = [path for path in self.store.runs[found["id"]].files if path != "manifest"]
        base = f"{self.store.url}/upload/{found['id']}"
        nodes = [{"__typename": "File", "name": path, "directUrl": f"{base}/{path}"} for path in files]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        member = {"files": {"pageInfo": page, "edges": [{"node": node} for node in nodes]}}
        collection = {"__typename": "ArtifactSequence", "artifactMembership": member}
        return {"project": {"artifactCollection": collection}}

    def versions(self, entity, project, name):
        """Those of a name, in order."""
        where = (entity or ENTITY, project, name)
        keys = ("entityName", "projectName", "artifactCollectionName")
        return [a for a in self.store.artifacts.values() if tuple(a[key] or ENTITY for key in keys) == where]

    def find_artifact(self, variables):
        """The version that was committed with an alias, or by its number."""
        collection, _, wanted = variables["name"].rpartition(":")
        found = [
            artifact
            for artifact in self.versions(
                variables.get("entity") or variables.get("entityName"),
                variables.get("project") or variables.get("projectName"),
                collection,
            )
            if artifact["state"] == "COMMITTED"
            and wanted in [f"v{artifact['version']}", *(each["alias"] for each in artifact["aliases"])]
        ]
        return found[-1] if found else None
