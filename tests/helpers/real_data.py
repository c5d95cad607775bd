import os
from pathlib import Path

REAL_DATA = Path(os.environ.get("LANDSCAPE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))
