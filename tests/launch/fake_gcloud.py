"""What `gcloud` does to TPUs and buckets, on this machine: a program for the PATH of launch/*.sh.

Everything is in the folder $FAKE_GCLOUD: `state.json` (queued resources and nodes), `calls.jsonl` (every argv),
`bucket/` (gs://) and `hosts/NODE.GENERATION/WORKER/`, the home of every host. Commands sent over ssh run as processes
of this machine. `plan.json` says what is to happen:

  workers         hosts of each node (1)
  states          states that a new queued resource goes through, one for each look
  faults          [{"match": pattern of the command, "times": n, "message": text, "code": exit code}]

`gcloud fake preempt NODE` takes a node away, and its processes with it.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_GCLOUD"])
STATES = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
VALUES = re.compile(r'value\[separator=","\]\((.*)\)$')


class Failure(Exception):
    """The command fails with a message and an exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def read(name, default):
    path = HOME / name
    return json.loads(path.read_text()) if path.exists() else default


@contextlib.contextmanager
def changing(name, default):
    """A file's content, written back in the end; no other process changes it meanwhile."""
    with (HOME / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = read(name, default)
        try:
            yield content
        finally:
            temporary = HOME / f"{name}.new"
            temporary.write_text(json.dumps(content))
            temporary.replace(HOME / name)


def world():
    return changing("state.json", {"requests": {}, "nodes": {}, "generations": {}})


def parse(argv):
    """Words and flags of a command."""
    words = [word for word in argv if not word.startswith("--") or word == "--"]
    flags = dict(word[2:].partition("=")[::2] for word in argv if word.startswith("--"))
    return words, flags


def fail_as_planned(argv):
    with changing("plan.json", {}) as plan:
        for fault in plan.get("faults", []):
            if re.search(fault["match"], " ".join(argv)) and fault["times"] > 0:
                fault["times"] -= 1
                raise Failure(f"ERROR: (gcloud) {fault['message']}", fault.get("code", 1))


def print_values(found, flags):
    """What --format="value[separator=","](...)" prints of resources."""
    for resource in found:
        values = []
        for path in VALUES.match(flags["format"]).group(1).split(","):
            value = resource
            for key in re.findall(r"basename\(\)|\w+", path):
                if key == "basename()":
                    value = value.rpartition("/")[2]
                else:
                    value = value[int(key)] if key.isdigit() else (value or {}).get(key, "")
            values.append(str(value))
        print(",".join(values))


def passes(resource, filter_):
    """Whether a resource passes --filter."""
    if match := re.fullmatch(r"name~(.*)", filter_):
        return re.search(match.group(1), resource["name"])
    key, value = re.fullmatch(r"labels\.(\w+)=(.*)", filter_).groups()
    return resource.get("labels", {}).get(key) == value


def labels(flags):
    return dict(pair.split("=") for pair in flags.get("labels", "").split(",") if pair)


def node_ids(name, flags):
    count = int(flags.get("node-count", 1))
    return [f"{flags.get('node-prefix', name)}-{i}" for i in range(count)] if count > 1 else [name]


def make_node(state, name, flags, status="READY"):
    generation = state["generations"][name] = state["generations"].get(name, 0) + 1
    state["nodes"][name] = {
        "name": f"projects/p/locations/z/nodes/{name}", "state": status, "health": "HEALTHY",
        "labels": labels(flags), "acceleratorType": flags["accelerator-type"], "generation": generation,
    }  # fmt: skip


def look(state, request):
    """A look at a queued resource lets it take its next step."""
    if request["coming"]:
        request["state"]["state"] = request["coming"].pop(0)
        if request["state"]["state"] == "ACTIVE":
            for name in node_ids(request["id"], request["flags"]):
                make_node(state, name, request["flags"])
    return request


def queued_resources(verb, name, flags):
    with world() as state:
        requests = state["requests"]
        if verb == "list":
            print_values([look(state, r) for r in requests.values() if passes(r, flags["filter"])], flags)
        elif verb == "create":
            if name in requests:
                raise Failure(f"ERROR: ALREADY_EXISTS: Resource '{name}' already exists")
            node = {"acceleratorType": flags["accelerator-type"], "labels": labels(flags)}
            requests[name] = {
                "id": name, "name": f"projects/p/locations/z/queuedResources/{name}", "flags": flags,
                "state": {"state": "ACCEPTED"}, "coming": list(read("plan.json", {}).get("states", STATES)),
                "tpu": {"nodeSpec": [{"node": node}]},
            }  # fmt: skip
        elif verb == "delete":
            if name not in requests:
                raise Failure("ERROR: NOT_FOUND")
            for node in node_ids(name, requests.pop(name)["flags"]):
                if state["nodes"].pop(node, None):
                    kill_processes(node, state["generations"][node])


def tpu_vm(verb, name, flags):
    with world() as state:
        nodes = state["nodes"]
        if verb == "list":
            print_values([node for node in nodes.values() if passes(node, flags["filter"])], flags)
        elif verb == "create":
            if name in nodes:
                raise Failure(f"ERROR: ALREADY_EXISTS: Resource '{name}' already exists")
            make_node(state, name, flags)
        elif verb == "delete":
            if not nodes.pop(name, None):
                raise Failure("ERROR: NOT_FOUND")
            kill_processes(name, state["generations"][name])


def workers():
    return int(read("plan.json", {}).get("workers", 1))


def host(node, generation, worker):
    return HOME / "hosts" / f"{node}.{generation}" / str(worker)


def ssh(name, flags):
    """Runs --command on the hosts that --worker names, at once; ends with the first exit code that is not 0."""
    import subprocess  # slow to import, and needed by no other command

    node = read("state.json", {"nodes": {}})["nodes"].get(name)
    if node is None:
        raise Failure(f"ERROR: NOT_FOUND: Resource '{name}' was not found")
    if node["state"] != "READY":
        raise Failure(f'ERROR: (gcloud.compute.tpus.tpu-vm.ssh) This TPU has terminal state "{node["state"]}"')
    chosen = range(workers()) if flags["worker"] == "all" else [int(flags["worker"])]
    running = []
    for worker in chosen:
        home = host(name, node["generation"], worker)
        home.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "HOME": str(home), "PATH": f"{HOME / 'host-bin'}:{os.environ['PATH']}",
            "FAKE_NODE": name, "FAKE_WORKER": str(worker),
        }  # fmt: skip
        # gcloud splits the command at its blanks, and ssh joins its arguments with blanks.
        command = " ".join(flags["command"].split(" "))
        running.append(subprocess.Popen(["bash", "-c", command], env=environment, cwd=home))
    codes = [process.wait() for process in running]
    if len(codes) > 1 and any(codes):
        print(f"##### Command execution failed with exit statuses {codes}. Continuing.", file=sys.stderr)
    raise Failure("", next((code for code in codes if code), 0))


