"""fitkit's packaging metadata; pyproject.toml holds the build system and the tools' settings."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """The version as text: importing fitkit would need torch, which a build does not."""
    text = (HERE / "fitkit" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('fitkit/_version.py has no line __version__ = "...".')
    return match[1]


EXTRAS = {
    "plot": ["matplotlib>=3.7", "pandas>=2.0"],
    "tensorboard": ["tensorboard>=2.16"],
    "sklearn": ["scikit-learn>=1.6"],
    "safetensors": ["safetensors>=0.4.3"],
    # The small MLflow, with what it needs for a store in a local file.
    "mlflow": ["alembic>=1.10", "mlflow-skinny>=3.0", "sqlalchemy>=2.0"],
    "wandb": ["wandb>=0.19"],
}

setup(
    name="fitkit",
    version=read_version(),
    description="Keras's compile and fit for any torch.nn.Module: exact, fast, and plain PyTorch underneath.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["pytorch", "keras", "training", "deep-learning", "fit"],
    packages=find_packages(include=["fitkit", "fitkit.*"]),
    package_data={"fitkit": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchmetrics>=1.5",
        "tabulate>=0.9",
        "tqdm>=4.64",
    ],
    extras_require={**EXTRAS, "all": sorted({name for names in EXTRAS.values() for name in names})},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
