"""Golden data for the ResNets: torchvision's, with weights that a formula makes.

The weights would be too large to keep: `fill` makes them from each parameter's name, on
both sides.  Kept are a few numbers after every stage, in evaluation, and what a step of
ResNet-18 in training mode makes of its running averages.

Made with torch 2.14.1, torchvision 0.29.1 and numpy 2.4.6:

    pip install torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
    python tests/golden/make_resnet.py           # writes tests/golden/resnet.npz
"""

import pathlib
import zlib

import numpy as np

SIDE = 64
SIZES = (18, 50, 101)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights of a parameter in PyTorch's name and layout, from a hash.

    Sines of a counter: cheap, the same everywhere to float32's last digits.
    """
    size = int(np.prod(shape))
    phase = (zlib.crc32(name.encode()) % 10_007) / 10_007
    wave = np.sin(np.arange(size, dtype=np.float64) * 12.9898 + 6.28 * phase)
    if len(shape) == 4:  # of unit gain, so that no activation explodes
        scale = (2 / np.prod(shape[1:])) ** 0.5 * 1.4
        return (wave * scale).reshape(shape).astype(np.float32)
    if name.endswith("running_var"):
        return (1 + 0.5 * wave).astype(np.float32)
    # The last normalisation of a block is small, as residual branches are.
    last = name.endswith(("bn3.weight", "layer1.0.bn2.weight"))
    if name.endswith("weight"):
        return ((0.3 if last else 1) * (1 + 0.2 * wave)).astype(np.float32)
    return (0.1 * wave).astype(np.float32)


def image() -> np.ndarray:
    """uint8 [2, SIDE, SIDE, 3], smooth, the same everywhere."""
    row = np.arange(SIDE)[None, :, None, None] / SIDE
    column = np.arange(SIDE)[None, None, :, None] / SIDE
    number = np.arange(2)[:, None, None, None]
    channel = np.arange(3)[None, None, None, :]
    wave = np.sin(9 * row + channel) * np.cos(7 * column * (1 + number))
    return np.round(127.5 * (1 + wave)).astype(np.uint8)


def summary(x: np.ndarray) -> np.ndarray:
    """float64: mean, deviation, maximum, and some entries of an array [B, H, W, C]."""
    x = np.asarray(x, np.float64)
    entries = x.reshape(-1)[:: max(1, x.size // 29)][:29]
    return np.array([x.mean(), x.std(), x.max(), *entries])


def main() -> None:
    """Writes resnet.npz beside this file."""
    import torch
    import torchvision

    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    pixels = torch.from_numpy(image()).permute(0, 3, 1, 2).float() / 255
    x = (pixels - mean) / deviation
    kept = {}
    for size in SIZES:
        network = getattr(torchvision.models, f"resnet{size}")(weights=None)
        state = network.state_dict()
        for name, value in state.items():
            if not name.startswith("fc.") and value.dim():
                state[name] = torch.from_numpy(fill(name, tuple(value.shape)))
        network.load_state_dict(state)
        network.eval()
        with torch.no_grad():
            z = network.maxpool(network.relu(network.bn1(network.conv1(x))))
            kept[f"{size}/0"] = summary(z.permute(0, 2, 3, 1).numpy())
            for i in (1, 2, 3, 4):
                z = getattr(network, f"layer{i}")(z)
                kept[f"{size}/{i}"] = summary(z.permute(0, 2, 3, 1).numpy())
            kept[f"{size}/pooled"] = z.amax((2, 3)).numpy()
            if size == 18:
                network.train()
                network(x)
                for name, value in network.state_dict().items():
                    if name.endswith(("running_mean", "running_var")):
                        kept[f"train/{name}"] = value.numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("resnet.npz"), **kept)


if __name__ == "__main__":
    main()
