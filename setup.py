"""What is installed, found in the tree: every package, and every file in it. All else is in pyproject.toml.

Two packages lie at the top of the tree, so pyproject.toml's own search cannot find their sub-packages.
"""

from setuptools import find_packages, setup

MAPPED = {"neco_bench.tasks": "tasks", "neco_bench.leaderboards": "leaderboards"}

packages = find_packages(include=["neco_bench", "neco_bench.*"])
for name, folder in MAPPED.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(
    packages=packages,
    package_dir=MAPPED,
    package_data={name: ["**/*"] for name in ("neco_bench", *MAPPED)},
    exclude_package_data={"": ["*.py[co]", "**/*.py[co]"]},
    include_package_data=False,
)
