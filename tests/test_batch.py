"""Notebooks in batches: the engine, sweeps, failures as rows, resuming, Dask."""
import csv
import json
import os
import shutil

import nbformat
import pytest

from ophav_nb import batch
from ophav_nb.batch import add_badges, execute, fill_in, notebook_parameters, read_sweep, run_sweep, skipped, template
from ophav_nb.run import FolderLock, InputError


def notebook(path, *cells, tagged=True):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    if tagged: nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, path)
    return path


@pytest.fixture
def small(tmp_path):
    return notebook(tmp_path/"small.ipynb", "x = 1\nportrait = ''\nout = '.'", "#| eval: false\n1/0", """\
import json, os, pathlib
if x == 'fail': raise ValueError('first line\\nsecond line')
if x == 'die': os._exit(1)
pathlib.Path(out).mkdir(parents=True, exist_ok=True)
(pathlib.Path(out)/'metrics.json').write_text(json.dumps({'rows': {'a': {'psnr': 30.5}}, 'x': x, 'list': [1]}))
""", "import ipywidgets; ipywidgets.IntSlider()")


def sweep(tmp_path, text):
    (tmp_path/"sweep.yaml").write_text("notebook: small.ipynb\n" + text)
    return tmp_path/"sweep.yaml"


@pytest.mark.parametrize("source, expected", [
    ("#| eval: false\n1/0", True), ("#|eval:false\n1/0", True), ("# a word\n#| eval: false", True), ("%%time\n#| eval: false", True),
    ("#| eval: true", False), ("x = 1\n#| eval: false", False), ("print('#| eval: false')", False)])
def test_directive(source, expected): assert skipped(source) == expected


def test_engine_skips_keeps_no_widget_state_and_saves_failures(tmp_path, small):
    done = nbformat.read(execute(small, tmp_path/"done.ipynb", dict(x=2, out=str(tmp_path/"o"))), 4)
    assert "widgets" not in done.metadata and "skip-execution" not in json.dumps(done)
    assert json.loads((tmp_path/"o"/"metrics.json").read_text())["x"] == 2
    with pytest.raises(Exception, match="first line"): execute(small, tmp_path/"failed.ipynb", dict(x="fail"))
    assert "ValueError" in (tmp_path/"failed.ipynb").read_text()


def test_unknown_parameters_are_refused(tmp_path, small):
    for do in (execute, fill_in):
        with pytest.raises(InputError, match="no parameter y; it knows x, portrait, out"): do(small, tmp_path/"a.ipynb", dict(y=1))
    assert notebook_parameters(notebook(tmp_path/"none.ipynb", "y = 1", tagged=False)) == {}
    (tmp_path/"bad.ipynb").write_text("{")
    with pytest.raises(InputError, match="not a notebook"): notebook_parameters(tmp_path/"bad.ipynb")
    with pytest.raises(InputError, match="no template called"): template("nonsense")


def test_papermill_itself_refuses_them_too(tmp_path, small):
    import papermill
    papermill.engines.papermill_engines.register("ophav", batch.OphavEngine)
    run = lambda **parameters: papermill.execute_notebook(str(small), str(tmp_path/"out.ipynb"), parameters, engine_name="ophav", kernel_name="python3", language="python", progress_bar=False)
    with pytest.raises(InputError, match="small.ipynb has no parameter y; it knows x, portrait, out"): run(y=1)
    run(x=3, out=str(tmp_path/"o"))
    assert json.loads((tmp_path/"o"/"metrics.json").read_text())["x"] == 3


def test_filled_in_is_not_run(tmp_path, small):
    nb = nbformat.read(fill_in(small, tmp_path/"{curly}"/"a.ipynb", dict(x="it's")), 4)
    assert any('x = "it\'s"' in c.source for c in nb.cells) and not any(c.get("outputs") for c in nb.cells)


