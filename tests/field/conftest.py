import pytest
from one_thread import _one_thread  # noqa: F401

pytest.register_assert_rewrite("lab")
