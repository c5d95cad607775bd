"""What the tests of nonsense share: how many cases there are, text that nobody means, and what must never happen."""

import contextlib
import os
import signal
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, example, settings
from hypothesis import strategies as st

CASES = 10_000 if os.environ.get("LANDSCAPE_LONG") == "1" else 400
"""Cases of all properties together; each takes a share of them."""
TRIED = Counter()
"""How many cases of each property were tried; printed when the tests have ended."""

TEXTS = [
    *("", " ", "-", "--", "nan", "-inf", "0", "-1", "1e400", "0x10", "1_000", "None", "[]", "%", "$$", "$x_1$", "{}"),
    *(r"\frac{", "..", "../../escaped", "ünï\u202ecode", "漢字", "\x1b[2J\x07", "new\nline", "\udcff", "'; drop"),
    *("x" * 300, "x/" * 3000),
]
"""Text that nobody means, without a zero byte, which no command line can hold."""
NUMBERS = [0, -1, 0.5, True, float("nan"), float("inf"), 1e308, 2**31, 2**63, 10**400, "1", "", None, [], {}, b"1", 1j]
"""What is given for a number, and seldom is one."""

texts = st.sampled_from(TEXTS) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
numbers = st.sampled_from(NUMBERS) | st.integers() | st.floats()
anything = numbers | texts | st.lists(numbers, max_size=3) | st.dictionaries(texts, numbers, max_size=2)


def also(name, *values):
    """These cases of an argument before all others: each once was a traceback, a hang or a wrong number."""

    def with_examples(test):
        for value in values:
            test = example(**{name: value})(test)
        return test

    return with_examples


def cases(share):
    """Settings of a property that takes this share of all cases: the same ones on each run, and none kept on disk."""
    return settings(
        max_examples=round(share * CASES),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class NotDone(BaseException):
    """No error that anything catches."""


@contextlib.contextmanager
def soon(name, seconds=30):
    """A case of the property of this name; one that takes longer is none that ends."""

    def late(_signal, _frame):
        raise NotDone(f"not done after {seconds} seconds")

    TRIED[name] += 1
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tree(folder):
    """Every path under a folder, with what is in its file."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}
