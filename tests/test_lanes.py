"Matrix products in registers, bits of sixteen, the exponential: against numpy."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import numpy as np
import pytest

from ophav_nb.geometry import kernel
from ophav_nb.lanes import COLUMNS, LANES, at_most, exponentials, first_bit, least, outer_product, product


@pytest.mark.parametrize('O, K, n', [(4, 4, COLUMNS), (64, 32, 192), (16, 64, 64), (8, 20, 3*COLUMNS)])
@pytest.mark.parametrize('relu', [False, True])
def test_product(O, K, n, relu):
    rng = np.random.default_rng(0)
    W, b, X = rng.normal(size=2 + O*K + 5).astype(np.float32), rng.normal(size=O + 3).astype(np.float32), rng.normal(size=(K + 2, n)).astype(np.float32)
    Y = np.full((O + 3, n), 7, np.float32)
    product(W, 2, b, 3, O, K, X.reshape(-1), 2*n, Y.reshape(-1), n, n, n, relu)
    want = W[2:2 + O*K].reshape(O, K) @ X[2:] + b[3:3 + O, None]
    np.testing.assert_allclose(Y[1:1 + O], np.maximum(want, 0) if relu else want, atol=2e-5)
    assert (Y[0] == 7).all() and (Y[1 + O:] == 7).all()          # nothing else was touched


@pytest.mark.parametrize('O, K, n', [(4, 4, LANES), (64, 28, 192), (8, 20, 5*LANES)])
def test_outer_product_adds(O, K, n):
    rng = np.random.default_rng(1)
    G, X = rng.normal(size=(O, n)).astype(np.float32), rng.normal(size=(K, n)).astype(np.float32)
    D = np.ones(3 + O*K + 1, np.float32)
    outer_product(G.reshape(-1), 0, O, X.reshape(-1), 0, K, D, 3, n, n)
    np.testing.assert_allclose(D[3:-1].reshape(O, K), 1 + G @ X.T, atol=1e-4)
    assert (D[:3] == 1).all() and D[-1] == 1


@kernel
def ask(a, at, bound):
    bits, out = at_most(a, at, bound), [-1]
    while bits:
        out.append(first_bit(bits))
        bits &= bits - 1
    return least(a, at), out


def test_bits():
    a = np.random.default_rng(2).normal(size=40).astype(np.float32)
    a[11] = np.nan
    for at, bound in ((0, .3), (5, -.2), (24, -9), (24, 9)):
        some, (low, lanes) = a[at:at + LANES], ask(a, at, np.float32(bound))
        assert lanes[1:] == list(np.flatnonzero(some <= np.float32(bound)))
        if not np.isnan(some).any(): assert low == some.min()


def test_exponentials():
    x = np.concatenate([np.linspace(-87, 88, 10001), [-1e9, 1e9, -0.]]).astype(np.float32)
    y = x.copy()
    exponentials(y, len(y), np.empty(len(y), np.int32))
    want = np.exp(np.clip(x, -87, 88).astype(np.float64))
    assert np.abs(y/want - 1).max() < 3e-7


def test_what_is_no_number_stays_none():
    W, X, Y = np.ones(16, np.float32), np.ones((4, COLUMNS), np.float32), np.zeros((4, COLUMNS), np.float32)
    X[1, 2] = np.nan
    product(W, 0, np.zeros(4, np.float32), 0, 4, 4, X.reshape(-1), 0, Y.reshape(-1), 0, COLUMNS, COLUMNS, True)
    assert np.isnan(Y[:, 2]).all() and np.isnan(Y).sum() == 4
    exponentials(Y[0], COLUMNS, np.empty(COLUMNS, np.int32))
    assert np.flatnonzero(np.isnan(Y[0])).tolist() == [2]
