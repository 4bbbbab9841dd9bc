"""Keep the packages of an image as they are while others are added.

    packages.py constraints          print every installed package with its version
    packages.py missing LOCK         print the entries of a lock with hashes that are not installed
    packages.py check CONSTRAINTS    fail if one of them changed or something needed is missing,
                                     warn of versions that were not asked for

Runs on the image's Python, before anything of this project is installed.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ENTRY = re.compile(r"([A-Za-z0-9._-]+)(\[[^]]*\])?==")


def installed() -> dict[str, str]:
    """Versions by canonical name."""
    found = importlib.metadata.distributions()
    return {canonicalize_name(one.metadata["Name"]): one.version for one in found}


def missing(lock: str, present: Iterable[str]) -> str:
    """The entries of a lock (with their hashes) whose package is not there in any version."""
    kept: list[str] = []
    keep = False
    for line in lock.splitlines():
        if found := ENTRY.match(line):
            keep = canonicalize_name(found[1]) not in present
        if keep and line.strip() and not line.lstrip().startswith("#"):
            kept.append(line)
    return "".join(f"{line}\n" for line in kept)


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """One line for each package that is gone or has another version."""
    return [
        f"{name}: {version} became {after.get(name, 'nothing')}"
        for name, version in before.items()
        if after.get(name) != version
    ]


def unmet(
    root: str, present: Mapping[str, str], image: Iterable[str]
) -> tuple[list[str], list[str]]:
    """What a package, and all it requires, lacks, and what is there in another version.

    Args:
        root: a requirement, as ``megatron-core[training]``.
        present: versions by canonical name.
        image: names of what was there before; what those require in turn is the image's matter.
    """
    lacking: list[str] = []
    other: list[str] = []
    start = Requirement(root)
    todo, seen = [(start, start.name)], set()
    while todo:
        requirement, wanted_by = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras), str(requirement.specifier))
        if key in seen:
            continue
        seen.add(key)
        if name not in present:
            lacking.append(f"{wanted_by} needs {name}{requirement.specifier}, which is missing")
            continue
        # Images carry builds such as 2.10.0a0+nv: pre-releases count.
        if not requirement.specifier.contains(present[name], prereleases=True):
            needs = f"{name}{requirement.specifier}"
            other.append(f"{wanted_by} needs {needs}, the image has {present[name]}")
        if name in image:
            continue
        for text in importlib.metadata.requires(name) or ():
            further = Requirement(text)
            extras = requirement.extras or {""}
            marker = further.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append((further, name))
    return lacking, other


def main(argv: list[str]) -> int:
    """Run the command line."""
    command, *files = argv
    present = installed()
    if command == "constraints":
        print("".join(f"{name}=={version}\n" for name, version in sorted(present.items())), end="")
        return 0
    text = Path(files[0]).read_text()
    if command == "missing":
        print(missing(text, present), end="")
        return 0
    before = dict(line.split("==", 1) for line in text.splitlines())
    errors = [f"a package of the image was changed: {line}" for line in changed(before, present)]
    lacking, other = unmet("megatron-core[training]", present, before)
    for line in errors + lacking:
        print(f"error: {line}", file=sys.stderr)
    # Not refused: what an image was built with works in it more often than its metadata says.
    for line in other:
        print(f"warning: {line}", file=sys.stderr)
    print(f"{len(present) - len(before)} packages added to the {len(before)} of the image")
    return 1 if errors or lacking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
