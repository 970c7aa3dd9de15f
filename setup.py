from pathlib import Path

from setuptools import find_packages, setup

extras = {
    "data": ["pyarrow", "huggingface_hub"],
    "fast": ["gigatoken>=0.10"],
    "mpi": ["mpi4py", "openmpi"],
    "eval": ["transformers", "accelerate", "lm-eval"],
    "test": [
        *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "setuptools>=70.1"),
        *("pyarrow", "huggingface_hub", "mpi4py", "openmpi", "gigatoken>=0.10", "transformers", "openai"),
    ],
}

# These lie beside the package in a checkout, where people look for them, and in it once installed: python -m llm.launch.train
inside = {f"llm.{folder}": folder for folder in ("configs", "ds_configs", "launch", "tools")}

setup(
    name="tally-llm",
    version="0.1.0",
    description="Train a GPT from raw text to chat, in as many short sittings as you have, with a ledger of every token it has seen",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["llm", "llm.*"]), *inside],
    package_dir=inside,
    package_data={"llm.chat": ["web/*"], "llm.report": ["page.css"], "llm.configs": ["*.yaml"], "llm.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.10,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "numpy",
        "tokenizers",
        "tiktoken>=0.13",
        "rustbpe",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "rich",
        "matplotlib",
    ],
    extras_require=extras,
)
