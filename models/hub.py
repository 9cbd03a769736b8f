"""Models on the Hugging Face Hub, or in a folder of its layout: config.json, model.safetensors, README.md.

    model = FocalTransformerOnHub(**VARIANTS["focal_tiny_patch4_window7_224"], num_classes=10)
    model.save_pretrained("focal-tiny-digits")     # or push_to_hub("somebody/focal-tiny-digits")
    model = FocalTransformerOnHub.from_pretrained("focal-tiny-digits")     # ready to predict: no dropout

The options given at construction are the config; the page is made from model_card.md. A repository on the
Hub may hold pytorch_model.bin in place of model.safetensors. Writing the page needs Jinja2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import to_2tuple

from .checkpoint import load_checkpoint
from .focal_transformer import FocalTransformer

CARD = Path(__file__).with_name("model_card.md")


class FocalTransformerOnHub(
    FocalTransformer,
    PyTorchModelHubMixin,
    library_name="focal-transformer",
    pipeline_tag="image-classification",
    license="mit",
    tags=["image-classification", "focal-transformer"],
    model_card_template=CARD.read_text(encoding="utf-8"),
):
    """FocalTransformer with `from_pretrained`, `save_pretrained` and `push_to_hub`; options as there."""

    def __init__(self, num_classes: int = 1000, global_pool: str = "avg", **options: Any) -> None:
        input_size = options.pop("input_size", None)  # of `_record`
        super().__init__(num_classes=num_classes, global_pool=global_pool, **options)
        where = {"device": None, "dtype": None}  # of this machine, not of the model
        self._record(num_classes=num_classes, global_pool=global_pool, **options | where)
        if input_size is not None:
            self.set_input_size(input_size)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """See `FocalTransformer`; what is saved from now on is built with this classifier."""
        super().reset_classifier(num_classes, global_pool)
        self._record(num_classes=num_classes, global_pool=self.global_pool.pool_type)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """See `FocalTransformer`; what is saved from now on is built with this size."""
        super().set_input_size(img_size)
        self._record(input_size=to_2tuple(img_size))

    def _record(self, **changed: Any) -> None:
        """Change options in the config that is saved, where JSON has no numbers of numpy and torch."""
        given = self._hub_mixin_config if isinstance(self._hub_mixin_config, dict) else {}
        for key, value in changed.items():
            if hasattr(value, "tolist") or (isinstance(value, Sequence) and not isinstance(value, str)):
                changed[key] = np.asarray(value).tolist()
        self._hub_mixin_config = given | changed

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """All parameters or none, whatever `strict` says: the mixin's default would leave some at random."""
        load_checkpoint(model, model_file)
        return model.to(map_location).eval()

    _load_as_pickle = _load_as_safetensor  # the file's ending decides how it is read
