"""Weights of others: recognised by content, loaded without running anything, refused in one line."""
import collections
import copy
import dataclasses
import hashlib
import http.server
import json
import os
import pickle
import re
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.sparse
import torch

from ophav_nb import weights
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight, find_weight, load_pickle_restricted, read_tensors, require, weight_row, weights_folder, weights_table


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path/"home"))
    return tmp_path/"home"


class Bomb:
    def __init__(self, target): self.target = str(target)
    def __reduce__(self): return os.mkdir, (self.target,)


GOLDEN = Path(__file__).parent/"golden"
NUMBER = torch.full((1,), .5)
WHOLE = lambda t: t[""]
DDP = lambda t: {f"module.{k}": v for k, v in t.items()}
ADAM = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
LIVEPORTRAIT = {"appearance": "appearance_feature_extractor", "motion": "motion_extractor", "warping": "warping_module",
                "generator": "spade_generator"}
OFFICIAL = {   # row -> (manifest, how its authors wrap the parts in a file)
    "gfpgan": ("gfpgan_v14", lambda t: {"params_ema": t[""]}),
    "facevid2vid": ("facevid2vid_256", lambda t: {**t, "discriminator": {"a": torch.zeros(2)}, "optimizer_generator": ADAM, "epoch": 189}),
    **{f"liveportrait_{k}": ("liveportrait", lambda t, v=v: t[v]) for k, v in LIVEPORTRAIT.items()},
    "liveportrait_stitching": ("liveportrait", lambda t: {k: DDP(v) for k, v in t.items() if k.startswith("retarget")}),
    "bisenet": ("bisenet_19", WHOLE), "rvm": ("rvm_mobilenetv3", WHOLE), "parsenet": ("parsenet_512", WHOLE),
    "mica": ("mica", lambda t: {"arcface": DDP(t["arcface"]), "flameModel": {**t["flameModel"], "generator.v_template": torch.zeros(5, 3)},
                                "opt": ADAM, "epoch": 3, "global_step": np.float64(2.5)}),
    "arcface18": ("csim_otavatar", lambda t: DDP(t[""])),
    "deep3d": ("deep3dfacerecon_resnet50", lambda t: {"net_recon": t[""], "opt_00": ADAM, "sched_00": {"milestones": collections.Counter([1])}}),
    "fan": ("fan4_2d", lambda t: {k: v for k, v in t[""].items() if not k.endswith("tracked")}),   # older than these counters
    "s3fd": ("s3fd", WHOLE), "retinaface": ("retinaface_r50", lambda t: DDP(t[""])),
    "lpips": ("alexnet_torchvision", WHOLE), "fid": ("inception_fid", WHOLE),
    "fomm": ("fomm_vox256", lambda t: {**t, "discriminator": {"a": torch.zeros(2)}, "epoch_generator": 90}),
    "pirender": ("pirender_face", lambda t: {"net_G": {k: v + 1 for k, v in list(t[""].items())[:3]}, "net_G_ema": t[""], "net_G_optimizer": ADAM}),
}


def official(name):
    "Tensors of every part of a golden network, one number each that is seen many times, in the authors' wrapping."
    manifest, wrap = OFFICIAL[name]
    path = GOLDEN/f"{manifest}.json"
    if not path.is_file(): pytest.skip(f"{path.name} is not among the golden data")
    parts = json.loads(path.read_text())["parts"]
    number = lambda shape, kind: (NUMBER if kind.startswith("float") else torch.zeros(1, dtype=torch.int64)).reshape([1]*len(shape)).expand(shape)
    return wrap({p: {k: number(*entry) for k, entry in part["state_dict"].items()} for p, part in parts.items()})


def stand_in(name): return {k: v.clone() for k, v in weights.recognise(weights._flat(official(name)))[1].items()}


def test_missing_weights_say_file_licence_and_command():
    with pytest.raises(InputError) as caught: require("gfpgan")
    for part in ("GFPGANv1.4.pth", "Apache-2.0", "github.com/TencentARC/GFPGAN", "ophav weights add"): assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="lists gfpgan"): require("gfgan")


def test_every_row_is_complete():
    assert len({w.name for w in weights.WEIGHTS}) == len(weights.WEIGHTS)
    for row in weights.WEIGHTS:
        assert row.licence and row.page.startswith("https://") and row.enables and row.without
        assert row.sha256 is None or len(row.sha256) == 64 or len(row.sha256) == 8 and row.sha256 in row.file
        assert not row.url or row.sha256, "what is fetched must be compared with something"
        assert bool(row.shapes) == bool(row.mark) == (row.name in OFFICIAL)
    assert {r["name"] for r in weights_table()} == {w.name for w in weights.WEIGHTS}


