"""What ships: a wheel with its assets and templates, notebooks in order, modules exported from them."""
import ast
import configparser
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from ophav_nb.cli import listed_assets
from ophav_nb.run import asset, file_hash

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT/"ophav_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
settings = configparser.ConfigParser(delimiters=["="])
settings.read(ROOT/"settings.ini")
settings = settings["DEFAULT"]
by_name = lambda p: str(p.relative_to(ROOT))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
                   check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_has_everything_and_finds_its_assets(wheel, tmp_path):
    """Installed without the checkout: assets and templates are found inside the package."""
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("ophav_nb/data/README.md", "ophav_nb/data/head.npz", "ophav_nb/experiments/create.ipynb", "ophav_nb/cli.py"): assert part in names
    assert any(n.startswith("ophav_nb/nets/") for n in names) or not list((ROOT/"ophav_nb"/"nets").glob("*.py"))
    assert not [n for n in names if n.startswith(("tests/", "nbs/"))]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = ("import sys; sys.path.insert(0, sys.argv[1])\nfrom ophav_nb.run import asset\nfrom ophav_nb.batch import template\n"
            "from ophav_nb.cli import listed_assets\nfor f in (asset('head.npz'), template('create'), *map(asset, listed_assets())): print(f)")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert all(line.startswith(str(tmp_path)) for line in out.stdout.split("\n") if line)


@pytest.mark.slow
def test_wheel_says_what_it_is(wheel):
    text = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))).decode()
    for part in ("Name: ophav-nb", "Requires-Python: ", "Apache-2.0", 'extra == "pretrained"', "Provides-Extra: cluster"): assert part in text
    assert not re.search(r"Requires-Dist: torch==", text), "torch is a range, never a pin"


def test_entry_points():
    points = importlib.metadata.entry_points()
    assert any(p.name == "ophav" and p.value == "ophav_nb.cli:main" for p in points.select(group="console_scripts"))
    from papermill.engines import PapermillEngines
    engines = PapermillEngines(); engines.register_entry_points()
    assert engines.get_engine("ophav").__name__ == "OphavEngine"


@pytest.mark.parametrize("order", ["papermill, ophav_nb.batch", "ophav_nb.batch, papermill"])
def test_engine_and_papermill_import_in_any_order(order):
    """papermill loads the entry point while it is being imported."""
    subprocess.run([sys.executable, "-c", f"import {order}; from papermill.engines import papermill_engines; papermill_engines.get_engine('ophav')"], check=True)


def test_assets_are_as_listed():
    listed = listed_assets()
    shipped = {p.name for p in (ROOT/"data").iterdir() if p.name not in ("README.md", "NOTICE") and not p.name.startswith(".")}
    assert set(listed) == shipped, "data/README.md lists every file with its sha256"
    assert {name: file_hash(asset(name)) for name in listed} == listed


def test_one_torch_pair():
    torch, vision = settings["torch_pair"].split()
    assert re.fullmatch(r"torch==[\d.]+", torch) and re.fullmatch(r"torchvision==[\d.]+", vision)
    others = [p for p in ("README.md", ".ci/test", ".ci/demo", ".ci/environment", "setup.py") if (ROOT/p).exists() and "torchvision==" in (ROOT/p).read_text()]
    assert others in ([], ["README.md"]), f"the pair is written once, in settings.ini (also found in {others})"
    if others: assert torch in (ROOT/"README.md").read_text() and vision in (ROOT/"README.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_notebook_is_in_order(path):
    nb, text = json.loads(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")
    cells = [dict(c, source="".join(c["source"])) for c in nb["cells"]]
    assert path.stat().st_size < 1_000_000
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"].startswith("# ") and "\n> " in cells[0]["source"]
    assert f"/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/{by_name(path)}" in cells[1]["source"], "no Colab badge"
    if any(c["cell_type"] == "code" for c in cells): assert cells[2]["source"].startswith("#| eval: false") and "if 'google.colab' in sys.modules:\n    %pip install" in cells[2]["source"]
    assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    for cell in nb["cells"]:
        for output in cell.get("outputs", []): output["data"] = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    text = json.dumps(nb)                                             # a picture's letters may spell anything
    home, scratch = str(Path.home()), tempfile.gettempdir()
    for place in (str(ROOT.parent) + "/", home + "/", scratch + "/", "ipykernel_", "it/s]", "s/it]"): assert place not in text, f"names {place}"
    if path.parent.name == "experiments": assert any("parameters" in c["metadata"].get("tags", []) for c in cells)


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_module_is_exported_and_readable(path):
    text = path.read_text(encoding="utf-8")
    assert "AUTOGENERATED" in text[:500], "modules come from notebooks"
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    definitions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    inner = {id(n) for d in definitions if isinstance(d, ast.FunctionDef) for n in ast.walk(d) if n is not d}
    public = [d for d in definitions if not d.name.startswith("_") and id(d) not in inner]
    telling = lambda d: ast.get_docstring(d) or d.name in ("forward", "backward", "extra_repr") or isinstance(d, ast.FunctionDef) and len(d.body) == 1
    assert not [d.name for d in public if not telling(d)], "public names say what they are"
    assert not [d.name for d in definitions if isinstance(d, ast.FunctionDef) and d.end_lineno - d.lineno > 60], "too long to read at a sitting"
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.type is None], "no bare except"
    assert "print(" not in text or path.stem in ("cli", "bench"), "libraries log"


def test_modules_import_only_from_rows_above():
    rows = {re.sub(r"^\d+[a-z]?_", "", p.stem): p.stem for p in NOTEBOOKS if p.parent.name == "nbs" and re.match(r"\d\d", p.stem)}
    for name, row in rows.items():
        path = ROOT/"ophav_nb"/f"{name}.py"
        if not path.exists(): continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("ophav_nb")):
                used = [(node.module or "").removeprefix("ophav_nb").strip(".").split(".")[0] or a.name for a in node.names]
                for other in set(used) & set(rows): assert rows[other] < row, f"{row} imports {rows[other]}"


@pytest.mark.slow
def test_thread_policy_and_its_warning():
    code = "import warnings; warnings.simplefilter('error')\nimport {}\n"
    ours = subprocess.run([sys.executable, "-c", code.format("ophav_nb, torch, os; assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'")], capture_output=True)
    late = subprocess.run([sys.executable, "-c", code.format("torch, ophav_nb")], capture_output=True, text=True,
                          env={k: v for k, v in __import__("os").environ.items() if not k.startswith(("OMP", "GOMP"))})
    assert ours.returncode == 0 and "torch was imported before ophav_nb" in late.stderr
