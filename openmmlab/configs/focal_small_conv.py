"""Focal-S with convolutional patch embeddings:
the values of configs/focal_small_useconv_patch4_window7_224.yaml.
"""

focal_small_conv = dict(
    type="FocalBackbone",
    kind="focal",
    img_size=224,
    embed_dim=96,
    depths=[2, 2, 18, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    focal_pool="fc",
    focal_stages=[0, 1, 2, 3],
    focal_levels=[2, 2, 2, 2],
    focal_windows=[7, 5, 3, 1],
    expand_sizes=[3, 3, 3, 3],
    use_conv_embed=True,
)
