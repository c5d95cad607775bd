from .analysis.compare import compare as compare
from .analysis.measures import measured as measured
from .analysis.summary import summarize as summarize
from .errors import LandscapeError as LandscapeError
from .norms.functional import ghost_norm as ghost_norm
from .norms.functional import seq_norm as seq_norm
from .norms.layers import GhostNorm as GhostNorm
from .norms.layers import SeqNorm as SeqNorm
from .norms.registry import convert_norms as convert_norms
from .norms.registry import make_norm as make_norm
from .norms.weight_standardization import standardize_weights as standardize_weights
from .plotting.landscape import plot_landscape as plot_landscape
from .probe.landscape_probe import LandscapeProbe as LandscapeProbe
from .ray.losses import ray_losses as ray_losses
from .traces.reader import list_runs as list_runs
from .traces.reader import read_traces as read_traces
from .traces.writer import TraceWriter as TraceWriter
from .training.presets import RECIPES as RECIPES
from .training.recipe import Recipe as Recipe
from .training.train import train as train

__version__: str
