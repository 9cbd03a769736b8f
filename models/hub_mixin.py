"""Models on the Hugging Face Hub, or in a folder of its layout: config.json, model.safetensors, README.md.

    model = FocalTransformerOnHub(**VARIANTS["focal_tiny_patch4_window7_224"], num_classes=10)
    model.save_pretrained("focal-tiny-digits")     # or push_to_hub("somebody/focal-tiny-digits")
    model = FocalTransformerOnHub.from_pretrained("focal-tiny-digits")

The options given at construction are the config; the page is made from model_card.md. Importing this file
needs huggingface_hub, which comes with timm, and writing the page needs Jinja2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError("models on the Hub need huggingface_hub: pip install huggingface_hub") from error

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
    """FocalTransformer with `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """All parameters or none, whatever `strict` says: the mixin's default would leave some at random."""
        load_checkpoint(model, model_file)
        return model.to(map_location)


__all__ = ["FocalTransformerOnHub"]
