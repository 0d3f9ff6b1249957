"""Pictures and films as people have them."""
import errno
import os
import struct
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from ophav_nb import media
from ophav_nb.media import SOUND_RATE, Crop, Film, VideoWriter, clip_info, iter_sound, iter_video, read_image, read_own, read_stored, read_video, resize, write_image, write_video
from ophav_nb.run import InputError


@pytest.fixture(scope="module")
def face():
    return np.ascontiguousarray(read_image("astronaut")[:200, 120:320])


def mean_difference(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


# ---- pictures

@pytest.mark.parametrize("flag", range(1, 9))
def test_every_exif_orientation(tmp_path, face, flag):
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    image, exif = Image.fromarray(face[:, :150]), Image.Exif()
    if flag in undo: image = image.transpose(Image.Transpose[undo[flag]])
    exif[0x0112] = flag
    image.save(tmp_path/"a.jpg", exif=exif, quality=95, subsampling=0)
    assert mean_difference(read_image(tmp_path/"a.jpg"), face[:, :150]) < 2


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "RGBA", "I;16", "I", "F"])
def test_every_mode(tmp_path, face, mode):
    image = Image.fromarray(face)
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(image.convert("L"))
        image = {"I;16": lambda: Image.fromarray(grey.astype(np.uint16)*257), "I": lambda: Image.fromarray(grey.astype(np.int32)*257),
                 "F": lambda: Image.fromarray(grey.astype(np.float32)/255)}[mode]()
    elif mode == "PA": image = image.convert("P").convert("PA")
    else: image = image.convert(mode)
    name = tmp_path/{"CMYK": "a.jpg", "YCbCr": "a.jpg", "F": "a.tiff", "PA": "a.tiff"}.get(mode, "a.png")
    try: image.save(name)
    except OSError: pytest.skip("this Pillow writes no such file")
    read = read_image(name)
    assert read.dtype == np.uint8 and read.shape == face.shape
    reference = face if mode in ("P", "PA", "CMYK", "YCbCr", "RGBA") else np.repeat(np.asarray(Image.fromarray(face).convert("L"))[..., None], 3, -1)
    assert mean_difference(resize(read, 20), resize(reference, 20)) < (12 if mode in ("P", "PA", "1") else 3)


def test_16_bit_colour(tmp_path, face):
    import zlib
    deep = (face.astype(">u2")*257)
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", face.shape[1], face.shape[0], 16, 2, 0, 0, 0)
    (tmp_path/"a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert mean_difference(read_image(tmp_path/"a.png"), face) < 1


def test_transparent_is_laid_over_white(tmp_path, face):
    rgba = np.dstack([face, np.zeros(face.shape[:2], np.uint8)])
    write_image(tmp_path/"a.png", rgba)
    assert (read_image(tmp_path/"a.png") == 255).all()


def test_colour_profile_is_applied(tmp_path, face):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))   # a profile that does not fit must be ignored
    for profile in (lab.tobytes(), b"nonsense"):
        Image.fromarray(face).save(tmp_path/"a.png", icc_profile=profile)
        assert mean_difference(read_image(tmp_path/"a.png"), face) == 0


def test_sizes(tmp_path, face):
    for side, expected in ((8000, 4096), (200, 200), (1, 1)):
        Image.fromarray(face).resize((side, side), Image.Resampling.NEAREST).save(tmp_path/"a.jpg")
        assert read_image(tmp_path/"a.jpg").shape == (expected, expected, 3)
    Image.new("P", (5000, 10)).save(tmp_path/"a.gif")
    assert read_image(tmp_path/"a.gif").shape[1] == 4096


