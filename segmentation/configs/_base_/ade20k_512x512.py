"""ADE20K in crops of 512 x 512, two images per GPU. Images are tested with a shorter side of 512, or at
0.5 to 1.75 of that size, each as it is and flipped. (MMSegmentation's own `tta_pipeline` multiplies the sizes
that the files have, which vary.)
"""

_base_ = "mmseg::_base_/datasets/ade20k.py"
scales = [
    dict(type="Resize", scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
    for ratio in _base_.img_ratios
]
flips = [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)]
augmentations = [scales, flips, [dict(type="LoadAnnotations")], [dict(type="PackSegInputs")]]
tta_pipeline = [dict(type="LoadImageFromFile"), dict(type="TestTimeAug", transforms=augmentations)]
train_dataloader = dict(batch_size=2)
