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

TESTS = Path(__file__).parent
# They start processes and take longest: first, so that the two workers of pytest end together.
FIRST = ("distributed", "test_train.py")


# Before the hook of pytest-xdist, which reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Give all tests of a file to one worker, for their fixtures, and all of `tests/distributed`, for their launch."""
    for item in items:
        path = item.path.relative_to(TESTS)
        group = path.parts[0] if path.parts[0] == "distributed" else path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] not in FIRST)


@pytest.fixture(scope="session")
def playground(tmp_path_factory):
    """A playground whose model was pre-trained for 20 steps only: the right shapes and files, hardly any skill."""
    return build_playground(tmp_path_factory.mktemp("playground") / "short", pretrain_steps=20, progress=False)