@pytest.mark.parametrize("kind", ["text", "empty", "torn jpg", "torn png", "torn header", "film", "folder", "missing", "bomb"])
def test_refused_pictures(tmp_path, face, kind):
    path = tmp_path/("a.png" if kind == "torn png" else "a.jpg")
    if kind == "text": path.write_text("Dear sir")
    if kind == "empty": path.write_bytes(b"")
    if kind.startswith("torn"):
        Image.fromarray(face).save(path)
        path.write_bytes(path.read_bytes()[:30 if "header" in kind else 3000])
    if kind == "film": write_video(tmp_path/"f.mp4", [face]).rename(path)
    if kind == "folder": path.mkdir()
    if kind == "bomb":
        head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + b"\0\0\0\0")
    with pytest.raises(InputError) as caught: read_image(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_no_other_program_draws_a_picture(tmp_path, face, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_, **__: pytest.fail('Ghostscript was asked'))
    Image.fromarray(face).save(tmp_path/'face.eps')
    (tmp_path/'face.eps').rename(tmp_path/'face.jpg')
    with pytest.raises(InputError, match='not a picture that can be read'): read_image(tmp_path/'face.jpg')
    with pytest.raises(InputError, match='damaged'): read_stored(tmp_path/'face.jpg')             # nor one in a run that somebody sent


def test_comment_is_in_the_file(tmp_path, face):
    assert Image.open(write_image(tmp_path/"a.png", face, "synthetic")).info["Description"] == "synthetic"
    assert Image.open(write_image(tmp_path/"a.jpg", face, "synthetic")).info["comment"] == b"synthetic"


# ---- crops

def test_crop_is_exact_where_it_is_whole(face):
    assert (Crop(60, 50, 40, 40).apply(face) == face[30:70, 40:80]).all()
    labels = np.arange(200*200, dtype=np.float32).reshape(200, 200)
    assert (Crop(60, 50, 40, 40).apply(labels, filter="nearest") == labels[30:70, 40:80]).all()
    assert Crop(-500, -500, 40, 16).apply(face).shape == (16, 16, 3)
    assert Crop(10, 50, 40, 80).covered(200, 60).tolist() == [20, 0, 80, 60] and Crop(60, 50, 40, 40).covered(200, 200).tolist() == [0, 0, 40, 40]
    assert (Crop(60, 50, 40, 40).paste(face, np.zeros((40, 40, 3)))[30:70, 40:80] == 0).all()


def test_crop_keeps_kinds_of_numbers(face):
    crop = Crop(100, 100, 150, 64)
    for image in (face, face[..., 0], np.dstack([face, face[..., :1]]), (face/255).astype(np.float32), np.stack([face, face])):
        out = crop.apply(image)
        assert out.dtype == image.dtype and out.shape[-3:-1] == (64, 64) or out.shape == (64, 64)
    import torch
    xy = torch.tensor([[100., 100.]], requires_grad=True)
    assert torch.allclose(crop.unpoints(crop.points(xy)), xy) and crop.points(xy).requires_grad


def test_resizing_keeps_the_mean(face):
    for filter in ("cubic", "linear", "box"):
        assert np.abs(resize(face, 37, filter).mean((0, 1)) - face.mean((0, 1))).max() < 1
    flat = resize(np.full((50, 70, 2), .3, np.float32), (20, 30))
    assert np.allclose(flat, .3, atol=1e-6)


# ---- films

@pytest.fixture(scope="module")
def moving(face):
    return np.stack([Crop(100 + 3*i, 100, 120, 96).apply(face) for i in range(20)])


def test_colours_survive(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 150, 120], [30, 60, 90], [128, 128, 128]], np.uint8)
    write_video(tmp_path/"a.mp4", [np.broadcast_to(c, (64, 64, 3)) for c in colours])
    frames, _ = read_video(tmp_path/"a.mp4")
    assert np.abs(frames[:, 32, 32].astype(int) - colours).max() <= 3


def test_odd_sizes_rates_and_metadata(tmp_path, face):
    path = write_video(tmp_path/"a.mp4", [face[:33, :41]]*5, fps=29.97, metadata={"comment": "synthetic", "title": "t"})
    with av.open(str(path)) as film: assert film.metadata["comment"] == "synthetic"
    info = clip_info(path)
    assert (info.width, info.height, info.frames) == (42, 34, 5) and abs(info.fps - 29.97) < .01
    with pytest.raises(ValueError, match="in a film of"), VideoWriter(tmp_path/"b.mp4") as film:
        film.add(face); film.add(face[:50])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4"]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotated_by_metadata(tmp_path, moving, turns):
    """A phone writes turned frames and a matrix that says how to turn them back."""
    turned = [np.ascontiguousarray(np.rot90(f[:, :64], turns)) for f in moving]   # stored counter-clockwise
    path = write_video(tmp_path/"a.mp4", turned)
    data, one = bytearray(path.read_bytes()), 1 << 16
    matrix = {1: (0, one, -one, 0), 2: (-one, 0, 0, -one), 3: (0, -one, one, 0)}[turns]   # ISO 14496-12: a b c d of the display
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames, _ = read_video(path)
    assert frames.shape[1:] == (96, 64, 3) and mean_difference(frames, moving[:, :, :64]) < 5


