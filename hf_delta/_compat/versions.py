"""Which releases of a package the recorded private names are those of."""

import importlib.metadata

from packaging.specifiers import SpecifierSet


def require_supported(package: str, name: str, supported: SpecifierSet, installed: str | None = None) -> None:
    """Refuse a release whose private names were not recorded.

    Raises:
        `ImportError`: the installed release is outside the tested range; the message says what to install.
    """
    installed = installed or importlib.metadata.version(package)
    # A development version of 1.17 is below 1.17 and not in `<1.17`, which is what it must be.
    if not supported.contains(installed, prereleases=True):
        raise ImportError(
            f"hf_delta uses private methods of {name} that were recorded for {package}{supported}, and {package} "
            f"{installed} is installed. Run: pip install '{package}{supported}'"
        )