@pytest.mark.parametrize("name, half", [(n, False) for n in OFFICIAL] + [(n, True) for n in ("gfpgan", "mica", "liveportrait_motion")])
def test_official_files_are_recognised(tmp_path, name, half):
    "In the authors' own wrapping, all names and shapes; the key set is the manifest's."
    def halved(value):
        if isinstance(value, dict): return {k: halved(v) for k, v in value.items()}
        if not torch.is_tensor(value) or not value.is_floating_point(): return value
        return NUMBER.half().reshape([1]*value.ndim).expand(value.shape)
    torch.save(halved(official(name)) if half else official(name), tmp_path/"a.bin")
    row, own = weights.recognise(read_tensors(tmp_path/"a.bin"))
    assert row.name == name and weights.shapes_digest(own) in row.shapes.split()
    kind = torch.float16 if half else torch.float32
    assert {t.dtype for k, t in own.items() if t.is_floating_point()} == {kind}
    small = {k: v[(slice(0, 1),)*v.ndim] for k, v in own.items()}
    kept = weights._kept(small)
    assert all(v.dtype == torch.float32 and (v == .5).all() for v in kept.values() if v.is_floating_point())
    assert {k for k in kept if k.endswith("running_mean")} == {k.replace("num_batches_tracked", "running_mean") for k in kept if k.endswith("tracked")}


def test_the_older_configuration_of_facevid2vid():
    "'vox-256-beta' looks at the whole picture: one tensor less."
    held = official("facevid2vid")
    del held["kp_detector"]["down.weight"]
    assert weights.recognise(weights._flat(held))[0].name == "facevid2vid"


@pytest.mark.parametrize("row", [w for w in weights.WEIGHTS if w.network], ids=lambda w: w.name)
def test_networks_have_the_shapes_of_the_table(row):
    known = weights.network_shapes(row)
    if not known: pytest.skip("this network is not in the package")
    assert weights.shapes_digest(known) == row.shapes.split()[0]
    assert bool(row.size) != bool(row.about) and row.about in (0, 4*sum(np.prod(shape, dtype=int) for shape in known.values()))


@pytest.mark.parametrize("change", ["shape", "lacking", "foreign"])
@pytest.mark.parametrize("name", ["rvm", "bisenet", "mica"])
def test_right_names_with_wrong_shapes(tmp_path, name, change, home):
    held = weights.recognise(weights._flat(official(name)))[1]
    key = next(k for k in held if k != weight_row(name).mark)
    if change == "shape": held[key] = torch.zeros(2, 2)
    elif change == "lacking": del held[key]
    else: held[key.replace("weight", "height")] = torch.zeros(1)
    torch.save(held, tmp_path/"a.pth")
    with pytest.raises(InputError, match=f"looks like {name}, but") as caught: add_weight(tmp_path/"a.pth")
    assert "\n" not in str(caught.value) and find_weight(name) is None and not home.exists()


def test_numbers_that_are_none(tmp_path, home):
    tensors = stand_in("liveportrait_stitching")
    key = next(k for k, t in tensors.items() if t.is_floating_point())
    for bad in (float("nan"), float("inf")):
        torch.save({**tensors, key: torch.full_like(tensors[key], bad)}, tmp_path/"a.pth")
        (tmp_path/"flame.pkl").write_bytes(pickle.dumps(FLAME | {"weights": FLAME["weights"]*bad}))
        for name in ("a.pth", "flame.pkl"):
            with pytest.raises(InputError, match="not finite"): add_weight(tmp_path/name)
    assert not home.exists()


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path/"a.pth").write_text("")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="a.pth may not be read; change its permissions"): add_weight(tmp_path/"a.pth")


@pytest.mark.parametrize("container", ["params_ema", "state_dict", "plain", "module", "safetensors", "legacy"])
def test_adding(tmp_path, container, home):
    "The smallest network, in all wrappings."
    name = "liveportrait_stitching"
    tensors, path = stand_in(name), tmp_path/"my file.bin"
    if container == "safetensors": safetensors.torch.save_file(tensors, path)
    elif container == "module": torch.save(DDP(tensors), path)
    else: torch.save({container: tensors} if "_" in container else tensors, path, _use_new_zipfile_serialization=container != "legacy")
    found, kept = add_weight(path)
    assert found == name and kept.parent.parent == home and find_weight(name) == kept == require(name)
    assert all(torch.equal(v, tensors[k]) for k, v in read_tensors(kept).items())
    assert all(torch.equal(v, tensors[k]) for source in (None, path) for k, v in weights.named_tensors(name, source).items())
    assert "licence" in kept.with_suffix(".json").read_text()
    assert "still missing: liveportrait_appearance" in weights.now_possible(name)
    with pytest.raises(InputError, match="other tensors than rvm's"): weights.named_tensors("rvm", path)


