"""The run folder: resume after a kill, locks, invalidation, bad folders."""
import errno
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ophav_nb import run as run_module
from ophav_nb.inspect import RunView
from ophav_nb.run import InputError, Run, make_key, pick_device, plain, remove_scraps, side_by_side, write_atomic


def child(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, seconds=20):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} did not appear"
        time.sleep(.02)


COUNTING = """
import sys, time
from ophav_nb.run import Run, write_atomic
def build(folder):
    step = folder/'step'
    n = int(step.read_text()) if step.exists() else 0
    (folder/'starts').open('a').write(f'{n} ')
    while n < 20:
        n += 1
        write_atomic(step, str(n))
        if n == 10 and not (folder/'paused').exists():
            (folder/'paused').touch(); time.sleep(60)
Run(sys.argv[1], dict(seed=1)).make('train', build, params=dict(steps=20))
"""


def test_killed_build_continues_where_it_was(tmp_path):
    process = child(COUNTING, tmp_path/"run")
    wait_for(tmp_path/"run"/"train.partial"/"paused")
    process.send_signal(signal.SIGKILL); process.wait()
    assert not Run(tmp_path/"run").has("train")
    again = child(COUNTING, tmp_path/"run")
    assert again.wait(60) == 0, again.stderr.read()
    folder = tmp_path/"run"/"train"
    assert (folder/"step").read_text() == "20" and (folder/"starts").read_text() == "0 10 "
    assert not (tmp_path/"run"/"train.partial").exists()


def test_two_writers_are_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    process = child(COUNTING, tmp_path/"run")
    wait_for(tmp_path/"run"/"train.partial"/"paused")
    with pytest.raises(InputError, match=f"is being written by process {process.pid}"):
        Run(tmp_path/"run").make("other", lambda folder: None)
    process.send_signal(signal.SIGKILL); process.wait()
    Run(tmp_path/"run").make("other", lambda folder: None)


def test_a_drive_without_locks_is_written_all_the_same(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")
    def refuse(code):
        def flock(*_): raise OSError(code, os.strerror(code))
        monkeypatch.setattr(fcntl, "flock", flock)
    refuse(errno.EOPNOTSUPP)
    Run(tmp_path/"run").make("a", lambda folder: None)
    assert "keeps no locks" in caplog.text and Run(tmp_path/"run").has("a")
    refuse(errno.EIO)
    with pytest.raises(OSError): Run(tmp_path/"run").make("b", lambda folder: None)


def test_partial_of_other_parameters_is_not_continued(tmp_path):
    def stop(folder):
        (folder/"old").touch()
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError): Run(tmp_path).make("a", stop, params=dict(x=1))
    assert (tmp_path/"a.partial"/"old").exists()
    Run(tmp_path).make("a", lambda folder: (folder/"new").touch(), params=dict(x=2))
    assert sorted(p.name for p in (tmp_path/"a").iterdir()) == ["manifest.json", "new"]


@pytest.mark.parametrize("moment", ["before", "between"])
def test_killed_while_renaming(tmp_path, moment, monkeypatch):
    """A kill between the last write and the rename, or between the two renames, loses nothing."""
    run, built = Run(tmp_path), []
    build = lambda folder: (built.append(1), (folder/"f").write_text("x"))
    run.make("a", build, params=dict(x=1))
    calls = []
    def replace(a, b, real=os.replace):
        if str(a).endswith((".partial", "/a")) and not Path(a).is_file():
            calls.append(a)
            if len(calls) == (1 if moment == "before" else 2): raise KeyboardInterrupt
        real(a, b)
    monkeypatch.setattr(run_module.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt): run.make("a", build, params=dict(x=2))
    monkeypatch.undo()
    Run(tmp_path).make("a", build, params=dict(x=2))
    assert len(built) == 2 and run.manifest("a")["params"] == {"x": 2}
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["a"]


def test_only_what_depends_is_redone(tmp_path):
    built = []
    def whole(a, b):
        run = Run(tmp_path, dict(a=a, b=b))
        run.make("one", lambda f: built.append("one"), params=dict(a=a))
        run.make("two", lambda f: built.append("two"), needs=["one"], params=dict(b=b))
        run.make("three", lambda f: built.append("three"), needs=["two"])
    whole(1, 1); whole(1, 1)
    assert built == ["one", "two", "three"]
    whole(1, 2)
    assert built[3:] == ["two", "three"]
    whole(2, 2)
    assert built[5:] == ["one", "two", "three"]
    with pytest.raises(KeyError, match="nothing"): Run(tmp_path).make("x", lambda f: None, needs=["nothing"])


