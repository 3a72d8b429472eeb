"""Packaging from settings.ini, the one place where names, versions and requirements are written."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = here / "README.md"


def requirements(key: str) -> list[str]:
    return cfg.get(key, "").split()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["clmae", "clmae.*"]),
    install_requires=requirements("requirements"),
    extras_require={
        "stream": requirements("stream_requirements"),
        "repro": requirements("repro_requirements"),
        "dev": requirements("dev_requirements"),
    },
    entry_points={"console_scripts": ["clmae = clmae.__main__:main"]},
)
