"RVM: equal to the authors' network over time, whatever the threads and the chunks; fails when broken; loads their file."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets.blocks import like_imagenet
from ophav_nb.nets.rvm import RobustVideoMatting, load_rvm, matte_frames
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight

STATES = [None]*4


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(RobustVideoMatting(), "rvm_mobilenetv3")


@torch.inference_mode()
def outputs(net):
    film, out = golden_fill.drawn_picture("rvm.frames", (2, 3, 256, 256)), {}
    for ratio in (1, .5):
        states = STATES
        for t in range(2):
            fgr, pha, *states = net(film[t:t + 1], *states, downsample_ratio=ratio)
            out |= {f"r{ratio}.frame{t}.{k}": v for k, v in zip(("fgr", "pha", "rec1", "rec2", "rec3", "rec4"), (fgr, pha, *states))}
    out["sequence_r0.5.fgr"], out["sequence_r0.5.pha"], *_ = net(film[None], downsample_ratio=.5)
    return out | {"seg": net(film[:1], segmentation_pass=True)[0]}


def test_golden(net): golden_fill.golden_on_threads("rvm_mobilenetv3", lambda: outputs(net))


def test_a_broken_layer_fails(net):
    weight = net.backbone.features[11].block[2].fc1.weight
    before = weight.detach().clone()
    with torch.no_grad(): weight.neg_()
    try: assert max(golden_fill.beyond("rvm_mobilenetv3", outputs(net)).values()) > 1
    finally: weight.data.copy_(before)


@torch.inference_mode()
@pytest.mark.parametrize("ratio", [1, .4])
def test_chunks_batches_and_odd_sizes(net, ratio):
    "A chunk is its frames one by one, two films are each alone, and no size is refused."
    films = torch.rand(2, 3, 3, 75, 101, generator=torch.Generator().manual_seed(1))
    fgr, pha, *last = net(films, downsample_ratio=ratio)
    assert fgr.shape == films.shape and pha.shape == (2, 3, 1, 75, 101)
    states = STATES
    for t in range(3):
        one, alpha, *states = net(films[1:, t], *states, downsample_ratio=ratio)
        torch.testing.assert_close(one, fgr[1:, t], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(alpha, pha[1:, t], rtol=1e-4, atol=2e-5)
    for a, b in zip(states, last): torch.testing.assert_close(a, b[1:], rtol=1e-4, atol=2e-5)


def test_film_of_any_length(net):
    "The memory is carried from call to call and from chunk to chunk, and it matters."
    frames = np.random.default_rng(0).integers(0, 256, (7, 64, 48, 3), np.uint8)
    whole = np.stack(list(matte_frames(net, frames, chunk=7)))
    assert whole.shape == (7, 64, 48) and whole.dtype == np.float32
    states = [None]*4
    pieces = np.stack([m for part in (frames[:1], frames[1:5], frames[5:]) for m in matte_frames(net, part, states=states, chunk=3)])
    stream = np.stack(list(matte_frames(net, (frames[i:i + 2] for i in range(0, 7, 2)))))
    assert np.abs(whole - np.stack(list(matte_frames(net, iter(frames))))).max() < 1e-5
    forgetful = np.stack([m for f in frames for m in matte_frames(net, f)])
    assert np.abs(whole - pieces).max() < 1e-5 and np.abs(whole - stream).max() < 1e-5
    assert np.abs(whole[0] - forgetful[0]).max() < 1e-5 < np.abs(whole[1:] - forgetful[1:]).max()


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="rvm_mobilenetv3.pth"): load_rvm()
    torch.save(net.state_dict(), tmp_path/"rvm_mobilenetv3.pth")
    assert add_weight(tmp_path/"rvm_mobilenetv3.pth")[0] == "rvm"
    for loaded in (load_rvm(), load_rvm(tmp_path/"rvm_mobilenetv3.pth")):
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    torch.save({"a": torch.zeros(1)}, tmp_path/"other.pth")
    with pytest.raises(InputError, match="other tensors"): load_rvm(tmp_path/"other.pth")


def test_encoder_beside_torchvision():
    "The encoder is torchvision's dilated MobileNetV3-Large: other weights, an odd size."
    theirs = pytest.importorskip("torchvision.models").mobilenet_v3_large(weights=None, dilated=True).features.eval()
    torch.manual_seed(3)
    ours = RobustVideoMatting().backbone.eval()
    with torch.no_grad():
        for name, t in ours.state_dict().items():
            if name.endswith(("running_var", "running_mean")): t.uniform_(.3, .6)
    theirs.load_state_dict({k.removeprefix("features."): t for k, t in ours.state_dict().items()}, strict=True)
    x = torch.rand(1, 3, 75, 101)
    with torch.inference_mode():
        last = theirs(like_imagenet(x))
        features = ours(x)
    torch.testing.assert_close(features[-1], last, rtol=1e-4, atol=1e-5)
    assert [list(f.shape[1:]) for f in features] == [[16, 38, 51], [24, 19, 26], [40, 10, 13], [960, 5, 7]]