def test_sweep_files(tmp_path, small):
    (tmp_path/"faces").mkdir()
    for name in ("b b.jpg", "a.jpg"): (tmp_path/"faces"/name).write_text(name)
    _, items = read_sweep(sweep(tmp_path, "parameters: {x: 0}\ngrid: {portrait: faces/*.jpg, x: [1, 2]}\nruns: [{name: 'a/../b', x: 3}, {name: a_x=1}]"))
    assert [i["name"] for i in items] == ["a_x=1", "a_x=2", "b-b_x=1", "b-b_x=2", "a-..-b", "a_x=1-2"]
    assert items[4]["parameters"] == {"x": 3} and items[5]["parameters"] == {"x": 0}
    assert read_sweep(sweep(tmp_path, ""))[1] == [{"name": "run", "parameters": {}}]


def test_files_are_seen_from_the_sweeps_folder(tmp_path, small, monkeypatch):
    "Wherever the command, or a worker of Dask, stands."
    for name in ("anna.png", "a[1].png", "b.png"): (tmp_path/name).write_text(name)
    monkeypatch.chdir(tmp_path.parent)
    path = sweep(tmp_path, "parameters: {portrait: b.png}\ngrid: {x: [anna.png, 'a[1].png', '[b].png', 7]}\nruns: [{name: special, portrait: anna.png, x: word.png}]")
    _, items = read_sweep(path.relative_to(tmp_path.parent))
    assert [i["parameters"]["x"] for i in items] == [str(tmp_path/n) for n in ("anna.png", "a[1].png", "b.png")] + [7, "word.png"]
    assert [i["parameters"]["portrait"] for i in items] == [str(tmp_path/"b.png")]*4 + [str(tmp_path/"anna.png")]
    assert [i["name"] for i in items] == ["anna", "a-1", "b", "x=7", "special"]


def test_a_word_is_no_file(tmp_path, small):
    for name in ("quick", "b.png"): (tmp_path/name).write_text(name)
    _, items = read_sweep(sweep(tmp_path, "parameters: {portrait: b.png, x: quick}"))
    assert items[0]["parameters"] == {"portrait": str(tmp_path/"b.png"), "x": "quick"}


@pytest.mark.parametrize("text", ["", "- a", "Dear sir", "3"])
def test_a_file_without_a_sweep(tmp_path, text):
    (tmp_path/"sweep.yaml").write_text(text)
    with pytest.raises(InputError, match="holds no sweep; a sweep reads"): read_sweep(tmp_path/"sweep.yaml")


def test_a_name_or_notebook_left_empty(tmp_path):
    "Is as good as none."
    template, items = read_sweep(sweep(tmp_path, "notebook:\nruns: [{name: , portrait: a.png}, {name: 0, portrait: b.png}]"))
    assert template.name == "create.ipynb" and [i["name"] for i in items] == ["a", "0"]


@pytest.mark.parametrize("text, message", [
    ("grid: {portrait: none/*.jpg}", "no file matches"), ("grids: {x: 1}", "grids is not part of a sweep"), ('"": [1]\nruns: [{portrait: a.png}]', "an empty name is not part"), ("parameters: {y: 1}", "no parameter y"),
    ("grid: [", "not YAML"), ("notebook: other.ipynb", "no such notebook")])
def test_bad_sweeps(tmp_path, small, text, message):
    with pytest.raises(InputError, match=message) as caught: read_sweep(sweep(tmp_path, text))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"): read_sweep(tmp_path/"lost.yaml")


@pytest.mark.parametrize("text, message", [
    ("grid: a.png", "grid wants names"), ("grid: [a]", "grid wants names"), ("runs: a.png", "runs wants a list"), ("runs: [a.png]", "runs wants a list"),
    ("runs: {a: 1}", "runs wants a list"), ("parameters: x", "parameters wants names"), ("parameters: {1: x}", "parameters wants names"),
    ("runs: [{1: x}]", "runs wants a list"), ("grid: {portrait: []}", "portrait is an empty list"), ("parameters: {portrait: }", "portrait is left empty"),
    ("grid: {portrait: }", "portrait is left empty"), ("parameters: {x: !!set {a, b}}", "x holds more than text"), ("parameters: {x: !!timestamp a}", "not YAML"),
    ("runs: [{portrait: {a: b}}]", "portrait is given names with values, and wants a text"), ("parameters: {portrait: [a.png, b.png]}", "several values stand under `grid`")])
