"""Let `import torchvision` succeed where its compiled operators cannot be loaded.

PyPI's torchvision is a CUDA build. Beside a CPU-only torch its extension does not load, and the import then fails with
"operator torchvision::nms does not exist": torchvision registers fake kernels for two operators that nothing has
declared. timm imports torchvision, and so does transformers where it finds it. Declaring the two schemas is enough for
everything but detection models, which we do not use.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _operators_load(package: Path) -> bool:
    """Whether torchvision's own extension loads beside this torch, and so declares its operators itself."""
    for library in sorted((*package.glob("_C*.so"), *package.glob("_C*.pyd"))):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError):
            continue
        return True
    return False


@cache
def declare_missing_operators() -> tuple[torch.library.Library, ...]:
    """Declare torchvision's operators if its extension cannot. Call it before anything that imports torchvision.

    Calling it again does nothing. The returned library must stay alive, which the cache sees to.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _operators_load(Path(found.origin).parent):
        return ()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    return (library,)
