"""Weights and inputs that anyone can make again, for the golden data in `tests/golden`.

A tensor is drawn from a generator that is seeded with the CRC-32 of its own name, so its value depends neither on the
order of the tensors nor on torch's generators. How the normal numbers `n` become a weight is decided by the first rule
that fits: the manifest's own rules `[pattern, kind, a, b]`, then the defaults by name and shape.
"""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent/"golden"


def named_generator(name: str) -> np.random.Generator:
    "A generator that depends on the name only."
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _scaled(kind, a, b, n):
    "The kinds of rules: a plain normal, one scaled by the fan-in, one by the fan-in of a modulated convolution."
    if kind == "normal": return a + b*n
    if kind == "fan": return a*n/np.sqrt(np.prod(n.shape[1:], dtype=float))
    if kind == "modfan": return a*n/np.sqrt(np.prod(n.shape[2:], dtype=float))
    raise ValueError(f"unknown kind of rule: {kind}")


def filled(name: str, shape, rules=(), gain: float = 1.) -> torch.Tensor:
    "The value of one floating-point tensor of a network without normalisation layers."
    n = named_generator(name).standard_normal(tuple(shape))
    for pattern, kind, a, b in rules:
        if re.search(pattern, name): break
    else:
        if name.endswith("bias"): kind, a, b = "normal", 0., .01
        elif len(shape) >= 2: kind, a, b = "fan", gain, 0.
        else: raise KeyError(f"no rule fills {name} {tuple(shape)}")
    return torch.from_numpy(_scaled(kind, a, b, n).astype(np.float32))


def fill(model: torch.nn.Module, rules=(), gain: float = 1.) -> torch.nn.Module:
    "Give every tensor of a model its drawn value."
    state = {name: filled(name, t.shape, rules, gain) for name, t in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def fingerprint(model: torch.nn.Module) -> int:
    "CRC-32 of all names and values, in alphabetical order."
    crc = 0
    for name, t in sorted(model.state_dict().items()):
        crc = zlib.crc32(np.ascontiguousarray(t.numpy()).tobytes(), zlib.crc32(name.encode(), crc))
    return crc


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
    return torch.from_numpy((low + (high - low)*(.9*smooth + .1*grain)).astype(np.float32))


def manifest(name: str) -> dict:
    "What is known about a golden network."
    return json.loads((GOLDEN/f"{name}.json").read_text())


def worst_difference(name: str, output: str, value: torch.Tensor) -> float:
    "Largest difference from the stored samples of one output."
    known = manifest(name)["outputs"][output]
    assert list(value.shape) == known["shape"]
    grid = tuple(slice(first, None, step) for first, step in zip(known["offset"], known["stride"]))
    with np.load(GOLDEN/f"{name}.npz") as stored: return float(np.abs(value.detach().numpy()[grid] - stored[output]).max())
