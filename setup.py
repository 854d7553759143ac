"""Where the packages live; everything else is in pyproject.toml.

The Triton sources sit in the top-level folder `kernels/` and are imported as `fastdpo.kernels`. They are
never installed as a package called `kernels`: that name is Hugging Face's, and transformers imports it.
Hence this mapping, the link `fastdpo/kernels -> ../kernels` for tools that read the tree, and no
`kernels/__init__.py`. The modules of `benchmarks/` are mapped and linked in the same way, without its studies and
regressions. The files of the quickstart, which `fastdpo demo` writes, are installed as data of the package.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "fastdpo.kernels": "kernels",
    "fastdpo.benchmarks": "benchmarks",
    "fastdpo.benchmarks.head": "benchmarks/head",
    "fastdpo.examples": "examples",
}

setup(
    packages=[*find_packages(include=["fastdpo", "fastdpo.*"], exclude=["fastdpo.benchmarks*"]), *FOLDERS],
    package_dir=FOLDERS,
)
