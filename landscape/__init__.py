"""Loss-landscape smoothness of a PyTorch training run: probe it, store it, draw it.

Names are imported when they are first used, so that drawing a trace never waits for torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
