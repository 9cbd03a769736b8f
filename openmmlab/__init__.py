"""What detection/ and segmentation/ share: the backbone's adapter, operators that mmcv-lite lacks, and the
front over mmengine's Runner. Needs the packages that `make setup-openmmlab` installs."""
