"""The toy accelerator of ``desk.cpp`` as a device of torch: ``load()``, then ``torch.ones(2, device="desk:1")``."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import time
import types
from pathlib import Path

import pooch
import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("desk.cpp")
NAME = "desk"
COUNT = 2


class MissingCompilerError(RuntimeError):
    """A machine on which the device cannot be built."""


def build(folder=None):
    """Return the library; it is compiled once for each source and version of torch, by one of several processes."""
    version = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(folder or pooch.os_cache("landscape-probe-tests"))
    library = folder / f"desk-{version}.so"
    if library.exists():
        return library
    if (compiler := shutil.which("g++")) is None:
        raise MissingCompilerError("needs g++")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            root, unfinished = Path(torch.__file__).parent, library.with_suffix(".part")
            includes = [f"-I{root / 'include' / part}" for part in ("", "torch/csrc/api/include")]
            # Optimization would take minutes, and all time is spent in the kernels of torch.
            command = [
                compiler,
                "-O0",
                "-shared",
                "-fPIC",
                "-std=c++20",
                "-w",
                *includes,
                str(SOURCE),
                f"-L{root / 'lib'}",
            ]
            done = subprocess.run(
                [*command, "-ltorch_cpu", "-lc10", "-o", str(unfinished)], capture_output=True, text=True
            )
            if done.returncode:
                raise MissingCompilerError(f"g++ cannot compile desk.cpp: {done.stderr[-2000:]}")
            unfinished.rename(library)
    return library


@functools.cache
def load():
    """Register the device for this process, which cannot be undone, and return its module, ``torch.desk``.

    It must be called before the first backward pass of the process.
    It is not available until `available` says so: then only what names it has to do with it.
    """
    path = build()
    torch.ops.load_library(path)
    module = _module(ctypes.CDLL(str(path)))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=False)
    # Autograd starts a thread for each device that there is at the first backward pass.
    module.set_available(True)
    torch.ones(1, device=NAME, requires_grad=True).sum().backward()
    module.set_available(False)
    return module


def _module(library):
    """Return the module that torch expects of a device."""
    library.desk_seed.argtypes = [ctypes.c_int, ctypes.c_uint64]
    for function in (library.desk_syncs, library.desk_launches, library.desk_rng_bytes):
        function.restype = ctypes.c_int64
    module, is_available = types.ModuleType(f"torch.{NAME}"), [False]

    def set_available(available):
        is_available[0] = available
        library.desk_set_available(available)

    def get_rng_state(device=NAME):
        state = ctypes.create_string_buffer(library.desk_rng_bytes())
        library.desk_rng_state(index_of(device), state)
        return torch.frombuffer(bytearray(state.raw), dtype=torch.uint8)

    def set_rng_state(state, device=NAME):
        library.desk_set_rng_state(index_of(device), state.numpy().tobytes())

    def manual_seed_all(seed):
        for index in range(COUNT):
            library.desk_seed(index, int(seed) % 2**31)

    def index_of(device):
        if isinstance(device, int):
            return device
        device = torch.device(NAME if device is None else device)
        return library.desk_current() if device.index is None else device.index

    class Stream:
        """The only stream of one of the devices."""

        def __init__(self, device=None):
            self.device = torch.device(NAME, index_of(device))

    class Event:
        """An event on the stream of a device, which is over at once."""

        def __init__(self, enable_timing=False):
            self.device, self.time = None, None

        def record(self, stream=None):
            self.device, self.time = (stream or Stream()).device, time.perf_counter()

        def query(self):
            return True

        def elapsed_time(self, other):
            assert self.device == other.device, "events of two devices"
            return (other.time - self.time) * 1e3

    vars(module).update(
        set_available=set_available,
        is_available=lambda: is_available[0],
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        device_count=lambda: COUNT if is_available[0] else 0,
        current_device=library.desk_current,
        set_device=lambda device: library.desk_set_current(index_of(device)),
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        manual_seed=lambda seed: library.desk_seed(library.desk_current(), int(seed) % 2**31),
        manual_seed_all=manual_seed_all,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        synchronize=lambda device=None: None,
        current_stream=Stream,
        Stream=Stream,
        Event=Event,
        syncs=library.desk_syncs,
        launches=library.desk_launches,
        set_sync_debug_mode=lambda mode: library.desk_forbid_syncs({"default": 0, "error": 1}[mode]),
    )
    return module
