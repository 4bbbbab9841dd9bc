"""Print shell exports that give uv the package index pip is configured for.

uv does not read pip's configuration, so a machine whose index is set for pip alone would be asked
for a public one. Printed is only what the user has not set for uv itself. Runs on any Python 3.8
or newer that has pip, before the environment exists, hence no import from the package:

    eval "$(python tools/uv_env.py)"
"""

import ast
import os
import shlex
import subprocess
import sys
from typing import Dict, List, Mapping  # noqa: UP035 - python 3.8 runs this file

# uv's old names on purpose: every version of uv reads them.
SETTINGS = (
    # pip's setting, uv's variables (the first is written; any of them set by the user wins)
    ("index-url", ("UV_INDEX_URL", "UV_DEFAULT_INDEX")),
    ("extra-index-url", ("UV_EXTRA_INDEX_URL", "UV_INDEX")),
    ("find-links", ("UV_FIND_LINKS",)),
    ("no-index", ("UV_NO_INDEX",)),
    ("trusted-host", ("UV_INSECURE_HOST",)),
    ("cert", ("SSL_CERT_FILE",)),
    ("timeout", ("UV_HTTP_TIMEOUT",)),
)


def pip_settings(listing: str) -> Dict[str, str]:  # noqa: UP006
    """Settings of `pip install` from the output of `pip config list`.

    Args:
        listing: lines like ``global.index-url='...'``; several values stand on several lines
            or are separated by spaces.

    Returns:
        Value by option name; the [install] section wins over [global], PIP_* variables over both.
    """
    found: Dict[str, str] = {}  # noqa: UP006
    lines = [line.partition("=") for line in listing.splitlines() if "=" in line]
    for section in ("global.", "install.", ":env:."):
        for key, _, value in lines:
            if key.startswith(section):
                try:
                    text = str(ast.literal_eval(value))
                except (ValueError, SyntaxError):
                    continue
                name = key[len(section) :].replace("_", "-")
                # PIP_DEFAULT_TIMEOUT is the variable pip's own help names for `timeout`.
                found["timeout" if name == "default-timeout" else name] = " ".join(text.split())
    return found


def exports(pip: Mapping[str, str], env: Mapping[str, str]) -> List[str]:  # noqa: UP006
    """Lines of shell for the settings of pip that uv has not been given.

    Args:
        pip: pip's settings, see `pip_settings`.
        env: the environment that uv will see.
    """
    lines = []
    for option, names in SETTINGS:
        value = pip.get(option, "")
        if option == "find-links":
            # pip only warns about a folder that is not there; uv stops.
            value = " ".join(v for v in value.split() if "://" in v or os.path.isdir(v))
        if value and not any(env.get(name) for name in names):
            # uv splits UV_FIND_LINKS at commas, its lists of indexes at spaces.
            value = value.replace(" ", ",") if option == "find-links" else value
            lines.append(f"export {names[0]}={shlex.quote(value)}")
    if any("UV_EXTRA_INDEX_URL" in line for line in lines) and not env.get("UV_INDEX_STRATEGY"):
        # pip looks for the pinned version on every index. The lock's hashes make that safe.
        lines.append("export UV_INDEX_STRATEGY=unsafe-best-match")
    return lines


def main() -> int:
    """Print the exports; a pip that cannot list its configuration prints none."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    for line in exports(pip_settings(listing.stdout.decode()), os.environ):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
