"""What every test shares: no network, one thread, and a small playground."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

from hf_delta.playground import build_playground  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def playground(tmp_path_factory):
    """A playground whose model was pre-trained for 20 steps only: the right shapes and files, hardly any skill."""
    return build_playground(tmp_path_factory.mktemp("playground") / "short", pretrain_steps=20, progress=False)
