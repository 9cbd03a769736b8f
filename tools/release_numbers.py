"""What the original release reports of its models: the tables of its README, but for two rows.

ATSS with DyHead and HTC++, both with Focal-L, are in none of the tables: box and mask AP are those that the
README's introduction gives for the largest Focal Transformer, without their methods. HTC++ is what the paper
names; that the box AP is DyHead's, with 229 M parameters, is in the FocalNet paper (arXiv 2203.11926). Of
Focal-L as a classifier nothing is reported.

These numbers are quoted, not reproduced here. The release says FLOPs where multiply-adds are meant. None is
what it does not report.
"""

from typing import NamedTuple


class Classifier(NamedTuple):
    """A classifier on ImageNet-1K, trained on it alone, for images of 224 x 224."""

    model: str
    config: str
    params_m: float | None
    flops_g: float | None
    top1: float | None
    top5: float | None

    @property
    def weights(self) -> str | None:
        """Name of the released file, whose link is dead; None if there is none."""
        name = self.config.removesuffix("_patch4_window7_224").replace("_", "-")
        return f"{name}-is224-ws7.pth" if self.top1 else None


CLASSIFIERS = tuple(
    Classifier(model, f"{name}_patch4_window7_224", *numbers)
    for model, name, *numbers in (
        ("Focal-T", "focal_tiny", 28.9, 4.9, 82.2, 95.9),
        ("Focal-T, conv", "focal_tiny_useconv", 30.8, 5.2, 82.7, 96.1),
        ("Focal-fast-T, conv", "focalv2_tiny_useconv", 30.2, 5.0, 82.4, 96.0),
        ("Focal-S", "focal_small", 51.1, 9.4, 83.6, 96.2),
        ("Focal-S, conv", "focal_small_useconv", 53.1, 9.7, 83.8, 96.5),
        ("Focal-fast-S, conv", "focalv2_small_useconv", 51.5, 9.4, 83.6, 96.4),
        ("Focal-B", "focal_base", 89.8, 16.4, 84.0, 96.5),
        ("Focal-B, conv", "focal_base_useconv", 93.3, 16.8, 84.2, 97.1),
        ("Focal-fast-B, conv", "focalv2_base_useconv", 91.2, 16.4, 84.0, 96.6),
        ("Focal-L", "focal_large", None, None, None, None),
    )
)


class Detector(NamedTuple):
    """A detector on COCO, mini-val."""

    method: str
    backbone: str
    config: str
    params_m: int | None
    flops_g: int | None
    box_ap: float | None
    mask_ap: float | None = None

    @property
    def pretraining(self) -> str | None:
        """Data set that the backbone was trained on first; the release does not say it of Focal-L."""
        return None if self.backbone == "Focal-L" else "ImageNet-1K"

    @property
    def schedule(self) -> str | None:
        """1x of 12 epochs or 3x of 36; the release does not say it of Focal-L."""
        return None if self.backbone == "Focal-L" else self.config.removesuffix("_coco")[-2:]


DETECTORS = tuple(
    Detector(method, backbone, f"{name}_coco", *numbers)
    for method, backbone, name, *numbers in (
        ("Mask R-CNN", "Focal-T", "mask-rcnn_focal-tiny_fpn_1x", 49, 291, 44.8, 41.0),
        ("Mask R-CNN", "Focal-T", "mask-rcnn_focal-tiny_fpn_amp-ms-crop-3x", 49, 291, 47.2, 42.7),
        ("Mask R-CNN", "Focal-S", "mask-rcnn_focal-small_fpn_1x", 71, 401, 47.4, 42.8),
        ("Mask R-CNN", "Focal-S", "mask-rcnn_focal-small_fpn_amp-ms-crop-3x", 71, 401, 48.8, 43.8),
        ("Mask R-CNN", "Focal-B", "mask-rcnn_focal-base_fpn_1x", 110, 533, 47.8, 43.2),
        ("Mask R-CNN", "Focal-B", "mask-rcnn_focal-base_fpn_amp-ms-crop-3x", 110, 533, 49.0, 43.7),
        ("RetinaNet", "Focal-T", "retinanet_focal-tiny_fpn_1x", 39, 265, 43.7),
        ("RetinaNet", "Focal-T", "retinanet_focal-tiny_fpn_amp-ms-crop-3x", 39, 265, 45.5),
        ("RetinaNet", "Focal-S", "retinanet_focal-small_fpn_1x", 62, 367, 45.6),
        ("RetinaNet", "Focal-S", "retinanet_focal-small_fpn_amp-ms-crop-3x", 62, 367, 47.3),
        ("RetinaNet", "Focal-B", "retinanet_focal-base_fpn_1x", 101, 514, 46.3),
        ("RetinaNet", "Focal-B", "retinanet_focal-base_fpn_amp-ms-crop-3x", 101, 514, 46.9),
        ("Cascade Mask R-CNN", "Focal-T", "cascade-mask-rcnn_focal-tiny_fpn_amp-ms-crop-3x", 87, 770, 51.5),
        ("ATSS", "Focal-T", "atss_focal-tiny_fpn_amp-ms-crop-3x", 37, 239, 49.5),
        ("RepPointsV2", "Focal-T", "reppointsv2_focal-tiny_bifpn_amp-ms-crop-3x", 45, 491, 51.2),
        ("Sparse R-CNN", "Focal-T", "sparse-rcnn_focal-tiny_fpn_amp-ms-crop-3x", 111, 196, 49.0),
        ("ATSS + DyHead", "Focal-L", "atss-dyhead_focal-large_fpn_amp-ms-480-1200-2x", 229, None, 58.7),
        ("HTC++", "Focal-L", "htc_focal-large_fpn_amp-ms-400-1400-6x", None, None, None, 50.9),
    )
)


