"""Entry points of torch.hub, one for each model:

    torch.hub.load("path/to/this/folder", "focal_tiny", source="local")
    torch.hub.load("path/to/this/folder", "focal_fast_tiny", source="local", pretrained="focal_fast_tiny.pth")

The names are focal_SIZE, focal_SIZE_conv and focal_fast_SIZE, sizes tiny, small and base, and focal_large. No
weights are published: `pretrained` is a file or an address.
"""

from collections.abc import Callable as _Callable

from models import VARIANTS as _VARIANTS
from models import TimmFocalTransformer as _TimmFocalTransformer
from models import load_checkpoint as _load_checkpoint

dependencies = ["numpy", "timm", "torch"]

_PREFIXES = {"focal": "focal", "focalv2": "focal_fast"}
_SUFFIXES = {"patch4_window7_224": "", "useconv_patch4_window7_224": "_conv"}


def _short(variant: str) -> str:
    """focal_tiny_patch4_window7_224 -> focal_tiny; Focal-fast exists with convolutions alone."""
    kind, size, rest = variant.split("_", 2)
    return f"{_PREFIXES[kind]}_{size}{_SUFFIXES[rest] if kind == 'focal' else ''}"


def _entry(variant: str) -> _Callable[..., _TimmFocalTransformer]:
    def create(
        pretrained: str | bool = False, reset_head: bool = False, resize: bool = False, **options: object
    ) -> _TimmFocalTransformer:
        if pretrained is True:
            raise ValueError(
                "pretrained must be a file or an address of weights, got True: none are published for "
                f"{variant}"
            )
        model = _TimmFocalTransformer(**{**_VARIANTS[variant], **options})
        if pretrained:
            _load_checkpoint(model, str(pretrained), reset_head=reset_head, resize=resize)
        return model

    create.__name__ = create.__qualname__ = _short(variant)
    create.__doc__ = f"""{variant}.

    Args:
        pretrained: file (.pth of the original or of this codebase, or .safetensors) or address of weights.
        reset_head: leave the classifier of the weights out, for another `num_classes`.
        resize: fit the weights to another `img_size` or `window_size`.
        options: those of models.TimmFocalTransformer, such as num_classes, img_size and drop_path_rate.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights that do not fit, or options that contradict each other.
    """
    return create


globals().update({_short(_variant): _entry(_variant) for _variant in _VARIANTS})
