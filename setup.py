"""The wheel holds the example configurations beside the code; the rest is in pyproject.toml.

They stay at the top of the repository, where people look for them, so no package finder sees them.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PATTERNS = ("examples/*.yaml", "examples/base/*.yaml")


class BuildWithExamples(build_py):
    """Copies the examples into the built package, and lists them for a source distribution."""

    def run(self) -> None:
        """Build as usual; an editable installation finds the examples in the checkout."""
        super().run()
        for source in () if self.editable_mode else self._examples():
            target = Path(self.build_lib, "megatron_default_moe", source)
            self.mkpath(str(target.parent))
            self.copy_file(source, str(target))

    def get_source_files(self) -> list[str]:
        """Return what the wheel is built from."""
        return [*super().get_source_files(), *self._examples()]

    def _examples(self) -> list[str]:
        return [str(path) for pattern in PATTERNS for path in sorted(Path().glob(pattern))]


setup(cmdclass={"build_py": BuildWithExamples})