def test_damaged_artifact_is_rebuilt(tmp_path):
    build = lambda folder: (folder/"f").write_text("content")
    Run(tmp_path).make("a", build)
    (tmp_path/"a"/"f").write_text("cont")
    Run(tmp_path).make("a", build)
    assert (tmp_path/"a"/"f").read_text() == "content"
    (tmp_path/"a"/"manifest.json").write_text("{")
    Run(tmp_path).make("a", build)
    assert Run(tmp_path).has("a")


def test_disk_full_is_one_line_and_keeps_what_is_done(tmp_path):
    def full(folder): raise OSError(errno.ENOSPC, "No space left on device", str(folder/"f"))
    Run(tmp_path).make("a", lambda folder: None)
    with pytest.raises(InputError, match="disk is full") as caught: Run(tmp_path).make("b", full)
    assert "\n" not in str(caught.value) and Run(tmp_path).has("a")


@pytest.mark.parametrize("raw", [True, False])
def test_disk_full_keeps_what_the_stage_has(tmp_path, raw):
    found = []
    def build(folder):
        found.append(len(list(folder.glob("*.png"))))
        for i in range(found[-1], 5): write_atomic(folder/f"{i}.png", b"frame")
        def full(path): raise OSError(errno.ENOSPC, "No space left on device", str(path))
        if len(found) == 1: full(folder/"5.png") if raw else write_atomic(folder/"5.png", full)
    with pytest.raises(InputError, match="disk is full"): Run(tmp_path/"run", dict(seed=0)).make("frames", build)
    Run(tmp_path/"run", dict(seed=0)).make("frames", build)
    assert found == [0, 5]


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no such file", "0.png"), PermissionError(errno.EACCES, "may not be read", "0.png")])
def test_errors_of_reading_are_not_told_as_errors_of_writing(tmp_path, error):
    def build(folder): raise error
    with pytest.raises(type(error)): Run(tmp_path).make("a", build)
    (tmp_path/"file").write_text("")
    with pytest.raises(InputError, match="not a folder"): Run(tmp_path).make("file/a", build)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_): raise PermissionError(errno.EACCES, "Permission denied")
    (tmp_path/"film.mp4").write_bytes(b"film")
    monkeypatch.setattr(run_module, "open", refuse, raising=False)   # root may read everything
    with pytest.raises(InputError, match="film.mp4 may not be read"): run_module.file_hash(tmp_path/"film.mp4")


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path/"file").write_text("")
    for bad in (tmp_path/"file", tmp_path/"file"/"run"):
        with pytest.raises(InputError): Run(bad, dict(seed=0))
    (tmp_path/"photos").mkdir(); (tmp_path/"photos"/"cat.jpg").write_text("")
    with pytest.raises(InputError, match="not a run folder"): Run(tmp_path/"photos", dict(seed=0))
    assert os.listdir(tmp_path/"photos") == ["cat.jpg"]
    with pytest.raises(InputError, match="not a run folder"): Run.open(tmp_path/"nowhere")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="no permission"): Run(tmp_path/"run", dict(seed=0))


def test_bad_input_leaves_nothing(tmp_path):
    def refuse(folder):
        (folder/"half").write_text("half")
        raise InputError("no face")
    with pytest.raises(InputError): Run(tmp_path/"run", dict(seed=0)).make("portrait", refuse)
    assert not (tmp_path/"run").exists()
    Run(tmp_path/"run", dict(seed=0)).make("good", lambda folder: None)
    with pytest.raises(InputError): Run(tmp_path/"run").make("portrait", refuse)
    assert Run(tmp_path/"run").has("good") and not (tmp_path/"run"/"portrait.partial").exists()


def test_run_json(tmp_path):
    @dataclass
    class Settings:
        size: int = 3
        path: Path = Path("x")
    run = Run(tmp_path/"r", dict(seed=5, settings=Settings(), scale=np.float32(.5)))
    run.make("portrait", lambda folder: None)
    run.note(device="cpu", inputs={"portrait": "abc"})
    info = json.loads((tmp_path/"r"/"run.json").read_text())
    assert info["parameters"] == {"seed": 5, "settings": {"size": 3, "path": "x"}, "scale": .5}
    assert info["seed"] == 5 and info["device"] == "cpu" and "python" in info["versions"] and len(info["history"]) == 1
    assert Run.open(tmp_path/"r").params["seed"] == 5


