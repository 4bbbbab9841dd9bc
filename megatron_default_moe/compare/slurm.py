"""A study as a SLURM array: one task a run, through the same command."""

import pathlib
import shlex
import sys

_SCRIPT = """#!/usr/bin/env bash
# The runs of {study}, one task each: sbatch {file}
#
# Submitted again, it goes on: finished runs end at once. sbatch's own flags win over these lines
# (--time, --partition, --account; --array=3 for one run alone). Afterwards, the comparison:
#
#   {report}
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{parallel}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={ranks}
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --open-mode=append
#SBATCH --output={logs}/slurm-run-%a.log
set -euo pipefail
cd {here}
exec {command} --run "$SLURM_ARRAY_TASK_ID"
"""


def write(
    study: pathlib.Path, out: pathlib.Path, runs: int, parallel: int, ranks: int
) -> pathlib.Path:
    """Write ``study.sbatch`` and return its path.

    Args:
        study: the study's file.
        out: the study's folder, which all nodes see.
        runs: how many.
        parallel: how many tasks at a time.
        ranks: processes of a run, and GPUs of its task.
    """
    file = out.resolve() / "study.sbatch"
    compare = [sys.executable, "-m", "megatron_default_moe", "compare", str(study.resolve())]
    command = shlex.join([*compare, "--out", str(out.resolve())])
    text = _SCRIPT.format(
        study=study.name,
        file=file,
        report=f"{command} --report",
        name=study.stem,
        last=runs - 1,
        parallel=parallel,
        ranks=ranks,
        logs=out.resolve(),
        here=shlex.quote(str(pathlib.Path.cwd())),
        command=command,
    )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
