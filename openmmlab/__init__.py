"""Shared by detection/ and segmentation/: the backbone's adapter, operators that mmcv-lite lacks, and command
lines for mmengine's Runner. Needs the packages that `make setup-openmmlab` installs."""
