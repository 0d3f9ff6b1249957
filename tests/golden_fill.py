"""Weights and inputs that anyone can make again, for the golden data in `tests/golden`.

A tensor is drawn from a generator that is seeded with the CRC-32 of its own name, so its value depends neither on the
order of the tensors nor on torch's generators. How the normal numbers `n` become a weight is decided by the first rule
that fits: the manifest's own rules `[pattern, kind, a, b]`, then the defaults by name and shape. Two kinds of tensors are
not drawn: those with the rule `keep` hold what the network's constructor gives them, and the vectors of spectral
normalisation follow from the weight.
"""
import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent/"golden"


def named_generator(name: str) -> np.random.Generator:
    "A generator that depends on the name only."
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _scaled(kind, a, b, n):
    "The kinds of rules: normal, positive, constant, scaled by the fan-in, by the fan-in of a modulated convolution."
    if kind == "normal": return a + b*n
    if kind == "abs": return a + b*np.abs(n)
    if kind == "const": return np.full(n.shape, float(a))
    n *= a                                                     # in place: most numbers are here, and each is touched once
    if kind == "fan": n /= np.sqrt(np.prod(n.shape[1:], dtype=float))
    elif kind == "modfan": n /= np.sqrt(np.prod(n.shape[2:], dtype=float))
    else: raise ValueError(f"unknown kind of rule: {kind}")
    return n


def _default(name, ndim, gain, names):
    "The rule for a tensor that no rule of the manifest fits."
    if name.endswith("running_mean"): return "normal", 0., .1
    if name.endswith("running_var"): return "abs", 1., .1
    if name.endswith("bias"): return "normal", 0., .01
    if ndim >= 2: return "fan", gain, 0.
    if not name.endswith("weight"): raise KeyError(f"no rule fills {name}")
    return ("normal", 1., .1) if name.removesuffix("weight") + "bias" in names else ("normal", .25, .05)   # a norm; a PReLU


def _rule(name, rules): return next(((kind, a, b) for pattern, kind, a, b in rules if re.search(pattern, name)), None)


def filled(name: str, shape, rules=(), gain: float = 1., names=(), seed: int = 0) -> torch.Tensor:
    "The value of one floating-point tensor; `names` are those of all tensors of its network."
    n = named_generator(f"{seed}:{name}" if seed else name).standard_normal(tuple(shape))
    return torch.from_numpy(_scaled(*(_rule(name, rules) or _default(name, len(shape), gain, names)), n).astype(np.float32))


def _singular(weight: torch.Tensor, name_u: str) -> dict[str, torch.Tensor]:
    "First singular vectors of a weight [O, ...] by 50 rounds of the power method: `v = W'u, u = Wv`, each of unit length."
    w = weight.numpy().astype(np.float64).reshape(len(weight), -1)
    unit = lambda x: x/np.linalg.norm(x)
    u, both = unit(named_generator(name_u).standard_normal(len(w))), w @ w.T     # two steps at once, of a small matrix
    for _ in range(49): u = unit(both @ u)
    v = unit(w.T @ u)
    return {"u": torch.from_numpy(unit(w @ v).astype(np.float32)), "v": torch.from_numpy(v.astype(np.float32))}


def fill(model: torch.nn.Module, rules=(), gain: float = 1., seed: int = 0) -> torch.nn.Module:
    "Give every tensor of a model its drawn value; another seed gives other numbers by the same rule."
    old = model.state_dict()
    value = lambda name: filled(name, old[name].shape, rules, gain, old, seed)
    kept = {k: t if t.is_floating_point() else torch.zeros_like(t) for k, t in old.items()
            if not t.is_floating_point() or (_rule(k, rules) or "?")[0] == "keep"}
    vectors = [k for k in old if k.endswith(("weight_u", "weight_v")) and k not in kept]
    drawn = [k for k in old if k not in kept and k not in vectors]
    with ThreadPoolExecutor(2) as pool: new = kept | dict(zip(drawn, pool.map(value, drawn)))
    for stem in {k[:-2] for k in vectors}: new |= {f"{stem}_{k}": t for k, t in _singular(new[stem + "_orig"], stem + "_u").items()}
    model.load_state_dict(new, strict=True)
    return model.eval()


