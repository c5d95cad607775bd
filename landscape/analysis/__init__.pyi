from .compare import Comparison as Comparison
from .compare import compare as compare
from .labels import band_labels as band_labels
from .measures import measured as measured
from .summary import envelope as envelope
from .summary import summarize as summarize
