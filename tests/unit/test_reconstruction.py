"""Distances to a target picture: pixels by hand, LPIPS with real weights. The weights: `make weights`."""

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from fetch_weights import weights_file
from PIL import Image
from torch.testing import assert_close

from reward_funcs import _lpips, reconstruction
from reward_funcs.reconstruction import Loss, lpips_distance, reconstruction_loss

PHOTOS = Path(skimage.__file__).parent / "data"
# What stlpips_pytorch 0.0.2 itself gives for the pictures of test_distance_grows_with_noise: the astronaut with noise
# of deviation 0, .02, .05, .1 and .3, then the coffee.
EXPECTED = {
    "alex": [0.0, 0.0034744, 0.0463888, 0.1927817, 0.5704018, 0.6744614],
    "vgg": [0.0, 0.0272292, 0.1223268, 0.2450940, 0.7538874, 0.6967487],
}


def grey(level, size=(64, 48)):
    return Image.new("RGB", size, (level, level, level))


# pixels


def test_loss_by_hand():
    target = torch.tensor([[0.0, 1.0, -1.0, 0.0]]).expand(2, 4).reshape(2, 1, 2, 2)
    drawn = torch.tensor([[0.0, 1.0, -1.0, 0.5], [0.5, 1.0, -1.0, 1.0]]).reshape(2, 1, 2, 2)
    # MSE: .25 / 4 and (.25 + 1) / 4; L1: .5 / 4 and 1.5 / 4
    assert_close(reconstruction_loss(None, drawn, target), torch.tensor([0.0625, 0.3125]), rtol=0, atol=1e-7)
    weighted = reconstruction_loss(None, drawn, target, mse=2.0, l1=4.0)
    assert_close(weighted, torch.tensor([0.625, 2.125]), rtol=0, atol=1e-7)


def test_rewards_by_hand():
    # 255 and 0 are 1 and -1: a difference of 2. 51 / 127.5 = .4.
    drawn, asked = [grey(255), grey(0), grey(51), None, grey(0)], [grey(0), grey(0), grey(0), grey(0), None]
    prompts = [""] * 5
    assert reconstruction.mse(prompts, drawn, asked) == pytest.approx([-4.0, 0.0, -0.16, None, None], abs=1e-6)
    assert reconstruction.l1(prompts, drawn, asked) == pytest.approx([-2.0, 0.0, -0.4, None, None], abs=1e-6)
    both = Loss(mse=0.5, l1=2.0, lpips=0.0, batch_size=2)
    assert reconstruction.reward(prompts, drawn, asked, both) == pytest.approx([-6.0, 0.0, -0.88, None, None], abs=1e-6)


def test_pictures_of_several_sizes_keep_their_order():
    drawn = [grey(255), grey(51, (32, 32)), grey(0)]
    rewards = reconstruction.mse([""] * 3, drawn, [grey(0), grey(0, (32, 32)), grey(0)])
    assert rewards == pytest.approx([-4.0, -0.16, 0.0], abs=1e-6)


def test_target_in_every_form_a_dataset_gives(tmp_path):
    path = tmp_path / "target.png"
    grey(51).save(path)
    data = path.read_bytes()
    column = Dataset.from_dict({"target": [str(path)]}).cast_column("target", ImageColumn())
    forms = [str(path), path, data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    forms += [grey(51), grey(51).convert("L"), column[0]["target"]]
    assert reconstruction.mse([""] * 8, [grey(0)] * 8, forms) == pytest.approx([-0.16] * 8, abs=1e-6)


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        (grey(0, (32, 32)), ValueError, r"target\[0\] is 32 x 32 and the picture drawn 64 x 48; crop and resize"),
        (b"no picture", ValueError, r"target\[0\], 10 bytes, is no picture that can be opened"),
        ("/absent.png", ValueError, r"target\[0\], '/absent.png', is no picture"),
        (3, TypeError, r"target\[0\] is a int; give a path"),
    ],
)
def test_target_that_cannot_be_compared_is_named(wanted, error, words):
    with pytest.raises(error, match=words):
        reconstruction.mse([""], [grey(0)], [wanted])
    if error is TypeError or not isinstance(wanted, Image.Image):
        with pytest.raises(error, match=words):
            reconstruction.check_rows({"prompt": [""], "target": [wanted]})


def test_dataset_without_targets_is_named():
    with pytest.raises(ValueError, match=r"reads the column 'target', and the dataset has \['prompt'\]"):
        reconstruction.check_rows(Dataset.from_dict({"prompt": ["p"]}))
    reconstruction.check_rows({"prompt": [""], "target": [None]})