def test_a_run_of_a_newer_format_is_left_alone(tmp_path):
    run = Run(tmp_path/"run", dict(a=1))
    run.make("part", lambda folder: (folder/"a.txt").write_text("a"))
    run.note(format=run_module.FORMAT + 1, versions={"ophav-nb": "9.1"})
    for again in (lambda: Run(tmp_path/"run", dict(a=2)), lambda: Run.open(tmp_path/"run").params):
        with pytest.raises(InputError, match=r"made by a newer ophav \(9\.1; format"): again()
    assert (tmp_path/"run"/"part"/"a.txt").read_text() == "a"


def test_keys_see_arrays_and_formats(monkeypatch):
    a = np.arange(3.)
    assert make_key({"a": a}, {}) == make_key({"a": a.copy()}, {}) != make_key({"a": a + 1}, {})
    assert plain({"s": {3, 1}, "t": (1, Path("p"))}) == {"s": [1, 3], "t": [1, "p"]}
    before = make_key({}, {})
    monkeypatch.setattr(run_module, "FORMAT", run_module.FORMAT + 1)
    assert make_key({}, {}) != before


def test_write_atomic_leaves_no_scraps(tmp_path):
    def broken(path):
        path.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): write_atomic(tmp_path/"a.txt", broken)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_swept(tmp_path):
    run = Run(tmp_path/"run", {})
    def build(folder): (folder/"kept.txt").write_text("kept")
    (tmp_path/"run"/"a.partial").mkdir(); (tmp_path/"run"/"b"/"a.old.partial").mkdir(parents=True)
    for place in ("", "a.partial"): (tmp_path/"run"/place/".picture.999999999.partial.png").write_bytes(b"half")
    (tmp_path/"run"/".mine.txt").write_text("the user's")
    run.make("a", build)
    left = {str(p.relative_to(tmp_path/"run")) for p in (tmp_path/"run").rglob("*") if "partial" in p.name}
    assert not left and (tmp_path/"run"/".mine.txt").exists() and list(run.manifest("a")["files"]) == ["kept.txt"]
    scraps = []
    write_atomic(tmp_path/"new.json", lambda path: (scraps.append(path.name), path.write_text("{}")))
    assert fnmatch.fnmatch(scraps[0], ".*.partial.*")   # the names that are swept are those that are written


def test_what_a_living_process_writes_is_left(tmp_path):
    "A film that `animate` writes into a run's folder outlives a command that enters it; a folder of such a name is nobody's scrap."
    for name in (f".film.{os.getpid()}.partial.mp4", ".film.999999999.partial.mp4", ".film.partial.mp4"): (tmp_path/name).write_bytes(b"half")
    (tmp_path/".mine.partial").mkdir()
    remove_scraps(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".film.{os.getpid()}.partial.mp4", ".mine.partial"]


def test_a_run_that_cannot_begin_lets_go_of_its_lock(tmp_path, monkeypatch):
    run = Run(tmp_path/"run", {})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(run_module, "remove_scraps", lambda folder: 1/0)
        run.make("a", lambda folder: None)
    with Run(tmp_path/"run"): pass
    assert run._lock.depth == 0 and run._lock.file is None


@pytest.mark.parametrize("text", ["", '{"parameters": {', "[]", "\0\0"])
def test_damaged_notes_are_said_or_made_anew(tmp_path, text):
    run = Run(tmp_path/"run", dict(seed=1))
    run.make("a", lambda folder: (folder/"a.txt").write_text("a"))
    run.path("run.json").write_text(text)
    for use in (lambda: Run.open(run.folder).info, lambda: Run(run.folder, dict(seed=1)), lambda: RunView(run.folder).info):
        with pytest.raises(InputError, match="run.json is damaged; delete it"): use()
    run.path("run.json").unlink()
    again, built = Run(run.folder, dict(seed=1)), []                # what is finished is kept
    again.make("a", built.append)
    assert not built and again.params == dict(seed=1)
    (run.path("b.partial")).mkdir()
    (run.path("b.partial", "partial.json")).write_text(text)
    again.make("b", built.append)
    assert len(built) == 1 and again.has("b")


def test_devices(monkeypatch):
    assert pick_device("cpu") == "cpu" and pick_device() in ("cpu", "cuda")
    with pytest.raises(InputError, match="no double precision"): pick_device("mps")
    for name in ("tpu", "cpu:x", "cpu-1"):
        with pytest.raises(InputError, match="unknown device"): pick_device(name)
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True); monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == "cuda:1"
    with pytest.raises(InputError, match="torch sees 2 such devices, counted from 0"): pick_device("cuda:2")


