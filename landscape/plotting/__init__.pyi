from .figure import LandscapeFigure as LandscapeFigure
from .figure import save as save
from .landscape import plot_landscape as plot_landscape