def test_hostile_files_do_nothing(tmp_path):
    target = tmp_path/"boom"
    torch.save({"a": torch.zeros(2), "b": Bomb(target)}, tmp_path/"a.pth")
    (tmp_path/"b.pth").write_bytes(pickle.dumps({"a": Bomb(target)}))
    (tmp_path/"c.pkl").write_bytes(pickle.dumps({"a": Bomb(target)}))
    for name in ("a.pth", "b.pth", "c.pkl"):
        with pytest.raises(InputError) as caught: add_weight(tmp_path/name)
        assert "\n" not in str(caught.value) and not target.exists()


@pytest.mark.parametrize("kind", ["deflated", "overlapping", "script"])
def test_archives_that_unpack_to_more(tmp_path, kind):
    path = tmp_path/"a.pth"
    if kind == "deflated":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("a/data.pkl", bytes(30_000_000))
        assert path.stat().st_size < 100_000
    elif kind == "script":
        with zipfile.ZipFile(path, "w") as archive: archive.writestr("a/code/__torch__.py", "class Net(Module): pass")
    else:   # a thousand entries that are one and the same
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data/0", bytes(100_000))
            archive.filelist += [copied(archive.filelist[0], f"a/data/{i}") for i in range(1, 1000)]
            archive._didModify = True
    with pytest.raises(InputError, match="TorchScript" if kind == "script" else "unpacks to more") as caught: add_weight(path)
    assert "\n" not in str(caught.value)


def copied(entry, name):
    entry = copy.copy(entry)
    entry.filename = name
    return entry


def test_structures_without_end(tmp_path):
    "Dictionaries and lists that hold each other: few bytes, endless when written out."
    deep = {"a": torch.zeros(1)}
    for _ in range(20): deep = {str(i): deep for i in range(10)}
    torch.save(deep, tmp_path/"a.pth")
    with pytest.raises(InputError, match="no network"): add_weight(tmp_path/"a.pth")
    wide = [1.]
    for _ in range(40): wide = [wide]*10
    (tmp_path/"a.pkl").write_bytes(pickle.dumps({"v_template": wide}))
    with pytest.raises(InputError, match="lacks shapedirs"): add_weight(tmp_path/"a.pkl")
    ring = []; ring.append(ring)
    (tmp_path/"b.pkl").write_bytes(pickle.dumps(ring))
    with pytest.raises(InputError): add_weight(tmp_path/"b.pkl")


