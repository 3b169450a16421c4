"""A disk that stops: what a folder holds after a process is killed, or the machine, at any one file operation.

While a `Disk` is on, writes, flushes, renames and deletions in its folder are counted. At the operation it is armed for
the process "dies": of a write only some first bytes arrive, and nothing that comes later has any effect. `restart` then
leaves in the folder what would be found. After a kill that is all that was done. After a loss of power it is less: of
file contents what was flushed, and of the rest any part, or zeros; of names those at the last flush of the folder, and
of the changes since any first few.
"""
import builtins
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np


class Killed(BaseException):
    "Raised in place of the process's death; nothing in the package may catch it."


class Disk:
    def __init__(self, folder, modules):
        self.folder, self.modules = Path(folder), modules
        self.count, self.fatal, self.dead = 0, None, False
        self.rng = np.random.default_rng(0)
        self._look()

    def _look(self):
        "All that is in the folder now is on the disk."
        found = {o.name: bytearray(o.read_bytes()) for o in self.folder.iterdir() if o.name != ".lock"}
        self.files = dict(enumerate(found.values()))                    # number -> bytes written
        self.names = dict(zip(found, self.files, strict=True))          # name -> number
        self.flushed = {i: bytes(o) for i, o in self.files.items()}     # number -> bytes on the disk
        self.flushed_names, self.changes = dict(self.names), []

    def arm(self, fatal, seed=0):
        "Die at the operation `fatal`, counted from 0."
        self.count, self.fatal, self.dead, self.rng = 0, fatal, False, np.random.default_rng(seed)

    def _step(self):
        "Whether this operation is the last."
        if self.dead: raise Killed
        self.dead = self.count == self.fatal
        self.count += 1
        return self.dead

    def _ours(self, path): return Path(path).parent == self.folder and Path(path).name != ".lock"

    def _change(self, change):
        change(self.names)
        self.changes.append(change)

    def open(self, path, mode="r", **kwargs):
        if "w" not in mode or not self._ours(path): return builtins.open(path, mode, **kwargs)
        if self._step(): raise Killed
        number, name = len(self.files), Path(path).name
        self.files[number], self.flushed[number] = bytearray(), b""
        self._change(lambda names: names.update({name: number}))
        return Writer(self, builtins.open(path, mode, buffering=0), number)

    def fsync(self, handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path == str(self.folder):
            if self._step(): raise Killed
            self.flushed_names, self.changes = dict(self.names), []
        elif self._ours(path):
            if self._step(): raise Killed
            number = self.names[Path(path).name]
            self.flushed[number] = bytes(self.files[number])

    def replace(self, old, new):
        if not self._ours(old): return self.real["replace"](old, new)
        if self._step(): raise Killed
        self.real["replace"](old, new)
        old, new = Path(old).name, Path(new).name
        self._change(lambda names: names.update({new: names.pop(old)}))

    def unlink(self, path, **kwargs):
        if not self._ours(path): return self.real["unlink"](path, **kwargs)
        if self._step(): raise Killed
        self.real["unlink"](path, **kwargs)
        self._change(lambda names, name=Path(path).name: names.pop(name))

    @contextmanager
    def on(self):
        "Stand between the package and the file system."
        self.real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
        try:
            for name in self.real: setattr(os, name, getattr(self, name))
            for module in self.modules: module.open = self.open
            yield self
        finally:
            for name, call in self.real.items(): setattr(os, name, call)
            for module in self.modules: del module.open

    def moment(self):
        "What was done and what was flushed until now, to `restart` from more than once."
        return self.files, self.flushed, self.flushed_names, self.changes

    def restart(self, power_lost, moment=None):
        "Leave in the folder what is found afterwards."
        self.files, self.flushed, self.flushed_names, self.changes = moment or self.moment()
        names = dict(self.flushed_names)
        happened = int(self.rng.integers(len(self.changes) + 1)) if power_lost else len(self.changes)
        for change in self.changes[:happened]: change(names)
        found = {name: self._found(i) if power_lost else bytes(self.files[i]) for name, i in names.items()}
        for path in self.folder.iterdir():
            if path.name != ".lock": self.real["unlink"](path)      # who has a file mapped keeps the old one
        for name, content in found.items(): (self.folder/name).write_bytes(content)
        self.fatal, self.dead = None, False
        self._look()

    def _found(self, number):
        written, safe = bytes(self.files[number]), self.flushed[number]
        if written == safe: return written
        size = int(self.rng.integers(len(written) + 1))
        return [written, written[:size], written[:size] + bytes(len(written) - size), safe][self.rng.integers(4)]


class Writer:
    "A file that passes on what is written to it, until the disk stops."
    def __init__(self, disk, file, number): self.disk, self.file, self.number = disk, file, number

    def write(self, data):
        data, last = bytes(data), self.disk._step()
        if last: data = data[:int(self.disk.rng.integers(len(data) + 1))]
        self.disk.files[self.number] += data
        self.file.write(data)
        if last: raise Killed
        return len(data)

    def tell(self): return self.file.tell()
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
