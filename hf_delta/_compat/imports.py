"""Code that runs when another package is imported."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable


def when_imported(package: str, then: Callable[[], object]) -> None:
    """Call `then` once `package` has been imported: now if it has been, else as soon as somebody imports it."""
    if package in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(package, then))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds one package as everybody else would, and lets its loader call back.

    It stays until the package has been imported: others only ask for the spec, as `is_peft_available` of transformers
    does, or fail and try again.
    """

    def __init__(self, package: str, then: Callable[[], object]):
        self.package, self.then = package, then

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != self.package:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CallingLoader(spec.loader, self._imported)
                return spec
        return None

    def _imported(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.then()


class _CallingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, then: Callable[[], object]):
        self.loader, self.then = loader, then

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        # The module keeps the loader that it would have had.
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.then()

    def __getattr__(self, name):
        return getattr(self.loader, name)
