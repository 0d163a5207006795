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
FIRST = ("distributed", "test_train.py", "test_interrupted.py")


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


@pytest.fixture(autouse=True)
def environment():
    """Accelerate and transformers write what a configuration says into variables, where the next test would find it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def playground(tmp_path_factory):
    """A playground whose model was pre-trained for 20 steps only: the right shapes and files, hardly any skill."""
    return build_playground(tmp_path_factory.mktemp("playground") / "short", pretrain_steps=20, progress=False)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub that this process talks to, with a token that may write."""
    from huggingface_hub import constants

    from tests.hub_server import TOKEN, running_hub

    with running_hub() as hub:
        url = hub.url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        reached = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_OFFLINE": False}
        for name, value in {**reached, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        # Clients that remember their address.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # Retries of huggingface_hub wait for seconds.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub
