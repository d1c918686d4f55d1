"""What setup.cfg cannot say: a wheel also holds configs/, as bc2_jax/configs."""

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # which reads configs/ where it is
            return
        for file in sorted(Path("configs").rglob("*.py")):
            target = Path(self.build_lib, "bc2_jax", file)
            os.makedirs(target.parent, exist_ok=True)
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
