from .reader import list_runs as list_runs
from .reader import read_traces as read_traces
from .writer import TraceWriter as TraceWriter
