"""Tensors on their way from one layout to another, and the account of where each came from and went to."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

# Stands for the sensor's id in names, until it is known.
SENSOR = "SENSOR"
RECOMPUTED = "a buffer: computed anew from the architecture"


class Translation:
    """What became of every key of a source.

    Attributes:
        tensors: {name in this layout: tensor}, with `SENSOR` in place of the sensor's id.
        buffers: {name: tensor} of the source's buffers, which tell its windows and its image size.
        sources: {source key: {"status": "loaded" | "transformed" | "ignored", "to": [names], "how": str}}.
        origins: {name: source keys}.
        changes: {name: what was done to the tensors on the way}.
        fresh: {name: why it comes from no source}.
        remarks: what the user should know.
        from_0_to_1: whether the source takes pixels from 0 to 1; the others take ImageNet's mean and deviation.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.given = dict(tensors)
        self.tensors: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self.sources: dict[str, dict] = {}
        self.origins: dict[str, list[str]] = {}
        self.changes: dict[str, list[str]] = {}
        self.fresh: dict[str, str] = {}
        self.remarks: list[str] = []
        self.from_0_to_1 = False

    def left(self) -> list[str]:
        """The source keys of which nothing has been said."""
        return [key for key in self.given if key not in self.sources]

    def load(self, keys: str | Sequence[str], name: str, tensor: torch.Tensor, how: str | None = None):
        """`name` is `tensor`, made of the source's `keys`; `how` says what was done, where it is not a copy."""
        keys = [keys] if isinstance(keys, str) else list(keys)
        if name in self.tensors:
            raise ValueError(
                f"`SRC` must hold each tensor once, got {', '.join(keys)} and {', '.join(self.origins[name])} for the "
                "same. Convert one model at a time."
            )
        self.tensors[name] = tensor
        self.origins[name] = keys
        for key in keys:
            self.sources.setdefault(key, {"status": "loaded", "to": []})["to"].append(name)
        if how is not None:
            self.change(name, tensor, how)

    def change(self, name: str, tensor: torch.Tensor, how: str):
        """Replace a tensor that was loaded, and say how it was made of the old one."""
        self.tensors[name] = tensor
        self.changes.setdefault(name, []).append(how)

    def rename(self, name: str, new: str):
        """Give a loaded tensor its final name."""
        if new != name:
            self.tensors[new] = self.tensors.pop(name)
            self.origins[new] = self.origins.pop(name)
            if name in self.changes:
                self.changes[new] = self.changes.pop(name)
            for key in self.origins[new]:
                self.sources[key]["to"] = [new if to == name else to for to in self.sources[key]["to"]]

    def drop(self, name: str, why: str):
        """Take a loaded tensor out again: its source keys are ignored."""
        del self.tensors[name]
        self.changes.pop(name, None)
        for key in self.origins.pop(name):
            self.ignore(key, why)

    def ignore(self, key: str, why: str):
        """A source key has no place here."""
        self.sources[key] = {"status": "ignored", "to": [], "how": why}

    def make(self, name: str, tensor: torch.Tensor, why: str):
        """`name` is a tensor that comes from no source."""
        self.tensors[name] = tensor
        self.fresh[name] = why

    def match(self, rules: Iterable[tuple[str, str]], prefix: str = ""):
        """Rename the keys that are left by the first rule (pattern, name) that matches them whole.

        Args:
            rules: a regular expression of the source key behind `prefix`, and the name here; a name of buffers starts
                with "buffer:".
            prefix: of the source keys.
        """
        rules = [(re.compile(pattern), name) for pattern, name in rules]
        for key in self.left():
            if not key.startswith(prefix):
                continue
            for pattern, name in rules:
                found = pattern.fullmatch(key.removeprefix(prefix))
                if found is None:
                    continue
                name = found.expand(name)
                if name.startswith("buffer:"):
                    self.buffers[name.removeprefix("buffer:")] = self.given[key]
                    self.ignore(key, RECOMPUTED)
                else:
                    self.load(key, name, self.given[key])
                break

    def ignore_prefixed(self, prefix: str, why: str):
        """Ignore the keys that are left and start with `prefix`."""
        for key in self.left():
            if key.startswith(prefix):
                self.ignore(key, why)

    def finish(self):
        """Give each source key its final status."""
        for key, entry in self.sources.items():
            if entry["status"] != "ignored":
                how = [change for name in entry["to"] for change in self.changes.get(name, ())]
                if how:
                    self.sources[key] = {
                        "status": "transformed",
                        "to": entry["to"],
                        "how": "; ".join(dict.fromkeys(how)),
                    }