def test_no_weights_is_an_error_that_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("LPIPS_WEIGHTS", raising=False)
    monkeypatch.delenv("LPIPS_BACKBONE", raising=False)
    with pytest.raises(ValueError, match=r"set LPIPS_WEIGHTS to a \.pth file"):
        reconstruction.reward([""], [grey(0)], [grey(0)])
    monkeypatch.setenv("LPIPS_WEIGHTS", str(tmp_path / "absent.pth"))
    with pytest.raises(FileNotFoundError, match=r"no LPIPS file .*absent\.pth"):
        reconstruction.reward([""], [grey(0)], [grey(0)])
    monkeypatch.setenv("LPIPS_WEIGHTS", str(weights_file("lpips_alex.pth")))
    with pytest.raises(ValueError, match="set LPIPS_BACKBONE to torchvision's weights of the same network"):
        reconstruction.reward([""], [grey(0)], [grey(0)])


# LPIPS with real weights


def photo(name, side=64):
    image = Image.open(PHOTOS / name).convert("RGB")
    return image.crop((100, 60, 100 + 2 * side, 60 + 2 * side)).resize((side, side))


@pytest.fixture(scope="module", params=["alex", "vgg"])
def network(request):
    return _lpips.load_lpips(str(weights_file(f"stlpips_{request.param}.pth")), "", "cpu")


def test_distance_grows_with_noise(network):
    pixels = reconstruction.pixels(photo("astronaut.png"))
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    changed = torch.stack([pixels + level * noise for level in (0.0, 0.02, 0.05, 0.1, 0.3)])
    other = reconstruction.pixels(photo("coffee.png"))
    pictures = torch.cat([changed, other[None]])
    distances = lpips_distance(network, pixels.expand_as(pictures), pictures)
    assert distances[0] == 0
    assert (distances[:5].diff() > 0).all()
    assert_close(distances, torch.tensor(EXPECTED[network.trunk]), rtol=0, atol=1e-4)
    assert_close(lpips_distance(network, pictures, pixels.expand_as(pictures)), distances, rtol=0, atol=1e-6)


def test_shift_costs_less_than_noise_of_the_same_error(network):
    # What the variant is for: one pixel to the right changes many pixels and little that is seen.
    pixels = reconstruction.pixels(photo("astronaut.png"))
    shifted = torch.cat([pixels[:, :, :1], pixels[:, :, :-1]], dim=2)
    error = (shifted - pixels).square().mean().sqrt()
    noise = pixels + error * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    shift_cost, noise_cost = lpips_distance(network, pixels.expand(2, -1, -1, -1), torch.stack([shifted, noise]))
    assert 5 * shift_cost < noise_cost


def test_gradient_reaches_the_picture_even_a_black_one(network):
    target = reconstruction.pixels(photo("astronaut.png"))[None]
    for start in (torch.full_like(target, -1.0), target + 0.1):
        drawn = start.clone().requires_grad_()
        loss = reconstruction_loss(network, drawn, target).sum()
        loss.backward()
        assert torch.isfinite(drawn.grad).all()
        with torch.no_grad():  # a small step against the gradient comes nearer
            nearer = reconstruction_loss(network, drawn - 0.05 * drawn.grad / drawn.grad.norm(), target).sum()
        assert nearer < loss


def test_perceptual_reward_of_pictures(monkeypatch):
    monkeypatch.setenv("LPIPS_WEIGHTS", str(weights_file("stlpips_alex.pth")))
    monkeypatch.setenv("GCPO_REWARD_DEVICE", "cpu")
    target, other = photo("astronaut.png"), photo("coffee.png")
    file = io.BytesIO()
    target.save(file, "PNG")
    asked = [file.getvalue()] * 3
    same, none, far = reconstruction.reward([""] * 3, [target, None, other], asked)
    assert (same, none) == (0.0, None)
    mse, perceptual = (
        reconstruction.mse([""] * 3, [target, None, other], asked),
        reconstruction.lpips([""] * 3, [target, None, other], asked),
    )
    assert far == pytest.approx(mse[2] + perceptual[2], abs=1e-6)
    assert perceptual[2] == pytest.approx(-EXPECTED["alex"][-1], abs=1e-4)


