"""Faults at exact steps of a job, in every Python process that has this directory on its PYTHONPATH and
BATCH_RERANK_FAULTS in its environment: the driver and Ray's workers alike. The package knows nothing of it.

BATCH_RERANK_FAULTS is a JSON object:
    root: the output; targets below it are told relative to it
    journal: a file that gets a line `pid operation when target` for every step, for tests to read
    faults: a list of objects:
        operation: create_exclusive, write_bytes, remove (Location's), delete (of what was seen, on S3), encode, score,
            commit (of a unit), load (of a model), or link, rename, unlink, create: what
            Python asks of the system, so `before` only
        when: before or after
        match: regular expression of the target: a path, a unit's id, or the model's name
        nth: strike from the nth such step of a process on, SIGSTOP at this one alone: woken, it goes on; 1 if left out
        once: a file that the first strike creates; no process strikes while it is there
        action: a signal's name (this process gets it), an errno's name (the step raises it), clock or hold
        folder: where a step that is held leaves a file with its process's id as name and the target in it, until there
            is one named go
        days: how far the clock of this process jumps (time.time, time_ns, gmtime and localtime; not datetime's)
"""

import errno
import json
import os
import re
import signal
import sys
import time
from functools import wraps

AUDITED = {"os.link": ("link", 1), "os.rename": ("rename", 1), "os.remove": ("unlink", 0), "open": ("create", 0)}


class Faults:
    def __init__(self, root="", journal=None, faults=()):
        self.root, self.journal, self.faults = root.rstrip("/") + "/", journal, faults
        self.counts = [0] * len(faults)

    def step(self, operation, when, target):
        target = target.removeprefix(self.root)
        if self.journal:
            file = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, f"{os.getpid()} {operation} {when} {target}\n".encode())
            os.close(file)
        for number, fault in enumerate(self.faults):
            if (fault["operation"], fault["when"]) != (operation, when) or not re.search(fault["match"], target):
                continue
            self.counts[number] += 1
            beyond = self.counts[number] - fault.get("nth", 1)
            struck = beyond == 0 if fault["action"] == "SIGSTOP" else beyond >= 0
            if struck and _first(fault.get("once")):
                _strike(fault, target)

    def wrap(self, owner, name, operation, target):
        """Tell of every call of a function; `target` names what it is about from its arguments."""
        function = getattr(owner, name)

        @wraps(function)
        def told(*args, **kwargs):
            about = target(*args)
            self.step(operation, "before", about)
            result = function(*args, **kwargs)
            self.step(operation, "after", about)
            return result

        setattr(owner, name, told)

    def patch_filesystem(self, module):
        for name in ("create_exclusive", "write_bytes", "remove", "remove_seen"):
            operation = name.removesuffix("_seen")
            self.wrap(module.Location, name, operation, lambda location, *_: location.path)
        if hasattr(module.Location, "_delete_matching"):  # on S3, between the look at an object and its removal
            self.wrap(module.Location, "_delete_matching", "delete", lambda location, *_: location.path)

    def patch_steps(self, module):
        for name in ("encode", "score"):
            self.wrap(module, f"{name}_unit", name, lambda unit, *_: unit.unit.id)
        self.wrap(module.LoadedScorer, "__init__", "load", lambda scorer, config, model: model.name)

    def patch_score_file(self, module):
        self.wrap(module, "commit_unit", "commit", lambda unit, *_: unit.unit.id)

    def audit(self, event, args):
        """Below the package: between a temporary file and its name, whatever the functions there are called."""
        if event not in AUDITED:
            return
        operation, position = AUDITED[event]
        path = args[position]
        creates = event != "open" or bool((args[2] or 0) & os.O_CREAT)
        if creates and isinstance(path, str) and path.startswith(self.root):
            self.step(operation, "before", path)


def _first(once):
    if once is None:
        return True
    try:
        os.close(os.open(once, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _strike(fault, target):
    action = fault["action"]
    if action == "clock":
        _shift_clock(fault["days"] * 86400)
    elif action == "hold":
        _hold(fault["folder"], target)
    elif action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
    else:
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number), target)


def _hold(folder, target):
    with open(f"{folder}/{os.getpid()}", "w") as file:
        file.write(target)
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.05)


def _shift_clock(seconds):
    now, now_ns, gmtime, localtime = time.time, time.time_ns, time.gmtime, time.localtime
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)
    time.gmtime = lambda at=None: gmtime(time.time() if at is None else at)
    time.localtime = lambda at=None: localtime(time.time() if at is None else at)


class Finder:
    """Patches a module when it is imported, so that no other process imports anything for it."""

    def __init__(self, patches):
        self.patches = patches

    def find_spec(self, name, path, target=None):
        patch = self.patches.get(name)
        if patch is None:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(spec for spec in found if spec is not None)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


if "BATCH_RERANK_FAULTS" in os.environ:
    _faults = Faults(**json.loads(os.environ["BATCH_RERANK_FAULTS"]))
    _patches = {
        "batch_rerank.store.filesystem": _faults.patch_filesystem,
        "batch_rerank.score.steps": _faults.patch_steps,
        "batch_rerank.score.score_file": _faults.patch_score_file,
    }
    sys.meta_path.insert(0, Finder(_patches))
    sys.addaudithook(_faults.audit)
