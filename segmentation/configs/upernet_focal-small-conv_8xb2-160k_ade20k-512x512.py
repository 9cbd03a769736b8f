"""UPerNet on Focal-S with convolutional patch embeddings, crops of 512 x 512; not in the release's tables."""

_base_ = "upernet_focal-small_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(variant="focal_small_useconv_patch4_window7_224"))
reported = None
