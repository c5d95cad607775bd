from .dataset import Dataset as Dataset
from .dataset import Samples as Samples
from .dataset import load_dataset as load_dataset
