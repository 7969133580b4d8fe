import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "src/hf_pdprune/version.py").read_text()).group(1)
README = HERE / "README.md"

# Every requirement is written once, here; the lists below name packages. constraints.txt has what is tested together.
_deps = [
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "evaluate",
    "gguf",
    "huggingface_hub",
    "hypothesis",
    "lm-eval",
    "matplotlib",
    "numpy",
    "peft",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "safetensors",
    "torch",
    "tqdm",
    "transformers>=5",
    "trl",
    "vllm",
]
deps = {re.split(r"[<>=!~]", requirement, maxsplit=1)[0]: requirement for requirement in _deps}


def deps_list(*names):
    return [deps[name] for name in names]


install_requires = deps_list(
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "evaluate",
    "safetensors",
    "huggingface_hub",
    "tqdm",
    "numpy",
)

extras = {
    "deepspeed": deps_list("deepspeed"),
    "eval": deps_list("lm-eval"),
    "plots": deps_list("matplotlib"),
    "gguf": deps_list("gguf"),
    "qlora": deps_list("bitsandbytes"),
    "vllm": deps_list("vllm"),
}
extras["dev"] = (
    deps_list("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff")
    + extras["plots"]
    + extras["gguf"]
    + extras["deepspeed"]
    + extras["eval"]
    + extras["qlora"]
)

setup(
    name="hf-pdprune",
    version=VERSION,
    description="Prune the prefill and the decode stage of a language model each by itself",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="large language models, pruning, distillation, prefill decode disaggregation, KV cache",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"hf_pdprune": ["**/*.md", "**/*.jinja", "**/*.yaml"]},
    python_requires=">=3.10",
    install_requires=install_requires,
    extras_require=extras,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