def test_what_is_current(tmp_path):
    run, write = Run(tmp_path/"r", {}), lambda folder: (folder/"x").write_text("x")
    for name, needs in (("a", []), ("b", ["a"])): run.make(name, write, needs, dict(n=1))
    assert run.current("b", ["a"], dict(n=1)) and not run.current("b", ["a"], dict(n=2)) and not run.current("c")
    run.make("a", write, params=dict(n=2))
    assert not run.current("b", ["a"], dict(n=1))
    (tmp_path/"r"/"a"/"x").unlink()
    assert not run.current("a", params=dict(n=2))


def test_side_by_side():
    "In order, each item in one thread of torch; torch's threads are as before; an error comes through."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert side_by_side(lambda i: (i, torch.get_num_threads()), range(5)) == [(i, 1) for i in range(5)]
        assert torch.get_num_threads() == 2 and side_by_side(lambda i: torch.get_num_threads(), [0]) == [2] and side_by_side(str, []) == []
        with pytest.raises(InputError, match='three'): side_by_side(lambda i: fail(i), range(5))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(threads)


def fail(i):
    if i == 3: raise InputError('three')


def test_a_command_that_fails_leaves_what_was_there(tmp_path):
    "run.json belongs to what is in the folder: it changes with the first artifact."
    run = Run(tmp_path/"run", dict(portrait="a.png"))
    run.make("portrait", lambda folder: None)
    def no_face(folder): raise InputError("no face")
    with pytest.raises(InputError): Run(tmp_path/"run", dict(portrait="b.png")).make("portrait", no_face, params=dict(image="b"))
    assert Run.open(tmp_path/"run").params == dict(portrait="a.png")
    later = Run(tmp_path/"run", dict(portrait="c.png"))
    assert later.params == dict(portrait="c.png")
    later.make("portrait", lambda folder: None, params=dict(image="c"))
    assert Run.open(tmp_path/"run").params == dict(portrait="c.png")


def test_a_folder_of_another_command_is_left_alone(tmp_path):
    Run(tmp_path/"run", dict(portrait="a.png")).make("portrait", lambda folder: None)
    with pytest.raises(InputError, match="is a run of `ophav create`"): Run(tmp_path/"run", dict(clip="a.mp4", protocol="self"))


def test_what_is_older_than_its_input(tmp_path):
    run = Run(tmp_path/"run", {})
    for name, needs in (("portrait", []), ("track", ["portrait"]), ("avatar", ["track"])): run.make(name, lambda folder: None, needs)
    assert run.stale("avatar") == []
    run.make("portrait", lambda folder: None, params=dict(image="another"))
    assert run.stale("avatar") == ["portrait"]
    run.make("track", lambda folder: None, ["portrait"])
    assert run.stale("avatar") == ["track"]
    shutil.rmtree(run.path("track"))               # to save room: the avatar is still of this person
    assert run.stale("avatar") == []


@pytest.mark.parametrize("writer", ["text", b"bytes", lambda path: path.write_text("called")])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, writer):
    steps, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (steps.append(os.fstat(n).st_size), sync(n)))
    monkeypatch.setattr(os, "replace", lambda *a: (steps.append("named"), rename(*a)))
    write_atomic(tmp_path/"a", writer)
    assert steps == [(tmp_path/"a").stat().st_size, "named"]


def test_what_is_kept_is_said_once(tmp_path, caplog):
    caplog.set_level("INFO", "ophav_nb")
    for _ in range(2):
        run = Run(tmp_path/"r", {})
        for _ in range(3): run.make("a", lambda folder: None)
    assert caplog.text.count("a: made in") == caplog.text.count("a: kept") == 1


def test_a_full_disk_that_safetensors_meets(tmp_path):
    "It says so in words of its own; what a training had done before is kept."
    from safetensors import SafetensorError
    def full(path): raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    def build(folder):
        (folder/"done").touch()
        write_atomic(folder/"a.safetensors", full)
    run = Run(tmp_path/"run", {})
    with pytest.raises(InputError, match=r"a\.safetensors: the disk is full"): run.make("a", build)
    assert (tmp_path/"run"/"a.partial"/"done").exists()


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_others_may_read_what_is_written(tmp_path):
    """As the umask has it, also where a library writes for the owner alone."""
    def secret(path):
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    before = os.umask(0o027)
    try: modes = {write_atomic(tmp_path/name, writer).stat().st_mode & 0o777 for name, writer in (("a", "text"), ("b", secret), ("c", lambda p: p.write_bytes(b"")))}
    finally: os.umask(before)
    assert modes == {0o640}