def kill_processes(node, generation):
    """Ends the training of a node's hosts as a machine that goes away does."""
    for worker in range(workers()):
        pid = host(node, generation, worker) / "grit-jax/run/pid"
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)


def preempt(name):
    with world() as state:
        state["nodes"][name]["state"] = "PREEMPTED"
        for request in state["requests"].values():
            if name in node_ids(request["id"], request["flags"]):
                request["coming"] = ["SUSPENDING", "SUSPENDED"]
        generation = state["nodes"][name]["generation"]
    kill_processes(name, generation)


def storage(verb, paths):
    def local(path):
        return HOME / "bucket" / path.removeprefix("gs://")

    if verb == "cp":
        source, target = paths
        local(target).parent.mkdir(parents=True, exist_ok=True)
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        local(target).write_bytes(data)
    elif verb == "cat":
        sys.stdout.buffer.write(local(paths[0]).read_bytes())
    elif verb == "ls":
        if local(paths[0]).is_file():
            print(paths[0])
            return
        found = sorted(local(paths[0]).glob("*"))
        if not found:
            raise Failure("ERROR: One or more URLs matched no objects.")
        for child in found:
            print(paths[0] + child.name + ("/" if child.is_dir() else ""))


def main(argv):
    with (HOME / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([time.time(), *argv]) + "\n")
    words, flags = parse(argv)
    try:
        fail_as_planned(argv)
        match [word for word in words if word != "alpha"]:
            case ["compute", "tpus", "queued-resources", verb, *names]:
                queued_resources(verb, *(names or [None]), flags)
            case ["compute", "tpus", "tpu-vm", "ssh", name]:
                ssh(name, flags)
            case ["compute", "tpus", "tpu-vm", verb, *names]:
                tpu_vm(verb, *(names or [None]), flags)
            case ["storage", verb, *paths]:
                storage(verb, paths)
            case ["secrets", "versions", "access", "latest"]:
                print(f"value of {flags['secret']}")
            case ["fake", "preempt", name]:
                preempt(name)
            case _:
                raise Failure(f"ERROR: (gcloud) Invalid choice: {argv}", 2)
    except Failure as failure:
        if str(failure):
            print(failure, file=sys.stderr)
        return failure.code
    return 0
