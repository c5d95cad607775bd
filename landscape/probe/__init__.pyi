from .landscape_probe import LandscapeProbe as LandscapeProbe
