"""What README and docs name: Python, links, files and flags, and which of these are not there."""

import functools
import importlib
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_default_moe"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [
    *(README, CONTRIBUTING, ROOT / "patches/README.md", ROOT / "tests/gpu/README.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w\[-])--(?:\[no-\])?[a-z][\w-]*\*?")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w.][\w./-]*\.(?:py|md|yaml|sh|sbatch|toml|txt|in|svg|cff|patch)|[\w./-]+/")
FROM_THE_ROOT = re.compile(
    r"(?<![\w/.-])(?:tools|tests|docs|examples|bench|requirements|patches|docker)/[\w./*-]*\w"
)

FOLDERS = ("patches", "examples/launch", "docs/results")
"""Whose files pages also name without the folder."""

OTHER_PROGRAMS = {
    "docker": "--gpus --ipc --rm --ulimit --user --network --device --cap-add --build-arg",
    "torchrun": "--nproc-per-node --standalone --max-restarts",
    "pip": "--no-deps --target",
    "SLURM": "--signal --requeue --container-image --container-mounts",
    "bench/": "--bytes --minutes --out",
    "argparse": "--help",
}
"""Flags on our pages that no parser of ours has."""

WRITTEN_LATER = {
    "pretrain_gpt.py": "Megatron-LM's",
    "study.sbatch": "by default-moe compare",
    "gpu_kernels.md": "by make gpu",
    "gpu_step.md": "by make gpu",
    "runs/quickstart/": "by make quickstart",
    "runs/": "by the launchers",
}
"""Files that pages name and this checkout does not hold, and whose they are."""


def name_of(page: pathlib.Path) -> str:
    """The page's path in the checkout."""
    return str(page.relative_to(ROOT))


def blocks(page: pathlib.Path) -> list[str]:
    """The page's Python, block by block."""
    return BLOCK.findall(page.read_text())


def anchors(page: pathlib.Path) -> set[str]:
    """The names under which a page's titles can be linked."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def broken_links(page: pathlib.Path, text: str) -> Iterator[str]:
    """Relative links of a text on this page that lead nowhere."""
    for target in LINK.findall(text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


def is_there(page: pathlib.Path, name: str) -> bool:
    """Whether a name is a file, seen from the page, the checkout or the package."""
    places = (page.parent, ROOT, PACKAGE, *(ROOT / folder for folder in FOLDERS))
    return name in WRITTEN_LATER or any((place / name).exists() for place in places)


def missing_files(page: pathlib.Path, text: str) -> Iterator[str]:
    """Names of files in code, and paths from the root anywhere, that are not there."""
    for span in CODE.findall(text):
        if FILE.fullmatch(span) and not is_there(page, span):
            yield span
    for name in FROM_THE_ROOT.findall(text):
        if "*" not in name and not (ROOT / name).exists() and not is_there(page, name):
            yield name


@functools.cache
def known_flags() -> frozenset[str]:
    """Of the entry, and of the commands' own parsers, which their help shows."""
    from megatron_default_moe import pretrain
    from megatron_default_moe.commands.table import COMMANDS

    known = set(pretrain.build_parser()._option_string_actions)
    for flags in OTHER_PROGRAMS.values():
        known |= set(flags.split())
    for command in COMMANDS:
        source = pathlib.Path(importlib.import_module(command.module).__file__).read_text()
        known |= set(re.findall(r"\"(--[\w-]+)\"", source))
    return frozenset(known)


def unknown_flags(text: str) -> Iterator[str]:
    """Flags that no program takes."""
    known = known_flags()
    for flag in FLAG.findall(text):
        if flag.endswith("*"):
            found = any(one.startswith(flag[:-1]) for one in known)
        else:
            found = {flag.replace("[no-]", ""), flag.replace("[no-]", "no-")} <= known
        if not found:
            yield flag
