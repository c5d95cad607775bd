"""The progress bar of a training."""

from dataclasses import replace

import pytest

from landscape import RECIPES, train

SHORT = replace(RECIPES["digits"], epochs=2, train_samples=256)


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress_of_train(tmp_path, capsys, progress, shown):
    steps = []
    train(SHORT, tmp_path, device="cpu", progress=progress, on_update=lambda probe: steps.append(probe.step))
    assert steps == [1, 2, 3, 4]
    printed = capsys.readouterr().err
    assert bool(printed) == shown
    assert ("4/4" in printed) == shown
    assert ("loss" in printed) == shown


def test_progress_of_a_resumed_run(tmp_path, capsys):
    def stop(probe):
        if probe.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SHORT, tmp_path, device="cpu", on_update=stop)
    train(SHORT, tmp_path, device="cpu", resume=True, progress=True)
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert "4/4" in last
