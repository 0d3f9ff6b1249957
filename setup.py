"""Packaging: metadata from settings.ini, version from the package; data/ ships as ophav_nb.data, the papermill templates of
nbs/experiments as ophav_nb.experiments."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
version = re.search(r'__version__\s*=\s*"([^"]+)"', (root / "ophav_nb/__init__.py").read_text()).group(1)
extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}

setup(
    name=cfg["lib_name"],
    version=version,
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']},<{cfg['max_python']}",
    packages=["ophav_nb", "ophav_nb.nets", "ophav_nb.data", "ophav_nb.experiments"],
    package_dir={"ophav_nb": "ophav_nb", "ophav_nb.data": "data", "ophav_nb.experiments": "nbs/experiments"},
    package_data={"ophav_nb.data": ["*"], "ophav_nb.experiments": ["*.ipynb"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": [cfg["console_scripts"]], "papermill.engine": ["ophav=ophav_nb.batch:OphavEngine"]},
)