def fingerprint(model: torch.nn.Module, rules=()) -> int:
    "CRC-32 of all names and drawn values, in alphabetical order."
    crc = 0
    for name, t in sorted(model.state_dict().items()):
        drawn = t.is_floating_point() and not name.endswith(("weight_u", "weight_v")) and (_rule(name, rules) or "?")[0] != "keep"
        if drawn: crc = zlib.crc32(np.ascontiguousarray(t.cpu().numpy()).tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def fill_otherwise(model: torch.nn.Module, name: str, part: str = "", seed: int = 1) -> torch.nn.Module:
    "Fill a (part of a) golden network by its own rules, but with other numbers."
    known = manifest(name)["parts"][part]
    return fill(model, known["rules"], known["gain"], seed)


def fill_golden(model: torch.nn.Module, name: str, part: str = "") -> torch.nn.Module:
    "Fill a (part of a) golden network after comparing its tensors' names, shapes and kept values with the manifest."
    known = manifest(name)["parts"][part]
    found = {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in model.state_dict().items()}
    assert found == known["state_dict"]
    prefix = f"kept/{part}/" if part else "kept/"
    with np.load(GOLDEN/f"{name}.npz") as stored:
        for key in stored.files:
            if key.startswith(prefix): assert np.allclose(model.state_dict()[key.removeprefix(prefix)].cpu().numpy(), stored[key], atol=1e-7), key
    fill(model, known["rules"], known["gain"])
    assert fingerprint(model, known["rules"]) == known["fill_crc32"]
    return model.to(memory_format=torch.channels_last) if getattr(model, "channels_last", False) else model   # as it is loaded


def _tensor(a: np.ndarray) -> torch.Tensor: return torch.as_tensor(a.astype(np.float32))   # where the tests run: see conftest


def drawn_picture(name: str, shape, low: float = 0., high: float = 1.) -> torch.Tensor:
    "Smooth noise with a little grain, [N, C, H, W]: 0.9 of a coarse grid enlarged bilinearly, 0.1 of white noise."
    generator = named_generator("input:" + name)
    n, c, height, width = shape
    coarse = generator.random((n, c, max(height//16, 1) + 1, max(width//16, 1) + 1))
    grain = generator.random(shape)
    y, x = (np.linspace(0, k - 1, size) for k, size in ((coarse.shape[2], height), (coarse.shape[3], width)))
    i, j = np.minimum(y.astype(int), coarse.shape[2] - 2), np.minimum(x.astype(int), coarse.shape[3] - 2)
    u, v = (y - i)[:, None], x - j
    rows = coarse[:, :, i]*(1 - u) + coarse[:, :, i + 1]*u
    smooth = rows[..., j]*(1 - v) + rows[..., j + 1]*v
    return _tensor(low + (high - low)*(.9*smooth + .1*grain))


def drawn_normal(name: str, shape, mean: float = 0., std: float = 1.) -> torch.Tensor:
    "Normal numbers."
    return _tensor(mean + std*named_generator("input:" + name).standard_normal(shape))


def drawn_uniform(name: str, shape, low: float = 0., high: float = 1.) -> torch.Tensor:
    "Uniform numbers."
    return _tensor(low + (high - low)*named_generator("input:" + name).random(shape))


def manifest(name: str) -> dict:
    "What is known about a golden network."
    return json.loads((GOLDEN/f"{name}.json").read_text())


def worst_difference(name: str, output: str, value: torch.Tensor) -> float:
    "Largest difference from the stored samples of one output."
    known = manifest(name)["outputs"][output]
    assert list(value.shape) == known["shape"]
    grid = tuple(slice(first, None, step) for first, step in zip(known["offset"], known["stride"]))
    with np.load(GOLDEN/f"{name}.npz") as stored: return float(np.abs(value.detach().cpu().numpy()[grid] - stored[output]).max())


def share(name: str, output: str, value: torch.Tensor) -> float:
    "The largest difference of one output as a share of its tolerance: golden up to 1."
    return worst_difference(name, output, value)/manifest(name)["outputs"][output]["atol"]


def beyond(name: str, outputs: dict) -> dict:
    "Each output's `share`; golden when none is above 1 and none is missing."
    assert set(outputs) == set(manifest(name)["outputs"])
    return {k: share(name, k, v) for k, v in outputs.items()}


def golden_on_threads(name: str, outputs, threads=(1, 2)) -> None:
    "What the function `outputs` gives is golden on one thread and on two."
    before = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        try: shares = beyond(name, outputs())
        finally: torch.set_num_threads(before)
        worst = max(shares, key=shares.get)
        assert shares[worst] <= 1, f"{count} threads: {worst} differs by {shares[worst]:.2f} of its tolerance"
