"""Write launch scripts and configurations to a folder of your own.

    switchlora init-scripts my_project

The folder then holds launch/ and ds_configs/, as a checkout does. Every command of the documentation works there:
`deepspeed launch/pretrain.py --ds_config ds_configs/zero1.json`, `sbatch launch/slurm/pretrain.sbatch`. The scripts
for Slurm and MPI start the Python that wrote them, unless PYTHON names another.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_switchlora.config.errors import UserError, ends_on_mistake, require
from megatron_switchlora.disk import user_path
from megatron_switchlora.shipped import shipped_folder

FOLDERS = ("launch", "ds_configs")
QUICK_START = "launch/configs/cpu_quickstart.yaml"
DEFAULT_PYTHON = {"slurm/pretrain.sbatch": ".venv/bin/python", "mpi/pretrain.sh": "$root/.venv/bin/python"}


def write_scripts(target: Path) -> list[Path]:
    """Copy the shipped folders to `target` and return the new files.

    Raises:
        UserError: launch/ or ds_configs/ is there already, or the folder cannot be written; nothing is left then.
    """
    copies: dict[Path, tuple[bytes, int]] = {}
    for folder in FOLDERS:
        source = shipped_folder(folder)
        for path in sorted(source.rglob("*")):
            inside = path.relative_to(source)
            if path.is_file() and not {"__pycache__", "__init__.py"} & set(inside.parts):
                content, default = path.read_bytes(), DEFAULT_PYTHON.get(inside.as_posix())
                if default:
                    content = content.replace(default.encode(), sys.executable.encode())
                copies[target / folder / inside] = content, path.stat().st_mode
    try:
        present = [str(target / folder) for folder in FOLDERS if os.path.lexists(target / folder)]
        require(not present, f"{' and '.join(present)} exist already: give another folder, or move them away.")
        for path, (content, mode) in copies.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(mode & 0o777 | 0o200)
    except OSError as error:
        for folder in FOLDERS:
            shutil.rmtree(target / folder, ignore_errors=True)
        raise UserError(f"{error.filename} cannot be written: {error.strerror}. Give another folder.") from None
    return list(copies)


def main(argv: Sequence[str]) -> None:
    """Run the command with these words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="where to write launch/ and ds_configs/")
    arguments = parser.parse_args(argv)
    with ends_on_mistake():
        written = write_scripts(arguments.folder)
        print(f"{len(written)} files in {arguments.folder}. Start there, for example:")
        print(f"deepspeed launch/pretrain.py --config {QUICK_START} --ds_config ds_configs/zero1.json")