def test_pictures_that_cannot_be_compared_are_named(network):
    with pytest.raises(ValueError, match=r"shape \(1, 3, 64, 64\) and \(1, 3, 64, 32\)"):
        lpips_distance(network, torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match="pictures of 31 x 64 pixels; LPIPS needs at least 32"):
        lpips_distance(network, torch.zeros(1, 3, 64, 31), torch.zeros(1, 3, 64, 31))


# the layout of lpips


def backbone(trunk):
    """Random weights named as torchvision names those of its AlexNet or VGG16."""
    generator = torch.Generator().manual_seed(1)
    numbers = {"alex": [0, 3, 6, 8, 10], "vgg": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]}[trunk]
    convolutions, width, state = [c for layer in _lpips.LAYERS[trunk] for c in layer], 3, {}
    for number, (channels, kernel) in zip(numbers, convolutions, strict=True):
        scale = math.sqrt(2 / (width * kernel**2))
        state[f"features.{number}.weight"] = scale * torch.randn(channels, width, kernel, kernel, generator=generator)
        state[f"features.{number}.bias"] = torch.zeros(channels)
        width = channels
    return state | {"classifier.6.bias": torch.zeros(1000)}


@pytest.mark.parametrize(("trunk", "sides"), [("alex", [15, 7, 3, 3, 3]), ("vgg", [64, 32, 16, 8, 4])])
def test_official_weights_with_a_torchvision_backbone(trunk, sides, tmp_path):
    torch.save(backbone(trunk), tmp_path / "backbone.pth")
    network = _lpips.load_lpips(str(weights_file(f"lpips_{trunk}.pth")), str(tmp_path / "backbone.pth"), "cpu")
    assert not network.shift_tolerant
    a, b = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    found = list(_lpips.features(network, torch.cat([a, b])))
    assert [layer.shape[-1] for layer in found] == sides
    # By the formula, without the shortcuts: per layer, channels normalised, weighted squares, mean over positions.
    expected = 0.0
    for layer, head in zip(found, network.heads, strict=True):
        first, second = (features / features.norm(dim=0) for features in layer.double())
        expected += (head[:, None, None] * (first - second) ** 2).nan_to_num().sum(dim=0).mean().item()
    assert lpips_distance(network, a, b).item() == pytest.approx(expected, rel=1e-4)
    assert lpips_distance(network, a, a).item() == 0


def test_a_whole_lpips_state_loads_too():
    # As lpips.LPIPS().state_dict() has it: slices, constants, the layers' weights by two names.
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    state = torch.load(weights_file("lpips_alex.pth"), map_location="cpu", weights_only=True)
    features = {key: value for key, value in backbone("alex").items() if key.startswith("features.")}
    renamed = {f"net.slice{slices[int(key.split('.')[1])]}{key[8:]}": value for key, value in features.items()}
    constants = {f"scaling_layer.{name}": torch.tensor(getattr(_lpips, name.upper())) for name in ("shift", "scale")}
    doubled = {key.replace("lin", "lins.", 1): value for key, value in state.items()}
    whole = _lpips.lpips_network(state | renamed | constants | doubled)
    parts = _lpips.lpips_network(state | features)
    a, b = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lpips_distance(whole, a, b), lpips_distance(parts, a, b))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lin1.model.1.weight": None}, "are not LPIPS weights"),
        ({"lin2.model.1.weight": None}, r"'lin2.model.1.weight' is absent; alex needs \(1, 384, 1, 1\)"),
        ({"lin5.model.1.weight": torch.zeros(1, 512, 1, 1)}, "unexpected LPIPS weight 'lin5.model.1.weight'"),
        ({"features.3.bias": None}, "'features.3.bias' is absent"),
        ({"features.3.weight": torch.zeros(192, 64, 3, 3)}, r"is \(192, 64, 3, 3\); alex needs \(192, 64, 5, 5\)"),
        ({"features.10.weight": None}, "has 4 convolutions, alex needs 5"),
        ({"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, "unexpected LPIPS weight 'scaling_layer.shift'"),
        ({"net.slice2.4.filt": torch.ones(64, 1, 3, 3)}, "unexpected LPIPS weight 'net.slice2.4.filt'"),
    ],
)
def test_weights_that_do_not_belong_are_named(change, words):
    state = torch.load(weights_file("lpips_alex.pth"), map_location="cpu", weights_only=True) | backbone("alex")
    del state["classifier.6.bias"]
    state = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        _lpips.lpips_network(state)


def test_pickled_code_is_refused(tmp_path):
    torch.save({"lin0.model.1.weight": np.random.default_rng}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"Weights only load failed"):
        _lpips.read_state(str(tmp_path / "evil.pth"))
