"""Preprocessing against Pillow and against formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from understudy.distillation.preprocess import Preprocess


def plain(channels: int, size: int) -> Preprocess:
    return Preprocess(channels=channels, size=size, mean=[0], std=[1])


def photo(height: int, width: int) -> np.ndarray:
    """Smooth and noisy parts, uint8 [height, width, 3]."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([127 + 100 * np.sin(x / 7), 127 + 100 * np.cos(y / 5), (x + y) % 256], axis=-1)
    noisy = smooth + generator.normal(0, 20, smooth.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def to_view(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]


def test_nothing_to_do_returns_the_same_tensor():
    views = torch.rand(2, 3, 8, 8)
    assert plain(3, 8)(views) is views


def test_grey_is_repeated_without_a_copy():
    views = torch.rand(2, 1, 8, 8)
    repeated = plain(3, 8)(views)
    assert torch.equal(repeated, torch.cat([views] * 3, dim=1))
    assert repeated.data_ptr() == views.data_ptr()


def test_colour_becomes_the_grey_of_pillow():
    image = photo(40, 50)
    grey = plain(1, 50)(to_view(np.pad(image, ((0, 10), (0, 0), (0, 0)))))[0, 0, :40] * 255
    expected = np.asarray(Image.fromarray(image).convert("L"))
    assert np.array_equal(np.floor(grey.numpy() + 0.5), expected)


@pytest.mark.parametrize("size", [13, 32, 64, 100])
def test_resizing_is_that_of_pillow(size):
    image = photo(64, 64)
    resized = plain(3, size)(to_view(image))[0].permute(1, 2, 0).numpy() * 255
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    # Pillow rounds after each of its two passes
    assert np.abs(resized - expected).max() <= 1.01


def test_each_channel_has_its_own_normalisation():
    views = torch.rand(2, 3, 4, 4, dtype=torch.float64).float()
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.2, 2.0)
    out = Preprocess(channels=3, size=4, mean=mean, std=std)(views)
    for channel in range(3):
        expected = (views[:, channel].double() - mean[channel]) / std[channel]
        torch.testing.assert_close(out[:, channel].double(), expected, atol=1e-6, rtol=1e-6)


def test_one_mean_serves_all_channels():
    views = torch.rand(2, 1, 4, 4)
    one = Preprocess(channels=3, size=4, mean=[0.4], std=[0.3])(views)
    three = Preprocess(channels=3, size=4, mean=[0.4] * 3, std=[0.3] * 3)(views)
    assert torch.equal(one, three)
    assert one.shape == (2, 3, 4, 4)


def test_grey_views_meet_a_normalisation_per_channel():
    views = torch.rand(2, 1, 4, 4)
    preprocess = Preprocess(channels=3, size=4, mean=[0.1, 0.2, 0.3], std=[1, 2, 4])
    assert torch.equal(preprocess(views), preprocess(views.repeat(1, 3, 1, 1)))


def test_nothing_is_kept_in_the_state():
    assert Preprocess(channels=3, size=4, mean=[0.4], std=[0.3]).state_dict() == {}


def test_wrong_views_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        plain(3, 4)(torch.rand(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 2}, "channels is 1 or 3"),
        ({"size": 0}, "size at least 1"),
        ({"mean": [0, 0]}, "mean and std have 1 or 3 values, not 2 and 1"),
        ({"std": [1, 0, 1]}, "std must be above 0"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Preprocess(**({"channels": 3, "size": 4, "mean": [0], "std": [1]} | options))


def test_gradients_reach_the_view():
    views = torch.rand(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    preprocess = Preprocess(channels=3, size=4, mean=[0.1, 0.2, 0.3], std=[1, 2, 4]).double()
    assert torch.autograd.gradcheck(preprocess, (views,))


def test_compiles_without_a_break():
    preprocess = Preprocess(channels=3, size=6, mean=[0.5], std=[0.25])
    views = torch.rand(2, 1, 8, 8)
    compiled = torch.compile(preprocess, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(views), preprocess(views))


@pytest.mark.slow
@pytest.mark.parametrize(("views", "channels"), [(1, 3), (3, 1)])
def test_exports_to_onnx(tmp_path, views, channels):
    import onnxruntime

    preprocess = Preprocess(channels=channels, size=6, mean=[0.5], std=[0.25]).eval()
    example = torch.rand(2, views, 16, 16)
    file = tmp_path / "preprocess.onnx"
    torch.onnx.export(preprocess, (example,), file, dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    np.testing.assert_allclose(out, preprocess(example).numpy(), atol=1e-5)
