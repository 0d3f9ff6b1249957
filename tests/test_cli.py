"""The command: arguments reach the functions, mistakes are one line and exit code 2."""
import logging
import os
import re
import subprocess
import sys
import time
import types

import pytest

from ophav_nb import cli
from ophav_nb.cli import main
from ophav_nb.run import InputError, Run


@pytest.fixture
def calls(monkeypatch):
    """Records calls in place of the heavy modules."""
    made = []
    def stand_in(module, *names):
        fake = types.ModuleType(module)
        for name in names:
            setattr(fake, name, lambda *args, _name=name, **kw: made.append((_name, args, kw)) or {"reached": False})
        monkeypatch.setitem(sys.modules, f"ophav_nb.{module}", fake)
        monkeypatch.setattr(sys.modules["ophav_nb"], module, fake, raising=False)
    stand_in("pipeline", "create", "animate")
    stand_in("evaluate", "evaluate_clip", "evaluate_run")
    sys.modules["ophav_nb.evaluate"].results_table = lambda result: "a table"
    stand_in("bench", "bench")
    return made


def one_line(capsys, *argv):
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ophav: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_an_evaluation_ends_with_its_table(calls, capsys):
    assert main(["evaluate", "--clip", "c.mp4", "--out", "e"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "| a table |"


def test_a_table_stands_straight_on_a_terminal(calls, monkeypatch, capsys):
    fake = sys.modules["ophav_nb.evaluate"]
    fake.results_table = lambda result: "| row | psnr_head |\n| --- | --- |\n| source | 9.30 |\n| round0 * | 21.95 |"
    fake.evaluate_clip = lambda **options: dict(reason="round 0: nothing is better", missing={"lpips": "needs weights", "fid": "too"})
    assert main(["evaluate", "--clip", "c.mp4", "--out", "e"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["| row      | psnr_head |", "| -------- | --------- |", "| source   |      9.30 |", "| round0 * |     21.95 |"]
    assert lines[4] == "*: the chosen round (round 0: nothing is better)" and lines[5].startswith("not measured: lpips, fid;")


@pytest.mark.parametrize("argv, said", [
    (["create", "", "--out", "r"], "portrait is empty"), (["create", "me.jpg", "--out", ""], "out is empty"), (["create", "me.jpg", "--out", "r", "--motion", " "], "motion is empty"),
    (["create", "me.jpg", "--out", "r", "--coarse", ""], "coarse is empty"), (["animate", "", "--out", "a.mp4"], "folder is empty"), (["batch", "", "--out", "s"], "sweep is empty"),
    (["create", "https://example.org/me.jpg", "--out", "r"], "ophav: https://example.org/me.jpg: this command fetches nothing"), (["animate", "r", "--motion", "HTTP://a/b.mp4", "--out", "a.mp4"], "download it"),
    (["evaluate", "--clip", "http://a/b.mp4", "--out", "e"], "download it")])
def test_neither_empty_words_nor_addresses(calls, capsys, argv, said):
    assert said in one_line(capsys, *argv) and not calls


@pytest.mark.parametrize("argv", [["create", "{}", "--out", "r"], ["create", "astronaut", "--out", "{}"], ["create", "astronaut", "--out", "r", "--motion", "{}"], ["animate", "{}", "--out", "a.mp4"],
                                  ["create", "astronaut", "--out", "r", "--coarse", "{}"], ["evaluate", "--clip", "{}", "--out", "e"], ["weights", "add", "{}"], ["batch", "{}", "--out", "s"]])
def test_a_name_that_is_too_long(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    assert "name is too long; choose a shorter one" in one_line(capsys, "-q", *(a.format("x"*300) for a in argv))


def test_only_given_options_are_passed_on(calls):
    assert main(["create", "me.jpg", "--out", "r"]) == 0
    assert calls[-1] == ("create", (), {"portrait": "me.jpg", "out": "r"})
    main(["-q", "create", "astronaut", "--out", "r", "--preset", "smoke", "--rounds", "0", "--face", "2", "--seed", "7", "--restorer", "none"])
    assert calls[-1][2] == {"portrait": "astronaut", "out": "r", "preset": "smoke", "rounds": 0, "face": 2, "seed": 7, "restorer": "none"}
    main(["animate", "r", "--out", "a.mp4", "--yaw", "-15", "--size", "64"])
    assert calls[-1] == ("animate", ("r",), {"motion": "talk", "out": "a.mp4", "yaw": -15., "size": 64})
    main(["evaluate", "--clip", "c.mp4", "--out", "e", "--protocol", "monocular"])
    assert calls[-1] == ("evaluate_clip", (), {"clip": "c.mp4", "out": "e", "protocol": "monocular"})
    main(["evaluate", "r", "--motion", "c.mp4", "--out", "e"])
    assert calls[-1] == ("evaluate_run", ("r",), {"motion": "c.mp4", "out": "e"})
    main(["evaluate", "--clip", "c.mp4", "--out", "e", "--matte", "rvm", "--parser", "bisenet", "--rounds", "1"])
    assert calls[-1][2] == {"clip": "c.mp4", "out": "e", "matte": "rvm", "parser": "bisenet", "rounds": 1}
    assert main(["bench", "--parts", "encoder"]) == 1 and calls[-1] == ("bench", (), {"parts": "encoder", "quick": False})


def test_options_exist_in_the_functions():
    """What the command offers, the functions take."""
    import inspect
    from ophav_nb import bench, evaluate, pipeline
    known = {"create": pipeline.create, "animate": pipeline.animate, "bench": bench.bench, "evaluate": evaluate.evaluate_clip}
    for action in cli.argument_parser()._subparsers._group_actions:
        for name, function in known.items():
            offered = {a.dest for a in action.choices[name]._actions} - {"help", "folder", "quiet"} - ({"motion"} if name == "evaluate" else set())
            assert offered <= set(inspect.signature(function).parameters), name
    from ophav_nb.motion import SCRIPTS
    from ophav_nb.pipeline import PRESETS
    assert set(cli.PRESETS) == set(PRESETS) and set(cli.SCRIPTS) == set(SCRIPTS)
    told = cli.argument_parser()._subparsers._group_actions[0].choices["create"].epilog
    for name, p in PRESETS.items(): assert re.search(rf"{name} +{p.frames:,} frames, +{p.size} px, +{p.steps:,} steps", told), name


def test_quiet_before_and_after_the_command(calls, monkeypatch):
    for argv in (["-q", "create", "a", "--out", "o"], ["create", "a", "--out", "o", "-q"], ["create", "a", "--out", "o", "--quiet"]):
        monkeypatch.setenv("OPHAV_QUIET", "")
        assert main(argv) == 0 and os.environ["OPHAV_QUIET"] == "1"


@pytest.mark.parametrize("argv, part", [
    ([], "COMMAND"), (["creat"], "invalid choice"), (["create"], "--out"), (["create", "a", "--out", "o", "--preset", "fast"], "smoke"),
    (["create", "a", "--out", "o", "--rounds", "-1"], "number from 0 on"), (["create", "a", "--out", "o", "--seed", "x"], "--seed"),
    (["create", "a", "--out", "o", "--seed", "-1"], "number from 0 on"), (["create", "a", "--out", "o", "--seed", "9"*23], "below 2**63"), (["animate", "n"*300, "--out", "a.mp4"], "too long"), (["-q", "create", "astronaut", "--out", "n"*300], "too long"), (["batch", "s.yaml", "--out", "o", "--workers", "-1"], "number from 0 on"),
    (["evaluate", "--clip", "c", "--motion", "m", "--out", "o"], "--motion drives a finished run"),
    (["create", "a", "--out", "o", "--nonsense"], "`ophav create --help`"), (["create", "a", "--out", "o", "--roundz=3"], "no option --roundz; did you mean --rounds"),
    (["animate", "r", "--output", "a.mp4"], "no option --output; did you mean --out"), (["create", "a", "--out", "o", "--rounds", "1e3"], "'1e3': give a whole number"), (["animate", "r", "--out", "a.avi"], ".mp4"),
    (["animate", "r", "--out", "a.mp4", "--yaw", "nan"], "--yaw"), (["animate", "r", "--out", "a.mp4", "--size", "0"], "16 to 2048"), (["animate", "r", "--out", "a.mp4", "--seconds", "0"], "--seconds"), (["evaluate", "--out", "o"], "--clip"),
    (["evaluate", "r", "--out", "o"], "--motion"), (["evaluate", "r", "--clip", "c", "--out", "o"], "either"),
    (["evaluate", "r", "--motion", "m", "--out", "o", "--matte", "rvm"], "--matte goes with --clip"), (["evaluate", "r", "--motion", "m", "--out", "o", "--seed", "3"], "--seed goes with --clip"), (["inspect", "nowhere"], "run folder"),
    (["batch", "lost.yaml", "--out", "o"], "lost.yaml"), (["weights", "add"], "needs a file"), (["weights", "get", "x"], "lists"),
    (["weights", "add", "lost.pth"], "no such file")])
def test_mistakes_are_one_line(capsys, argv, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in one_line(capsys, *argv)
    assert os.listdir(tmp_path) == []


def test_errors_of_the_functions(calls, capsys, monkeypatch):
    def fail(error):
        def function(*_, **__): raise error
        monkeypatch.setattr(sys.modules["ophav_nb.pipeline"], "create", function)
    fail(InputError("two\nlines"))
    assert one_line(capsys, "create", "a", "--out", "o") == "ophav: two lines\n"
    fail(KeyboardInterrupt())
    assert main(["create", "a", "--out", "o"]) == 130 and "continues" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["ophav_nb.pipeline"], "animate", sys.modules["ophav_nb.pipeline"].create)
    assert main(["animate", "r", "--out", "a.mp4"]) == 130 and "starts anew" in capsys.readouterr().err
    for error in (MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried ...")):
        fail(error)
        assert "memory is full" in one_line(capsys, "create", "a", "--out", "o")
    fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError): main(["create", "a", "--out", "o"])
    assert not [h for h in logging.getLogger("ophav_nb").handlers if isinstance(h, cli._BarHandler)]


def test_help_is_fast_and_teaches():
    start = time.perf_counter()
    text = subprocess.run([sys.executable, "-c", "from ophav_nb.cli import main; main(['create', '--help'])"], capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - start
    assert "examples:" in text and "ophav create astronaut" in text
    heavy = subprocess.run([sys.executable, "-c", "import sys; from ophav_nb.cli import argument_parser; argument_parser(); print([m for m in "
                            "('torch', 'numpy', 'numba', 'av', 'papermill') if m in sys.modules])"], capture_output=True, text=True).stdout
    assert heavy.strip() == "[]" and seconds < 5   # under a second where nothing else runs


def test_a_terminal_of_few_letters():
    for argv in (["create", "--help"], ["evaluate", "--help"], ["weights"]):
        done = subprocess.run([sys.executable, "-c", f"import sys; from ophav_nb.cli import main; sys.exit(main({argv}))"],
                              capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and "Traceback" not in done.stderr and done.stdout.isascii() and len(done.stdout) > 500


def test_weights_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    assert main(["weights"]) == 0
    out = capsys.readouterr().out
    assert "gfpgan (GFPGANv1.4.pth)" in out and "licence:" in out and "not here" in out


def test_doctor(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "CUDA", "tinycudann", "gfpgan", "dlib", "codecs", "threads", "asset head.npz"): assert word in out
    monkeypatch.setattr(cli, "listed_assets", lambda: {"head.npz": "0"*64, "lost.npz": "1"*64})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "differs from the listed" in out and "to mend: asset head.npz, asset lost.npz" in out


def test_inspect_writes_a_notebook(tmp_path, capsys, monkeypatch):
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("run = ''", metadata={"tags": ["parameters"]})])
    nbformat.write(nb, tmp_path/"inspect.ipynb")
    from ophav_nb import batch
    monkeypatch.setattr(batch, "template", lambda name: tmp_path/f"{name}.ipynb")
    Run(tmp_path/"r", dict(seed=0)).make("portrait", lambda folder: None)
    assert main(["inspect", str(tmp_path/"r"), "--no-browser"]) == 0
    assert str(tmp_path/"r") in (tmp_path/"r"/"inspect.ipynb").read_text()


def test_a_run_of_a_newer_version_is_not_inspected(tmp_path, capsys):
    (tmp_path/"run.json").write_text('{"format": 99}')
    assert "newer" in one_line(capsys, "inspect", str(tmp_path)) and os.listdir(tmp_path) == ["run.json"]


def test_batch_counts_failures(tmp_path, capsys, monkeypatch):
    from ophav_nb import batch
    rows = [{"name": "a", "status": "done", "error": ""}, {"name": "b", "status": "failed", "error": "no face"}]
    monkeypatch.setattr(batch, "run_sweep", lambda *a, **k: rows)
    assert main(["batch", "s.yaml", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [f"1 of 2 done; table: {tmp_path/'table.html'}"]
