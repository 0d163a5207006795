"""What every test shares: no network, one thread, and a small playground."""

import os
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

from hf_delta.playground import build_playground  # noqa: E402


torch.set_num_threads(1)

# They start processes and take longest: first, so that the two workers of pytest end together.
FIRST = ("distributed", "test_train.py")


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(tests).parts[0] not in FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give all tests of a file to one worker, for their fixtures, and all of `tests/distributed`, for their launch."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "distributed" if nodeid.startswith("tests/distributed/") else super()._split_scope(nodeid)

    return ByFile(config, log)


@pytest.fixture(scope="session")
def playground(tmp_path_factory):
    """A playground whose model was pre-trained for 20 steps only: the right shapes and files, hardly any skill."""
    return build_playground(tmp_path_factory.mktemp("playground") / "short", pretrain_steps=20, progress=False)
