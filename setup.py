"""Packaging, from settings.ini (the same file that nbdev reads)."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("demo", "gemma", "eval", "onnx", "openvino", "draw", "dev")}
extras["dev"] = sum(extras.values(), [])  # the tests run everything
extras["deepspeed"] = cfg["deepspeed_requirements"].split()  # they keep it apart
site = cfg["doc_host"] + cfg["doc_baseurl"]


def absolute(link: re.Match) -> str:
    """A link of README.md, which names a file of the repository, for a package index: to the site, or to that file."""
    path = re.sub(r"(\d+_)?(\w+)\.ipynb$", r"\2.html", link[2])
    base = site if path.startswith("nbs/") else f"{cfg['git_url']}/blob/{cfg['branch']}"
    return f"{link[1]}{base}/{path.removeprefix('nbs/')}"


def description() -> str:
    """README.md without what only GitHub knows: relative links, and the marks of its alerts."""
    text = (here / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(\]\()(?![a-z]+:|#)([^)\s]+)", absolute, text)
    return re.sub(r"^> \[!\w+\]\n(>\n)?", "", text, flags=re.M)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=description(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=site,
    project_urls={
        "Documentation": site,
        "Source": cfg["git_url"],
        "Issues": cfg["git_url"] + "/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["lor2c", "lor2c.*"]),
    package_data={"lor2c": ["py.typed", "experiments/papers.toml"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        # Where nbdev finds the pages and sources of our names: it links them on our site, and on that of any project.
        "nbdev": ["lor2c=lor2c._modidx:d"],
    },
    zip_safe=False,
)
