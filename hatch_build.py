"""Refuses other Pythons before pip looks for dependencies, whose own complaints would hide the reason."""

import sys

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


LOWEST = (3, 11)


class PythonVersionHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if sys.version_info < LOWEST:
            raise RuntimeError(
                f"hf_delta needs Python {'.'.join(map(str, LOWEST))} or newer, and this is Python {sys.version.split()[0]}."
            )
