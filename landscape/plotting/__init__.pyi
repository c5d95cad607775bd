from .figure import LandscapeFigure as LandscapeFigure
from .figure import save_figure as save_figure
from .forest import plot_forest as plot_forest
from .landscape import plot_landscape as plot_landscape