class Segmenter(NamedTuple):
    """UPerNet on ADE20K, 160,000 iterations; `miou_ms` is tested at several scales."""

    backbone: str
    pretraining: str
    crop: int
    config: str
    params_m: int
    flops_g: int
    miou: float
    miou_ms: float


SEGMENTERS = tuple(
    Segmenter(backbone, data, crop, f"upernet_{name}_8xb2-160k_ade20k-{crop}x{crop}", *numbers)
    for backbone, data, crop, name, *numbers in (
        ("Focal-T", "ImageNet-1K", 512, "focal-tiny", 62, 998, 45.8, 47.0),
        ("Focal-S", "ImageNet-1K", 512, "focal-small", 85, 1130, 48.0, 50.0),
        ("Focal-B", "ImageNet-1K", 512, "focal-base", 126, 1354, 49.0, 50.5),
        ("Focal-L", "ImageNet-22K", 640, "focal-large", 240, 3376, 54.0, 55.4),
    )
)


class Speed(NamedTuple):
    """Images per second of a classifier on one GPU, which the release does not name, by resolution."""

    family: str
    model: str
    top1: float
    flops_g: float
    at_224: int
    at_448: int | None
    at_896: int | None


SPEEDS = (
    Speed("DeiT", "DeiT-Small/16", 79.8, 4.6, 939, 101, 20),
    Speed("PVT", "PVT-Small", 79.8, 3.8, 794, 172, 31),
    Speed("CvT", "CvT-13", 81.6, 4.5, 746, 125, 14),
    Speed("ViL", "ViL-Small", 82.0, 5.1, 397, 87, 17),
    Speed("Swin", "Swin-Tiny", 81.2, 4.5, 760, 189, 48),
    Speed("Focal", "Focal-Tiny", 82.2, 4.9, 319, 105, 27),
    Speed("PVT", "PVT-Medium", 81.2, 6.7, 517, 111, 20),
    Speed("CvT", "CvT-21", 82.5, 7.1, 480, 85, 10),
    Speed("ViL", "ViL-Medium", 83.3, 9.1, 251, 53, 8),
    Speed("Swin", "Swin-Small", 83.1, 8.7, 435, 111, 28),
    Speed("Focal", "Focal-Small", 83.6, 9.4, 192, 63, 17),
    Speed("ViT", "ViT-Base/16", 77.9, 17.6, 291, 57, 8),
    Speed("DeiT", "DeiT-Base/16", 81.8, 17.6, 291, 57, 8),
    Speed("PVT", "PVT-Large", 81.7, 9.8, 352, 77, 14),
    Speed("ViL", "ViL-Base", 83.2, 13.4, 145, 35, 5),
    Speed("Swin", "Swin-Base", 83.4, 15.4, 291, 70, 17),
    Speed("Focal", "Focal-Base", 84.0, 16.4, 138, 44, 11),
    Speed("Focal-fast", "Focal-fast-Tiny, conv", 82.4, 5.0, 483, None, None),
    Speed("Focal-fast", "Focal-fast-Small, conv", 83.6, 9.4, 293, None, None),
    Speed("Focal-fast", "Focal-fast-Base, conv", 84.0, 16.4, 203, None, None),
)
