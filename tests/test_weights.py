"""Weights of others: recognised by content, loaded without running anything, refused in one line."""
import collections
import dataclasses
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import scipy.sparse
import torch

from ophav_nb import weights
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight, find_weight, load_pickle_restricted, read_tensors, require, weight_row, weights_table


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path/"home"))
    return tmp_path/"home"


class Bomb:
    def __init__(self, target): self.target = str(target)
    def __reduce__(self): return os.mkdir, (self.target,)


def stand_in(name):
    row = weight_row(name)
    return {key: torch.randn(shape) for key, shape in row.keys}


def test_missing_weights_say_file_licence_and_command():
    with pytest.raises(InputError) as caught: require("gfpgan")
    for part in ("GFPGANv1.4.pth", "Apache-2.0", "github.com/TencentARC/GFPGAN", "ophav weights add"): assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="lists gfpgan"): require("gfgan")


def test_every_row_is_complete_and_recognises_itself_alone():
    assert len({w.name for w in weights.WEIGHTS}) == len(weights.WEIGHTS)
    for row in weights.WEIGHTS:
        assert row.licence and row.page.startswith("https://") and row.enables and row.without
        assert row.sha256 is None or len(row.sha256) == 64
        if row.keys:
            prefix = f"{row.part}." if row.part else ""
            assert weights.recognise({prefix + k: v for k, v in stand_in(row.name).items()})[0].name == row.name
    assert {r["name"] for r in weights_table()} == {w.name for w in weights.WEIGHTS}


@pytest.mark.parametrize("container", ["params_ema", "plain", "safetensors", "legacy"])
def test_adding_gfpgan(tmp_path, container, home):
    tensors, path = stand_in("gfpgan"), tmp_path/("my file.safetensors" if container == "safetensors" else "my file.pth")
    if container == "safetensors": safetensors.torch.save_file(tensors, path)
    else: torch.save({"params_ema": tensors} if container == "params_ema" else tensors, path,
                     _use_new_zipfile_serialization=container != "legacy")
    name, kept = add_weight(path)
    assert name == "gfpgan" and kept.parent.parent == home and find_weight("gfpgan") == kept == require("gfpgan")
    assert all(torch.equal(v, tensors[k]) for k, v in read_tensors(kept).items())
    assert "licence" in kept.with_suffix(".json").read_text()


def test_hostile_files_do_nothing(tmp_path):
    target = tmp_path/"boom"
    torch.save({"a": torch.zeros(2), "b": Bomb(target)}, tmp_path/"a.pth")
    (tmp_path/"b.pth").write_bytes(pickle.dumps({"a": Bomb(target)}))
    (tmp_path/"c.pkl").write_bytes(pickle.dumps({"a": Bomb(target)}))
    for name in ("a.pth", "b.pth", "c.pkl"):
        with pytest.raises(InputError) as caught: add_weight(tmp_path/name)
        assert "\n" not in str(caught.value) and not target.exists()


@pytest.mark.parametrize("size", [0, 1, 10, 200, 5000])
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_truncated_files(tmp_path, size, suffix):
    path = tmp_path/f"a.{suffix}"
    if suffix == "pth": torch.save(stand_in("gfpgan"), path)
    elif suffix == "safetensors": safetensors.torch.save_file(stand_in("gfpgan"), path)
    else: path.write_bytes(pickle.dumps({"v_template": np.zeros((500, 3))}))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError) as caught: add_weight(path)
    assert "\n" not in str(caught.value)


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


def test_getting_a_file(tmp_path, monkeypatch):
    from ophav_nb.run import file_hash
    torch.save({"params_ema": stand_in("gfpgan")}, tmp_path/"GFPGANv1.4.pth")
    served = lambda digest: [dataclasses.replace(weight_row("gfpgan"), url=(tmp_path/"GFPGANv1.4.pth").as_uri(), sha256=digest)]
    monkeypatch.setattr(weights, "WEIGHTS", served("0"*64))
    with pytest.raises(InputError, match="not the published file"): weights.get_weight("gfpgan")
    assert find_weight("gfpgan") is None
    monkeypatch.setattr(weights, "WEIGHTS", served(file_hash(tmp_path/"GFPGANv1.4.pth")))
    assert weights.get_weight("gfpgan")[1] == find_weight("gfpgan")


def test_what_cannot_be_got(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="accept"): weights.get_weight("flame")
    monkeypatch.setattr(weights, "WEIGHTS", [dataclasses.replace(weight_row("gfpgan"), url=(tmp_path/"no").as_uri())])
    with pytest.raises(InputError, match="cannot be fetched"): weights.get_weight("gfpgan")