@pytest.mark.parametrize("kind", ["vast", "meta", "sparse", "complex"])
def test_tensors_that_are_none(tmp_path, kind):
    "Right name, wrong substance: nothing is allocated for it, nothing is kept."
    held = dict(official("liveportrait_stitching")["retarget_eye"])
    held = {f"retarget_eye.{k.removeprefix('module.')}": v for k, v in held.items()}
    held |= {k.replace("eye", part): v for part in ("shoulder", "mouth") for k, v in held.items()}
    held["retarget_shoulder.mlp.0.weight"] = {"vast": torch.zeros(1).expand(10**7, 10**7), "meta": torch.zeros(128, 126, device="meta"),
        "sparse": torch.zeros(128, 126).to_sparse(), "complex": torch.zeros(128, 126, dtype=torch.complex64)}[kind]
    torch.save(held, tmp_path/"a.pth")
    with pytest.raises(InputError) as caught: add_weight(tmp_path/"a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 10, 200, 5000])
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_truncated_files(tmp_path, size, suffix):
    path = tmp_path/f"a.{suffix}"
    if suffix == "pth": torch.save(stand_in("liveportrait_stitching"), path)
    elif suffix == "safetensors": safetensors.torch.save_file(stand_in("liveportrait_stitching"), path)
    else: path.write_bytes(pickle.dumps({"v_template": np.zeros((500, 3))}))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError) as caught: add_weight(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit(tmp_path):
    torch.save(stand_in("liveportrait_stitching"), tmp_path/"a.pth")
    data = bytearray((tmp_path/"a.pth").read_bytes())
    data[len(data)//2] ^= 1
    (tmp_path/"a.pth").write_bytes(data)
    with pytest.raises(InputError, match="damaged"): add_weight(tmp_path/"a.pth")


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors", "npz", "pickle"])
def test_spoilt_bytes(tmp_path, kind):
    "Whatever bytes change, near the ends where the structure is: kept, or one line."
    path = tmp_path/"a.bin.npz"      # np.savez minds the suffix
    if kind == "safetensors": safetensors.torch.save_file(stand_in("liveportrait_stitching"), path)
    elif kind in ("torch", "legacy"): torch.save(stand_in("liveportrait_stitching"), path, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "npz": np.savez(path, **FLAME)
    else: path.write_bytes(pickle.dumps(FLAME))
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(25):
        spoilt = bytearray(data)
        for k in rng.integers(0, 3000, 3): spoilt[k % len(data) if k & 1 else -1 - k % len(data)] = rng.integers(256)
        path.write_bytes(spoilt)
        try: add_weight(path)
        except InputError as error: assert "\n" not in str(error)


def test_wrong_files(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path/"other.pth")
    (tmp_path/"other.pkl").write_bytes(pickle.dumps({"v_template": np.zeros((5, 3))}))
    with pytest.raises(InputError, match="no network in the table"): add_weight(tmp_path/"other.pth")
    with pytest.raises(InputError, match="lacks shapedirs"): add_weight(tmp_path/"other.pkl")
    with pytest.raises(InputError, match="no such file"): add_weight(tmp_path/"lost.pth")


class Ch:
    "A stand-in under chumpy's name: an array in the attribute x."
    __module__ = "chumpy.ch"
    def __init__(self, x): self.x = x


def as_chumpy(monkeypatch):
    import sys, types
    module = types.ModuleType("chumpy.ch")
    module.Ch = Ch
    monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy")); monkeypatch.setitem(sys.modules, "chumpy.ch", module)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_flame_pickle(tmp_path, protocol, monkeypatch):
    as_chumpy(monkeypatch)
    regressor = scipy.sparse.random(5, 40, .3, "csc", random_state=0)
    model = {"v_template": Ch(np.arange(120.).reshape(40, 3)), "shapedirs": Ch(np.ones((40, 3, 400))), "posedirs": np.zeros((40, 3, 36)),
             "J_regressor": regressor, "weights": np.asfortranarray(np.ones((40, 5))), "f": np.zeros((9, 3), np.uint32),
             "kintree_table": np.zeros((2, 5), np.int64), "bs_style": "lbs"}
    (tmp_path/"flame2023.pkl").write_bytes(pickle.dumps(model, protocol=protocol))
    name, path = add_weight(tmp_path/"flame2023.pkl")
    kept = np.load(path, allow_pickle=False)
    assert name == "flame" and np.array_equal(kept["v_template"], model["v_template"].x)
    assert np.allclose(kept["J_regressor"], regressor.toarray()) and kept["weights"].shape == (40, 5)


FLAME = {"v_template": np.zeros((4, 3)), "shapedirs": np.zeros((4, 3, 400)), "posedirs": np.zeros((4, 3, 36)), "weights": np.ones((4, 5)),
         "J_regressor": np.zeros((5, 4)), "f": np.array([[0, 1, 2]]), "kintree_table": np.zeros((2, 5), int)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flame_npz(tmp_path, save):
    save(tmp_path/"flame.bin.npz", **FLAME)
    assert np.array_equal(np.load(add_weight(tmp_path/"flame.bin.npz")[1])["weights"], FLAME["weights"])


@pytest.mark.parametrize("key, value", [("weights", np.ones((5, 5))), ("posedirs", np.zeros((4, 3, 35))), ("f", np.array([[0, 1, 4]])),
                                        ("shapedirs", np.array(["x"])), ("v_template", np.float64(1)), ("kintree_table", None)])
def test_flame_of_wrong_shapes(tmp_path, key, value, home):
    (tmp_path/"a.pkl").write_bytes(pickle.dumps(FLAME | {key: value}))
    with pytest.raises(InputError, match="no FLAME model") as caught: add_weight(tmp_path/"a.pkl")
    assert "\n" not in str(caught.value) and not home.exists()


def test_hostile_npz(tmp_path, monkeypatch):
    np.savez(tmp_path/"a.npz", **FLAME | {"f": np.array([Bomb(tmp_path/"boom")], dtype=object)})
    with pytest.raises(InputError, match="more than numbers"): add_weight(tmp_path/"a.npz")
    monkeypatch.setattr(weights, "_MOST_BYTES", 1 << 20)
    np.savez_compressed(tmp_path/"b.npz", **FLAME | {"f": np.zeros((10**6, 3))})
    with pytest.raises(InputError, match="unpacks to more"): add_weight(tmp_path/"b.npz")
    assert not (tmp_path/"boom").exists()


def test_vast_matrices_are_not_written_out(tmp_path):
    matrix = scipy.sparse.csc_matrix((3, 3))
    matrix._shape = (10**6, 10**6)
    (tmp_path/"a.pkl").write_bytes(pickle.dumps(FLAME | {"J_regressor": matrix}))
    with pytest.raises(InputError, match="sparse matrix of"): add_weight(tmp_path/"a.pkl")


def test_restricted_pickles_of_numpy(tmp_path):
    value = collections.OrderedDict(a=np.float32(1.5), b=[np.arange(3), (np.array(["x"]), {"c": b"\xff"})], n=None)
    for protocol in range(2, 6):
        (tmp_path/"a.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
        back = load_pickle_restricted(tmp_path/"a.pkl")
        assert back["a"] == 1.5 and np.array_equal(back["b"][0], [0, 1, 2]) and back["b"][1][1]["c"] == b"\xff"


@pytest.mark.parametrize("what", [eval, open, os.system, getattr, np.load, np.memmap, torch.load])
def test_other_functions_are_refused(tmp_path, what):
    class Call:
        def __reduce__(self): return what, ("1",)
    try: data = pickle.dumps(Call())
    except pickle.PicklingError: pytest.skip("cannot be pickled")
    (tmp_path/"a.pkl").write_bytes(data)
    with pytest.raises(InputError, match="more than numpy arrays"): load_pickle_restricted(tmp_path/"a.pkl")


@pytest.fixture
def served(tmp_path, monkeypatch):
    "A row of the table whose file comes from a small server that breaks off as often as it is told."
    name, path = "liveportrait_stitching", tmp_path/"served.pth"
    torch.save(stand_in(name), path)
    data, asked, cut = path.read_bytes(), [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def do_GET(self):
            asked.append(self.headers["Range"])
            start = int(re.match(r"bytes=(\d+)-", asked[-1] or "bytes=0-")[1])
            if start >= len(data): self.send_error(416); return
            self.send_response(206 if start else 200)
            if start: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start)); self.end_headers()
            self.wfile.write(data[start:cut.pop() if cut else None])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    row = dataclasses.replace(weight_row(name), url=f"http://127.0.0.1:{server.server_port}/{path.name}", sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(weights, "WEIGHTS", [row])
    yield types.SimpleNamespace(name=name, row=row, size=len(data), asked=asked, cut=cut, part=weights_folder()/"unfinished"/row.file)
    server.shutdown(); server.server_close()


def test_fetching_goes_on_where_it_broke(served):
    served.cut[:] = [served.size - 1, 300_000]
    for at in (300_000, served.size - 1):
        with pytest.raises(InputError, match="goes on from there"): weights.get_weight(served.name)
        assert served.part.stat().st_size == at and find_weight(served.name) is None
    assert weights.get_weight(served.name)[1] == find_weight(served.name)
    assert served.asked == [None, "bytes=300000-", f"bytes={served.size - 1}-"] and not served.part.exists()


def test_fetching_with_all_of_it_here(served):
    served.cut[:] = [10]
    with pytest.raises(InputError): weights.get_weight(served.name)
    served.part.write_bytes(served.part.parent.parent.parent.parent.joinpath("served.pth").read_bytes())
    assert weights.get_weight(served.name)[0] == served.name      # the server has nothing left to send (416)


def test_a_spoilt_remainder_is_thrown_away(served):
    served.part.parent.mkdir(parents=True)
    served.part.write_bytes(b"x"*1000)
    with pytest.raises(InputError, match="not the published file"): weights.get_weight(served.name)
    assert not served.part.exists() and find_weight(served.name) is None
    assert weights.get_weight(served.name)[0] == served.name


def test_a_file_with_another_digest(served, monkeypatch):
    monkeypatch.setattr(weights, "WEIGHTS", [dataclasses.replace(served.row, sha256="0"*64)])
    with pytest.raises(InputError, match="not the published file"): weights.get_weight(served.name)
    assert find_weight(served.name) is None and not served.part.exists()


def test_what_cannot_be_got(tmp_path, monkeypatch):
    for name in ("flame", "mica", "facevid2vid"):
        with pytest.raises(InputError, match="accept its terms at https://.* fetch .* there"): weights.get_weight(name)
    monkeypatch.setattr(weights, "WEIGHTS", [dataclasses.replace(weight_row("gfpgan"), url=(tmp_path/"no").as_uri())])
    with pytest.raises(InputError, match="cannot be fetched"): weights.get_weight("gfpgan")
