"""Packages to install: the package's own, and the folders beside it that an installation holds inside."""

from setuptools import find_packages, setup

PACKAGE = "megatron_switchlora"
BESIDE = {f"{PACKAGE}.launch": "launch", f"{PACKAGE}.ds_configs": "ds_configs", f"{PACKAGE}.settings": "tools/settings"}

setup(
    packages=[*find_packages(include=[f"{PACKAGE}*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        PACKAGE: ["py.typed"],
        f"{PACKAGE}.launch": ["configs/*.yaml", "configs/methods/*.yaml", "slurm/*.sbatch", "mpi/*.sh"],
        f"{PACKAGE}.ds_configs": ["*.json"],
        f"{PACKAGE}.settings": ["*.yaml"],
    },
)
