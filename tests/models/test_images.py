import json

import numpy as np
import pytest
import torch
from PIL import Image

from downriver.core.errors import InputError
from downriver.models.images import ImageProcessor

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_pixels_are_normalised_channel_by_channel():
    processor = ImageProcessor(20, 30, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    tensor = processor([PIXELS, PIXELS])
    expected = (PIXELS / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.4, 0.3])
    assert tensor.dtype == torch.float32 and tensor.shape == (2, 3, 20, 30)
    np.testing.assert_allclose(tensor[1].permute(1, 2, 0), expected, atol=1e-6)


def test_every_form_of_one_image_gives_the_same(tmp_path):
    processor = ImageProcessor(16, 16)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    forms = [
        Image.fromarray(PIXELS),
        PIXELS.tolist(),
        PIXELS.astype(np.int64),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ]
    assert all(processor([form]).equal(processor([PIXELS])) for form in forms)
    grey = PIXELS[:, :, 0]
    assert processor([grey]).equal(processor([grey[:, :, None]])) and processor([grey])[0, 0].equal(
        processor([grey])[0, 2]
    )


def test_the_middle_is_cut_out():
    wide = np.zeros((10, 40, 3), dtype=np.uint8)
    wide[:, 15:25] = 255
    assert ImageProcessor(10, 10, shortest=10)([wide]).min() == 1.0
    assert ImageProcessor(10, 10)([wide]).min() == -1.0
    assert ImageProcessor(8, 8, shortest=16)([PIXELS]).shape == (1, 3, 8, 8)


def test_it_agrees_with_transformers(tmp_path):
    """The same configuration, read by ViTImageProcessor's PIL backend, gives the same tensor."""
    pil = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    for ours in (ImageProcessor(24, 24, resample=3), ImageProcessor(12, 12, (0.4,) * 3, (0.3,) * 3)):
        ours.save_pretrained(tmp_path)
        theirs = pil.ViTImageProcessorPil.from_pretrained(tmp_path)([Image.fromarray(PIXELS)], return_tensors="pt")
        torch.testing.assert_close(ours([PIXELS]), theirs["pixel_values"].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "processor",
    [ImageProcessor(), ImageProcessor(24, 20, (0.0,) * 3, (1.0,) * 3, resample=3), ImageProcessor(8, 8, shortest=9)],
)
def test_settings_come_back(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path) == processor


def test_older_forms_are_read(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"size": 32, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "do_normalize": True}))
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor(32, 32, (0.1,) * 3, (0.2,) * 3)
    file.write_text(
        json.dumps({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32, "do_normalize": False})
    )
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor(32, 32, (0.0,) * 3, (1.0,) * 3, shortest=40)
    for text in ("{", '{"size": {"longest_edge": 3}}', '"text"'):
        file.write_text(text)
        with pytest.raises(InputError, match="preprocessor_config"):
            ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((4, 4), np.float32), "float32"),
        ([[0, 300]], "0 to 255"),
        ("no/such/file.png", r"no/such/file\.png"),
    ],
)
def test_what_is_no_image_is_refused(image, says):
    with pytest.raises(InputError, match=says):
        ImageProcessor()([image])
