"Fixtures that every test file shares."
import os
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")

import pytest
from rsir_nb.machine import declare_torchvision_ops

declare_torchvision_ops()   # before anything imports torchmetrics, which imports torchvision

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root():
    "The repository's root folder."
    return ROOT


@pytest.fixture(scope="session")
def shared():
    "The folder with golden values and real images beside the repository; tests that need it skip without it."
    folder = Path(os.environ.get("RSIR_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no ../shared folder: golden values and real images are not on this machine")
    return folder
