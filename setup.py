"""Packaging. Two source roots: `pipeline/` holds sctd, `kernels/` holds sctd_kernels."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (ROOT / "pipeline/sctd/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="sctd",
    version=version,
    description="BERT pretraining with token dropping and semantic-consistent token dropping, on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"sctd": "pipeline/sctd", "sctd_kernels": "kernels/sctd_kernels"},
    packages=find_packages("pipeline") + find_packages("kernels"),
    package_data={"sctd": ["recipes/*.yaml", "py.typed"], "sctd_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.9",
        "deepspeed>=0.19,<0.20",
        "transformers>=5.17,<6",
        "datasets>=5,<6",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "tensorboard>=2.18",
        "numpy>=2",
        "pyarrow>=20",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require={
        "evaluation": ["scikit-learn>=1.5", "scipy>=1.14", "seqeval>=1.2"],
        "mpi": ["mpi4py>=4"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            "ruff>=0.9",
            "mypy>=1.15",
            "types-PyYAML",
            "types-tqdm",
            "matplotlib>=3.9",
            # Comes with torch's CUDA builds; the tests run its kernels under its interpreter.
            "triton>=3.6; sys_platform == 'linux'",
        ],
    },
    entry_points={"console_scripts": ["sctd=sctd.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
