"""Moments at which files change while a process saves; the process can be killed at any of them."""

import builtins
import io
import os
import shutil
import signal
from pathlib import Path

import torch
from transformers import modeling_utils


class Events:
    """Counts moments inside one folder from when it is installed, and kills this process at one of them.

    A moment is named `what:file`: `opened` (the file is empty), `half` (it ends in its middle) and `written` for
    weights and states; `renaming` and `renamed`; `deleting`, when the first file of a folder is gone.
    """

    def __init__(self, folder, at=None, log=None):
        self.folder, self.at, self.log, self.count = str(Path(folder).resolve()), at, log, 0

    def __call__(self, name, prepare=None):
        if self.log is not None:
            with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
                file.write(name + "\n")
        if self.count == self.at:
            if prepare is not None:
                prepare()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def inside(self, path):
        return isinstance(path, str | os.PathLike) and str(Path(path).resolve()).startswith(self.folder + os.sep)

    def name(self, path):
        return str(Path(path).resolve())[len(self.folder) + 1 :]

    def install(self):
        """Wrap what writes, renames and deletes; for the life of this process."""

        def saving(real, argument):
            def save(*args, **kwargs):
                found = real(*args, **kwargs)
                path = args[argument] if len(args) > argument else kwargs.get("filename", kwargs.get("f"))
                if self.inside(path):
                    self(f"half:{self.name(path)}", lambda: os.truncate(path, os.path.getsize(path) // 2))
                    self(f"written:{self.name(path)}")
                return found

            return save

        def opening(real):
            def open_(file, mode="r", *args, **kwargs):
                found = real(file, mode, *args, **kwargs)
                if "w" in mode and self.inside(file) and ("unfinished" in str(file) or "checkpoint" in str(file)):
                    self(f"opened:{self.name(file)}")
                return found

            return open_

        def renaming(real):
            def rename(source, target, *args, **kwargs):
                if not self.inside(source):
                    return real(source, target, *args, **kwargs)
                self(f"renaming:{self.name(source)}")
                real(source, target, *args, **kwargs)
                self(f"renamed:{self.name(source)}")
                return None

            return rename

        def deleting(real):
            def rmtree(path, *args, **kwargs):
                files = sorted(each for each in Path(path).rglob("*") if each.is_file())
                if files and self.inside(path):
                    self(f"deleting:{self.name(path)}", files[0].unlink)
                return real(path, *args, **kwargs)

            return rmtree

        torch.save = saving(torch.save, 1)
        modeling_utils.safe_save_file = saving(modeling_utils.safe_save_file, 1)
        builtins.open, io.open = opening(builtins.open), opening(io.open)
        os.rename, os.replace = renaming(os.rename), renaming(os.replace)
        shutil.rmtree = deleting(shutil.rmtree)
        return self
