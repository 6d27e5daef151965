"""What is done to images before a network sees them."""

import pytest
import torch
from PIL import Image

from basis.compression.images import Preparation, preparation_for
from basis.compression.networks import build_network
from basis.vision import import_timm, import_torchvision
from tests import tiny

OWN, LARGE = "tests.tiny:network", [(500, 375), (375, 500), (640, 480)]


def prepare(sizes, name="resnet18", **options):
    return preparation_for(name, tiny.network(), sizes, **options)


def test_images_are_prepared_as_the_library_does_it():
    image = Image.effect_noise((300, 260), 50).convert("RGB")
    own = import_torchvision().models.EfficientNet_B1_Weights.DEFAULT.transforms()
    found = prepare(LARGE, "torchvision/efficientnet_b1")
    torch.testing.assert_close(found(image), own(image), rtol=0, atol=0)
    data = import_timm().data
    for name in ("test_resnet", "tf_efficientnetv2_b3"):  # the second is squashed
        with torch.device("meta"):
            model = build_network(f"timm/{name}", classes=3)
        own = data.create_transform(**data.resolve_data_config({}, model=model))
        found = preparation_for(f"timm/{name}", model, LARGE)
        torch.testing.assert_close(found(image), own(image), rtol=0, atol=0)
        changed = preparation_for(name, model, LARGE, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
        assert torch.equal(changed(Image.new("RGB", (60, 40))), torch.full((3, 32, 32), -1.0))


@pytest.mark.parametrize(
    ("name", "sizes", "options", "resize", "crop"),
    [
        ("resnet18", LARGE, {}, 256, [224, 224]),
        ("resnet18", [(224, 224)] * 3, {}, None, None),
        ("resnet18", [(224, 224)] * 3, {"crop": 0.875}, 256, [224, 224]),
        ("resnet18", [(32, 32)] * 3, {"image_size": 32}, None, None),
        ("resnet18", [(32, 32)] * 3, {"image_size": 224}, 224, [224, 224]),
        ("resnet18", LARGE, {"crop": 0.9}, 248, [224, 224]),  # rounded down, as timm does
        ("resnet18", LARGE, {"image_size": 160, "crop": 0.5}, 320, [160, 160]),
        ("resnet18", [(4000, 3000), (3000, 4000)], {}, 256, [224, 224]),
        (OWN, [(48, 32)] * 3, {}, None, None),
        (OWN, [(36, 36)] * 3, {"crop": 0.9}, 40, [36, 36]),
        (OWN, LARGE, {"image_size": 64}, 64, [64, 64]),
    ],
)
def test_images_that_fit_stay_as_they_are(name, sizes, options, resize, crop):
    found = prepare(sizes, name, **options)
    assert (found.resize, found.crop) == (resize, crop)
    assert found(Image.new("RGB", sizes[0])).shape[1:] == (*(crop or sizes[0][::-1]),)
    assert ("neither resized nor cropped" in str(found)) == (resize is None)


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        ("resnet18", [(32, 32)] * 3, {}, "32 pixels .*224 x 224.* --image-size 32 .* --image-size 224 "),
        ("resnet18", [(40, 30), (60, 50), (99, 90)], {}, r"50 pixels .*\(median\)"),
        ("resnet18", [(1024, 1024)] * 3, {}, "1024 pixels .* --image-size 1024 "),
        (OWN, LARGE, {}, r"375 .*\(median\), and .* --image-size N"),
    ],
)
def test_images_that_training_hardly_saw_so_are_refused(name, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(sizes, name, **options)


def test_images_as_they_are_are_only_normalised():
    image = Image.effect_noise((16, 16), 50)
    x = Preparation(mean=(0.5,), std=(0.25,))(image)
    assert ((x * 0.25 + 0.5) * 255).round().byte().flatten().tolist() == list(image.tobytes())
