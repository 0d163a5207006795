"""The tuner of PMSS: selection with a progress bar."""

import os
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from tqdm.auto import tqdm

from hf_delta.adapters.base import DeltaModel
from hf_delta.adapters.pmss.config import PmssConfig
from hf_delta.adapters.pmss.layer import PmssLinear


# Seconds after which a selection shows a bar.
PATIENCE = 2


class PmssModel(DeltaModel):
    """The tuner of [`PmssConfig`]."""

    prefix = "hfd_pmss_"
    tuner_layer_cls = PmssLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into every target, with a bar if it takes long."""
        hidden = int(os.environ.get("LOCAL_RANK", "0")) != 0
        with tqdm(desc=f"PMSS {adapter_name}", unit="layer", delay=PATIENCE, leave=False, disable=hidden) as bar:
            self.bar = bar
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            finally:
                del self.bar

    def adapt(self, config: PmssConfig, adapter_name: str, module: nn.Module, key: str) -> nn.Module:
        if self.bar.total is None:
            # Counted here, because PEFT has written the names of the targets into the configuration by now.
            self.bar.total = sum(
                bool(check_target_module_exists(config, name)) for name, _ in self.model.named_modules() if name
            )
        adapted = super().adapt(config, adapter_name, module, key)
        adapted.path = key
        self.bar.update()
        return adapted
