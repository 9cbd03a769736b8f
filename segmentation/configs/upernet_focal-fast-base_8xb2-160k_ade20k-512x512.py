"""UPerNet on Focal-fast-B, crops of 512 x 512; not in the release's tables."""

_base_ = "upernet_focal-base_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(variant="focalv2_base_useconv_patch4_window7_224"))
reported = None