def test_sweeps_of_another_form(tmp_path, small, text, message):
    with pytest.raises(InputError, match=message) as caught: read_sweep(sweep(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_dates_are_text_and_what_may_be_empty(tmp_path, small):
    _, items = read_sweep(sweep(tmp_path, "runs: [{portrait: 2020-01-01}, {portrait: 2020-99-99}]\ngrid:"))
    assert [i["parameters"]["portrait"] for i in items] == ["2020-01-01", "2020-99-99"]
    notebook(small, "x = None\nportrait = ''\nout = '.'")
    assert read_sweep(sweep(tmp_path, "grid: {x: [null, 1]}"))[1][0]["parameters"] == {"x": None}


def test_deleted_results_are_made_again(tmp_path, small):
    path, out = sweep(tmp_path, "grid: {x: [1, 2]}"), tmp_path/"out"
    run_sweep(path, out)
    shutil.rmtree(out/"x=2"/"run")
    assert [r["status"] for r in run_sweep(path, out)] == ["kept", "done"] and (out/"x=2"/"run"/"metrics.json").is_file()


def test_failures_are_rows_and_the_rest_is_kept(tmp_path, small, caplog):
    path, out = sweep(tmp_path, "grid: {x: [1, fail, die]}"), tmp_path/"out"
    rows = run_sweep(path, out, workers=3)
    assert [r["status"] for r in rows] == ["done", "failed", "failed"]
    assert caplog.text.count("fail failed: ValueError: first line second line") == 1
    assert rows[1]["error"] == "ValueError: first line second line" and "ernel" in rows[2]["error"]
    assert rows[0]["metrics"] == {"rows.a.psnr": 30.5, "x": 1}
    table = list(csv.DictReader(open(out/"table.csv")))
    assert [r["name"] for r in table] == ["x=1", "fail", "die"] and table[0]["rows.a.psnr"] == "30.5"
    assert "ValueError" in (out/"table.html").read_text()
    path = sweep(tmp_path, "grid: {x: [1, 2]}")
    assert [r["status"] for r in run_sweep(path, out)] == ["kept", "done"]
    small.write_text(small.read_text().replace("30.5", "31.5"))
    assert [r["status"] for r in run_sweep(path, out, workers=2)] == ["done", "done"]


@pytest.mark.parametrize("text", ["parameters: {out: one}\ngrid: {x: [1, 2]}", "runs: [{x: 1, out: one}, {x: 2, out: ./one}]", "runs: [{name: a}, {name: b, out: a/run}]"])
def test_runs_that_would_overwrite_each_other(tmp_path, small, text):
    with pytest.raises(InputError, match="would both write to"): run_sweep(sweep(tmp_path, text), tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_own_places_of_results(tmp_path, small, monkeypatch):
    "`out` is seen from the sweep's folder, and linked from its page."
    monkeypatch.chdir(tmp_path)
    small.write_text(small.read_text().replace("metrics.json').write", "report.html').write_text('')\\n(pathlib.Path(out)/'metrics.json').write"))
    rows = run_sweep(sweep(tmp_path, f"runs: [{{x: 1, out: 'my own'}}, {{x: 2, out: {tmp_path/'far'}}}, {{x: 3}}]"), "sweeps", workers=3)
    assert [r["metrics"].get("x") for r in rows] == [1, 2, 3], rows
    page = (tmp_path/"sweeps"/"table.html").read_text()
    assert (tmp_path/"sweeps"/"my own"/"metrics.json").is_file() and 'href="x=3/run/report.html"' in page.replace("%3D", "=")
    assert 'href="my%20own/report.html"' in page and f'href="{(tmp_path/"far"/"report.html").as_uri()}"' in page


def test_files_seen_from_here_only_are_said_before_the_night(tmp_path, small, monkeypatch):
    (tmp_path/"sweeps").mkdir()
    (tmp_path/"a.jpg").write_text("one")
    monkeypatch.chdir(tmp_path)
    path = tmp_path/"sweeps"/"s.yaml"
    path.write_text("notebook: ../small.ipynb\nparameters: {portrait: a.jpg}")
    with pytest.raises(InputError, match=r"portrait: files are seen from the sweep's folder.*; give \.\./a\.jpg"): read_sweep(path)
    path.write_text("notebook: ../small.ipynb\nparameters: {portrait: ../a.jpg}")
    assert read_sweep(path)[1][0]["parameters"]["portrait"].endswith("a.jpg")


def test_page_of_a_sweep_has_room_for_numbers(tmp_path):
    row = dict(name="a", status="failed", seconds=1., path=str(tmp_path/"a.ipynb"), error="no <face>; use another", parameters={"portrait": "/far/away/me.jpg"}, metrics={"psnr": 1.})
    text = batch.write_table([row], tmp_path).read_text()
    page = (tmp_path/"table.html").read_text()
    assert "failed: no &lt;face&gt;; use another</td>" in page and '<td title="/far/away/me.jpg">me.jpg</td>' in page
    assert "/far/away/me.jpg" in text and "no <face>" in text      # the file for programs keeps all of it


def test_changed_input_files_are_noticed(tmp_path, small):
    face = tmp_path/"a.jpg"
    face.write_text("one")
    path = sweep(tmp_path, f"parameters: {{portrait: {face}}}")
    assert [run_sweep(path, tmp_path/"out")[0]["status"] for _ in range(2)] == ["done", "kept"]
    face.write_text("two")
    assert run_sweep(path, tmp_path/"out")[0]["status"] == "done"


def test_one_sweep_at_a_time_and_no_scraps(tmp_path, small):
    path, out = sweep(tmp_path, "grid: {x: [1]}"), tmp_path/"out"
    with FolderLock(out/".lock"), pytest.raises(InputError, match="is being written"): run_sweep(path, out)
    (out/"x=1").mkdir()
    (out/".table.9.partial.csv").write_text("half"); (out/"x=1"/".row.9.partial.json").write_text("half")
    run_sweep(path, out)
    assert not list(out.rglob("*.partial.*"))
    (out/"x=1"/"notebook.ipynb").unlink()
    assert run_sweep(path, out)[0]["status"] == "done"


@pytest.mark.slow
def test_dask_cluster(tmp_path, small):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        rows = run_sweep(sweep(tmp_path, "grid: {x: [1, fail]}"), tmp_path/"out", dask=cluster)
    assert [r["status"] for r in rows] == ["done", "failed"] and rows[1]["error"].startswith("ValueError: first line")
    assert (tmp_path/"out"/"table.csv").exists()


def test_no_scheduler(tmp_path, small, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(batch, "DASK_TIMEOUT", "1s")
    with pytest.raises(InputError, match="no Dask scheduler answers"): run_sweep(sweep(tmp_path, ""), tmp_path/"out", dask="tcp://127.0.0.1:9")


def test_badges_are_made_from_the_settings_and_replaced(tmp_path):
    (tmp_path/"nbs"/"sub").mkdir(parents=True)
    path = notebook(tmp_path/"nbs"/"sub"/"a.ipynb", "x = 1")
    for user in ("someone", "else"):
        (tmp_path/"settings.ini").write_text(f"[DEFAULT]\nuser = {user}\nrepo = r\nbranch = b\n")
        assert add_badges([path], tmp_path/"settings.ini") == [path] and add_badges([path], tmp_path/"settings.ini") == []
        cells = nbformat.read(path, 4).cells
        assert len(cells) == 3 and f"github/{user}/r/blob/b/nbs/sub/a.ipynb" in cells[1].source
        assert skipped(cells[2].source) and f"github.com/{user}/r@b" in cells[2].source


@pytest.mark.parametrize("name, wanted", [("create", {"portrait", "out", "recipe"}), ("evaluate", {"films", "protocol", "baselines", "recipe"}), ("fidelity", {"evaluations"})])
def test_templates_say_what_they_take(name, wanted):
    assert wanted <= set(notebook_parameters(template(name)))
