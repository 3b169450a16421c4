"A view of a training: bounded, faithful to the log, and never a reason to stop."
import numpy as np
import pytest
from engine_run import tiny_config

from rsir_nb.core import InputError, MissingFileError
from rsir_nb.engine.progress import LiveView, follow, loss_curves, progress_html, watch
from rsir_nb.engine.train import pretrain, read_history


def test_every_batch_may_draw_and_the_end_does(tmp_path):
    shown, cfg = [], tiny_config(tmp_path/"run", "trainer.pictures=1")
    view = LiveView(cfg.out, every=0, show=shown.append)
    run = pretrain(cfg, progress=False, callbacks=[view])
    steps = len(read_history(run))
    assert view.drawn == len(shown) == steps + 1 and not view.failed
    assert "What it makes of a patch" in shown[-1] and 'alt=""' not in shown[-1]


def test_a_slow_view_draws_once(tmp_path):
    shown, cfg = [], tiny_config(tmp_path/"run")
    pretrain(cfg, progress=False, callbacks=[LiveView(cfg.out, every=3600, show=shown.append)])
    assert len(shown) == 2, "the first batch and the end"


def test_the_curve_is_that_of_the_log(tmp_path):
    run = pretrain(tiny_config(tmp_path/"run"), progress=False)
    means = read_history(run).groupby("epoch").loss.mean()
    line = next(o for o in loss_curves(run).get_lines() if o.get_label() == "loss")
    assert np.allclose(line.get_ydata(), means) and np.allclose(line.get_xdata(), means.index + 1)
    assert "trained, epoch 3" in progress_html(run)


def test_a_view_that_fails_does_not_stop_the_training(tmp_path, caplog):
    def broken(html): raise RuntimeError("no screen")
    cfg = tiny_config(tmp_path/"run")
    with caplog.at_level("WARNING"):
        run = pretrain(cfg, progress=False, callbacks=[LiveView(cfg.out, every=0, show=broken)])
    assert (run/"finished.json").is_file() and caplog.text.count("no screen") == 1


def test_outside_a_notebook_it_is_quiet(tmp_path, capsys):
    run = watch(tiny_config(tmp_path/"run"))
    assert (run/"finished.json").is_file() and capsys.readouterr().out == ""
    follow(run, every=60)


def test_a_method_without_guesses_and_a_run_that_has_not_begun(tmp_path):
    assert "not begun" in progress_html(tmp_path/"nothing")
    with pytest.raises(MissingFileError, match="not begun"): loss_curves(tmp_path/"nothing")
    run = pretrain(tiny_config(tmp_path/"run", "trainer.pictures=0"), progress=False)
    assert "What it makes" not in progress_html(run)
    with pytest.raises(InputError, match="0 seconds"): LiveView(run, every=-1)


def test_a_run_goes_on_with_its_curve(tmp_path):
    cfg = tiny_config(tmp_path/"run")

    class Stop(LiveView):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1: raise KeyboardInterrupt
    with pytest.raises(BaseException): pretrain(cfg, progress=False, callbacks=[Stop(cfg.out, show=lambda o: None)]) # noqa: B017
    shown = []
    pretrain(cfg, progress=False, callbacks=[LiveView(cfg.out, every=3600, show=shown.append)])
    assert read_history(cfg.out).epoch.nunique() == 3 and "epoch 3" in shown[-1]
