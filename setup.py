"Package metadata, read from settings.ini, which nbdev reads too: one place for each version."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {key.removesuffix("_requirements"): value.split()
          for key, value in cfg.items() if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=cfg["git_url"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["rsir_nb", "rsir_nb.*"]),
    package_data={"rsir_nb": ["world.json", "configs/*.yaml", "configs/*/*.yaml",
                              "gallery/*.js", "gallery/*.css",
                              "weights/*/*", "samples/*/LICENSE", "samples/*/*/*.jpg"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "License :: OSI Approved :: Apache Software License",
                 "Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12",
                 "Topic :: Scientific/Engineering :: GIS"],
    zip_safe=False,
)
