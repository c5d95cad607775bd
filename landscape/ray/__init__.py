"""The loss of one update as a function of the parameters, evaluated along a ray."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