@pytest.mark.parametrize("aspect, width", [(Fraction(2), 192), (Fraction(1, 2), 48), (Fraction(9, 1), 96), (Fraction(300, 301), 96)])
def test_pixels_become_square(tmp_path, moving, aspect, width):
    with av.open(str(tmp_path/"a.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.sample_aspect_ratio = 96, 64, "yuv420p", aspect
        for frame in moving[:3]: film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:64]), "rgb24")))
        film.mux(stream.encode())
    frames, _ = read_video(tmp_path/"a.mp4")
    info = clip_info(tmp_path/"a.mp4")
    assert frames.shape == (3, 64, width, 3) and (info.width, info.height) == (width, 64)
    assert mean_difference(frames, resize(moving[:3, :64], (64, width))) < 5
    assert read_video(tmp_path/"a.mp4", size=32)[0].shape[2:0:-1] == (round(32*width/max(width, 64)), round(32*64/max(width, 64)))


def uneven(path, frames, times):
    """Write a film whose frames stand at these times (milliseconds)."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for frame, time in zip(frames, times):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            film.mux(stream.encode(picture))
        film.mux(stream.encode())
    return path


def test_uneven_times_become_even(tmp_path, moving):
    times = np.cumsum([0] + [20, 20, 80, 40]*5)[:20]   # 40 ms on average
    path = uneven(tmp_path/"a.mp4", moving, [int(t) for t in times])
    frames, fps = read_video(path, fps=25)
    shown = [int(np.searchsorted(times, 40*i + 20, side="right") - 1) for i in range(len(frames))]
    best = [int(np.argmin([mean_difference(f, m) for m in moving])) for f in frames]
    assert fps == 25 and len(frames) in (19, 20) and np.abs(np.array(best[:-1]) - shown[:-1]).max() <= 1
    halved, _ = read_video(write_video(tmp_path/"b.mp4", moving, 25), fps=12.5)
    assert len(halved) == 10


def test_limits(tmp_path, moving):
    path = write_video(tmp_path/"a.mp4", moving)
    frames, fps = read_video(path, size=48, max_frames=7)
    assert frames.shape == (7, 48, 48, 3) and fps == 25


@pytest.mark.parametrize("kind", ["text", "empty", "no index", "torn", "folder", "missing"])
def test_refused_films(tmp_path, moving, kind):
    path = tmp_path/"a.mp4"
    if kind == "text": path.write_text("Dear sir")
    if kind == "empty": path.write_bytes(b"")
    if kind == "folder": path.mkdir()
    if kind in ("torn", "no index"):
        data = write_video(path, moving).read_bytes()
        path.write_bytes(data[:len(data)*9//10] if kind == "torn" else data[:200])
    with pytest.raises(InputError) as caught: read_video(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    if kind == "torn": assert 0 < len(read_video(path, partial=True)[0]) < 20


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path/"a.mp4"), "w") as film:
        stream = film.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono"); sound.rate = 44100
        film.mux(stream.encode(sound)); film.mux(stream.encode())
    with pytest.raises(InputError, match="no pictures"): read_video(tmp_path/"a.mp4")


def with_beep(path, frames, rate, codec, at, late=0., mono=True):
    """A film of 25 pictures a second with a beep of .1 s at `at`, its sound beginning `late` seconds after the pictures."""
    with av.open(str(path), "w") as film:
        stream, heard = film.add_stream("libx264", rate=25), film.add_stream(codec, rate=rate, layout="mono" if mono else "stereo")
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames: film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        film.mux(stream.encode())
        time = np.arange(round((len(frames)/25 - late)*rate))/rate + late
        beep = (.5*np.sin(2*np.pi*1000*time)*(abs(time - at - .05) < .05)).astype(np.float32)
        for i in range(0, len(beep) - 1023, 1024):
            piece = av.AudioFrame.from_ndarray(np.repeat(beep[None, i:i + 1024], 1 if mono else 2, 0), "fltp", "mono" if mono else "stereo")
            piece.sample_rate, piece.time_base, piece.pts = rate, Fraction(1, rate), i + round(late*rate)
            film.mux(heard.encode(piece))
        film.mux(heard.encode())
    return path


def beep_of(path):
    heard = np.concatenate(list(iter_sound(path, 25.)), 1)
    return np.flatnonzero(abs(heard[0]) > .2)[[0, -1]]/SOUND_RATE, heard.shape[1]/SOUND_RATE


@pytest.mark.parametrize("name, rate, codec, late, mono", [("a.mp4", 44100, "aac", 0., True), ("a.mkv", 22050, "aac", .4, True), ("a.mkv", 48000, "ac3", 0., False)])
def test_a_film_is_heard_along_with_another(tmp_path, moving, name, rate, codec, late, mono):
    source = with_beep(tmp_path/name, moving, rate, codec, .5, late, mono)
    assert np.allclose(beep_of(source)[0], (.5, .6), atol=.01)
    (begins, ends), seconds = beep_of(write_video(tmp_path/"b.mp4", moving[:17], 25, sound=source))
    assert np.allclose((begins, ends), (.5, .6), atol=.01) and abs(seconds - 17/25) < .03      # no longer than its pictures
    assert beep_of(write_video(tmp_path/"c.mp4", np.repeat(moving, 2, 0), 25, sound=source))[1] < .9   # nor longer than the sound
    with av.open(str(tmp_path/"b.mp4")) as film: assert [(s.type, s.codec_context.name) for s in film.streams] == [("video", "h264"), ("audio", "aac")]


def test_a_film_without_sound_stays_silent(tmp_path, moving):
    silent = write_video(tmp_path/"a.mp4", moving)
    with av.open(str(write_video(tmp_path/"b.mp4", moving, sound=silent))) as film: assert [s.type for s in film.streams] == ["video"]


def test_show_images_stays_small(face):
    picture = media.show_images([face, face[..., 0], np.dstack([face, face[..., :1]])], ["a", "b", "c"], width=300)
    assert picture.array.shape[1] <= 300 and picture._repr_jpeg_()[:2] == b"\xff\xd8"


def test_a_film_is_read_again_and_again(tmp_path, moving):
    film = Film(write_video(tmp_path/"a.mp4", moving, 25), size=48, max_frames=7)
    once, again = list(film), list(film)
    assert len(once) == len(again) == 7 and film.fps == 25 and max(once[0].shape) == 48
    assert np.array_equal(once, again) and np.array_equal(once, read_video(film.path, 48, 7)[0])


def test_a_disk_that_fills_up_while_a_film_is_written(tmp_path, moving, monkeypatch):
    class Full:
        def __init__(self, container): self.container = container
        def __getattr__(self, name): return getattr(self.container, name)
        def close(self):
            self.container.close()
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path/".a.partial.mp4"))
    film = VideoWriter(tmp_path/"a.mp4", 25)
    with pytest.raises(InputError, match=r"a\.mp4: the disk is full") as caught, film:
        film.add(moving[0])
        film.container = Full(film.container)
    assert ".partial" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_gap_in_time_stamps_is_no_long_film(tmp_path, moving, caplog):
    with av.open(str(tmp_path/"a.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width = stream.height = moving.shape[1]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 25)
        for i, image in enumerate(moving):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = i + 15000*(i >= 10), Fraction(1, 25)      # ten minutes of nothing
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    total = sum(1 for _ in iter_video(tmp_path/"a.mp4", fps=25))
    assert len(moving) + 4*25 < total < len(moving) + 6*25 and "no frames for 600 s after frame 10" in caplog.text


@pytest.mark.parametrize("fps", [-1., 0., float("nan"), float("inf")])
def test_rates_that_cannot_be(tmp_path, moving, fps):
    path = write_video(tmp_path/"a.mp4", moving[:3])
    with pytest.raises(InputError, match="frames a second cannot be"): next(iter_video(path, fps=fps))
    with pytest.raises(InputError, match="frames a second cannot be"): write_video(tmp_path/"b.mp4", moving[:3], fps)


def test_what_cannot_be_written_is_said(tmp_path, face):
    with pytest.raises(InputError, match="at least one frame"): write_video(tmp_path/"a.mp4", [])
    with pytest.raises(InputError, match="keeps no transparency"): write_image(tmp_path/"a.jpg", np.dstack([face, face[..., :1]]))
    with pytest.raises(InputError, match="written as .png, .jpg or .webp"): write_image(tmp_path/"a.xyz", face)
    with pytest.raises(InputError, match="unknown fill 'white'"): Crop(10, 10, 50, 32).apply(face, fill="white")
    assert not list(tmp_path.iterdir())


def test_films_of_two_processes_have_two_temporary_names(tmp_path):
    assert f".{os.getpid()}.partial" in VideoWriter(tmp_path/"a.mp4").partial.name


def test_what_may_not_be_read_is_not_told_as_damaged(tmp_path, monkeypatch):
    film, picture = write_video(tmp_path/"a.mp4", [np.zeros((32, 32, 3), np.uint8)]*3), write_image(tmp_path/"a.png", np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(os, "access", lambda path, mode: False)      # root may read everything
    for use, path in ((clip_info, film), (read_video, film), (read_image, picture), (read_own, picture)):
        with pytest.raises(InputError, match=f"{path.name} may not be read; change its permissions"): use(path)
    with pytest.raises(InputError, match="no such file"): read_image(tmp_path/"b.png")


def test_an_array_of_a_run_that_is_damaged(tmp_path):
    "It says whose the file is and what to do, whether it is cut, overwritten, of pickled things or not there."
    path = tmp_path / "landmarks.npy"
    np.save(path, np.arange(6.))
    assert (media.read_array(path) == np.arange(6)).all() and (media.read_array(path, mmap=True) == np.arange(6)).all()
    for spoil in (lambda: path.write_bytes(path.read_bytes()[:-8]), lambda: path.write_bytes(b"\0"*128), lambda: np.save(path, np.array([{}]), allow_pickle=True),
                  lambda: path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((  "), lambda: path.write_bytes(b"PK\x03\x04 no archive"), path.unlink):
        spoil()
        with pytest.raises(InputError, match="landmarks.npy is missing or damaged; .*ophav create`, `ophav evaluate`"): media.read_array(path)


def test_a_film_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, there, sync = tmp_path / "film.mp4", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (there.append(path.exists()), sync(number)))
    write_video(path, np.zeros((3, 16, 16, 3), np.uint8), fps=25)
    assert there == [False] and path.exists()


def test_letters_beyond_ascii_are_no_boxes(face):
    bar = lambda text: media.show_images([face], [text], width=200).array[:20]
    assert len({bar(text).tobytes() for text in ("Zo\u00eb", "Zo\u00f6", "Zo\u0151", "Zo\u0441")}) == 4


def test_a_phones_picture(tmp_path, face, monkeypatch):
    path = tmp_path/"a.heic"
    path.write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match="pip install pillow-heif.*or save it as JPEG"): read_image(path)
    class Decoder(ImageFile.ImageFile):
        format = "HEIF"
        def _open(self): self._size, self._mode, self.tile = face.shape[1::-1], "RGB", []
        def load(self): self.im = Image.fromarray(face).im
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN)); monkeypatch.setattr(Image, "ID", list(Image.ID))
    register = lambda: Image.register_open("HEIF", Decoder, lambda start: start[4:12] == b"ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert np.array_equal(read_image(path), face)


def test_a_film_that_ends_before_its_header_says(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (150, 64, 64, 3), dtype=np.uint8)      # large frames: one cluster of Matroska holds few of them
    with av.open(str(tmp_path/"whole.mkv"), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for image in noise: film.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        film.mux(stream.encode())
    assert sum(1 for _ in iter_video(tmp_path/"whole.mkv")) == len(noise) and not caplog.text
    data = (tmp_path/"whole.mkv").read_bytes()
    (tmp_path/"cut.mkv").write_bytes(data[:len(data)*6//10])
    for _ in range(2): assert 0 < sum(1 for _ in iter_video(tmp_path/"cut.mkv")) < len(noise)
    assert caplog.text.count("its header says 6.0 s") == 1
